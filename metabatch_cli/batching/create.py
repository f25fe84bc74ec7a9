"""Creation: from a BatchSpec to a batch, under its own random streams and on one thread."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from metabatch_cli.batching.collate import padded, stacked
from metabatch_cli.batching.plan import BatchSpec
from metabatch_cli.batching.ragged import PaddedTask
from metabatch_cli.batching.streams import (
    GeneratorStates,
    Stream,
    borrowed_global_generators,
    seed_global_generators,
)
from metabatch_cli.batching.task import Task, concatenate, tree_map
from metabatch_cli.batching.taskset import TaskSet, makes_whole_batches


class BatchMaker:
    """Makes the batch of a spec; the only place where a task set's code runs.

    Indexing with a spec makes it a map-style dataset for torch's `DataLoader`.

    Args:
        taskset: whose tasks.
        seed, split: choose the streams.
        collate: joins a list of tasks; only for sets of `__gettask__`.
    """

    def __init__(
        self,
        taskset: TaskSet,
        seed: int,
        split: str,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.taskset = taskset
        self.whole = makes_whole_batches(taskset)
        self.collate = collate or (padded if taskset.ragged else stacked)
        self._states = GeneratorStates(seed, split, "batch")
        self._task_stream = Stream(seed, split, "task")

    def __getitem__(self, spec: BatchSpec) -> Any:
        make = self._make_whole if self.whole else self._make_each
        try:
            with one_thread():
                batch = make(spec)
            if get_worker_info() is not None:
                check_sendable(batch)
            return batch
        except Exception as error:
            note = f"while creating {spec} of {type(self.taskset).__name__}"
            if get_worker_info() is not None and "<locals>" in type(error).__qualname__:
                # a class that only exists inside a function cannot be sent either
                raise RuntimeError(f"{type(error).__name__}: {error}\n{note}") from error
            error.add_note(note)
            raise

    def _make_whole(self, spec: BatchSpec) -> Any:
        n_context, n_target, more = _split(spec.sizes)
        parts = []
        for start in range(0, len(spec.indices), spec.shard_size):
            shard = (spec.first + start) // spec.shard_size
            indices = torch.from_numpy(spec.indices[start : start + spec.shard_size])
            generator = torch.Generator()
            generator.set_state(self._states.at(spec.step, shard))
            parts.append(
                self.taskset.__gettasks__(indices, n_context, n_target, **more, generator=generator)
            )
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def _make_each(self, spec: BatchSpec) -> Any:
        tasks = []
        n_context, n_target, more = _split(spec.sizes)
        with borrowed_global_generators():
            for position, index in enumerate(spec.indices.tolist(), start=spec.first):
                seed_global_generators(self._task_stream, spec.step, position)
                tasks.append(self.taskset.__gettask__(index, n_context, n_target, **more))
        return self.collate(tasks)


def check_sendable(batch: Any) -> None:
    """Raise TypeError here for what cannot be sent: torch's queue would drop it and wait."""
    if _surely_sendable(batch):
        return
    try:
        pickle.dumps(batch)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _leaves(batch)):
            raise TypeError("it holds a tensor with a graph: detach it")
    except Exception as error:
        raise TypeError(
            f"a worker cannot send this {type(batch).__name__} to the main process: {error}"
        ) from None


def _surely_sendable(tree: Any) -> bool:
    """Whether it is built of what always travels; anything else is tried out."""
    kind = type(tree)
    if kind is dict:
        return all(_surely_sendable(part) for part in tree.values())
    if kind in (tuple, list, Task, PaddedTask):
        return all(_surely_sendable(part) for part in tree)
    if kind is Tensor:
        return not tree.requires_grad
    if kind is np.ndarray:
        return tree.dtype != object
    return kind in (int, float, bool, str, bytes, type(None))


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


_BY_POSITION = ("n_context", "n_target")


def _split(sizes: Mapping[str, int]) -> tuple[int, int, dict[str, int]]:
    """The two sizes that are passed by position, whatever a task set calls them, and the rest."""
    more = {} if len(sizes) == 2 else {k: v for k, v in sizes.items() if k not in _BY_POSITION}
    return sizes["n_context"], sizes["n_target"], more


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: sums and factorisations have other bits on two (a worker has one)."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
