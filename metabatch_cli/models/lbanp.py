"""The latent bottlenecked attentive neural process: a few latents stand for the context."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from metabatch_cli.models.attention import attend, begin_as_torchs, check_heads
from metabatch_cli.models.encoders import with_flag
from metabatch_cli.models.gaussian import MinSigma, Sigma, normal
from metabatch_cli.models.mlp import layers


class PreNormLayer(nn.Module):
    """Attention and a feed-forward part, each after a layer norm (Xiong et al. 2020,
    arXiv:2002.04745).

    Args:
        width: of a token.
        heads: of the attention.
        hidden: units of the feed-forward part.
        own_norm: whether what is looked at is other than the tokens, and has a norm of its own.
    """

    def __init__(self, width: int, heads: int, hidden: int, own_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm_seen = nn.LayerNorm(width) if own_norm else None
        self.of_query = nn.Linear(width, width)
        self.of_seen = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed1 = nn.Linear(width, hidden)
        self.feed2 = nn.Linear(hidden, width)
        begin_as_torchs(self.of_query, self.of_seen, self.out)

    def forward(
        self, tokens: Tensor, seen: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Tokens `[tasks, n, width]` look at `seen [tasks, n_seen, width]`, or at each other →
        as `tokens`."""
        query = self.norm1(tokens)
        seen = query if self.norm_seen is None or seen is None else self.norm_seen(seen)
        key, value = self.of_seen(seen).chunk(2, dim=-1)
        tokens = tokens + self.out(attend(self.of_query(query), key, value, self.heads, mask))
        return tokens + self.feed2(F.relu(self.feed1(self.norm2(tokens))))


class LBANP(nn.Module):
    """Feng et al. 2023, "Latent Bottlenecked Attentive Neural Processes" (arXiv:2211.08458), §3.

    In every layer a few latents look at the context's tokens, which stay as they were embedded,
    then at each other; the targets' tokens look at the latents of that layer. A context of n
    points costs `n · latents` for all targets together, a target `latents`, not n.

    Followed: the order of the attentions, learned first latents, 8 of them, layer norms before
    the attentions, and the sizes of TNP-D. Our own: a flag says that a target's y is unknown
    (as in our TNP-D), and a last norm before the head. Of an empty context, attention brings 0.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y.
        latents: that stand for a context.
        width: of a token and a latent.
        heads: of the attentions.
        hidden: units of the feed-forward parts, and of the head.
        depth: layers, of three attentions each.
        embedder_depth: linear layers that make a token of a point.
        min_sigma, sigma: as for `CNP`; here as for `TNPD`.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        latents: Annotated[int, Ge(1)] = 8,
        width: Annotated[int, Ge(1)] = 64,
        heads: Annotated[int, Ge(1)] = 4,
        hidden: Annotated[int, Ge(1)] = 128,
        depth: Annotated[int, Ge(1)] = 6,
        embedder_depth: Annotated[int, Ge(1)] = 4,
        min_sigma: MinSigma = 0.0,
        sigma: Sigma = "exp",
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        self.dim_y = dim_y
        self.min_sigma, self.sigma = min_sigma, sigma
        self.embedder = layers([dim_x + dim_y + 1, *[width] * embedder_depth])
        self.latents = nn.Parameter(torch.randn(latents, width))

        def stack(own_norm: bool) -> nn.ModuleList:
            return nn.ModuleList(PreNormLayer(width, heads, hidden, own_norm) for _ in range(depth))

        self.read, self.think, self.answer = stack(True), stack(False), stack(True)
        self.norm = nn.LayerNorm(width)
        self.head = layers([width, hidden, 2 * dim_y])

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
    ) -> Distribution:
        """The predictive distribution at the targets; arguments as of `CNP`.

        Returns:
            Normal, batch `[tasks, n_target]`, event `[dim_y]`.
        """
        context = self.embedder(with_flag(context_x, context_y, self.dim_y))
        targets = self.embedder(with_flag(target_x, None, self.dim_y))
        latents = self.latents.expand(len(context_x), -1, -1)
        for read, think, answer in zip(self.read, self.think, self.answer, strict=True):
            latents = think(read(latents, context, context_mask))
            targets = answer(targets, latents)
        raw = self.head(self.norm(targets))
        # the likelihood is no place for bfloat16
        return normal(raw.to(target_x.dtype), self.min_sigma, self.sigma)
