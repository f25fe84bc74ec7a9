"""From a network's raw numbers to a normal distribution: what bounds σ from below."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.nn import functional as F

from metabatch_cli.batching.arguments import one_of

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

Sigma = Literal["scaled", "additive", "exp"]
"""How a raw number becomes σ, with m = `min_sigma`: `m + (1 − m)·softplus`, `m + softplus`, or
`m + exp`."""

MinSigma = Annotated[float, Ge(0), Le(1)]
"""The smallest σ; 0 for none. It caps the log-likelihood at `−log(min_sigma·√(2π))`."""


class Gaussian(Normal):
    """torch's `Normal` with a density in two thirds of the operations, forth and back."""

    def log_prob(self, value: Tensor) -> Tensor:
        standardised = (value - self.loc) / self.scale
        squares = torch.addcmul(self.scale.log(), standardised, standardised, value=0.5)
        return -(squares + HALF_LOG_2PI)


def normal(raw: Tensor, min_sigma: float, sigma: Sigma = "scaled") -> Independent:
    """The distribution of y that raw numbers `[…, 2·dim_y]` stand for: means, then deviations.

    Args:
        raw: of the network.
        min_sigma: m, the smallest σ.
        sigma: `scaled`, `m + (1 − m)·softplus`, is what the code of Garnelo et al. 2018 and of
            Nguyen & Grover 2022 has, with m = 0.1; `exp` without a floor what the latter's
            transformers have.

    Returns:
        Normal, batch `[…]`, event `[dim_y]`.
    """
    mean, deviation = raw.chunk(2, dim=-1)
    return Independent(
        # unchecked: a mean that is no number shall reach the loss, where the loop explains it
        Gaussian(mean, positive(deviation, min_sigma, sigma), validate_args=False),
        1,
        validate_args=False,
    )


def positive(raw: Tensor, least: float, form: Sigma) -> Tensor:
    """A positive number of at least `least` from any number."""
    if form == "exp":
        return least + raw.exp()
    scale = 1 - least if one_of("sigma", form, get_args(Sigma)) == "scaled" else 1.0
    return least + scale * F.softplus(raw)
