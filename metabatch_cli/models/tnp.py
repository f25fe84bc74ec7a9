"""Transformer neural processes: targets are tokens that attend to the context's."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from metabatch_cli.models.attention import attend
from metabatch_cli.models.gaussian import MinSigma, Sigma, normal
from metabatch_cli.models.mlp import layers


class TransformerLayer(nn.Module):
    """A post-norm layer (Vaswani et al. 2017, arXiv:1706.03762) whose keys are some of its tokens.

    Args:
        width: of a token.
        heads: of the attention.
        hidden: units of the feed-forward part.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.of_query = nn.Linear(width, width)
        self.of_context = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed1 = nn.Linear(width, hidden)
        self.feed2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        for projection in (self.of_query, self.of_context):  # as torch's own attention begins
            bound = math.sqrt(6 / (4 * width))
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `[tasks, n, width]` look at `seen [tasks, n_seen, width]` → as `tokens`."""
        key, value = self.of_context(seen).chunk(2, dim=-1)
        attended = attend(self.of_query(tokens), key, value, self.heads, mask)
        tokens = self.norm1(tokens + self.out(attended))
        return self.norm2(tokens + self.feed2(F.relu(self.feed1(tokens))))


class Transformer(nn.Module):
    """Context and targets as tokens, through layers in which only the context is looked at.

    The context's tokens attend to each other, a target's to the context: one attention with the
    context as keys and values, so that a step costs `(n_c + n_t)·n_c`, without any mask. In the
    last layer only targets are asked for.

    Args:
        dim_x, dim_y: numbers in an x and a y.
        width, heads, hidden, depth: of the layers.
        embedder_depth: linear layers that make a token of a point.
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        width: int = 64,
        heads: int = 4,
        hidden: int = 128,
        depth: int = 6,
        embedder_depth: int = 4,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} do not divide width={width}")
        self.dim_y = dim_y
        # a target's y is unknown, which is not the same as 0: a flag says so
        self.embedder = layers([dim_x + dim_y + 1, *[width] * embedder_depth])
        self.layers = nn.ModuleList(TransformerLayer(width, heads, hidden) for _ in range(depth))

    def points(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Inputs `[tasks, points, dim_x + dim_y + 1]` of points whose y is known, or not."""
        shape = (*x.shape[:2], self.dim_y)
        known = x.new_zeros(*x.shape[:2], 1) if y is None else x.new_ones(*x.shape[:2], 1)
        return torch.cat([x, x.new_zeros(shape) if y is None else y, known], dim=-1)

    def forward(
        self, context_x: Tensor, context_y: Tensor, target_x: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Context `[tasks, n_context, …]`, `target_x [tasks, n_target, dim_x]` → the targets'
        tokens `[tasks, n_target, width]`."""
        n_context = context_x.shape[1]
        points = [self.points(context_x, context_y), self.points(target_x, None)]
        tokens = self.embedder(torch.cat(points, dim=1))
        for layer in self.layers[:-1]:
            tokens = layer(tokens, tokens[:, :n_context], mask)
        return self.layers[-1](tokens[:, n_context:], tokens[:, :n_context], mask)


class TNPD(nn.Module):
    """Nguyen & Grover 2022, "Transformer Neural Processes" (arXiv:2207.04179), §3.3: TNP-D.

    Each target is predicted by itself, from the context. The defaults are those of the paper's
    Gaussian processes.

    Args:
        dim_x: numbers in an x.
        dim_y: numbers in a y.
        width: of a token.
        heads: of the attention.
        hidden: units of the feed-forward parts, and of the head.
        depth: layers.
        embedder_depth: linear layers that make a token of a point.
        min_sigma, sigma: as for `CNP`; here the paper has no floor, and `exp`.
    """

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 64,
        heads: Annotated[int, Ge(1)] = 4,
        hidden: Annotated[int, Ge(1)] = 128,
        depth: Annotated[int, Ge(1)] = 6,
        embedder_depth: Annotated[int, Ge(1)] = 4,
        min_sigma: MinSigma = 0.0,
        sigma: Sigma = "exp",
    ) -> None:
        super().__init__()
        self.min_sigma, self.sigma = min_sigma, sigma
        self.transformer = Transformer(dim_x, dim_y, width, heads, hidden, depth, embedder_depth)
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
        tokens = self.transformer(context_x, context_y, target_x, context_mask)
        return normal(self.head(tokens).to(target_x.dtype), self.min_sigma, self.sigma)
