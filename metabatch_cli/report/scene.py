"""The scene of a figure: a learner, tasks made for it, contexts that grow, predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.plan import BatchSpec
from metabatch_cli.batching.ragged import PaddedTask, Tasks
from metabatch_cli.batching.sizes import WORDS
from metabatch_cli.batching.streams import (
    Stream,
    borrowed_global_generators,
    seed_global_generators,
)
from metabatch_cli.batching.task import Task, as_task, slice_tasks, to_device, tree_map
from metabatch_cli.batching.taskset import TaskSet, TaskSpec, n_tasks
from metabatch_cli.learners.learner import Learner

_COLUMNS = 4  # context sizes, where none are given
_LOWEST, _HIGHEST = (0,) * WORDS, (2**64 - 1,) * WORDS  # words of a law's smallest, largest sizes


@dataclass(frozen=True)
class Scene:
    """Who predicts what: all that a drawing asks for."""

    learner: Learner
    taskset: TaskSet
    spec: TaskSpec
    device: torch.device
    dtype: torch.dtype
    seed: int
    wanted: Sequence[int] | None

    @property
    def shows_spread(self) -> bool:
        return self.learner.has_spread

    def context_sizes(self) -> list[int]:
        """The sizes of the nested contexts, ascending."""
        if self.wanted is not None:
            return sorted(set(self.wanted))
        law = self.taskset.law
        ends = sorted(law.draw(words)["n_context"] for words in (_LOWEST, _HIGHEST))
        low, high = max(ends[0], 1), max(ends[1], 1)
        return sorted({round(size) for size in np.geomspace(low, high, _COLUMNS).tolist()})

    def create_alike(self, count: int, **wanted: int) -> Task | None:
        """Some tasks that share their sizes; of unequal ones as many points as all of them have.

        The largest of several times as many are taken. None if even they have no targets.
        """
        tasks = self.create(4 * count if self.taskset.ragged else count, **wanted)
        if not isinstance(tasks, PaddedTask):
            return slice_tasks(tasks, 0, count)
        points = torch.minimum(tasks.context_mask.sum(dim=1), tasks.target_mask.sum(dim=1))
        largest = points.argsort(descending=True, stable=True)[:count]
        alike = tree_map(lambda leaf: leaf[largest.to(leaf.device)], tasks).common()
        return alike if alike.target_x.shape[1] else None

    def create(self, count: int, **wanted: int) -> Tasks:
        """Some tasks `[tasks, points, …]` of the law's sizes, except for those wanted."""
        stream = Stream(self.seed, self.taskset.split, "figure")
        drawn = self.taskset.law.draw([int(word) for word in stream.words(WORDS, 0)])
        smallest, largest = (self.taskset.law.draw(words) for words in (_LOWEST, _HIGHEST))
        indices = self._choose(count, stream)
        maker = BatchMaker(self.taskset, self.seed, self.taskset.split)
        attempts = [drawn | wanted, largest, drawn, smallest]
        for number, sizes in enumerate(attempts, start=1):
            try:
                batch = maker(BatchSpec(0, 0, sizes, indices, 0, len(indices)))
            except Exception:
                # a table has no more rows than it has: its own sizes are the next best
                if number == len(attempts):
                    raise
            else:
                break
        tasks = to_device(as_task(batch), self.device)
        return tasks._replace(
            context_x=self._cast(tasks.context_x),
            context_y=self._cast(tasks.context_y),
            target_x=self._cast(tasks.target_x),
            target_y=self._cast(tasks.target_y),
        )

    def spread(self, prediction: torch.distributions.Distribution, like: Tensor) -> Tensor | None:
        """The standard deviations of a prediction, in the shape of `like`; None without any."""
        return prediction.stddev.reshape(like.shape) if self.shows_spread else None

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _choose(self, count: int, stream: Stream) -> np.ndarray:
        length = n_tasks(self.taskset)
        if length is None:
            return np.arange(count, dtype=np.int64)
        # at random: neighbours are often alike, such as the images of one class
        chosen = np.random.default_rng(stream.words(4, 1))
        return chosen.choice(length, min(count, length), replace=False).astype(np.int64)


@contextmanager
def at_rest(learner: Learner, device: torch.device, seed: int) -> Iterator[None]:
    """Evaluation without gradients, on borrowed random generators; all is given back."""
    modes = {module: module.training for module in learner.modules()}
    cards = [device] if device.type == "cuda" else []
    try:
        learner.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=cards),
            borrowed_global_generators(),
        ):
            # latent-variable learners draw from the global generators
            seed_global_generators(Stream(seed, "figure"), 0, 0)
            for card in cards:
                with torch.cuda.device(card):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def within(sizes: Sequence[int], available: int) -> list[int]:
    """The sizes that a context of `available` points holds; its own instead of larger ones."""
    return sorted({min(size, available) for size in sizes})
