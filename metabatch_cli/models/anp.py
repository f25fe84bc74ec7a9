"""The attentive neural process: a latent variable, and targets that look at the context."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from metabatch_cli.models.encoders import CrossAttentionEncoder, Decoder, PoolingEncoder
from metabatch_cli.models.gaussian import MinSigma, Sigma
from metabatch_cli.models.mlp import Activation
from metabatch_cli.models.np import NP


class ANP(NP):
    """Kim et al. 2019, "Attentive Neural Processes" (arXiv:1901.05761).

    The deterministic code of a target is what its x finds in the context by attention. As in
    Nguyen & Grover 2022 (arXiv:2207.04179, published code), whose sizes are the defaults.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y.
        width: units of each layer, and of the code.
        dim_latent: numbers of z.
        encoder_depth: layers over each context point on the way to z, the last two being
            self-attention.
        post_depth: linear layers over their mean.
        value_depth: layers over each context point before targets attend to it, the last two
            being self-attention.
        query_depth: linear layers that make queries and keys of x.
        heads: of every attention.
        decoder_depth: linear layers of the decoder.
        activation: between the layers.
        min_sigma, sigma: of y, as for `CNP`.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 128,
        dim_latent: Annotated[int, Ge(1)] = 128,
        encoder_depth: Annotated[int, Ge(3)] = 4,
        post_depth: Annotated[int, Ge(1)] = 2,
        value_depth: Annotated[int, Ge(3)] = 4,
        query_depth: Annotated[int, Ge(1)] = 2,
        heads: Annotated[int, Ge(1)] = 8,
        decoder_depth: Annotated[int, Ge(1)] = 3,
        activation: Activation = "relu",
        min_sigma: MinSigma = 0.1,
        sigma: Sigma = "scaled",
    ) -> None:
        nn.Module.__init__(self)
        self.min_sigma, self.sigma = min_sigma, sigma
        self.encoder = CrossAttentionEncoder(
            dim_x, dim_y, width, value_depth, query_depth, activation, heads
        )
        self.latent_encoder = PoolingEncoder(
            dim_x + dim_y, width, encoder_depth, post_depth, activation, heads, 2 * dim_latent
        )
        self.decoder = Decoder(
            [width, dim_latent], dim_x, width, decoder_depth, 2 * dim_y, activation
        )

    def encode(
        self, context_x: Tensor, context_y: Tensor, target_x: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return self.encoder(context_x, context_y, target_x, mask)
