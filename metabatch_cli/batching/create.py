"""Creation: from a BatchSpec to a batch, under its own random streams and on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from metabatch_cli.batching.plan import BatchSpec
from metabatch_cli.batching.streams import (
    Stream,
    borrowed_global_generators,
    seed_global_generators,
)
from metabatch_cli.batching.task import concatenate, tree_map
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
        self.collate = collate or default_collate
        self._batch_stream = Stream(seed, split, "batch")
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
            error.add_note(f"while creating {spec} of {type(self.taskset).__name__}")
            raise

    def _make_whole(self, spec: BatchSpec) -> Any:
        generator = torch.Generator()
        indices = torch.tensor(spec.indices)  # a copy: a task set may write into what it gets
        n_context, n_target, more = _split(spec.sizes)
        parts = []
        for start in range(0, len(indices), spec.shard_size):
            shard = (spec.first + start) // spec.shard_size
            self._batch_stream.fill(generator, spec.step, shard)
            part = indices[start : start + spec.shard_size]
            parts.append(
                self.taskset.__gettasks__(part, n_context, n_target, **more, generator=generator)
            )
        return concatenate(parts)

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

    def look(leaf: Any) -> None:
        if not isinstance(leaf, (Tensor, np.ndarray, int, float, str, bytes, type(None))):
            try:
                ForkingPickler.dumps(leaf)
            except Exception as error:
                raise TypeError(
                    f"a worker cannot send {type(leaf).__name__} to the main process, because it "
                    f"cannot be pickled: {error}"
                ) from None

    tree_map(look, batch)


def _split(sizes: Mapping[str, int]) -> tuple[int, int, dict[str, int]]:
    """The two sizes that are passed by position, whatever a task set calls them, and the rest."""
    more = dict(sizes)
    return more.pop("n_context"), more.pop("n_target"), more


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: sums and factorisations have other bits on two (a worker has one)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
