"""What task sets of drawn functions share: an end or none, ranges, points that are divided."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import TaskSet


class DrawnTaskSet(TaskSet):
    """A task set of functions that are drawn: without end, or of `n_tasks` that have an index."""

    n_tasks: int | None

    def __len__(self) -> int:
        if self.n_tasks is None:
            raise TypeError("an infinite task set has no length: every index is a fresh function")
        return self.n_tasks


def as_count(n_tasks: int | None) -> int | None:
    """A number of tasks, None for no end; ValueError where there is less than one."""
    if n_tasks is not None and n_tasks < 1:
        raise ValueError(f"n_tasks={n_tasks} must be at least 1, or null for no end")
    return n_tasks


def as_range(name: str, value: Any) -> tuple[float, float]:
    """The bounds of a range, of which a number is one of a single value; else a ValueError."""
    bounds = (value, value) if isinstance(value, (int, float)) else tuple(value)
    if len(bounds) != 2 or bounds[1] < bounds[0]:
        raise ValueError(f"{name}={value!r} must be a number or a range [low, high]")
    return float(bounds[0]), float(bounds[1])


def divided(x: Tensor, y: Tensor, n_context: int, aux: dict[str, Tensor]) -> Task:
    """Tasks whose first points are the context and the others targets, `[tasks, points, …]`."""
    return Task(
        x[:, :n_context].contiguous(),
        y[:, :n_context].contiguous(),
        x[:, n_context:].contiguous(),
        y[:, n_context:].contiguous(),
        aux,
    )
