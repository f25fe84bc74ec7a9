"""The attentive conditional neural process: every target looks at the context by itself."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.encoders import CrossAttentionEncoder, Decoder, PoolingEncoder
from metabatch_cli.models.gaussian import MinSigma, Sigma
from metabatch_cli.models.mlp import Activation


class CANP(CNP):
    """The deterministic half of Kim et al. 2019, "Attentive Neural Processes" (arXiv:1901.05761).

    Two codes meet in the decoder: one of the whole context, and one of what a target finds in it
    by attention from its x to the context's. As in Nguyen & Grover 2022 (arXiv:2207.04179,
    published code), whose sizes are the defaults.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y.
        width: units of each layer, and of a code.
        encoder_depth: layers over each context point, the last two being self-attention.
        post_depth: linear layers over the mean of the points.
        value_depth: layers over each context point before targets attend to it, the last two
            being self-attention.
        query_depth: linear layers that make queries and keys of x.
        heads: of every attention.
        decoder_depth: linear layers of the decoder.
        activation: between the layers.
        min_sigma, sigma: as for `CNP`.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 128,
        encoder_depth: Annotated[int, Ge(3)] = 4,
        post_depth: Annotated[int, Ge(0)] = 2,
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
        self.attentive = CrossAttentionEncoder(
            dim_x, dim_y, width, value_depth, query_depth, activation, heads
        )
        self.pooling = PoolingEncoder(
            dim_x + dim_y, width, encoder_depth, post_depth, activation, heads
        )
        self.decoder = Decoder([width, width], dim_x, width, decoder_depth, 2 * dim_y, activation)

    def encode(
        self, context_x: Tensor, context_y: Tensor, target_x: Tensor, mask: Tensor | None = None
    ) -> list[Tensor]:
        return [
            self.attentive(context_x, context_y, target_x, mask),
            self.pooling(context_x, context_y, mask).unsqueeze(-2),
        ]
