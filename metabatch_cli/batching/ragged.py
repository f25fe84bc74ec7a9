"""Tasks of unequal sizes: a batch of them padded and masked, packed end to end, or as a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metabatch_cli.batching.task import Task, concatenate


class PaddedTask(NamedTuple):
    """A batch of tasks of unequal sizes, filled up to common ones: the form that learners take.

    As a `Task`, with two masks that say which points are real. Padding is 0 where we make it;
    whatever stands there, NaN too, changes no loss, no gradient and no score of our learners.
    A task may have no context, and a task without targets does not count: it is left out of
    means over tasks.

    Attributes:
        context_x, context_y: `[tasks, the most context points, …]`.
        context_mask: bool `[tasks, the most context points]`, True where a point is real.
        target_x, target_y: `[tasks, the most target points, …]`.
        target_mask: bool `[tasks, the most target points]`, True where a point is real.
        aux: what else is known about each task, tensors `[tasks, …]`.
    """

    context_x: Tensor
    context_y: Tensor
    context_mask: Tensor
    target_x: Tensor
    target_y: Tensor
    target_mask: Tensor
    aux: dict[str, Tensor] = {}  # noqa: RUF012 (nobody writes into a default)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Both masks by their names, as keyword arguments of `Learner.predict`."""
        return {"context_mask": self.context_mask, "target_mask": self.target_mask}

    def packed(self) -> PackedTask:
        """Only the real points, end to end."""
        return PackedTask(
            self.context_x[self.context_mask],
            self.context_y[self.context_mask],
            _offsets(self.context_mask.sum(dim=1)),
            self.target_x[self.target_mask],
            self.target_y[self.target_mask],
            _offsets(self.target_mask.sum(dim=1)),
            self.aux,
        )

    def unpad(self) -> list[Task]:
        """Each task alone, with its real points."""
        return self.packed().unpad()

    def common(self) -> Task:
        """Every task with its first points, as many as all of them have."""
        packed = self.packed()
        n_context, n_target = (int(lengths.min()) for lengths in packed.lengths)
        left = packed.padded()
        return Task(
            left.context_x[:, :n_context],
            left.context_y[:, :n_context],
            left.target_x[:, :n_target],
            left.target_y[:, :n_target],
            self.aux,
        )

    @classmethod
    def join_padded(cls, parts: Sequence[PaddedTask]) -> PaddedTask:
        """Batches joined along the tasks, all padded to the longest of them."""
        names = cls._fields[:-1]
        columns = {name: [getattr(part, name) for part in parts] for name in names}
        return cls(
            **{name: torch.cat(_lengthened(columns[name])) for name in names},
            aux=concatenate([part.aux for part in parts]),
        )


class PackedTask(NamedTuple):
    """A batch of tasks of unequal sizes without a gap: the points of all tasks, end to end.

    The context of task `i` are the points `context_offsets[i] … context_offsets[i + 1] − 1`.

    Attributes:
        context_x, context_y: `[context points of all tasks, …]`.
        context_offsets: int64 `[tasks + 1]`, from 0 to the number of all context points.
        target_x, target_y: `[target points of all tasks, …]`.
        target_offsets: int64 `[tasks + 1]`, from 0 to the number of all target points.
        aux: what else is known about each task, tensors `[tasks, …]`.
    """

    context_x: Tensor
    context_y: Tensor
    context_offsets: Tensor
    target_x: Tensor
    target_y: Tensor
    target_offsets: Tensor
    aux: dict[str, Tensor] = {}  # noqa: RUF012 (nobody writes into a default)

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """The points of each task in its context and in its target, int64 `[tasks]` each."""
        return self.context_offsets.diff(), self.target_offsets.diff()

    def padded(self, n_context: int | None = None, n_target: int | None = None) -> PaddedTask:
        """The same tasks, filled up with zeros behind their points.

        Args:
            n_context: context points to fill up to; None for those of the largest task.
            n_target: target points to fill up to; None for those of the largest task, but one if
                no task has any: there is always something to predict, be it padding.

        Raises:
            ValueError: a task has more points.
        """
        n_contexts, n_targets = self.lengths
        context_mask = _prefixes("n_context", n_contexts, n_context)
        target_mask = _prefixes("n_target", n_targets, n_target, least=1)
        return PaddedTask(
            _spread(self.context_x, context_mask),
            _spread(self.context_y, context_mask),
            context_mask,
            _spread(self.target_x, target_mask),
            _spread(self.target_y, target_mask),
            target_mask,
            self.aux,
        )

    def unpad(self) -> list[Task]:
        """Each task alone, with its points; views of the packed ones."""
        n_contexts, n_targets = (lengths.tolist() for lengths in self.lengths)
        fields = zip(
            self.context_x.split(n_contexts),
            self.context_y.split(n_contexts),
            self.target_x.split(n_targets),
            self.target_y.split(n_targets),
            strict=True,
        )
        return [
            Task(*four, aux={name: value[place] for name, value in self.aux.items()})
            for place, four in enumerate(fields)
        ]


Tasks = Task | PaddedTask  # what a learner takes


def pack(tasks: Sequence[Task]) -> PackedTask:
    """Single tasks `[points, …]` end to end.

    Raises:
        ValueError: no task at all, x and y of unequal length, fields that differ in more than
            their number of points, or in their entries of `aux`.
    """
    if not tasks:
        raise ValueError("no task to pack: a batch has at least one")
    n_contexts = _counts(tasks, "context")
    n_targets = _counts(tasks, "target")
    names = list(tasks[0].aux)
    for place, task in enumerate(tasks):
        if set(task.aux) != set(names):
            raise ValueError(
                f"aux has {', '.join(names) or 'nothing'} in task 0 of the batch and "
                f"{', '.join(task.aux) or 'nothing'} in task {place}: all tasks need the same"
            )
    context_x = _cat(tasks, "context_x")
    return PackedTask(
        context_x,
        _cat(tasks, "context_y"),
        _offsets(torch.tensor(n_contexts, device=context_x.device)),
        _cat(tasks, "target_x"),
        _cat(tasks, "target_y"),
        _offsets(torch.tensor(n_targets, device=context_x.device)),
        {name: torch.stack([task.aux[name] for task in tasks]) for name in names},
    )


def pad(tasks: Sequence[Task]) -> PaddedTask:
    """Single tasks `[points, …]`, filled up with zeros to the sizes of the largest.

    Raises:
        ValueError: as `pack`.
    """
    return pack(tasks).padded()


def _counts(tasks: Sequence[Task], part: str) -> list[int]:
    """The points of each task in its context or target."""
    pairs = [(len(getattr(task, f"{part}_x")), len(getattr(task, f"{part}_y"))) for task in tasks]
    for place, (of_x, of_y) in enumerate(pairs):
        if of_x != of_y:
            raise ValueError(
                f"task {place} of the batch has {of_x} points in {part}_x and {of_y} in {part}_y"
            )
    return [of_x for of_x, _ in pairs]


def _cat(tasks: Sequence[Task], name: str) -> Tensor:
    parts = [getattr(task, name) for task in tasks]
    for place, part in enumerate(parts):
        # torch.cat lets an empty vector pass for anything
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{name} is {list(parts[0].shape)} in task 0 of the batch and {list(part.shape)} "
                f"in task {place}: tasks may differ in their number of points only"
            )
    return torch.cat(parts)


def _offsets(lengths: Tensor) -> Tensor:
    """Where each task begins, and where the last one ends."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _prefixes(name: str, lengths: Tensor, wanted: int | None, least: int = 0) -> Tensor:
    """The mask `[tasks, points]` of tasks that begin with their real points."""
    most = int(lengths.max()) if len(lengths) else 0
    if wanted is not None and wanted < most:
        raise ValueError(f"{name}={wanted} is too small: a task of the batch has {most} points")
    columns = max(most, least) if wanted is None else wanted
    return torch.arange(columns, device=lengths.device) < lengths[:, None]


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Packed values `[points of all tasks, …]` at the places where the mask is True, else 0."""
    padded = values.new_zeros(*mask.shape, *values.shape[1:])
    padded[mask] = values
    return padded


def _lengthened(columns: list[Tensor]) -> list[Tensor]:
    """Tensors `[tasks, points, …]`, all with the points of the longest, False or 0 at the end."""
    most = max(column.shape[1] for column in columns)
    return [
        torch.cat(
            [column, column.new_zeros(len(column), most - column.shape[1], *column.shape[2:])], 1
        )
        if column.shape[1] < most
        else column
        for column in columns
    ]
