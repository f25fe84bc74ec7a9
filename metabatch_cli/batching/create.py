"""Creation: from a BatchSpec to a batch, under its own random streams and on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import default_collate

from metabatch_cli.batching.plan import BatchSpec
from metabatch_cli.batching.streams import (
    Stream,
    borrowed_global_generators,
    seed_global_generators,
)
from metabatch_cli.batching.task import concatenate
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
                return make(spec)
        except Exception as error:
            error.add_note(f"while creating {spec} of {type(self.taskset).__name__}")
            raise

    def _make_whole(self, spec: BatchSpec) -> Any:
        generator = torch.Generator()
        indices = torch.from_numpy(spec.indices)
        parts = []
        for start in range(0, len(indices), spec.shard_size):
            shard = (spec.first + start) // spec.shard_size
            self._batch_stream.fill(generator, spec.step, shard)
            part = indices[start : start + spec.shard_size]
            parts.append(self.taskset.__gettasks__(part, **spec.sizes, generator=generator))
        return concatenate(parts)

    def _make_each(self, spec: BatchSpec) -> Any:
        tasks = []
        with borrowed_global_generators():
            for position, index in enumerate(spec.indices.tolist(), start=spec.first):
                seed_global_generators(self._task_stream, spec.step, position)
                tasks.append(self.taskset.__gettask__(index, **spec.sizes))
        return self.collate(tasks)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: sums and factorisations have other bits on two (a worker has one)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
