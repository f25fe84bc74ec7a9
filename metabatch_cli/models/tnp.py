"""Transformer neural processes: targets are tokens that attend to the context's."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.distributions import Independent

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.models.attention import attend, begin_as_torchs, check_heads
from metabatch_cli.models.encoders import with_flag
from metabatch_cli.models.gaussian import MinSigma, Sigma, normal, positive
from metabatch_cli.models.masking import blank, joined_masks
from metabatch_cli.models.mlp import layers
from metabatch_cli.models.predictive import Autoregressive, JointNormal, LowRankNormal


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
        begin_as_torchs(self.of_query, self.of_context, self.out)

    def forward(self, tokens: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `[tasks, n, width]` look at `seen [tasks, n_seen, width]` → as `tokens`."""
        key, value = self.of_context(seen).chunk(2, dim=-1)
        attended = attend(self.of_query(tokens), key, value, self.heads, mask)
        rows = self.norm1((tokens + self.out(attended)).flatten(0, 1))
        rows = self.norm2(rows + self.feed2(self.feed1(rows).relu_()))
        return rows.unflatten(0, tokens.shape[:2])


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
        check_heads(width, heads)
        self.dim_y = dim_y
        self.embedder = layers([dim_x + dim_y + 1, *[width] * embedder_depth])
        self.layers = nn.ModuleList(TransformerLayer(width, heads, hidden) for _ in range(depth))

    def points(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Inputs `[tasks, points, dim_x + dim_y + 1]` of points whose y is known, or not."""
        return with_flag(x, y, self.dim_y)

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

    def one_after_another(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        target_y: Tensor,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """The tokens `[tasks, n_target, width]` of targets that see the context and the y of all
        targets before them."""
        (n_context, n_target), device = (context_x.shape[1], target_x.shape[1]), target_x.device
        known = [self.points(context_x, context_y), self.points(target_x, target_y)]
        tokens = self.embedder(torch.cat([*known, self.points(target_x, None)], dim=1))
        n_seen = n_context + n_target
        order = torch.arange(n_target, device=device)
        # from when on a token is seen, and up to when one sees: the context at once, a target
        # itself and what was before it, its unknown twin only what was before it
        time = torch.cat([order.new_zeros(n_context), order + 1])
        until = torch.cat([time, order])
        sees = (time[None, :] <= until[:, None])[None]
        real = joined_masks(context_x, mask, target_x, target_mask)
        if real is not None:
            sees = sees & real[:, None, :]
        for layer in self.layers[:-1]:
            tokens = layer(tokens, tokens[:, :n_seen], sees)
        return self.layers[-1](tokens[:, n_seen:], tokens[:, :n_seen], sees[:, n_seen:])


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
    ) -> Independent:
        """The predictive distribution at the targets; arguments as of `CNP`.

        Returns:
            Normal, batch `[tasks, n_target]`, event `[dim_y]`.
        """
        tokens = self.transformer(context_x, context_y, target_x, context_mask)
        return normal(self.head(tokens).to(target_x.dtype), self.min_sigma, self.sigma)


class TNPA(TNPD):
    """TNP-A: targets are predicted one after the other, each given the y of those before it.

    Nguyen & Grover 2022 (arXiv:2207.04179), §3.2; arguments as of `TNPD`. The likelihood of all
    targets together takes one pass, in which every target is there twice: with its y, for those
    after it to see, and without, to be predicted.
    """

    joint = True  # what targets have in common is learnt from a joint likelihood only

    def forward(  # type: ignore[override]
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Autoregressive:
        """The joint distribution of the targets: batch `[tasks]`, event `[n_target, dim_y]`.

        Its marginals are what is predicted of each target as if it were the first.
        """

        def alone() -> Independent:
            return super(TNPA, self).forward(context_x, context_y, target_x, context_mask)

        def given(y: Tensor) -> Independent:
            tokens = self.transformer.one_after_another(
                context_x, context_y, target_x, y, context_mask, target_mask
            )
            return normal(self.head(tokens).to(target_x.dtype), self.min_sigma, self.sigma)

        like = target_x.new_zeros(*target_x.shape[:2], self.transformer.dim_y)
        return Autoregressive(alone, given, like, target_mask)


class TNPND(nn.Module):
    """TNP-ND: targets are predicted together, with a full covariance.

    Nguyen & Grover 2022 (arXiv:2207.04179), §3.4: means from the targets' tokens; from further
    layers, in which targets look at each other, a vector h of `rank` numbers for each target and
    dimension of y. What is predicted of a target depends on which others there are.

    Args:
        dim_x, dim_y, width, heads, hidden, depth, embedder_depth: as of `TNPD`.
        covariance_depth: further layers.
        projection_depth: linear layers that make h of a token.
        rank: numbers of h.
        covariance: `low_rank` is `H Hᵀ` and a variance for each target; `cholesky`, which the
            paper's numbers are from, takes the lower triangle of `H Hᵀ` as the root of the
            covariance: the prediction then depends on the order of the targets.
        min_sigma: the least deviation of a target's own; added to the diagonal of the root.
    """

    joint = True  # what targets have in common is learnt from a joint likelihood only

    def __init__(
        self,
        dim_x: Annotated[int, Ge(1)],
        dim_y: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 64,
        heads: Annotated[int, Ge(1)] = 4,
        hidden: Annotated[int, Ge(1)] = 128,
        depth: Annotated[int, Ge(1)] = 6,
        embedder_depth: Annotated[int, Ge(1)] = 4,
        covariance_depth: Annotated[int, Ge(1)] = 2,
        projection_depth: Annotated[int, Ge(1)] = 4,
        rank: Annotated[int, Ge(1)] = 20,
        covariance: Literal["low_rank", "cholesky"] = "low_rank",
        min_sigma: Annotated[float, Gt(0), Le(1)] = 0.001,
    ) -> None:
        super().__init__()
        one_of("covariance", covariance, ("low_rank", "cholesky"))
        self.dim_y, self.rank, self.min_sigma = dim_y, rank, min_sigma
        self.transformer = Transformer(dim_x, dim_y, width, heads, hidden, depth, embedder_depth)
        self.head = layers([width, hidden, dim_y])
        self.further = nn.ModuleList(
            TransformerLayer(width, heads, hidden) for _ in range(covariance_depth)
        )
        self.projection = layers([width, *[hidden] * (projection_depth - 1), rank * dim_y])
        self.deviation = layers([width, hidden, dim_y]) if covariance == "low_rank" else None

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> JointNormal | LowRankNormal:
        """The joint distribution of the targets: batch `[tasks]`, event `[n_target, dim_y]`."""
        tokens = self.transformer(context_x, context_y, target_x, context_mask)
        mean = self.head(tokens).to(target_x.dtype)
        for layer in self.further:
            tokens = layer(tokens, tokens, target_mask)
        h = self.projection(tokens).to(target_x.dtype)
        if self.deviation is not None:
            deviation = positive(self.deviation(tokens).to(h.dtype), self.min_sigma, "exp")
            return LowRankNormal(mean, h.unflatten(-1, (self.dim_y, -1)), deviation, target_mask)
        # in float64: a product of few numbers is far from invertible in less
        h = blank(h.double(), target_mask).unflatten(-1, (self.dim_y, -1)).flatten(1, 2)
        root = (h @ h.mT).tril() + self.min_sigma * torch.eye(h.shape[1]).to(h)
        return JointNormal(mean, root, target_mask)
