"""What a refused argument is told: what it must be, or what there is to choose from."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any


def at_least(name: str, value: Any, least: int) -> Any:
    """The value; ValueError where it is smaller."""
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return value


def one_of(name: str, value: Any, choices: Collection[Any]) -> Any:
    """The value; ValueError where it is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: {choose_from(value, map(str, choices))}")
    return value


def choose_from(wrong: object, names: Iterable[str]) -> str:
    """The end of a message about a wrong name: what there is, and the nearest of it."""
    names = list(names)
    near = difflib.get_close_matches(str(wrong), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"choose from {', '.join(names)}{hint}"
