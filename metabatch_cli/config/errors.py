"""One readable message for whatever a person got wrong: place, value, what is allowed, nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that its maker can mend; shown without a traceback, exit code 1."""


class ConfigError(UserError):
    """A key of the configuration that cannot be as it is.

    Args:
        key: the dotted key.
        problem: what is wrong with it.
        value: the value that it has; left out where the key itself is wrong.
        allowed: what it may be: a sentence, or the names to choose from.
        wrong_name: the name to look for a near one of among `allowed`.
    """

    def __init__(
        self,
        key: str,
        problem: str,
        *,
        value: Any = ...,
        allowed: str | Iterable[str] | None = None,
        wrong_name: str | None = None,
    ) -> None:
        shown = key if value is ... else f"{key}={_shown(value)}"
        lines = [f"{shown}: {problem}"]
        if isinstance(allowed, str):
            lines.append(f"  allowed: {allowed}")
        elif allowed is not None:
            names = sorted(allowed)
            lines.append(f"  allowed: {', '.join(names) or 'nothing'}")
            near = nearest(wrong_name, names) if wrong_name is not None else None
            if near is not None:
                lines.append(f"  did you mean {near!r}?")
        super().__init__("\n".join(lines))
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        """By its words: what made them is no longer there."""
        return _said, (type(self), str(self), vars(self))


def _said(kind: type[ConfigError], message: str, state: dict[str, Any]) -> ConfigError:
    error = kind.__new__(kind, message)
    vars(error).update(state)
    return error


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that looks most like `name`, if any looks like it at all."""
    candidates = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.6)
    return candidates[found[0]] if found else None


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def readable(error: BaseException) -> UserError | None:
    """What Hydra or OmegaConf raised about somebody's configuration, as one message.

    Returns None for an error that is not about the configuration.
    """
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    if isinstance(error, UserError):
        return error
    if isinstance(error, yaml.YAMLError):
        return UserError(_yaml_message(error))
    if isinstance(error, InterpolationResolutionError):
        place = error.full_key or re.search(r"full_key: (\S+)", str(error))
        key = place if isinstance(place, str) else place.group(1) if place else "configuration"
        return ConfigError(key, f"cannot be resolved: {_first(str(error))}")
    if isinstance(error, HydraException):
        return _hydra_message(error)
    if isinstance(error, ValueError) and _raised_in(error, "hydra"):
        return UserError(f"the command line: {_first(str(error)) or type(error).__name__}")
    if isinstance(error, OmegaConfBaseException):
        return ConfigError(error.full_key or "configuration", _first(str(error)))
    return None


def _raised_in(error: BaseException, package: str) -> bool:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and f"/{package}/" in frames[-1].filename.replace("\\", "/")


def _hydra_message(error: BaseException) -> UserError:
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        return _override_message(error.override)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        if found and error.options:
            group, _, name = found.group(1).rpartition("/")
            if group == "hydra/launcher" and name in ("joblib", "submitit_slurm"):
                return UserError(
                    f"{group}={name}: its plugin is not installed\n"
                    "  it comes with: pip install '.[sweep]'"
                )
            return ConfigError(
                group or "configuration",
                f"there is no {group or 'configuration'} of that name",
                value=name,
                allowed=error.options,
                wrong_name=name,
            )
    cause = error.__cause__
    if isinstance(cause, Exception) and (known := readable(cause)) and "override" not in text:
        return known
    return UserError("\n".join(line for line in text.splitlines()[:4] if line.strip()))


def _override_message(override: str) -> ConfigError:
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w./@:$-]+", key):
        return ConfigError(override, "is no override: key=value, +key=value or ~key")
    allowed = f"every bracket and quote is closed; special characters in quotes, '{key}=\"…\"'"
    if value.lstrip().startswith("{"):
        allowed += ", and in a name behind a backslash, {a\\=1: …}"
    return ConfigError(key, "the value cannot be read", value=value, allowed=allowed)


def _yaml_message(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}: " if mark is not None else ""
    return f"{where}not valid YAML: {getattr(error, 'problem', None) or error}"


def _first(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if text else ""


def explain(error: BaseException, words: Sequence[str] = (), config_name: str = "train") -> str:
    """What to tell the person whose command, of these words, ended in this error.

    Args:
        config_name: the primary configuration that the words changed.
    """
    known = readable(error)
    if known is None:
        return (
            f"failed: {type(error).__name__}: {error}{_last_frame(error)}\n"
            "  the same command with --debug shows the traceback"
        )
    if isinstance(known, ConfigError) or "Could not override" not in str(known):
        return str(known)
    return _unknown_override(str(known), words, config_name) or str(known)


def _unknown_override(text: str, words: Sequence[str], config_name: str) -> str | None:
    """Hydra says which key it does not know; what there is says a composition without it."""
    from omegaconf import OmegaConf

    from metabatch_cli.config.compose import compose, config_dir

    found = re.search(r"Could not override '([^']+)'", text)
    if found is None:
        return None
    key = found.group(1)
    typed = next((w for w in words if w.startswith(f"{key}=")), None)
    if typed and (config_dir() / key).is_dir():
        return f"{typed}: nothing of this group is chosen yet\n  did you mean '+{typed}'?"
    rest = [w for w in words if "=" in w and not w.startswith("-") and key not in w.split("=")[0]]
    rest = [re.sub(r"=([^,'\"[{(]+),.*", r"=\1", w) for w in rest]  # of a sweep the first values
    try:
        run = next((w.partition("=")[2] for w in words if w.startswith("run=")), None)
        if run is None:
            composed: Any = compose(*rest, config_name=config_name)
        else:
            composed = OmegaConf.load(Path(run) / "config.yaml")
        above = key.rpartition(".")[0]
        parent = OmegaConf.select(composed, above) if above else composed
        names = [str(name) for name in parent] if parent is not None else []
        if above and parent is None and key in _optional_keys():
            return f"{above}: is null, so it has no keys yet\n  did you mean '+{typed or key}'?"
        if not above and (deeper := _deeper(OmegaConf.to_container(composed), key)):
            return f"{key}: there is no such key\n  did you mean {deeper!r}?"
    except Exception:
        names = []
    wrong = key.rpartition(".")[2]
    if re.match(r"evaluation\.(val|test)\.", key):  # whatever the task set has
        word = next((w for w in words if w.startswith(f"{key}=")), f"{key}=…")
        return f"{key}: is not set yet\n  did you mean '+{word}'?"
    return str(ConfigError(key, "there is no such key", allowed=names or None, wrong_name=wrong))


def _optional_keys() -> set[str]:
    """The keys of what is null unless somebody asks for it."""
    from metabatch_cli.config.schema import BalanceConfig

    return {f"loader.balance.{name}" for name in vars(BalanceConfig)["__annotations__"]}


def _deeper(tree: Any, key: str) -> str | None:
    """Where a key of that name is in a section."""
    sections = (name for name, part in tree.items() if isinstance(part, dict) and key in part)
    return next((f"{name}.{key}" for name in sections), None)


def _last_frame(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
    return f"\n  at {frames[-1].filename}:{frames[-1].lineno}{notes}" if frames else notes
