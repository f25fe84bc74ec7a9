"""The attention of attentive neural processes: a block of it, on a CPU one operation in all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metabatch_cli.models.attention import (
    attend,
    attention,
    by_head,
    check_heads,
    everybody_sees,
    in_cache,
    once_in_full_precision,
    put_gradients_of_attention,
    side_by_side,
)
from metabatch_cli.models.linear import Linear, gradient_of_weight, linear, product


class AttentionBlock(nn.Module):
    """The attention of attentive neural processes as the TNP paper's code has it.

    `h = LN(Wq·query + attention)`, then `LN(h + relu(Wo·h + b))`; logits are divided by `√width`,
    not by the root of a head's width (Nguyen & Grover 2022, arXiv:2207.04179, published code).

    Args:
        width: of all inputs and of the output.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.scale = 1 / math.sqrt(width)
        self.projections = Linear(width, 3 * width, bias=False)  # queries, keys and values
        self.out = Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def between(self, points: Tensor, mask: Tensor | None = None, first: int = 0) -> Tensor:
        """Self-attention: `points [tasks, n, width]` look at each other, each sample's of
        `[samples, tasks, n, width]` apart.

        Args:
            mask: as of `attend`; with counts, what comes is of every sample.
            first: so many points at the beginning also look at each other only; what comes of
                them is put before the rest, `[tasks, first + n, width]`.
        """
        if points.dim() == 4:
            mask = None if mask is None else mask.repeat(len(points), 1)
            return self.between(points.flatten(0, 1), mask).unflatten(0, points.shape[:2])
        if not first and self._is_one_operation(points, points, mask):
            return self._at_once(mask, None, points, self.projections.weight)
        parts = self.projections(points)
        seen = self._attended(parts.chunk(3, dim=-1), mask)
        if first:
            own = parts[:, :first].chunk(3, dim=-1)
            alone = self._attended(own, None if mask is None else mask[:, :first])
            seen = torch.cat([alone, seen], dim=1)
        return self._finished(seen)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        before: nn.Linear | None = None,
    ) -> Tensor:
        """`query [tasks, n_query, width]`, `key`, `value [tasks, n_key, width]` → as `query`;
        of samples of values, or by counts, as `attend`.

        Args:
            before: a linear layer that queries and keys have still to go through; it is merged
                into the block's own, as two products of weights are cheaper than two of points.
        """
        width = self.projections.in_features
        weight, of_value = self.projections.weight.split([2 * width, width])  # queries' and keys'
        bias = None
        if before is not None:
            # the queries' only: what all keys have in common changes no softmax
            bias = (weight @ before.bias)[:width]
            weight = weight @ before.weight
        of_query, of_key = weight.chunk(2)
        if value.dim() == 3 and self._is_one_operation(query, key, mask):
            return self._at_once(mask, bias, query, key, value, of_query, of_key, of_value)
        parts = linear(query, of_query, bias), linear(key, of_key), linear(value, of_value)
        return self._finished(self._attended(parts, mask))

    def _attended(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        query, key, value = parts
        return query + attend(query, key, value, self.heads, mask, self.scale)

    def _finished(self, seen: Tensor) -> Tensor:
        hidden = self.norm1(seen.flatten(0, -2))  # all points as rows of one matrix
        return self.norm2(hidden + self.out(hidden, relu=True)).unflatten(0, seen.shape[:-1])

    def _is_one_operation(self, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
        if torch.is_autocast_enabled("cpu") or not in_cache(query, key, self.heads):
            return False
        return everybody_sees(mask)

    def _at_once(self, mask: Tensor | None, bias: Tensor | None, *parts: Tensor) -> Tensor:
        last = self.out, self.norm1, self.norm2
        own = [weight for layer in last for weight in (layer.weight, layer.bias)]
        return _Block.apply(self, mask, bias, *own, *parts)


class _Block(torch.autograd.Function):
    """An `AttentionBlock` as one operation, not to be differentiated twice.

    Of the same products, an attention by autograd takes a dozen operations more: small ones, whose
    call is what they cost.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: AttentionBlock,
        mask: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        out_bias: Tensor,
        *norms_and_parts: Tensor,
    ) -> Tensor:
        """
        Args:
            block: whose settings count.
            mask: bool or counts `[tasks, n_key]`, by which every task has a key, or None.
            bias: of the queries.
            out, out_bias: of the layer after the attention.
            norms_and_parts: weights and biases of both norms; then points `[tasks, n, width]` and
                the weights of their projections `[3 · width, width]`, or queries, keys and values,
                and the weights of each.
        """
        norms, parts = norms_and_parts[:4], norms_and_parts[4:]
        n_inputs = len(parts) // 2
        inputs, weights = parts[:n_inputs], parts[n_inputs:]
        tasks, n, _ = inputs[0].shape
        shape = torch.Size([tasks, n, out.shape[0]])
        rows = [part.flatten(0, 1) for part in inputs]
        projected = [
            product(*each).view(tasks, -1, each[1].shape[0])
            for each in zip(rows, weights, (bias, None, None), strict=False)
        ]
        apart = [_by_head(part, block.heads, n_inputs) for part in projected]
        attended, by = attention(
            _three(apart),
            block.scale,
            block.heads,
            None if mask is None else mask[:, None, :],
            steep=n_inputs == 3,
            onto_query=True,
        )
        seen = side_by_side(attended, block.heads, shape).flatten(0, 1)
        hidden, *first = _norm(seen, norms[:2], block.norm1)
        more = product(hidden, out, out_bias, relu=True)
        both = hidden + more
        y, *second = _norm(both, norms[2:], block.norm2)
        ctx.save_for_backward(
            seen, hidden, more, both, by, out, *first, *second, *norms, *rows, *weights, *apart
        )
        ctx.block, ctx.shape, ctx.n_inputs = block, shape, n_inputs
        return y.view(shape)

    @staticmethod
    @once_in_full_precision
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        seen, hidden, more, both, by, out, *others = ctx.saved_tensors
        first, second, norm1, norm2 = (others[start : start + 2] for start in range(0, 8, 2))
        n, others = ctx.n_inputs, others[8:]
        rows, weights, apart = (others[start * n : (start + 1) * n] for start in range(3))
        heads, shape = ctx.block.heads, ctx.shape

        of_both, *of_norm2 = _of_norm(gradient.reshape(both.shape), both, second, norm2)
        of_more = torch.ops.aten.threshold_backward.default(of_both, more, 0)
        of_out = gradient_of_weight(of_more, hidden), of_more.sum(dim=0)
        of_hidden = of_both.add_(product(of_more, out.t()))
        of_seen, *of_norm1 = _of_norm(of_hidden, seen, first, norm1)

        of_attended = by_head(of_seen.view(shape), heads).flatten(0, 1)
        of_apart = [torch.empty_like(part) for part in apart]
        put_gradients_of_attention(
            _three(of_apart), of_attended, by, _three(apart), ctx.block.scale, onto_query=True
        )
        of_projected = [_side_by_side(part, heads, shape) for part in of_apart]
        of_bias = of_projected[0].sum(dim=0) if ctx.needs_input_grad[2] else None
        of_weights = [gradient_of_weight(*each) for each in zip(of_projected, rows, strict=True)]
        needed = ctx.needs_input_grad[9 : 9 + n]
        of_inputs = [
            product(part, weight.t()).view(shape[0], -1, weight.shape[1]) if needs else None
            for part, weight, needs in zip(of_projected, weights, needed, strict=True)
        ]
        return None, None, of_bias, *of_out, *of_norm1, *of_norm2, *of_inputs, *of_weights


def _by_head(part: Tensor, heads: int, n_inputs: int) -> Tensor:
    """`[tasks, n, width]` → `[tasks · heads, n, width / heads]`; of the only input three parts side
    by side, `[tasks, n, 3 · width]` → `[3, tasks · heads, n, width / heads]`."""
    if n_inputs == 3:
        return by_head(part, heads).flatten(0, 1)
    tasks, n, width = part.shape
    apart = part.view(tasks, n, 3, heads, width // (3 * heads))
    return apart.permute(2, 0, 3, 1, 4).flatten(1, 2)


def _side_by_side(part: Tensor, heads: int, shape: torch.Size) -> Tensor:
    """What `_by_head` made, as rows: `[tasks · n, width]` or `[tasks · n, 3 · width]`."""
    if part.dim() == 3:
        return side_by_side(part, heads, shape).flatten(0, 1)
    n, width = part.shape[2:]
    together = part.view(3, shape[0], heads, n, width).permute(1, 3, 0, 2, 4)
    return together.reshape(shape[0] * n, 3 * shape[2])


def _three(parts: list[Tensor]) -> list[Tensor]:
    """Those of queries, keys and values, if they are in one."""
    return list(parts[0].unbind()) if len(parts) == 1 else parts


def _norm(x: Tensor, weights: tuple[Tensor, ...], norm: nn.LayerNorm) -> tuple[Tensor, ...]:
    """What a layer norm says of `x [points, width]`, and the moments that its gradient needs."""
    weight, bias = weights
    return torch.native_layer_norm(x, x.shape[1:], weight, bias, norm.eps)


def _of_norm(
    gradient: Tensor, x: Tensor, moments: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a layer norm's input, weight and bias."""
    return torch.ops.aten.native_layer_norm_backward.default(
        gradient, x, x.shape[1:], *moments, *weights, [True, True, True]
    )
