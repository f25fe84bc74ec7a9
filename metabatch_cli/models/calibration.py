"""How often the truth lies where a prediction says, and how wide the prediction is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from metabatch_cli.models.masking import masked_mean
from metabatch_cli.models.predictive import marginals

LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Of the central intervals whose coverage is measured: 0.05, 0.10 … 0.95."""


class Calibration(NamedTuple):
    """Of each task, over its targets and the dimensions of y.

    Attributes:
        coverage: `[tasks, levels]`, the fraction of numbers in the central interval of a level.
        variance: `[tasks]`, the mean predicted variance, in the square of y's units.
    """

    coverage: Tensor
    variance: Tensor


def calibration(
    prediction: Distribution, y: Tensor, mask: Tensor | None, levels: Tensor
) -> Calibration | None:
    """Coverage and variance of what is predicted of each target alone.

    The central interval of level p lies between the quantiles (1 − p)/2 and (1 + p)/2; y is in it
    if `|2 F(y) − 1| ≤ p`, F being the predicted distribution function (Gneiting et al. 2007,
    "Probabilistic forecasts, calibration and sharpness"). Of a mixture it is the
    mixture's own.

    Args:
        prediction: of either kind (models/predictive.py), of `n_target` targets.
        y: `[tasks, n_target, dim_y]`.
        mask: bool `[tasks, n_target]`, True where a target is real; None if all are.
        levels: `[levels]`, in (0, 1).

    Returns:
        NaN for a task without targets; None of a distribution that has no distribution function.
    """
    alone = marginals(prediction)
    below = probability_below(alone, y)
    if below is None:
        return None
    inside = (2 * below - 1).abs()[..., None] <= levels.to(below)
    empty = float("nan")
    coverage = masked_mean(inside.to(below.dtype).mean(dim=2), mask, empty=empty)
    variance = masked_mean(alone.variance.mean(dim=2), mask, empty=empty)
    return Calibration(coverage, variance)


def probability_below(alone: Distribution, y: Tensor) -> Tensor | None:
    """`F(y)` of each dimension of y by itself, `[tasks, n_target, dim_y]`; None if not known.

    Args:
        alone: batch `[tasks, n_target]`, event `[dim_y]`.
        y: `[tasks, n_target, dim_y]`.
    """
    if isinstance(alone, MixtureSameFamily):
        parts = probability_below(alone.component_distribution, y[..., None, :])
        weights = alone.mixture_distribution.probs[..., None]
        return None if parts is None else (weights * parts).sum(dim=-2)
    if isinstance(alone, MultivariateNormal):
        alone = Independent(Normal(alone.mean, alone.stddev, validate_args=False), 1)
    if not isinstance(alone, Independent):
        return None
    try:
        with torch.autocast(y.device.type, enabled=False):
            return alone.base_dist.cdf(y)
    except NotImplementedError:
        return None
