"""What keeps a task set from being sent to a worker, found before a worker is started."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.taskset import TaskSet


def attributes(owner: Any, name: str, above: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The attributes of a task set by name, those of task sets and datasets inside it too.

    Args:
        above: what it lies in, which is not entered again.
    """
    above = (*above, owner)
    for attribute, value in vars(owner).items():
        yield f"{name}.{attribute}", value
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for key, part in parts:
            inside = isinstance(part, TaskSet) or (
                attribute == "dataset" and hasattr(part, "__dict__")
            )
            if inside and not any(part is outer for outer in above):
                where = f"{name}.{attribute}" + (f".{key}" if key else "")
                yield from attributes(part, where, above)


def on_a_gpu(taskset: TaskSet) -> str | None:
    """The name of a tensor that lies on a GPU: a worker can do nothing with it."""
    for name, value in attributes(taskset, type(taskset).__name__):
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return name
    return None


class _NoProcess:
    """What pickling for a new process asks of it, without one."""

    DupFd = staticmethod(int)

    @staticmethod
    def duplicate_for_child(descriptor: int) -> int:
        return descriptor


def unsendable(maker: BatchMaker, first: Any) -> str | None:
    """The name of what cannot be pickled, as far down as the task set's own attributes."""
    taskset = maker.taskset
    named = {
        "worker_init_fn": first,
        "collate_fn": maker.collate,
        **{f"{type(taskset).__name__}.{name}": value for name, value in vars(taskset).items()},
        type(taskset).__name__: taskset,
    }
    pretended: Any = _NoProcess
    set_spawning_popen(pretended)
    try:
        for name, value in named.items():
            try:
                ForkingPickler.dumps(value)
            except Exception:
                return name
    finally:
        set_spawning_popen(None)
    return None
