"""Rates: how many batches a second, again and again, in rounds over all that is compared."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from metabatch_cli.bench.rivals import PREFETCH, Rival
from metabatch_cli.bench.work import Work

LEAST = 3  # batches that count at least, however slow they are
START = 0.1  # seconds that it takes to begin, and to start a worker: for the estimate only
WARM_UP = 0.25  # of the measured time: until then what was prefetched is read


@dataclass(frozen=True)
class Cell:
    """One rate to be measured."""

    work: Work
    batch_size: int
    name: str
    rival: Rival
    workers: int

    @property
    def ahead(self) -> int:
        """Batches that are made before the first one is read."""
        return PREFETCH * self.workers

    def measure(self, seconds: float) -> float:
        """Batches a second, by a fresh loader whose processes are gone afterwards."""
        with self.rival.open(self.work, self.batch_size, self.workers) as batches:
            return rate(batches, seconds, self.ahead, self.workers)

    def expected(self, seconds: float) -> float:
        """About how many seconds that takes."""
        batch = self.batch_size * self.work.seconds_a_task / max(1, self.workers)
        warm_up = max(seconds * WARM_UP, (self.ahead + 1) * batch)
        return START + START * self.workers + warm_up + max(seconds, LEAST * batch)


def rate(batches: Iterator[Any], seconds: float, ahead: int, workers: int = 0) -> float:
    """Batches a second of an endless iterator, which is read as fast as it gives.

    Before the clock starts, more batches than the prefetched ones are read, and for at least a
    quarter of the time: then nothing is in stock that was made before, and where creating is
    slower than reading nothing is in stock at all. Workers deliver almost at the same time: the
    clock starts and stops behind the last one's batch, or the others' would count as made in no
    time. Garbage is collected before, and left to Python meanwhile, as in a training.

    Args:
        seconds: how long, at least; and at least three batches.
        ahead: how many batches the workers are ahead.
        workers: how many deliver in turn.
    """
    gc.collect()
    read(batches, seconds * WARM_UP, ahead + 1, workers)
    count, taken = read(batches, seconds, LEAST, workers)
    return count / taken


def read(batches: Iterator[Any], seconds: float, least: int, workers: int = 0) -> tuple[int, float]:
    """Read for so long, so many, and as many from every worker; returns how many and how long."""
    count, began = 0, time.perf_counter()
    now = began
    while now - began < seconds or count < least or (workers and count % workers):
        _last = next(batches)  # kept until the next one is there, as in a training
        count += 1
        now = time.perf_counter()
    return count, now - began


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
