"""From single tasks to a batch: stacked where they share their sizes, else padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from metabatch_cli.batching.packing import empty, sending
from metabatch_cli.batching.ragged import PaddedTask, pad
from metabatch_cli.batching.task import Task, as_task, tree_map


def stacked(tasks: list[Any]) -> Any:
    """Single tasks of the same sizes, any trees, as torch's `default_collate` stacks them.

    Raises:
        ValueError: the sizes differ; names the fields and the tasks.
    """
    try:
        return (
            collate(tasks, collate_fn_map=_INTO_THE_MESSAGE)
            if sending()
            else default_collate(tasks)
        )
    except RuntimeError as error:
        unequal = _unequal_sizes(tasks)
        if not unequal:
            raise
        raise ValueError(
            f"the tasks of a batch have unequal sizes: {'; '.join(unequal)} (counted within the "
            "batch). Either give every task n_context and n_target points, or let the task set "
            "say `ragged = True`: its batches are then padded, with masks (PaddedTask)"
        ) from error


def _stack(tensors: list[Tensor], *, collate_fn_map: Any = None) -> Tensor:
    """Tensors stacked where the batch will be sent from, instead of copied there afterwards."""
    first = tensors[0]
    alike = all(tensor.dtype == first.dtype and not tensor.requires_grad for tensor in tensors)
    if not alike or first.layout is not torch.strided:
        return torch.stack(tensors)
    return torch.stack(tensors, out=empty(len(tensors), *first.shape, dtype=first.dtype))


_INTO_THE_MESSAGE = {**default_collate_fn_map, Tensor: _stack}


def padded(tasks: list[Any]) -> PaddedTask:
    """Single tasks of any sizes, everything that `as_task` takes, filled up to the largest.

    Raises:
        TypeError: something is no single task.
        ValueError: tasks that differ in more than their number of points.
    """
    return pad([_single(task) for task in tasks])


def _single(task: Any) -> Task:
    task = as_task(task)
    if not isinstance(task, Task):
        raise TypeError(
            f"__gettask__ gave a {type(task).__name__}: a single task has no padding, "
            "its batch will have"
        )
    return tree_map(torch.as_tensor, task)


def _unequal_sizes(tasks: list[Any]) -> list[str]:
    """For each field that has several shapes: what it has in the first task, and in another."""
    all_shapes = [_shapes(task) for task in tasks]
    first = all_shapes[0]
    found = []
    for name, shape in first.items():
        for place, shapes in enumerate(all_shapes):
            if shapes.get(name, shape) != shape:
                found.append(f"{name} is {shape} in task 0 and {shapes[name]} in task {place}")
                break
    return found


def _shapes(tree: Any, path: str = "") -> dict[str, list[int]]:
    """The shapes of all tensors and arrays in a tree, by their path."""
    if isinstance(tree, (Tensor, np.ndarray)):
        return {path: list(tree.shape)}
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif isinstance(tree, (tuple, list)):
        # a tuple of four or five is a task by position
        known = not path and len(tree) in (4, 5)
        tree = dict(zip(Task._fields if known else range(len(tree)), tree, strict=False))
    if not isinstance(tree, Mapping):
        return {}
    return {
        name: shape
        for key, part in tree.items()
        for name, shape in _shapes(part, f"{path}.{key}" if path else str(key)).items()
    }
