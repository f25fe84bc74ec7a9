"""Episodes: few-shot classification, N ways and K shots, over any dataset of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from annotated_types import Ge, Len
from torch import Tensor

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.ragged import PackedTask, PaddedTask, Tasks
from metabatch_cli.batching.sizes import WORDS, WayShot
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

    Where tasks have sizes of their own (`vary`), the set is ragged and its batches are a
    `PaddedTask`, their labels from 0 to the task's own ways − 1; `aux["classes"]` is −1 for labels
    that a task has not. Queries are balanced in every case: as many of each class of a task.

    Args:
        dataset: whose images.
        ways, shots, queries: a number each, or a range [low, high] to draw from, every number of
            it equally likely.
        n_tasks: so many tasks, each with classes of its own, the same every time, while images
            and labels are drawn anew; None for ever new tasks.
        augment: changes the images of training tasks, from uint8 `[images, C, H, W]` and a
            generator to the same shape (tasksets/augment.py); None leaves them. Those of held-out
            tasks are left in any case.
        vary: who draws from the ranges. "batch": its tasks share what was drawn, which costs no
            padding. "task": every task. "class": every task its ways and queries, and every
            class of a task its shots: the "random" imbalance of Ochal et al. 2021
            (arXiv:2101.02523), whose other laws (linear, step) are not here. (Meta-Dataset,
            Triantafillou et al. 2020, arXiv:1903.03096, draws shots in proportion to the sizes
            of the classes; this does not, so it is for balanced datasets too.)
        turn: rotation by a random multiple of 90°, of square images: "class", each class of a
            task, the same for all its images, as in the code of MAML (Finn et al. 2017,
            arXiv:1703.03400) and of MAML++ (Antoniou et al. 2019, arXiv:1810.09502); "task", all
            images of a task alike. `aux["turns"]`, int64 `[tasks, ways]`, counts quarter turns
            counter-clockwise. (Rotations as classes of their own, of which one task may have
            several, are the dataset's: `Omniglot(rotations=True)`.)
        turn_held_out: whether validation and test tasks are turned too, as in MAML's code; in
            that of MAML++ only training is.
        split: whose classes.
        eval: whether these are held-out tasks, where `split` is not given.

    Raises:
        ValueError: more ways than the split has classes, more images of a class than the
            smallest class has, or images to be turned that are not square.
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
        vary: Literal["batch", "task", "class"] = "batch",
        turn: Literal["class", "task"] | None = None,
        turn_held_out: bool = False,
        split: Split | None = None,
        eval: bool = False,
    ) -> None:
        one_of("vary", vary, ("batch", "task", "class"))
        if turn is not None:
            one_of("turn", turn, ("class", "task"))
        law = WayShot(ways, shots, queries)
        ranges = cast(list[tuple[int, int]], [law.ways, law.shots, law.queries])  # by the law
        self._ranges = ranges
        self._ways, most_shots, most_queries = (most for _, most in ranges)
        self.vary = vary
        self.ragged = vary != "batch" and any(low < high for low, high in ranges)
        own = OwnSizes(law.ways, law.shots, law.queries, vary)
        super().__init__(eval=eval, sizes=own if self.ragged else law, split=split)
        if n_tasks is not None and n_tasks < 1:
            raise ValueError(f"n_tasks={n_tasks} must be at least 1, or null for ever new tasks")
        self.n_tasks = n_tasks
        self.augment = augment
        self.dataset: ImageDataset | None = dataset
        self.images = open_split(dataset, split, eval)
        self.turn = turn if turn_held_out or not self.eval else None
        self._sizes = self.images.sizes
        if self._ways > len(self._sizes):
            raise ValueError(
                f"ways={self._ways} is more than the {len(self._sizes)} classes of the split "
                f"{self.split!r}"
            )
        smallest, needed = int(self._sizes.argmin()), most_shots + most_queries
        if needed > self._sizes[smallest]:
            splits_classes = getattr(dataset, "split_by", None) == "class"
            way_out = f"; dataset.min_images={needed} leaves such classes out"
            raise ValueError(
                f"shots={most_shots} and queries={most_queries} are {needed} images of a class, "
                f"but class {self.images.class_names[smallest]!r} of the split {self.split!r} has "
                f"{self._sizes[smallest]}{way_out if splits_classes else ''}"
            )
        if turn is not None:
            self._check_turns(turn)

    def _check_turns(self, turn: str) -> None:
        _, height, width = self.images.shape
        if height != width:
            raise ValueError(
                f"turn={turn!r} needs square images, not {height} × {width}: a quarter turn "
                "changes their shape"
            )
        if turn == "class" and self.images.turns.any():
            raise ValueError(
                "turn='class' could make two classes one: this dataset turns classes itself, to "
                "have more of them; leave one of the two out (dataset.rotations=false)"
            )

    def belong_to(self, split: Split) -> None:
        check_same_split(self, split)
        super().belong_to(split)

    def __len__(self) -> int:
        if self.n_tasks is None:
            raise TypeError("Episodes with n_tasks=None are infinite: they have no length")
        return self.n_tasks

    def __getstate__(self) -> dict[str, Any]:
        # workers have its images; how they were read may be nothing that can travel
        return {**vars(self), "dataset": None}

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

    @property
    def note(self) -> str:  # type: ignore[override]
        """Sizes of each task's own, turned images, and what the dataset has to say of itself."""
        parts = [getattr(self.dataset, "note", "")]
        if self.turn is not None:
            parts.insert(0, f"every {self.turn} turned by a random multiple of 90°")
        if self.ragged:
            parts.insert(0, self.law.own())  # type: ignore[attr-defined]
        return "; ".join(filter(None, parts))

    def __gettasks__(  # type: ignore[override]  # the law way_shot adds three sizes
        self,
        indices: Tensor,
        n_context: int,
        n_target: int,
        ways: int,
        shots: int,
        queries: int,
        generator: torch.Generator,
    ) -> Tasks:
        if self.ragged:
            return self._create_ragged(indices, ways, shots, queries, generator)
        classes = self._choose_classes(indices, ways, generator)
        members = self._choose_members(classes, shots + queries, generator)
        turns, aux = self._choose_turns(classes, generator)
        return Task(
            context_x=self._points(members[:, :, :shots], turns, generator),
            context_y=_labels(len(indices), ways, shots),
            target_x=self._points(members[:, :, shots:], turns, generator),
            target_y=_labels(len(indices), ways, queries),
            aux={"classes": torch.from_numpy(classes), **aux},
        )

    def _create_ragged(
        self, indices: Tensor, ways: int, shots: int, queries: int, generator: torch.Generator
    ) -> PaddedTask:
        """Tasks of sizes of their own, of which the given ones are the most."""
        tasks = len(indices)
        if self.n_tasks is None:
            of_ways = _random(generator, tasks, 1)
        else:  # the same classes every time, so as many of them every time
            of_ways = uniforms(indices, 1, self.split, "ways").numpy()
        of_shots = _random(generator, tasks, ways if self.vary == "class" else 1)
        of_queries = _random(generator, tasks, 1)
        numbers = (of_ways, of_shots, of_queries)
        n_ways, n_shots, n_queries = map(_integers, numbers, self._ranges)
        there = np.arange(ways) < n_ways
        classes = self._choose_classes(indices, ways, generator, there)
        members = self._choose_members(classes, shots + queries, generator)
        turns, aux = self._choose_turns(classes, generator)
        aux["classes"] = torch.from_numpy(np.where(there, classes, -1))
        in_context = there[:, :, None] & (np.arange(shots) < n_shots[:, :, None])
        in_target = there[:, :, None] & (np.arange(queries) < n_queries[:, :, None])
        return PackedTask(
            *self._packed_points(members[:, :, :shots], in_context, turns, generator),
            *self._packed_points(members[:, :, shots:], in_target, turns, generator),
            aux,
        ).padded()

    def _choose_classes(
        self,
        indices: Tensor,
        ways: int,
        generator: torch.Generator,
        there: np.ndarray | None = None,
    ) -> np.ndarray:
        """`ways` classes for each task, by label: int64 `[tasks, ways]`.

        Args:
            there: bool `[tasks, ways]`, the labels that a task has, the first ones; None for all.
        """
        n_classes = np.full(len(indices), len(self._sizes))
        if self.n_tasks is None:
            return distinct(n_classes, ways, _random(generator, len(indices), 2 * ways))
        # always as many as the most ways, so that fewer of them are a part of the same set
        numbers = uniforms(indices, 2 * self._ways, self.split, "classes").numpy()
        classes = distinct(n_classes, self._ways, numbers)[:, :ways]
        # a class that had the same label every time could be learned by heart
        keys = _random(generator, len(indices), ways)
        if there is not None:
            keys[~there] = 1  # behind all others
        shuffled = np.argsort(keys, axis=1, kind="stable")
        return np.take_along_axis(classes, shuffled, axis=1)

    def _choose_members(
        self, classes: np.ndarray, images: int, generator: torch.Generator
    ) -> np.ndarray:
        """So many different images of every class: int64 `[tasks, ways, images]`."""
        members = distinct(
            self._sizes[classes], images, _random(generator, *classes.shape, 2 * images)
        )
        members += self.images.starts[classes][:, :, None]
        return members

    def _choose_turns(
        self, classes: np.ndarray, generator: torch.Generator
    ) -> tuple[np.ndarray | None, dict[str, Tensor]]:
        """The quarter turns of every class of every task, if any, and what `aux` says of them."""
        if self.turn is None:
            return None, {}
        tasks, ways = classes.shape
        numbers = _random(generator, tasks, ways if self.turn == "class" else 1)
        turns = np.broadcast_to(_integers(numbers, (0, 3)), classes.shape).copy()
        return turns, {"turns": torch.from_numpy(turns)}

    def _points(
        self, members: np.ndarray, turns: np.ndarray | None, generator: torch.Generator
    ) -> Tensor:
        """`[tasks, points, C, H, W]` of the images `[tasks, ways, images of a class]`."""
        tasks = len(members)
        if turns is not None:
            turns = turns.repeat(members.shape[2], axis=1).flatten()
        x = self._images(members.reshape(-1), turns, generator)
        return x.unflatten(0, (tasks, -1))

    def _images(
        self, members: np.ndarray, turns: np.ndarray | None, generator: torch.Generator
    ) -> Tensor:
        """`[images, C, H, W]` of images by their numbers, turned, and changed as `augment` does."""
        x = torch.from_numpy(self.images.take(members, turns))
        return x if self.augment is None or self.eval else self.augment(x, generator)

    def _packed_points(
        self,
        members: np.ndarray,
        chosen: np.ndarray,
        turns: np.ndarray | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the images `[tasks, ways, images of a class]` the chosen ones, end to end.

        Returns:
            x `[points of all tasks, C, H, W]`, y `[points of all tasks]`, and where each task
            begins, `[tasks + 1]`.
        """
        _, labels, _ = chosen.nonzero()
        if turns is not None:
            turns = np.broadcast_to(turns[:, :, None], chosen.shape)[chosen]
        points = chosen.sum(axis=(1, 2))
        return (
            self._images(members[chosen], turns, generator),
            torch.from_numpy(labels),
            torch.from_numpy(np.concatenate([[0], points.cumsum()])),
        )


@dataclass(frozen=True)
class OwnSizes(WayShot):
    """Ways, shots and queries that every task draws for itself: the most that it may have."""

    vary: str

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        return super().draw([2**64 - 1] * WORDS)

    def describe(self) -> str:
        ranges = {name: getattr(self, name) for name in ("ways", "shots", "queries")}
        return ", ".join(f"{most} {name}" for name, (_, most) in ranges.items())

    def own(self) -> str:
        """Which of the sizes are whose."""
        words = []
        for name, whose in (("ways", "task"), ("shots", self.vary), ("queries", "task")):
            low, high = getattr(self, name)
            if low < high:
                words.append(f"{low}–{high} {name} for each {whose}")
        return ", ".join(words)


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


def _integers(numbers: np.ndarray, bounds: tuple[int, int]) -> np.ndarray:
    """Numbers of [0, 1) as integers of `[low, high]`."""
    low, high = bounds
    return low + (numbers * (high - low + 1)).astype(np.int64)


def _labels(tasks: int, ways: int, images: int) -> Tensor:
    """0 … ways − 1, each as often as it has images: int64 `[tasks, points]`."""
    return torch.arange(ways).repeat_interleave(images).repeat(tasks, 1)
