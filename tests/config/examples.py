"""Configurations to spoil, and components with signatures of their own."""

from __future__ import annotations

import copy
import functools
from typing import Annotated, Any

from annotated_types import Ge, Le

from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.compose import compose
from metabatch_cli.config.schema import Config

BASE = ("taskset=sine", "model=cnp", "learner=neural_process")


def plain(*overrides: str) -> dict[str, Any]:
    """A configuration as check takes it."""
    return copy.deepcopy(_resolved(overrides))


@functools.cache
def _resolved(overrides: tuple[str, ...]) -> dict[str, Any]:
    return resolve(compose(*BASE, "trainer.threads=1", "loader.device=cpu", *overrides))


def checked(*overrides: str) -> Config:
    """Composed and checked."""
    return check(plain(*overrides))


def with_value(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The configuration with one dotted key set, whether it exists or not."""
    node = config
    *above, last = key.split(".")
    for part in above:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[last] = value
    return config


class Inner:
    """A component in a component."""

    def __init__(self, size: Annotated[int, Ge(1), Le(9)], name: str = "inner") -> None:
        self.size = size
        self.name = name


class Outer:
    """A component that holds others."""

    def __init__(
        self,
        inner: Inner,
        others: list[Inner] | None = None,
        rate: float = 1.0,
        flag: bool = False,
    ) -> None:
        self.inner = inner
        self.others = others
        self.rate = rate
        self.flag = flag


class TakesAnything:
    """A component that says nothing about its arguments."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


def function(size: int) -> Inner:
    """A factory is as good as a class."""
    return Inner(size)


NUMBER = 3
