"""Padding that counts for nothing: means over real points, where a mask says which these are.

Without a mask every point is real, and nothing is computed that would not be computed anyway.

Where several samples of a task's points are asked for at once, drawn with replacement, the place of
the mask is taken by *counts*: numbers `[samples, tasks, points]`, how often each point was drawn, 0
for one that is not real. Points that were drawn often count as often, in means as in attention.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


def blank(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values with 0 in the place of padding, whatever stood there.

    A product with 0 would not do: of a NaN or an infinity it makes a NaN, if not in the loss,
    then in a gradient.

    Args:
        values: `[tasks, points, …]`, or any shape that begins with the mask's.
        mask: bool `[tasks, points]`, True where a point is real; None if all are.
    """
    return values if mask is None else values.masked_fill(~_aligned(mask, values), 0)


def are_counts(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a mask holds counts."""
    return mask is not None and mask.dtype != torch.bool


def mean_of_points(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the points of `values [(samples,) tasks, points, width]`; 0 over none.

    Args:
        mask: bool `[tasks, points]`, or counts; None if all points are real.

    Returns:
        `[(samples,) tasks, width]`, with samples if values or counts have them.
    """
    if not values.shape[-2]:
        samples = mask.shape[:1] if are_counts(mask) else values.shape[:-3]
        return values.new_zeros(*samples, values.shape[-3], values.shape[-1])
    if mask is None:
        return values.mean(dim=-2)
    if are_counts(mask):
        shares = mask / mask.sum(dim=2, keepdim=True).clamp(min=1)
        if values.dim() == 4:
            return (shares[:, :, None] @ values).squeeze(2)
        return (shares.transpose(0, 1) @ values).transpose(0, 1)
    rows = values.flatten(0, -3)
    return masked_mean(rows, mask.repeat(len(rows) // len(mask), 1)).unflatten(0, values.shape[:-2])


def joined_masks(
    x1: Tensor, mask1: Tensor | None, x2: Tensor, mask2: Tensor | None
) -> Tensor | None:
    """The mask of two sets of points side by side; None if all points of both are real.

    Args:
        x1, x2: `[tasks, points, …]`.
        mask1, mask2: bool `[tasks, points]`; None if all are real.
    """
    if mask1 is None and mask2 is None:
        return None
    pairs = ((x1, mask1), (x2, mask2))
    return torch.cat(
        [x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in pairs], dim=1
    )


def masked_mean(values: Tensor, mask: Tensor | None, dim: int = 1, empty: float = 0.0) -> Tensor:
    """The mean over real points: of `[tasks, points, …]` → `[tasks, …]`.

    Args:
        values: numbers of each point, finite where they are padding if a gradient is wanted.
        mask: bool, of the shape that `values` begins with; None if all points are real.
        dim: that of the points.
        empty: the mean where a task has no real point.
    """
    if mask is None:
        return values.mean(dim=dim)
    count = _aligned(mask, values).sum(dim=dim)
    mean = blank(values, mask).sum(dim=dim) / count.clamp(min=1)
    return mean.masked_fill(count == 0, empty)


def task_scores(of_points: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """Scores of tasks `[tasks]` from those of their targets `[tasks, targets]`, by name.

    NaN for a task without a real target: it does not count.
    """
    return {
        name: masked_mean(values, mask, empty=float("nan")) for name, values in of_points.items()
    }


def mean_over_tasks(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean `[…]` of `[tasks, …]` over the tasks that have a real point; 0 if none has."""
    if mask is None:
        return values.mean(dim=0)
    judged = mask.any(dim=1)
    return blank(values, judged).sum(dim=0) / judged.sum().clamp(min=1)


def mean_loss(losses: Tensor, mask: Tensor | None) -> Tensor:
    """From the losses `[tasks, targets]` of all targets to one, in which every task counts alike.

    The mean of each task over its own real targets, then the mean over the tasks that have any.
    Where all tasks have the same number of targets, this is the mean over all.
    """
    if mask is None:
        return losses.mean()
    return mean_over_tasks(masked_mean(losses, mask), mask)


def _aligned(mask: Tensor, values: Tensor) -> Tensor:
    """The mask with a dimension of 1 for each that it lacks."""
    return mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim()))
