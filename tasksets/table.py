"""Regression on a table: a task is a group of rows, such as a storm, seen through some of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.ragged import PaddedTask, Tasks
from metabatch_cli.batching.sizes import WORDS, SizeLaw
from metabatch_cli.batching.streams import Stream, permutation
from metabatch_cli.batching.task import Task, to_device
from metabatch_cli.batching.taskset import Split, TaskSet, TaskSpec
from tasksets.baselines import (
    context_mean,
    gaussian_scores,
    linear_interpolation,
    squared_errors,
)
from tasksets.images import DataError
from tasksets.table_file import TableFile

_FITTED = 8192  # training tasks that the σ of the baselines is fitted to
_AT_ONCE = 64  # of them in a batch, which shares its sizes


class Table(TaskSet):
    """Tasks from the groups of a table: an index is a group, its rows are drawn anew every time.

    The context is some rows of the group, at most all but one; the targets are others, all that
    are left if there are not more than `n_target`. No row comes twice. The tasks are in the
    table's own units; `spec.units` says how the training groups' rows are distributed.
    `aux["group"]`, int64 `[tasks]`, is the place of each group in `dataset.group_names`.

    Groups of fewer than `min_pts + 1` (or the file's `min_rows`) rows are left out.

    Two baselines are scored with every evaluation (`tasksets.baselines`): the context's mean and,
    for x of one dimension, straight lines between its points. They know nothing of their
    own error, so their normal distribution has one σ for each dimension of y: the one of maximum
    likelihood on tasks of the training groups, of the same law of sizes, always the same ones.

    Args:
        dataset: the table.
        min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts, eval, predict_full_target,
            predict_full_target_during_eval, sizes, split: as in `TaskSet`; sizes are the most
            that a task has.
        context: "random": context and targets are any rows. "first": the context is the first
            rows of the group and the targets are those that follow, in the order of time (of the
            file, where the table has no time): forecasting.
        ragged: whether each group brings the rows that it has. Else all tasks of a batch have
            the sizes that the law draws, and groups of fewer rows than these may be in all are
            left out.

    Attributes:
        groups: the places of this split's groups in `dataset.group_names`, int64 `[len(self)]`.
        least: the rows that a group must have.
        left_out: how many groups of this split have fewer.

    Raises:
        ValueError: an argument that cannot be.
        DataError: a split without a group that has enough rows.
    """

    ragged = True

    def __init__(
        self,
        dataset: TableFile,
        min_pts: int | None = None,
        max_ctx_pts: int | None = None,
        max_tgt_pts: int | None = None,
        total_tgt_pts: int | None = None,
        eval: bool = False,
        predict_full_target: bool = False,
        predict_full_target_during_eval: bool = False,
        *,
        context: Literal["random", "first"] = "random",
        ragged: bool = True,
        sizes: str | Mapping[str, Any] | SizeLaw = "metabatch",
        split: Split | None = None,
    ) -> None:
        one_of("context", context, ("random", "first"))
        self.dataset = dataset
        self.context = context
        self.ragged = ragged
        super().__init__(
            min_pts,
            max_ctx_pts,
            max_tgt_pts,
            total_tgt_pts,
            eval,
            predict_full_target,
            predict_full_target_during_eval,
            sizes=sizes,
            split=split,
        )

    def belong_to(self, split: Split) -> None:
        super().belong_to(split)
        self.least = max(self.dataset.min_rows, 1 + (self.min_pts or 1))
        if not self.ragged:
            most = self.law.draw([2**64 - 1] * WORDS)
            self.least = max(self.least, most["n_context"] + most["n_target"])
        self.groups = self._large_enough(split)
        self.left_out = len(self.dataset.select(split)) - len(self.groups)
        vars(self).pop("baseline_sigmas", None)  # they are of the law of the sizes

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def note(self) -> str:  # type: ignore[override]
        """What was left out of the table, if anything was."""
        parts = []
        if self.left_out:
            groups = _counted(self.left_out, "group")
            parts.append(f"{groups} of fewer than {self.least} rows left out")
        if self.dataset.dropped_rows:
            rows = _counted(self.dataset.dropped_rows, "row")
            parts.append(f"{rows} with an empty cell dropped")
        return ", ".join(parts)

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Tasks:
        return self._create(self.groups[indices.numpy()], n_context, n_target, generator)

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(
            x_shape=tuple(self.dataset.x.shape[1:]),
            y_shape=tuple(self.dataset.y.shape[1:]),
            units=self.dataset.normalisation,
        )

    def baselines(self, tasks: Tasks) -> dict[str, dict[str, Tensor]]:
        """`context_mean` and, for x of one dimension, `linear_interpolation`, on the CPU."""
        tasks = to_device(tasks, "cpu")
        return {
            name: gaussian_scores(tasks, prediction, self.baseline_sigmas[name])
            for name, prediction in self._predictions(tasks).items()
        }

    @cached_property
    def baseline_sigmas(self) -> dict[str, Tensor]:
        """The standard deviation of each baseline, float64 `[dim_y]`.

        Every task counts alike, as in a score; so this is the root of the mean over tasks of the
        mean square error over targets.
        """
        groups = self._large_enough("train")
        stream = Stream(0, "table", "baselines")
        generator = torch.Generator()
        errors: dict[str, list[Tensor]] = {}
        passes = -(-_FITTED // len(groups))  # each over all groups, in another order
        orders = [permutation(stream.words(len(groups), number)) for number in range(passes)]
        order = np.concatenate(orders)[:_FITTED]
        for step, start in enumerate(range(0, _FITTED, _AT_ONCE)):
            sizes = self.law.draw(stream.words(WORDS, step, 1).tolist())
            stream.fill(generator, step, 2)
            chosen = groups[order[start : start + _AT_ONCE]]
            tasks = self._create(chosen, sizes["n_context"], sizes["n_target"], generator)
            for name, prediction in self._predictions(tasks).items():
                errors.setdefault(name, []).append(squared_errors(tasks, prediction))
        tiny = 1e-6 * torch.tensor(self.dataset.normalisation["y_std"], dtype=torch.float64)
        return {
            name: torch.cat(of_tasks).mean(dim=0).sqrt().maximum(tiny)
            for name, of_tasks in errors.items()
        }

    def _predictions(self, tasks: Tasks) -> dict[str, Tensor]:
        otherwise = torch.tensor(self.dataset.normalisation["y_mean"], dtype=torch.float64)
        predictions = {"context_mean": context_mean(tasks, otherwise)}
        if self.dataset.x.shape[1] == 1:
            predictions["linear_interpolation"] = linear_interpolation(tasks, otherwise)
        return predictions

    # --- creation ----------------------------------------------------------------------------

    def _large_enough(self, split: Split) -> np.ndarray:
        """The groups of a split that have enough rows."""
        groups = self.dataset.select(split)
        large = groups[self.dataset.counts[groups] >= self.least]
        if not len(large):
            raise DataError(
                f"{self.dataset.path}: none of the {len(groups)} groups of the split {split!r} "
                f"has the {self.least} rows that a task needs"
            )
        return large

    def _create(
        self, groups: np.ndarray, n_context: int, n_target: int, generator: torch.Generator
    ) -> Tasks:
        """A task of each group."""
        counts, starts = self.dataset.counts[groups], self.dataset.starts[groups]
        if not self.ragged and n_context + n_target > self.least:
            raise ValueError(
                f"n_context={n_context} and n_target={n_target} are more than the {self.least} "
                "rows that every group has: ragged=true gives each task what its group has"
            )
        n_contexts = np.minimum(n_context, counts - 1)[:, None]
        n_targets = np.minimum(n_target, counts[:, None] - n_contexts)
        drawn = int((n_contexts + n_targets).max())
        if self.context == "first":
            order = np.broadcast_to(np.arange(drawn), (len(groups), drawn))
        else:
            order = _random_rows(counts, drawn, generator)
        context = np.arange(n_contexts.max())
        target = np.arange(n_targets.max()) + n_contexts
        context_mask = context < n_contexts
        target_mask = target < n_contexts + n_targets
        fields: list[Tensor] = []
        targets = np.take_along_axis(order, target.clip(max=drawn - 1), axis=1)
        parts = (order[:, : len(context)], context_mask), (targets, target_mask)
        for places, mask in parts:
            rows = np.where(mask, places, 0) + starts[:, None]
            for values in (self.dataset.x, self.dataset.y):
                found = values[rows]
                found[~mask] = 0
                fields.append(torch.from_numpy(found))
            fields.append(torch.from_numpy(mask))
        context_x, context_y, of_context, target_x, target_y, of_target = fields
        aux = {"group": torch.from_numpy(groups)}
        if not self.ragged:
            return Task(context_x, context_y, target_x, target_y, aux)
        return PaddedTask(context_x, context_y, of_context, target_x, target_y, of_target, aux)


def _random_rows(counts: np.ndarray, drawn: int, generator: torch.Generator) -> np.ndarray:
    """Distinct rows of each group in random order, int64 `[groups, drawn]`.

    Rows that a group has, counted from its first, come before any that it has not. As in
    `ImageCompletion`, a random key carries the number of its row in its lowest bits.
    """
    longest = int(counts.max())
    keys = torch.empty(len(counts), longest, dtype=torch.int64).random_(generator=generator).numpy()
    bits = max(1, (longest - 1).bit_length())
    rows = np.arange(longest)
    keys >>= bits
    keys <<= bits
    keys |= rows
    keys[rows >= counts[:, None]] = np.iinfo(np.int64).max
    if drawn < longest:
        keys.partition(drawn, axis=1)
    return np.sort(keys[:, :drawn], axis=1) & ((1 << bits) - 1)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
