"""The rotary transformer neural process: only differences of x matter."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributions import Independent
from torch.nn import functional as F

from metabatch_cli.models.attention import attend
from metabatch_cli.models.gaussian import MinSigma, Sigma, normal
from metabatch_cli.models.mlp import layers


class RotaryLayer(nn.Module):
    """A pre-norm transformer layer whose attention knows where tokens lie only by rotations.

    Queries, keys and values are cut into pairs of numbers, and each pair is turned by an angle
    proportional to x (Su et al. 2021, arXiv:2104.09864); what a token gathers is turned back by
    its own angle (Miyato et al. 2024, arXiv:2310.10375). Moving all x alike turns everything
    alike, which changes neither products nor what comes back.

    Args:
        width: of a token.
        heads: of the attention; `width / heads` is even.
        hidden: units of the feed-forward part.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.of_query = nn.Linear(width, width)
        self.of_context = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed = layers([width, hidden, width], "gelu")
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, turn: Tensor, n_context: int, mask: Tensor | None, first: int = 0
    ) -> Tensor:
        """Tokens `[tasks, n, width]`, the context's before the targets', → those from `first` on.

        Args:
            turn: complex numbers of modulus 1, `[tasks, n, width / 2]`: the turns of each token's
                pairs.
            n_context: how many of the tokens are looked at.
            mask: bool `[tasks, n_context]`, True where one of these is real; None if all are.
            first: the tokens before it are not asked for.
        """
        normed = self.norm1(tokens)
        key, value = self.of_context(normed[:, :n_context]).chunk(2, dim=-1)
        seen, own = turn[:, :n_context], turn[:, first:]
        query = _turned(self.of_query(normed[:, first:]), own)
        attended = attend(query, _turned(key, seen), _turned(value, seen), self.heads, mask)
        tokens = tokens[:, first:] + self.out(_turned(attended, own.conj()))
        return tokens + self.feed(self.norm2(tokens))


class RTNP(nn.Module):
    """A transformer neural process that is equivariant to translation, for stationary processes.

    As `TNPD`, but a token says nothing of where it lies: it is made of y and of whether y is
    known, and x enters by the rotations of `RotaryLayer` alone, of wavelengths in a geometric
    sequence. This network is ours; translation-equivariant transformers for neural processes, by
    learned functions of differences, are in Ashman et al. 2024 (arXiv:2406.12409).

    Equivariant but for rounding: far from 0 angles lose digits (in float32 a shift by 4,096 changed
    means by up to 0.0005, one by 65,536 by 0.01).

    Args:
        dim_x: numbers in an x; each pair turns along a direction of its own.
        dim_y: numbers in a y.
        width: of a token.
        heads: of the attention.
        hidden: units of the feed-forward parts, and of the head.
        depth: layers.
        embedder_depth: linear layers that make a token of y.
        wavelengths: the shortest and the longest, in units of x.
        min_sigma, sigma: as for `CNP`.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 64,
        heads: Annotated[int, Ge(1)] = 4,
        hidden: Annotated[int, Ge(1)] = 128,
        depth: Annotated[int, Ge(1)] = 6,
        embedder_depth: Annotated[int, Ge(1)] = 4,
        wavelengths: tuple[float, float] = (0.2, 20.0),
        min_sigma: MinSigma = 0.0,
        sigma: Sigma = "exp",
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"heads={heads} must cut width={width} into parts of an even size")
        if not 0 < wavelengths[0] <= wavelengths[1]:
            raise ValueError(
                f"wavelengths={list(wavelengths)} must be [shortest, longest], above 0"
            )
        self.dim_y, self.min_sigma, self.sigma = dim_y, min_sigma, sigma
        self.embedder = layers([dim_y + 1, *[width] * embedder_depth], "gelu")
        self.layers = nn.ModuleList(RotaryLayer(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = layers([width, hidden, 2 * dim_y], "gelu")
        # every head has long and short ones, and no two of all pairs the same
        pairs = torch.arange(width // 2).reshape(-1, heads).mT.flatten() / max(width // 2 - 1, 1)
        shortest, longest = wavelengths
        frequencies = 2 * math.pi / (shortest * (longest / shortest) ** pairs)
        direction = F.normalize(torch.randn(width // 2, dim_x), dim=-1)
        self.register_buffer("frequencies", frequencies[:, None] * direction)

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
    ) -> Independent:
        """The predictive distribution at the targets; arguments as of `CNP`.

        Returns:
            Normal, batch `[tasks, n_target]`, event `[dim_y]`.
        """
        n_context, n_target = context_x.shape[1], target_x.shape[1]
        known = torch.cat([context_y, context_y.new_ones(*context_y.shape[:2], 1)], dim=-1)
        unknown = self.embedder(target_x.new_zeros(1, 1, self.dim_y + 1))
        tokens = torch.cat(
            [self.embedder(known), unknown.expand(len(target_x), n_target, -1)], dim=1
        )
        x = torch.cat([context_x, target_x], dim=1)
        # no matrix product: angles need all their bits, whatever the rest is computed in
        angles = (x[:, :, None, :] * self.frequencies).sum(dim=-1)
        turn = torch.polar(torch.ones_like(angles), angles)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, turn, n_context, context_mask)
        tokens = self.layers[-1](tokens, turn, n_context, context_mask, first=n_context)
        return normal(self.head(self.norm(tokens)).to(target_x.dtype), self.min_sigma, self.sigma)


def _turned(tokens: Tensor, turn: Tensor) -> Tensor:
    """Each pair of neighbouring numbers of `tokens [tasks, n, width]` turned in its plane."""
    pairs = tokens.to(turn.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
