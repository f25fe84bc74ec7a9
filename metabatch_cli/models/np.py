"""The neural process: a latent variable makes the targets of a task hang together."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from metabatch_cli.models.encoders import Decoder, PoolingEncoder
from metabatch_cli.models.gaussian import MinSigma, Sigma, normal
from metabatch_cli.models.mlp import Activation
from metabatch_cli.models.predictive import Paths


class NP(nn.Module):
    """Garnelo et al. 2018, "Neural Processes" (arXiv:1807.01622), with a deterministic code.

    The context gives a code and a normal distribution of a latent variable z; every draw of z
    predicts all targets. As in Nguyen & Grover 2022 (arXiv:2207.04179, published code), whose
    sizes are the defaults. Objectives that look at the targets too (`elbo`, `iwae`) ask `latents`
    and `decode`.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y.
        width: units of each layer, and of the code.
        dim_latent: numbers of z.
        encoder_depth: linear layers over each context point.
        post_depth: linear layers over their mean.
        decoder_depth: linear layers of the decoder.
        activation: between the layers.
        min_sigma, sigma: of y, as for `CNP`. That of z is `0.1 + 0.9·sigmoid(·)`.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 128,
        dim_latent: Annotated[int, Ge(1)] = 128,
        encoder_depth: Annotated[int, Ge(1)] = 4,
        post_depth: Annotated[int, Ge(1)] = 2,
        decoder_depth: Annotated[int, Ge(1)] = 3,
        activation: Activation = "relu",
        min_sigma: MinSigma = 0.1,
        sigma: Sigma = "scaled",
    ) -> None:
        super().__init__()
        self.min_sigma, self.sigma = min_sigma, sigma
        depths = encoder_depth, post_depth
        self.encoder: nn.Module = PoolingEncoder(dim_x + dim_y, width, *depths, activation)
        self.latent_encoder = PoolingEncoder(
            dim_x + dim_y, width, *depths, activation, dim_out=2 * dim_latent
        )
        self.decoder = Decoder(
            [width, dim_latent], dim_x, width, decoder_depth, 2 * dim_y, activation
        )

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        samples: int = 1,
    ) -> Paths:
        """The prediction by `samples` draws of z from what the context says of it.

        Args:
            context_x, context_y, target_x, context_mask: as of `CNP`.
            target_mask: bool `[tasks, n_target]`, True where a target is real; None if all are.
            samples: draws, from torch's global generator.

        Returns:
            A mixture of the draws: batch `[tasks]`, event `[n_target, dim_y]`.
        """
        z = self.latent(context_x, context_y, context_mask).rsample(torch.Size([samples]))
        return Paths(self.decode(z, context_x, context_y, target_x, context_mask), target_mask)

    def latent(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Independent:
        """What points `x [tasks, points, dim_x]`, `y` say of z: batch `[tasks]`, event `[dim]`."""
        return _of_z(self.latent_encoder(x, y, mask).to(x.dtype))

    def latents(
        self, x: Tensor, y: Tensor, mask: Tensor | None, first: int
    ) -> tuple[Independent, Independent]:
        """The same of the `first` points, and of all; cheaper together than apart."""
        prior, posterior = self.latent_encoder.nested(x, y, mask, first).to(x.dtype)
        return _of_z(prior), _of_z(posterior)

    def decode(
        self,
        z: Tensor,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
    ) -> Independent:
        """What draws `z [samples, tasks, dim_latent]` predict: batch `[samples, tasks, n_target]`,
        event `[dim_y]`."""
        code = self.encode(context_x, context_y, target_x, context_mask)
        raw = self.decoder([code, z[:, :, None]], target_x)
        return normal(raw.to(target_x.dtype), self.min_sigma, self.sigma)

    def encode(
        self, context_x: Tensor, context_y: Tensor, target_x: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """What the context says without chance: `[tasks, n_target or 1, width]`."""
        return self.encoder(context_x, context_y, mask)[:, None]


def _of_z(raw: Tensor) -> Independent:
    mean, raw = raw.chunk(2, dim=-1)
    deviation = 0.1 + 0.9 * torch.sigmoid(raw)
    return Independent(Normal(mean, deviation, validate_args=False), 1, validate_args=False)
