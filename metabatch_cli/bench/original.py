"""The original MetaBatch 0.9.1 as a rival; importable only where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import metabatch

from metabatch_cli.batching.task import Task
from metabatch_cli.bench.work import LENGTH, Work


class OriginalTasks(metabatch.TaskSet):
    """A work as a task set of the original.

    Its law of sizes has no fixed ones; with equal bounds and `predict_full_target` it draws the
    same two numbers for every batch.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(
            min_pts=work.n_context,
            max_ctx_pts=work.n_context,
            max_tgt_pts=work.n_target,
            total_tgt_pts=work.n_target,
            eval=False,
            predict_full_target=True,
            predict_full_target_during_eval=False,
        )
        self.work = work

    def __len__(self) -> int:
        return LENGTH

    def __gettask__(self, index: int, n_context: int, n_target: int) -> Task:
        return self.work.task()


@contextmanager
def open_original(work: Work, batch_size: int, workers: int, prefetch_factor: int) -> Iterator[Any]:
    """Its loader, without `n_batches`, which would cost it a further look-up for every task."""
    loader = metabatch.TaskLoader(
        OriginalTasks(work),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        # its default of 2 is refused by current torch where there are no workers
        prefetch_factor=prefetch_factor if workers else None,
    )
    try:
        yield loader
    finally:
        # its sizes live in a process of their own, which would stay until garbage collection
        loader.batch_sampler._sampling_inst._manager.shutdown()
