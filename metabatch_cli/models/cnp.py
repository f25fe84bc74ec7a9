"""The conditional neural process: a mean of encoded context points, decoded at each target."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn
from torch.distributions import Independent

from metabatch_cli.models.encoders import Decoder, PoolingEncoder
from metabatch_cli.models.gaussian import MinSigma, Sigma, normal
from metabatch_cli.models.mlp import Activation


class CNP(nn.Module):
    """Garnelo et al. 2018, "Conditional Neural Processes" (arXiv:1807.01613), eq. 2–4.

    Every pair (x, y) of the context is encoded, the mean of the codes stands for the function,
    and a decoder gives mean and standard deviation of y at each target x.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y.
        width: units of each layer, and of a code.
        encoder_depth: linear layers over each context point.
        post_depth: linear layers over their mean.
        encoders: of which each gives a code of its own (the TNP paper's CNP has two).
        decoder_depth: linear layers of the decoder.
        activation: between the layers.
        min_sigma: the smallest σ, 0 for none; the paper's code has 0.1. It caps the
            log-likelihood at `−log(min_sigma · √(2π))`.
        sigma: how σ is made: `scaled`, `min_sigma + (1 − min_sigma) · softplus(·)`; `additive`,
            `min_sigma + softplus(·)`; `exp`, `min_sigma + exp(·)`.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 128,
        encoder_depth: Annotated[int, Ge(1)] = 4,
        post_depth: Annotated[int, Ge(0)] = 0,
        encoders: Annotated[int, Ge(1)] = 1,
        decoder_depth: Annotated[int, Ge(1)] = 4,
        activation: Activation = "relu",
        min_sigma: MinSigma = 0.1,
        sigma: Sigma = "scaled",
    ) -> None:
        super().__init__()
        self.min_sigma, self.sigma = min_sigma, sigma
        self.encoders = nn.ModuleList(
            PoolingEncoder(dim_x + dim_y, width, encoder_depth, post_depth, activation)
            for _ in range(encoders)
        )
        self.decoder = Decoder(
            [width] * encoders, dim_x, width, decoder_depth, 2 * dim_y, activation
        )

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
    ) -> Independent:
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
        codes = self.encode(context_x, context_y, target_x, context_mask)
        return self.decode(codes, target_x)

    def encode(
        self, context_x: Tensor, context_y: Tensor, target_x: Tensor, mask: Tensor | None = None
    ) -> list[Tensor]:
        """What the context says: codes `[tasks, n_target or 1, width]`.

        With samples of `context_y [samples, tasks, n_context, dim_y]`, or counts of samples for a
        mask (see models/masking.py), `[samples, tasks, n_target or 1, width]`.
        """
        return [encoder(context_x, context_y, mask).unsqueeze(-2) for encoder in self.encoders]

    def decode(
        self, codes: list[Tensor], target_x: Tensor, more: Tensor | None = None
    ) -> Independent:
        """The distribution of y at the targets that codes, and whatever is added, stand for."""
        raw = self.decoder(codes, target_x, more)
        # the likelihood is no place for bfloat16
        return normal(raw.to(target_x.dtype), self.min_sigma, self.sigma)
