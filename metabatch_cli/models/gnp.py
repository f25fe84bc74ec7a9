"""The Gaussian neural process: targets that are predicted together, with their covariance."""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from metabatch_cli.models.encoders import CrossAttentionEncoder, Decoder, PoolingEncoder
from metabatch_cli.models.gaussian import MinSigma, Sigma, positive
from metabatch_cli.models.mlp import Activation
from metabatch_cli.models.predictive import LowRankNormal


class GNP(nn.Module):
    """Markou et al. 2022, "Practical Conditional Neural Processes …" (arXiv:2203.08775).

    A conditional neural process whose decoder gives at each target, beside mean and noise,
    a vector g of `rank` numbers: the covariance of two targets is `gᵢᵀgⱼ / rank`, plus the noise
    on the diagonal (the paper's `linear` covariance). It learns covariances only from a joint
    likelihood: `learner.scoring=joint`.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y, each with vectors of its own.
        attention: whether targets also attend to the context, as in `CANP`; else they all have
            the same code, as in `CNP`.
        rank: numbers of a vector g. More than numbers to predict are of no use.
        width: units of each layer, and of a code.
        encoder_depth: layers over each context point; with attention, the last two of them are
            self-attention.
        post_depth: linear layers over the mean of the points.
        query_depth: linear layers that make queries and keys of x; with attention only.
        heads: of every attention.
        decoder_depth: linear layers of the decoder.
        activation: between the layers.
        min_sigma, sigma: of the noise, as for `CNP`.
    """

    joint = True  # what targets have in common is learnt from a joint likelihood only

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        attention: bool = True,
        rank: Annotated[int, Ge(1)] = 64,
        width: Annotated[int, Ge(1)] = 128,
        encoder_depth: Annotated[int, Ge(3)] = 4,
        post_depth: Annotated[int, Ge(0)] = 2,
        query_depth: Annotated[int, Ge(1)] = 2,
        heads: Annotated[int, Ge(1)] = 8,
        decoder_depth: Annotated[int, Ge(1)] = 4,
        activation: Activation = "relu",
        min_sigma: MinSigma = 0.001,
        sigma: Sigma = "additive",
    ) -> None:
        super().__init__()
        self.dim_y, self.rank = dim_y, rank
        self.min_sigma, self.sigma = min_sigma, sigma
        self.pooling = PoolingEncoder(
            dim_x + dim_y,
            width,
            encoder_depth,
            post_depth,
            activation,
            heads if attention else None,
        )
        self.attentive = (
            CrossAttentionEncoder(
                dim_x, dim_y, width, encoder_depth, query_depth, activation, heads
            )
            if attention
            else None
        )
        codes = [width, width] if attention else [width]
        self.decoder = Decoder(codes, dim_x, width, decoder_depth, dim_y * (2 + rank), activation)

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> LowRankNormal:
        """The joint prediction of all targets.

        Args:
            context_x: `[tasks, n_context, dim_x]`; `n_context` may be 0.
            context_y: `[tasks, n_context, dim_y]`.
            target_x: `[tasks, n_target, dim_x]`.
            context_mask: bool `[tasks, n_context]`, True where a point is real; None if all are.
                Padding is finite.
            target_mask: the same of the targets.

        Returns:
            Batch `[tasks]`, event `[n_target, dim_y]`.
        """
        codes = [self.pooling(context_x, context_y, context_mask)[:, None]]
        if self.attentive is not None:
            codes.append(self.attentive(context_x, context_y, target_x, context_mask))
        # the likelihood is no place for bfloat16
        raw = self.decoder(codes, target_x).to(target_x.dtype)
        mean, noise, factor = raw.split([self.dim_y, self.dim_y, self.dim_y * self.rank], dim=-1)
        factor = factor.unflatten(-1, (self.dim_y, self.rank)) / math.sqrt(self.rank)
        return LowRankNormal(mean, factor, positive(noise, self.min_sigma, self.sigma), target_mask)
