"""Encoders of a context: a code of the task as a whole, or one for every target."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metabatch_cli.models.attention import AttentionBlock
from metabatch_cli.models.masking import mean_of_points
from metabatch_cli.models.mlp import ACTIVATIONS, Activation, layers


class PoolingEncoder(nn.Module):
    """The mean over encoded points, encoded further: a code of the whole task.

    Deep sets (Zaheer et al. 2017, arXiv:1703.06114) as neural processes have them. The mean over
    no points is 0, from which the code of an empty context follows.

    Args:
        dim_in: numbers of a point, those of x and of y.
        width: units of each layer, and of the code.
        depth: linear layers over each point.
        post_depth: linear layers over the mean.
        activation: between the layers.
        heads: of self-attention between the points, in place of two of the `depth` layers; None
            for no attention.
        dim_out: numbers of the code; None for `width`.
    """

    def __init__(
        self,
        dim_in: int,
        width: int,
        depth: int,
        post_depth: int = 0,
        activation: Activation = "relu",
        heads: int | None = None,
        dim_out: int | None = None,
    ) -> None:
        super().__init__()
        if heads is not None and depth < 3:
            raise ValueError(f"encoder_depth={depth}: self-attention takes the place of two layers")
        own = depth if heads is None else depth - 2
        self.points = layers([dim_in, *[width] * own], activation)
        self.attention = None
        if heads is not None:
            self.points.append(ACTIVATIONS[activation]())
            self.attention = AttentionBlock(width, heads)
        if not post_depth and dim_out not in (None, width):
            raise ValueError("post_depth=0: a code of another size needs a layer after the mean")
        self.post = layers([width] * post_depth + [dim_out or width], activation)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Points `x [tasks, points, dim_x]`, `y [(samples,) tasks, points, dim_y]` → their code
        `[(samples,) tasks, dim_out]`.

        Args:
            mask: bool `[tasks, points]`, or counts of samples (see models/masking.py).
        """
        return self._code(mean_of_points(self._encoded(x, y, mask), mask))

    def nested(self, x: Tensor, y: Tensor, mask: Tensor | None, first: int) -> Tensor:
        """Codes `[2, tasks, dim_out]` of the `first` points, and of all.

        What concerns a point by itself is computed once for both.
        """
        hidden = self._encoded(x, y, mask, first)
        own = hidden[:, :first], None if mask is None else mask[:, :first]
        everything = hidden[:, -x.shape[1] :], mask
        return self._code(torch.stack([mean_of_points(*own), mean_of_points(*everything)]))

    def _encoded(self, x: Tensor, y: Tensor, mask: Tensor | None, first: int = 0) -> Tensor:
        points = _pairs(x, y)
        if self.attention is None:
            return self.points(points, stop=-1)
        return self.attention.between(self.points(points), mask, first)

    def _code(self, mean: Tensor) -> Tensor:
        # the mean of a linear map is the map of the mean, once instead of for every point
        return self.post(mean if self.attention is not None else self.points[-1](mean))


class CrossAttentionEncoder(nn.Module):
    """A code for every target: it attends to the context by its x.

    Attentive neural processes (Kim et al. 2019, arXiv:1901.05761, §3), with self-attention
    between the context's points.

    Args:
        dim_x, dim_y: numbers in an x and a y.
        width: units of each layer, and of the codes.
        value_depth: layers over each context point, the last two of them being self-attention.
        query_depth: linear layers over an x, which make keys of the context and queries of the
            targets.
        activation: between the layers.
        heads: of the attentions.
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        width: int,
        value_depth: int = 4,
        query_depth: int = 2,
        activation: Activation = "relu",
        heads: int = 8,
    ) -> None:
        super().__init__()
        if value_depth < 3:
            raise ValueError(f"value_depth={value_depth}: self-attention takes two of its layers")
        self.of_x = layers([dim_x, *[width] * query_depth], activation)
        self.of_points = layers([dim_x + dim_y, *[width] * (value_depth - 2)], activation)
        self.self_attention = AttentionBlock(width, heads)
        self.cross_attention = AttentionBlock(width, heads)

    def forward(
        self, context_x: Tensor, context_y: Tensor, target_x: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Context `[tasks, n_context, …]`, `target_x [tasks, n_target, dim_x]` →
        `[tasks, n_target, width]`.

        With samples of `context_y [samples, tasks, n_context, dim_y]`, or counts for a mask (see
        models/masking.py), `[samples, tasks, n_target, width]`.
        """
        values = self.of_points(_pairs(context_x, context_y))
        values = self.self_attention.between(values, mask)
        query, key = (self.of_x(x, stop=-1) for x in (target_x, context_x))
        return self.cross_attention(query, key, values, mask, before=self.of_x[-1])


class Decoder(nn.Module):
    """From codes and an x to numbers: linear layers over `[codes, x]`.

    The first layer is applied to each input before they are put side by side: what is the same
    for all targets, or for all samples, is multiplied once.

    Args:
        dim_codes: numbers of each code.
        dim_x: numbers of an x.
        width: units of each layer.
        depth: linear layers.
        dim_out: numbers that come out.
        activation: between the layers.
    """

    def __init__(
        self,
        dim_codes: list[int],
        dim_x: int,
        width: int,
        depth: int,
        dim_out: int,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.sizes = [*dim_codes, dim_x]
        self.layers = layers([sum(self.sizes), *[width] * (depth - 1), dim_out], activation)

    def forward(self, codes: list[Tensor], x: Tensor, more: Tensor | None = None) -> Tensor:
        """Codes `[…, tasks, points or 1, dim]` and `x [tasks, points, dim_x]` →
        `[…, tasks, points, dim_out]`.

        Args:
            more: added to what the first layer says, `[…, tasks, points or 1, width]`.
        """
        first = self.layers[0]
        *of_codes, of_x = first.weight.split(self.sizes, dim=1)  # type: ignore[operator]
        parts = [F.linear(x, of_x, first.bias)]  # type: ignore[arg-type]
        parts += [F.linear(code, weight) for code, weight in zip(codes, of_codes, strict=True)]
        parts += [] if more is None else [more]
        # what all points have in common is added up first
        of_all = [part for part in parts if part.shape[-2] == 1]
        parts = [*of_all, *(part for part in parts if part.shape[-2] != 1)]
        return self.layers(sum(parts[1:], parts[0]), start=1)


def with_flag(x: Tensor, y: Tensor | None, dim_y: int) -> Tensor:
    """Points `[tasks, points, dim_x + dim_y + 1]` whose last number says whether y is known.

    That a target's y is unknown is not the same as that it is 0.
    """
    if y is None:
        return torch.cat([x, x.new_zeros(*x.shape[:2], dim_y + 1)], dim=-1)
    return torch.cat([x, y, x.new_ones(*x.shape[:2], 1)], dim=-1)


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """`[(samples,) tasks, points, dim_x + dim_y]`; x is the same in all samples of y."""
    return torch.cat([x.expand(*y.shape[:-1], -1), y], dim=-1)
