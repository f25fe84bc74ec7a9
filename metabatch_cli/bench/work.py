"""The three kinds of task that loaders are measured with, the same for every rival.

A work is given in both ways in which tasks can be made: one at a time from the global generators,
as a map-style dataset does, and a whole batch at once from one generator.
"""

from __future__ import annotations

import math
import random
import time
from typing import ClassVar

import torch
from torch import Tensor

from metabatch_cli.batching.packing import empty
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import TaskSet
from tasksets.functions import Functions, Sine

LENGTH = 2**20  # tasks in a finite set: no epoch ends while it is measured


class Work:
    """A kind of task of fixed sizes."""

    name: ClassVar[str]
    summary: ClassVar[str]
    n_context: ClassVar[int]
    n_target: ClassVar[int]
    whole: ClassVar[bool] = True
    """Whether making a whole batch at once is another, faster way of making it."""

    seconds_a_task: float = 0.0
    """About what a task takes, where that is long; for the estimate of the total time."""

    def task(self) -> Task:
        """One task, drawn from the global generators."""
        raise NotImplementedError

    def batch(self, count: int, generator: torch.Generator) -> Task:
        """A batch in the fastest way that there is, drawn from `generator`."""
        raise NotImplementedError

    def taskset(self) -> TaskSet:
        """The work as a task set of whole batches."""
        return WholeBatches(self)


class SineWork(Work):
    """Points on sine waves: a few microseconds of arithmetic, a few hundred bytes."""

    name = "sine"
    summary = "sine waves, 10 + 30 points"
    n_context, n_target = 10, 30

    def __init__(self) -> None:
        self.functions = Functions(
            Sine(), max_ctx_pts=self.n_context, max_tgt_pts=self.n_target, sizes="fixed"
        )

    def task(self) -> Task:
        """What `Functions` computes for a batch, by the same calls, for one function."""
        family, (low, high) = self.functions.dataset, self.functions.x_range
        parameters = family.parameters(torch.rand(len(family.names)))
        x = torch.rand(self.n_context + self.n_target, 1)
        x = x.mul_(high - low).add_(low)
        amplitude, phase, frequency, offset = parameters.unbind(-1)
        y = amplitude * torch.sin(frequency * x + phase) + offset
        n = self.n_context
        return Task(x[:n], y[:n], x[n:], y[n:], {"parameters": parameters})

    def batch(self, count: int, generator: torch.Generator) -> Task:
        indices = torch.arange(count)
        return self.functions.__gettasks__(indices, self.n_context, self.n_target, generator)

    def taskset(self) -> TaskSet:
        return self.functions


class PythonWork(Work):
    """A pendulum, followed in pure Python for two milliseconds: a simulator, a parser, a search.

    How many steps that takes is found out once; from then on every rival does as many.

    Args:
        steps: of the pendulum in a task; None for as many as two milliseconds hold here.
    """

    name = "python"
    summary = "2 ms of pure Python a task"
    n_context, n_target = 10, 30
    whole = False

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps_within(0.002) if steps is None else steps
        self.seconds_a_task = 0.002

    def task(self) -> Task:
        return self._observed(random.uniform(0.5, 3.0))

    def batch(self, count: int, generator: torch.Generator) -> Task:
        angles = torch.rand(count, generator=generator).mul_(2.5).add_(0.5)
        return stack([self._observed(angle) for angle in angles.tolist()])

    def taskset(self) -> TaskSet:
        raise TypeError("a simulation in pure Python is made one at a time")

    def _observed(self, angle: float) -> Task:
        points = self.n_context + self.n_target
        every = max(1, self.steps // points)
        seen = [(0.0, angle)] * points
        speed, dt = 0.0, 0.01
        for step in range(self.steps):
            speed -= dt * math.sin(angle)
            angle += dt * speed
            if step % every == 0:
                seen[step // every % points] = (step * dt, angle)
        table = torch.tensor(seen)
        x, y, n = table[:, :1], table[:, 1:], self.n_context
        return Task(x[:n], y[:n], x[n:], y[n:], {})


class ImageWork(Work):
    """Episodes of colour images of 84×84, taken at random from memory: 1.7 MB a task.

    Args:
        pool: images in memory, uint8, that tasks draw from.
    """

    name = "images"
    summary = "5 + 15 colour images of 84 × 84"
    n_context, n_target = 5, 15

    def __init__(self, pool: int = 2048) -> None:
        drawn = torch.Generator().manual_seed(0)
        shape = (pool, 3, 84, 84)
        self.pool = torch.randint(256, shape, generator=drawn, dtype=torch.uint8)
        self.mean = torch.tensor([120.0, 115.0, 104.0])[:, None, None]
        self.std = torch.tensor([73.0, 69.0, 72.0])[:, None, None]

    def task(self) -> Task:
        chosen = torch.randint(len(self.pool), (self.n_context + self.n_target,))
        x, y, n = self._normalise(self.pool[chosen].to(torch.float32)), chosen % 5, self.n_context
        return Task(x[:n], y[:n], x[n:], y[n:], {})

    def batch(self, count: int, generator: torch.Generator) -> Task:
        shape = (count, self.n_context + self.n_target)
        chosen = torch.randint(len(self.pool), shape, generator=generator)
        context, target = chosen.split([self.n_context, self.n_target], dim=1)
        return Task(self._images(context), context % 5, self._images(target), target % 5, {})

    def _images(self, chosen: Tensor) -> Tensor:
        batch = empty(*chosen.shape, *self.pool.shape[1:])
        for images, numbers in zip(batch, chosen, strict=True):  # a task's fit into the caches
            self._normalise(images.copy_(self.pool[numbers]))
        return batch

    def _normalise(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)


WORKS: dict[str, type[Work]] = {kind.name: kind for kind in (SineWork, PythonWork, ImageWork)}


class OneByOne(TaskSet):
    """A work as a task set that makes one task at a time: what is written for any loader."""

    def __init__(self, work: Work) -> None:
        super().__init__(max_ctx_pts=work.n_context, max_tgt_pts=work.n_target, sizes="fixed")
        self.work = work

    def __len__(self) -> int:
        return LENGTH

    def __gettask__(self, index: int, n_context: int, n_target: int) -> Task:
        return self.work.task()


class WholeBatches(OneByOne):
    """A work as a task set that makes whole batches."""

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Task:
        return self.work.batch(len(indices), generator)


def stack(tasks: list[Task]) -> Task:
    """Single tasks as a batch."""
    return Task(
        torch.stack([task.context_x for task in tasks]),
        torch.stack([task.context_y for task in tasks]),
        torch.stack([task.target_x for task in tasks]),
        torch.stack([task.target_y for task in tasks]),
        {name: torch.stack([task.aux[name] for task in tasks]) for name in tasks[0].aux},
    )


def mebibytes(work: Work, batch_size: int) -> float:
    """What a batch takes in memory."""
    task = work.task()
    tensors = [*task[:4], *task.aux.values()]
    return batch_size * sum(tensor.nbytes for tensor in tensors) / 2**20


def steps_within(seconds: float) -> int:
    """How many steps of the pendulum fit, on a core of this machine that does nothing else."""
    trial = PythonWork(steps=4000)
    fastest = math.inf  # what disturbs only ever makes it slower
    for _ in range(9):
        began = time.perf_counter()
        trial.task()
        fastest = min(fastest, time.perf_counter() - began)
    return max(1, round(trial.steps * seconds / fastest))
