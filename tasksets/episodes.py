"""Episodes: few-shot classification, N ways and K shots, over any dataset of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Len
from torch import Tensor

from metabatch_cli.batching.sizes import WayShot
from metabatch_cli.batching.streams import uniforms
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import Split, TaskSet, TaskSpec
from tasksets.images import ImageDataset, check_same_split, open_split

Ways = Annotated[int, Ge(2)] | Annotated[Sequence[Annotated[int, Ge(2)]], Len(2, 2)]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
PerClass = Annotated[int, Ge(1)] | Annotated[Sequence[Annotated[int, Ge(1)]], Len(2, 2)]


class Episodes(TaskSet):
    """Tell classes apart that were never seen, from a few images of each.

    The episodes of Vinyals et al. 2016 (arXiv:1606.04080): every task has `ways` classes,
    numbered at random from 0; its context ("support") has `shots` images of each, its target
    ("query") `queries` others. Points come class by class, in the order of their labels.

    x is uint8 `[tasks, points, C, H, W]`, y int64 `[tasks, points]`, and
    `aux["classes"]` int64 `[tasks, ways]` says which class of the split each label stands for.

    Args:
        dataset: whose images.
        ways, shots, queries: a number each, or a range [low, high] drawn anew for each batch.
        n_tasks: so many tasks, each with classes of its own, the same every time, while images
            and labels are drawn anew; None for ever new tasks.
        augment: changes the images of training tasks, from uint8 `[images, C, H, W]` and a
            generator to the same shape (tasksets/augment.py); None leaves them. Those of held-out
            tasks are left in any case.
        split: whose classes.
        eval: whether these are held-out tasks, where `split` is not given.

    Raises:
        ValueError: more ways than the split has classes, or more images of a class than the
            smallest class has.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        ways: Ways = 5,
        shots: PerClass = 1,
        queries: PerClass = 15,
        *,
        n_tasks: Annotated[int, Ge(1)] | None = None,
        augment: Augmentation | None = None,
        split: Split | None = None,
        eval: bool = False,
    ) -> None:
        law = WayShot(ways, shots, queries)
        super().__init__(eval=eval, sizes=law, split=split)
        if n_tasks is not None and n_tasks < 1:
            raise ValueError(f"n_tasks={n_tasks} must be at least 1, or null for ever new tasks")
        self.n_tasks = n_tasks
        self.augment = augment
        self.images = open_split(dataset, split, eval)
        self._sizes = self.images.sizes
        ranges = (law.ways, law.shots, law.queries)  # the law made each of them a range
        self._ways, most_shots, most_queries = (most for _, most in ranges)  # type: ignore[misc]
        if self._ways > len(self._sizes):
            raise ValueError(
                f"ways={self._ways} is more than the {len(self._sizes)} classes of the split "
                f"{self.split!r}"
            )
        smallest = int(self._sizes.argmin())
        if most_shots + most_queries > self._sizes[smallest]:
            raise ValueError(
                f"shots={most_shots} and queries={most_queries} are {most_shots + most_queries} "
                f"images of a class, but class {self.images.class_names[smallest]!r} of the "
                f"split {self.split!r} has {self._sizes[smallest]}"
            )

    def belong_to(self, split: Split) -> None:
        check_same_split(self, split)
        super().belong_to(split)

    def __len__(self) -> int:
        if self.n_tasks is None:
            raise TypeError("Episodes with n_tasks=None are infinite: they have no length")
        return self.n_tasks

    @property
    def spec(self) -> TaskSpec:
        """Images to class labels."""
        return TaskSpec(
            x_shape=self.images.shape,
            y_shape=(),
            kind="classification",
            ways=self._ways,
            classes=len(self._sizes),
        )

    def __gettasks__(  # type: ignore[override]  # the law way_shot adds three sizes
        self,
        indices: Tensor,
        n_context: int,
        n_target: int,
        ways: int,
        shots: int,
        queries: int,
        generator: torch.Generator,
    ) -> Task:
        classes = self._choose_classes(indices, ways, generator)
        numbers = _random(generator, len(indices), ways, 2 * (shots + queries))
        members = distinct(self._sizes[classes], shots + queries, numbers)
        members += self.images.starts[classes][:, :, None]
        support, query = members[:, :, :shots], members[:, :, shots:]
        return Task(
            context_x=self._points(support, generator),
            context_y=_labels(len(indices), ways, shots),
            target_x=self._points(query, generator),
            target_y=_labels(len(indices), ways, queries),
            aux={"classes": torch.from_numpy(classes)},
        )

    def _choose_classes(self, indices: Tensor, ways: int, generator: torch.Generator) -> np.ndarray:
        """`ways` classes for each task, by label: int64 `[tasks, ways]`."""
        n_classes = np.full(len(indices), len(self._sizes))
        if self.n_tasks is None:
            return distinct(n_classes, ways, _random(generator, len(indices), 2 * ways))
        # always as many as the most ways, so that fewer of them are a part of the same set
        numbers = uniforms(indices, 2 * self._ways, self.split, "classes").numpy()
        classes = distinct(n_classes, self._ways, numbers)[:, :ways]
        # a class that had the same label every time could be learned by heart
        shuffled = np.argsort(_random(generator, len(indices), ways), axis=1, kind="stable")
        return np.take_along_axis(classes, shuffled, axis=1)

    def _points(self, members: np.ndarray, generator: torch.Generator) -> Tensor:
        """`[tasks, points, C, H, W]` of the images `[tasks, ways, images of a class]`."""
        points = torch.from_numpy(self.images.take(members.reshape(len(members), -1)))
        if self.augment is None or self.eval:
            return points
        return self.augment(points.flatten(0, 1), generator).view(points.shape)


def distinct(sizes: np.ndarray, count: int, numbers: np.ndarray) -> np.ndarray:
    """`count` different integers from 0 to size − 1, in random order, for each of many sizes.

    Floyd's algorithm (Bentley & Floyd 1987, "A sample of brilliance"): every subset is equally
    likely, at a cost that depends on `count` but not on the sizes, which may differ. Each step
    is taken for all sizes at once. Its order is not uniform, therefore it is shuffled.

    Args:
        sizes: int64 `[…]`, each at least `count`.
        numbers: uniform in [0, 1), float64 `[…, 2 * count]`.

    Returns:
        int64 `[…, count]`.
    """
    draws, order = np.split(numbers, [count], axis=-1)
    chosen = np.empty((count, *sizes.shape), dtype=np.int64)
    for k in range(count):
        last = sizes - count + k
        drawn = (draws[..., k] * (last + 1)).astype(np.int64)
        # `last` was out of reach so far, so it can stand in for a number that was drawn before
        chosen[k] = np.where((chosen[:k] == drawn).any(axis=0), last, drawn)
    order = np.argsort(order, axis=-1, kind="stable")
    return np.take_along_axis(np.moveaxis(chosen, 0, -1), order, axis=-1)


def _random(generator: torch.Generator, *shape: int) -> np.ndarray:
    """Uniform numbers of [0, 1), float64."""
    return torch.rand(*shape, dtype=torch.float64, generator=generator).numpy()


def _labels(tasks: int, ways: int, images: int) -> Tensor:
    """0 … ways − 1, each as often as it has images: int64 `[tasks, points]`."""
    return torch.arange(ways).repeat_interleave(images).repeat(tasks, 1)
