"""Who makes the batches: for each rival an endless iterator over the batches of a work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from metabatch_cli.batching.loader import TaskLoader
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import TaskSet
from metabatch_cli.bench.work import LENGTH, OneByOne, Work, stack

PREFETCH = 2  # batches that each worker is ahead, torch's own default, for all who have workers
ORIGINAL = "0.9.1"

Batches = Iterator[Any]
Opened = AbstractContextManager[Batches]


@dataclass(frozen=True)
class Rival:
    """One way to get batches.

    Attributes:
        label: what tables call it.
        summary: what it is.
        open: from a work, a batch size and workers to batches; its processes end with it.
        has_workers: whether other numbers of workers than 0 mean something.
        whole: whether it needs a work that whole batches can be made of.
    """

    label: str
    summary: str
    open: Callable[[Work, int, int], Opened]
    has_workers: bool = True
    whole: bool = False

    def does(self, work: Work) -> bool:
        """Whether there is such a way for this work."""
        return work.whole or not self.whole


@contextmanager
def bare(work: Work, batch_size: int, workers: int) -> Iterator[Batches]:
    """The limit: nothing but the work, in the fastest way, on one thread."""
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Task]:
        while True:
            yield work.batch(batch_size, generator)

    with one_thread():
        yield batches()


@contextmanager
def naive(work: Work, batch_size: int, workers: int) -> Iterator[Batches]:
    """Tasks made and stacked in the training loop, as research code does."""

    def batches() -> Iterator[Task]:
        while True:
            yield stack([work.task() for _ in range(batch_size)])

    yield batches()


@contextmanager
def dataloader(work: Work, batch_size: int, workers: int) -> Iterator[Batches]:
    """Torch's own loader over single tasks, with its own collation."""
    loader = DataLoader(
        _MapStyle(work),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        prefetch_factor=PREFETCH if workers else None,
    )
    with closing(endless(loader)) as batches:
        yield batches


@contextmanager
def original(work: Work, batch_size: int, workers: int) -> Iterator[Batches]:
    """MetaBatch 0.9.1 from PyPI."""
    from metabatch_cli.bench.original import open_original

    with (
        open_original(work, batch_size, workers, PREFETCH) as loader,
        closing(endless(loader)) as batches,
    ):
        yield batches


def ours(work: Work, batch_size: int, workers: int) -> Opened:
    """TaskLoader over the very code that the others call: one task at a time."""
    return _task_loader(OneByOne(work), batch_size, workers)


def ours_whole(work: Work, batch_size: int, workers: int) -> Opened:
    """TaskLoader over a set that makes whole batches."""
    return _task_loader(work.taskset(), batch_size, workers)


@contextmanager
def _task_loader(taskset: TaskSet, batch_size: int, workers: int) -> Iterator[Batches]:
    with TaskLoader(
        taskset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        prefetch_factor=PREFETCH,
    ) as loader:
        yield loader.stream()


RIVALS = {
    "bare": Rival("the bare work", "no loader, one thread: the limit", bare, has_workers=False),
    "naive": Rival("naive", "tasks made and stacked in the loop", naive, has_workers=False),
    "dataloader": Rival("DataLoader", "torch's own, single tasks, fixed sizes", dataloader),
    "metabatch": Rival(f"metabatch {ORIGINAL}", "the original, from PyPI", original),
    "ours": Rival("ours", "TaskLoader, the same tasks one by one", ours),
    "ours_whole": Rival("ours, whole", "TaskLoader, whole batches at once", ours_whole, whole=True),
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as a worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def missing(name: str) -> str | None:
    """Why a rival cannot be measured here, and what helps; None where it can."""
    if name != "metabatch":
        return None
    try:
        import metabatch
    except ImportError:
        installed = False
    else:  # a folder of that name in the current directory is no package of that name
        installed = hasattr(metabatch, "TaskLoader")
    if installed:
        return None
    return f"not installed: pip install metabatch=={ORIGINAL} (the extra 'bench')"


def endless(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """One epoch behind the other; closing it ends the workers of the one at hand."""
    while True:
        yield from loader


class _MapStyle(Dataset):
    """Single tasks as any dataset has them."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Task:
        return self.work.task()
