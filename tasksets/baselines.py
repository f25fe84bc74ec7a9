"""Predictions that ask for no training, and what they score: what a learner should beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metabatch_cli.batching.ragged import PaddedTask, Tasks


def context_mean(tasks: Tasks, otherwise: Tensor) -> Tensor:
    """Every target is the mean of the context.

    Args:
        tasks: any; a single size or padded.
        otherwise: what is predicted for a task without a context, `[dim_y]`.

    Returns:
        float64 `[tasks, targets, dim_y]`, some number where a target is padding.
    """
    mask = _masks(tasks)[0]
    y = tasks.context_y.double().masked_fill(~mask[:, :, None], 0)
    count = mask.sum(dim=1)[:, None]
    mean = torch.where(count > 0, y.sum(dim=1) / count.clamp(min=1), otherwise.double())
    return mean[:, None, :].expand(-1, tasks.target_x.shape[1], -1)


def linear_interpolation(tasks: Tasks, otherwise: Tensor) -> Tensor:
    """Straight lines between the context points, over x of one dimension.

    Beyond the outermost points it stays what it is there, as `numpy.interp`; where several
    points have the same x, their mean counts.

    Args:
        tasks, otherwise: as in `context_mean`.

    Returns:
        As `context_mean`.

    Raises:
        ValueError: x of more than one dimension.
    """
    if tasks.context_x.shape[2:] != (1,):
        raise ValueError(f"x is {list(tasks.context_x.shape[2:])} a point: lines need one number")
    mask, target_mask = _masks(tasks)
    if not mask.shape[1]:
        return context_mean(tasks, otherwise)
    dim_y = tasks.context_y.shape[2]
    x = tasks.context_x[:, :, 0].double().masked_fill(~mask, math.inf)
    x, order = x.sort(dim=1)
    y = tasks.context_y.double().masked_fill(~mask[:, :, None], 0)
    y = y.gather(1, order[:, :, None].expand(-1, -1, dim_y))

    run = torch.zeros_like(order)  # of points of equal x
    run[:, 1:] = (x[:, 1:] != x[:, :-1]).cumsum(dim=1)
    runs = run[:, :, None].expand(-1, -1, dim_y)
    sums, counts = (torch.zeros_like(y).scatter_add_(1, runs, v) for v in (y, torch.ones_like(y)))
    y = (sums / counts.clamp(min=1)).gather(1, runs)

    wanted = tasks.target_x[:, :, 0].double().masked_fill(~target_mask, 0).contiguous()
    last = (mask.sum(dim=1)[:, None] - 1).clamp(min=0)
    after = torch.searchsorted(x, wanted)  # the first point that is not before it
    before = (after - 1).clamp(min=0).minimum(last)
    after = after.minimum(last)
    x_before, x_after = x.gather(1, before), x.gather(1, after)
    wide = x_after > x_before
    share = torch.where(wide, (wanted - x_before) / torch.where(wide, x_after - x_before, 1.0), 0.0)
    y_before, y_after = (
        y.gather(1, place[:, :, None].expand(-1, -1, dim_y)) for place in (before, after)
    )
    lines = y_before + share[:, :, None] * (y_after - y_before)
    return torch.where(mask.any(dim=1)[:, None, None], lines, otherwise.double())


def squared_errors(tasks: Tasks, prediction: Tensor) -> Tensor:
    """The mean over each task's targets, float64 `[tasks, dim_y]`; NaN without a target."""
    mask = _masks(tasks)[1][:, :, None]
    errors = (prediction - tasks.target_y.double()).square().masked_fill(~mask, 0)
    return errors.sum(dim=1) / mask.sum(dim=1)


def gaussian_scores(tasks: Tasks, prediction: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """What a normal distribution around a prediction scores, float64 `[tasks]` by metric.

    `mse`: over targets and dimensions of y. `rmse`: its root, task by task. `log_likelihood`:
    nats per target point, summed over the dimensions of y. NaN for a task without a target.

    Args:
        prediction: the means, `[tasks, targets, dim_y]`.
        sigma: the standard deviations, `[dim_y]`, the same everywhere.
    """
    errors = squared_errors(tasks, prediction)
    mse = errors.mean(dim=1)
    surprise = 0.5 * errors / sigma.square() + sigma.log() + 0.5 * math.log(2 * math.pi)
    return {"mse": mse, "rmse": mse.sqrt(), "log_likelihood": -surprise.sum(dim=1)}


def _masks(tasks: Tasks) -> tuple[Tensor, Tensor]:
    if isinstance(tasks, PaddedTask):
        return tasks.context_mask, tasks.target_mask
    context, target = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for x in (tasks.context_x, tasks.target_x)
    )
    return context, target
