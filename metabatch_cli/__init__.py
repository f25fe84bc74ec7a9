"""metabatch: configuration-driven meta-learning on PyTorch. Names are imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metabatch_cli import mkl

if TYPE_CHECKING:
    from metabatch_cli.batching import PackedTask, PaddedTask, Task, TaskLoader, TaskSet
    from metabatch_cli.config.compose import compose
    from metabatch_cli.engine.load import load_run
    from metabatch_cli.engine.run import train

__version__ = "0.1.0"

mkl.enable_avx512()  # before anything imports torch

_HOMES = {
    "PackedTask": "metabatch_cli.batching",
    "PaddedTask": "metabatch_cli.batching",
    "Task": "metabatch_cli.batching",
    "TaskLoader": "metabatch_cli.batching",
    "TaskSet": "metabatch_cli.batching",
    "compose": "metabatch_cli.config.compose",
    "load_run": "metabatch_cli.engine.load",
    "train": "metabatch_cli.engine.run",
}

__all__ = [
    "PackedTask",
    "PaddedTask",
    "Task",
    "TaskLoader",
    "TaskSet",
    "compose",
    "load_run",
    "train",
]


def __getattr__(name: str) -> Any:
    # torch takes over a second to import, and `metabatch --help` must not wait for it
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
