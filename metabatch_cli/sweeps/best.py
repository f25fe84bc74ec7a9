"""What a study found, as an experiment that anybody can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from metabatch_cli.config.compose import config_dir
from metabatch_cli.sweeps.jobs import identity


def as_experiment(
    typed: Sequence[str], values: Mapping[str, Any], metric: str, score: float | None
) -> str:
    """The YAML of an experiment: what was typed, and the best values.

    Args:
        typed: the overrides of the command, choices and keys.
        values: by dotted key.
        metric, score: what they reached in validation.
    """
    defaults: list[Any] = []
    tree: dict[str, Any] = {}
    for word in (word for word in typed if identity([word])):
        key, _, value = word.lstrip("+").partition("=")
        if key.startswith(("tune.", "~")) or key == "tune":
            continue
        if not (config_dir() / key.split("@")[0]).is_dir():
            _put(tree, key, yaml.safe_load(value))
        elif word.startswith("+"):
            defaults.append(f"/{key}/{value}")
        else:
            defaults.append({f"override /{key}": value})
    for key, value in values.items():
        _put(tree, key, value)
    defaults.sort(key=lambda entry: isinstance(entry, dict))  # overrides come last
    head = [
        "# @package _global_",
        f"# Found by a search: val/{metric} {score:.4f}.",
        "#",
        "#   metabatch train --config-dir DIR +experiment=best     DIR: the study's directory",
    ]
    body = yaml.safe_dump({"defaults": defaults} if defaults else {}, sort_keys=False)
    return "\n".join([*head, body.replace("{}\n", "") + yaml.safe_dump(tree, sort_keys=False)])


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, name = key.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[name] = value
