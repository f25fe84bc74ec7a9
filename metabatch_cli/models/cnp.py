"""The conditional neural process: a mean of encoded context points, decoded at each target."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from metabatch_cli.models.masking import masked_mean
from metabatch_cli.models.mlp import Activation, layers


class CNP(nn.Module):
    """Garnelo et al. 2018, "Conditional Neural Processes" (arXiv:1807.01613), eq. 2–4.

    Every pair (x, y) of the context is encoded, the mean of the codes stands for the function,
    and a decoder gives mean and standard deviation of y at each target x.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y.
        width: units of each layer, and of the code.
        encoder_depth: linear layers of the encoder.
        decoder_depth: linear layers of the decoder.
        activation: between the layers.
        min_sigma: the smallest σ: `σ = min_sigma + (1 − min_sigma) · softplus(·)`, where the
            paper's code has 0.1. It caps the log-likelihood at `−log(min_sigma · √(2π))`.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 128,
        encoder_depth: Annotated[int, Ge(1)] = 4,
        decoder_depth: Annotated[int, Ge(1)] = 4,
        activation: Activation = "relu",
        min_sigma: Annotated[float, Gt(0), Le(1)] = 0.1,
    ) -> None:
        super().__init__()
        self.width = width
        self.min_sigma = min_sigma
        self.encoder = layers([dim_x + dim_y, *[width] * encoder_depth], activation)
        self.decoder = layers(
            [width + dim_x, *[width] * (decoder_depth - 1), 2 * dim_y], activation
        )

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
    ) -> Distribution:
        """The predictive distribution at the targets.

        Args:
            context_x: `[tasks, n_context, dim_x]`; `n_context` may be 0.
            context_y: `[tasks, n_context, dim_y]`.
            target_x: `[tasks, n_target, dim_x]`.
            context_mask: bool `[tasks, n_context]`, True where a point is real; None if all are.
                Padding is finite.

        Returns:
            Normal, batch `[tasks, n_target]`, event `[dim_y]`.
        """
        n_tasks, n_target, _ = target_x.shape
        if context_x.shape[1]:
            codes = self.encoder(torch.cat([context_x, context_y], dim=-1))
            code = masked_mean(codes, context_mask)
        else:
            code = target_x.new_zeros(n_tasks, self.width)
        code = code[:, None, :].expand(n_tasks, n_target, self.width)
        raw = self.decoder(torch.cat([code.to(target_x.dtype), target_x], dim=-1))
        # the likelihood is no place for bfloat16
        mean, raw_sigma = raw.to(target_x.dtype).chunk(2, dim=-1)
        sigma = self.min_sigma + (1 - self.min_sigma) * F.softplus(raw_sigma)
        # unchecked: a mean that is no number shall reach the loss, where the loop explains it
        return Independent(Normal(mean, sigma, validate_args=False), 1, validate_args=False)
