"""Attention to a context: the context's points are keys and values, and nobody else is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metabatch_cli.models.masking import are_counts

IN_CACHE = 1 << 20  # logits
BOUND = 1e-28  # of sums of exponentials
FEW = 32  # queries, whose largest logits torch finds one by one


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, §3.2).

    Whoever may see no key at all gets 0, neither NaN nor a mean over what is not there.

    Args:
        query: `[tasks, n_query, width]`.
        key: `[tasks, n_key, width]`; `n_key` may be 0.
        value: `[tasks, n_key, width]`, or several with the same keys, `[samples, tasks, n_key,
            width]`.
        heads: the parts that the width is cut into.
        mask: bool `[tasks, n_key]`, True where a key is real, or `[tasks, n_query, n_key]` (tasks
            may be 1), True where the query sees the key; None if everybody sees everything. Or
            counts (see models/masking.py) `[samples, tasks, n_key]`.
        scale: of the logits; None for `1/√(width of a head)`.

    Returns:
        `[tasks, n_query, width]`, of samples `[samples, tasks, n_query, width]`.
    """
    if are_counts(mask) and mask.dim() == 3:
        # a softmax for each sample, as if each were tasks of its own
        query, key = query.repeat(len(mask), 1, 1), key.repeat(len(mask), 1, 1)
        value = value.flatten(0, 1) if value.dim() == 4 else value.repeat(len(mask), 1, 1)
        attended = attend(query, key, value, heads, mask.flatten(0, 1), scale)
        return attended.unflatten(0, mask.shape[:2])
    if not key.shape[1]:
        return query.new_zeros(*value.shape[:-2], *query.shape[1:])
    seen = None
    if mask is not None:
        mask = mask[:, None, :] if mask.dim() == 2 else mask
        seen = mask.any(dim=-1, keepdim=True)
        mask = mask.masked_fill(~seen, 1)  # a row without any key has no softmax
    if _in_cache(query, key, heads):
        scale = _usual_scale(query.shape[2], heads) if scale is None else scale
        attended = _AttentionInCache.apply(heads, scale, mask, False, False, query, key, value)
    else:
        mask = None if mask is None else mask[:, None]
        mask = mask.log() if are_counts(mask) else mask
        q, k, v = (_by_head(part, heads) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if value.dim() == 3:
            attended = attended.transpose(1, 2).flatten(2)  # mostly as it lies
        else:
            attended = _side_by_side(attended.flatten(0, 1), heads, value.shape)
    return attended if seen is None else attended.masked_fill(~seen, 0)


def attend_onto(
    *parts: Tensor,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    steep: bool = False,
) -> Tensor:
    """What `attend` says, added to the queries.

    Args:
        parts: queries, keys and values as of `attend`; or, of points that attend to each other,
            all three side by side in one tensor `[tasks, n, 3 · width]`.
        heads, mask, scale: as of `attend`.
        steep: whether logits are expected to be hundreds apart. Then nothing is tried that would
            overflow unless the largest is found first. It changes roundings only.
    """
    query, key, value = parts * 3 if len(parts) == 1 else parts
    if _in_cache(query, key, heads) and value.dim() == 3 and _everybody_sees(mask):
        if scale is None:
            scale = _usual_scale(query.shape[2] * len(parts) // 3, heads)
        mask = None if mask is None else mask[:, None, :]
        return _AttentionInCache.apply(heads, scale, mask, True, steep, *parts)
    query, key, value = parts[0].chunk(3, dim=-1) if len(parts) == 1 else parts
    return query + attend(query, key, value, heads, mask, scale)


def _in_cache(query: Tensor, key: Tensor, heads: int) -> bool:
    """Whether `_AttentionInCache` is the fastest: on a CPU, with few logits, not compiled."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return 0 < query.shape[:2].numel() * heads * key.shape[1] <= IN_CACHE


def _everybody_sees(mask: Tensor | None) -> bool:
    """Whether every task is known to have a key: by no mask, or by one `[tasks, n_key]`."""
    return mask is None or (mask.dim() == 2 and bool(mask.any(dim=1).all()))


def _usual_scale(width: int, heads: int) -> float:
    return 1 / math.sqrt(width // heads)


class _AttentionInCache(torch.autograd.Function):
    """`F.scaled_dot_product_attention` where all logits fit in a processor's cache.

    Keys come first in the logits: over a last dimension shorter than a vector of the processor,
    as few keys are, a softmax would take up to ten times as long. And exponentials are taken of
    the logits as they are, where these are not expected to be `steep`: finding the largest of each
    task and query takes longer than all else, and is done only if a sum turns out too large or too
    small. They are powers of 2, for which torch has its own vectorised kernel; that of e is MKL's,
    four times slower where MKL is not at its widest (metabatch_cli/mkl.py).

    In float32 under autocast. Not to be differentiated twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
        scale: float,
        mask: Tensor | None,
        onto_query: bool,
        steep: bool,
        *parts: Tensor,
    ) -> Tensor:
        """Queries, keys and values as of `attend`, or one tensor with all three side by side.

        Args:
            mask: as of `attend`, with all its dimensions, or None.
            onto_query: whether the queries are added to what comes.
            steep: as of `attend_onto`.
        """
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                wide = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
                return _AttentionInCache.forward(ctx, heads, scale, mask, onto_query, steep, *wide)
        if len(parts) == 1:
            kept = [_three_by_head(parts[0], heads).flatten(1, 2)]
            query, key, value = kept[0].unbind()
        else:
            kept = query, key, value = [_by_head(part, heads).flatten(0, 1) for part in parts]
        weights = _weights(query, key, scale, heads, mask, steep)
        ctx.save_for_backward(weights, *kept)
        ctx.heads, ctx.scale, ctx.onto_query = heads, scale, onto_query
        ctx.shapes = [part.shape for part in parts]
        if onto_query:
            attended = torch.baddbmm(query, weights.mT, value)
        else:
            attended = torch.bmm(weights.mT, value)
        return _side_by_side(attended, heads, parts[-1].shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _AttentionInCache._last_gradients(ctx, gradient)
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return _AttentionInCache._gradients(ctx, gradient)
        return _AttentionInCache._gradients(ctx, gradient)

    @staticmethod
    @once_differentiable
    def _last_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _AttentionInCache.backward(ctx, gradient)  # without a graph

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *kept = ctx.saved_tensors
        heads, scale = ctx.heads, ctx.scale
        gradients = [torch.empty_like(part) for part in kept]
        together = len(kept) == 1
        query, key, value = kept[0].unbind() if together else kept
        of_query, of_key, of_value = gradients[0].unbind() if together else gradients
        gradient = _by_head(gradient, heads).flatten(0, 1)
        of_weights = torch.bmm(value, gradient.mT)
        of_logits = torch._softmax_backward_data(of_weights, weights, 1, weights.dtype)
        onto, beta = (gradient, 1) if ctx.onto_query else (of_query, 0)
        torch.baddbmm(onto, of_logits.mT, key, beta=beta, alpha=scale, out=of_query)
        torch.baddbmm(of_key, of_logits, query, beta=0, alpha=scale, out=of_key)
        torch.bmm(weights, gradient, out=of_value)
        of_parts = [
            _side_by_side(part, heads, shape)
            for part, shape in zip(gradients, ctx.shapes, strict=True)
        ]
        return None, None, None, None, None, *of_parts


def _weights(
    query: Tensor, key: Tensor, scale: float, heads: int, mask: Tensor | None, steep: bool
) -> Tensor:
    """The softmax over keys, `[tasks · heads, n_key, n_query]`; arguments as of the operation."""
    nothing = query.new_empty(())
    # in bits: those of e, divided by log 2
    logits = torch.baddbmm(nothing, key, query.mT, beta=0, alpha=scale / math.log(2))
    if mask is not None:
        mask = mask.mT.contiguous().unsqueeze(1)  # of keys and queries, as the weights
    if not steep:
        weights = logits.exp2()
        if mask is not None:
            weights.unflatten(0, (-1, heads)).mul_(mask.to(weights.dtype))
        total = weights.sum(dim=1, keepdim=True)
        least, most = total.aminmax()
        if least.item() > BOUND and most.item() < 1 / BOUND:  # not so if one is not a number
            return weights.div_(total)
    if mask is not None:
        of_tasks = logits.unflatten(0, (-1, heads)).masked_fill_(mask == 0, -math.inf)
        if are_counts(mask):
            of_tasks.add_(mask.log2().clamp(min=0))  # of those that are there
    if logits.shape[2] < FEW:
        return logits.mul_(math.log(2)).softmax(dim=1)
    weights = logits.sub_(logits.amax(dim=1, keepdim=True)).exp2_()
    return weights.div_(weights.sum(dim=1, keepdim=True))


def _by_head(part: Tensor, heads: int) -> Tensor:
    """`[tasks, n, width]` → `[tasks, heads, n, width / heads]`.

    Samples `[samples, tasks, n, width]` side by side, `[tasks, heads, n, samples · width / heads]`.
    """
    if part.dim() == 4:
        return part.unflatten(-1, (heads, -1)).permute(1, 3, 2, 0, 4).flatten(3)
    tasks, n, width = part.shape
    return part.view(tasks, n, heads, width // heads).transpose(1, 2)


def _three_by_head(parts: Tensor, heads: int) -> Tensor:
    """Three parts side by side, `[tasks, n, 3 · width]` → `[3, tasks, heads, n, width / heads]`."""
    tasks, n, width = parts.shape
    return parts.view(tasks, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)


def _side_by_side(part: Tensor, heads: int, shape: torch.Size) -> Tensor:
    """What was made by head of tensors of a shape, tasks and heads in one dimension, put together.

    n may be another one, and three parts may have become one.
    """
    *front, n, width = part.shape
    if len(shape) == 4:
        samples, tasks = shape[:2]
        apart = part.view(tasks, heads, n, samples, width // samples)
        return apart.permute(3, 0, 2, 1, 4).flatten(3)
    if len(front) == 2:
        return part.view(3, shape[0], heads, n, width).permute(1, 3, 0, 2, 4).flatten(2)
    return part.view(shape[0], heads, n, width).transpose(1, 2).flatten(2)


def begin_as_torchs(of_query: nn.Linear, of_seen: nn.Linear, out: nn.Linear) -> None:
    """Draw the weights of an attention as `nn.MultiheadAttention` does, queries, keys and values
    being parts of one product."""
    for projection in (of_query, of_seen):
        bound = math.sqrt(6 / (4 * projection.in_features))
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)
    nn.init.zeros_(out.bias)


def check_heads(width: int, heads: int) -> None:
    """Refuse, with a ValueError, a number of heads that does not divide the width."""
    if width % heads:
        raise ValueError(f"heads={heads} do not divide width={width}")


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
        self.projections = nn.Linear(width, 3 * width, bias=False)  # queries, keys and values
        self.out = nn.Linear(width, width)
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
        parts = self.projections(points)
        seen = self._attend(parts, mask=mask)
        if first:
            alone = self._attend(parts[:, :first], mask=None if mask is None else mask[:, :first])
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
        query, key = F.linear(query, of_query, bias), F.linear(key, of_key)
        value = F.linear(value, of_value)
        return self._finished(self._attend(query, key, value, mask=mask, steep=True))

    def _attend(self, *parts: Tensor, mask: Tensor | None, steep: bool = False) -> Tensor:
        return attend_onto(*parts, heads=self.heads, mask=mask, scale=self.scale, steep=steep)

    def _finished(self, seen: Tensor) -> Tensor:
        hidden = self.norm1(seen.flatten(0, -2))  # all points as rows of one matrix
        return self.norm2(hidden + self.out(hidden).relu_()).unflatten(0, seen.shape[:-1])
