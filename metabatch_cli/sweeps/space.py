"""A search space in YAML: for each key a range, or the values to choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from metabatch_cli.config.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FORMS = "{low, high}, with log: true or step, or {choices: [...]}"


def read_space(space: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of the keys of a space.

    Args:
        space: by dotted key, `{low, high}`, whole numbers if both are, with `log` or `step`; or
            `{choices}`.
        config: the configuration whose keys they are, as nested mappings.

    Raises:
        ConfigError: a key that there is not, or no range.
    """
    if not space:
        raise ConfigError("tune.space", "is empty: there is nothing to search", allowed=FORMS)
    return {key: _distribution(key, entry, config) for key, entry in space.items()}


def flat_space(space: Mapping[str, Any], prefix: str = "") -> dict[str, Mapping[str, Any]]:
    """A space by dotted keys, however deeply it was nested: `model: {width: {low: 8, …}}`."""
    found: dict[str, Any] = {}
    for name, entry in space.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        nested = isinstance(entry, Mapping) and not {"low", "high", "choices"} & set(entry)
        if nested and all(isinstance(part, Mapping) for part in entry.values()):
            found |= flat_space(entry, key)
        else:
            found[key] = entry
    return found


def _distribution(key: str, entry: Any, config: Mapping[str, Any]) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    _check_key(key, config)
    place = f"tune.space.{key}"
    if not isinstance(entry, Mapping):
        raise ConfigError(place, "is no range", value=entry, allowed=FORMS)
    if set(entry) == {"choices"} and isinstance(entry["choices"], list) and entry["choices"]:
        return CategoricalDistribution(entry["choices"])
    unknown = set(entry) - {"low", "high", "log", "step"}
    if unknown or not {"low", "high"} <= set(entry):
        raise ConfigError(place, "is no range", value=dict(entry), allowed=FORMS)
    low, high, step = entry["low"], entry["high"], entry.get("step")
    whole = all(isinstance(part, int) for part in (low, high, step or 1))
    try:
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("its ends must be finite")
        log = bool(entry.get("log", False))
        if whole:
            return IntDistribution(low, high, log=log, step=step or 1)
        return FloatDistribution(float(low), float(high), log=log, step=step)
    except (TypeError, ValueError) as error:
        raise ConfigError(place, f"is no range: {error}", value=dict(entry)) from error


def _check_key(key: str, config: Mapping[str, Any]) -> None:
    node: Any = config
    above = ""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            names = [str(name) for name in node] if isinstance(node, Mapping) else []
            where = f" in {above}" if above else ""
            raise ConfigError(
                f"tune.space.{key}",
                f"there is no key {part!r}{where}",
                allowed=names or None,
                wrong_name=part,
            )
        node, above = node[part], f"{above}.{part}" if above else part
