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
        scale = _usual_scale(query, heads) if scale is None else scale
        attended = _AttentionInCache.apply(heads, scale, mask, False, query, key, value)
    else:
        mask = None if mask is None else mask[:, None]
        mask = mask.log() if are_counts(mask) else mask
        q, k, v = (_by_head(part, heads)[0] for part in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        attended = _side_by_side(attended[None], value.shape)
    return attended if seen is None else attended.masked_fill(~seen, 0)


def attend_onto(
    *parts: Tensor, heads: int, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What `attend` says, added to the queries.

    Args:
        parts: queries, keys and values as of `attend`; or, of points that attend to each other,
            all three side by side in one tensor `[tasks, n, 3 · width]`.
        heads, mask, scale: as of `attend`.
    """
    query, key, value = parts[0].chunk(3, dim=-1) if len(parts) == 1 else parts
    if _in_cache(query, key, heads) and value.dim() == 3 and _everybody_sees(mask):
        scale = _usual_scale(query, heads) if scale is None else scale
        mask = None if mask is None else mask[:, None, :]
        return _AttentionInCache.apply(heads, scale, mask, True, *parts)
    return query + attend(query, key, value, heads, mask, scale)


def _in_cache(query: Tensor, key: Tensor, heads: int) -> bool:
    """Whether `_AttentionInCache` is the fastest: on a CPU, with few logits, not compiled."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return 0 < query.shape[:2].numel() * heads * key.shape[1] <= IN_CACHE


def _everybody_sees(mask: Tensor | None) -> bool:
    """Whether every task is known to have a key: by no mask, or by one `[tasks, n_key]`."""
    return mask is None or (mask.dim() == 2 and bool(mask.any(dim=1).all()))


def _usual_scale(query: Tensor, heads: int) -> float:
    return 1 / math.sqrt(query.shape[2] // heads)


class _AttentionInCache(torch.autograd.Function):
    """`F.scaled_dot_product_attention` where all logits fit in a processor's cache.

    Keys come first in the logits: over a last dimension shorter than a vector of the processor,
    as few keys are, a softmax would take up to ten times as long. And exponentials are taken of
    the logits as they are: finding the largest of each task and query takes longer than all else,
    and is done only if a sum turns out too large or too small. They are powers of 2, for which
    torch has its own vectorised kernel; that of e is MKL's, four times slower on AMD.

    In float32 under autocast. Not to be differentiated twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
        scale: float,
        mask: Tensor | None,
        onto_query: bool,
        *parts: Tensor,
    ) -> Tensor:
        """Queries, keys and values as of `attend`, or one tensor with all three side by side.

        Args:
            mask: as of `attend`, with all its dimensions, or None.
            onto_query: whether the queries are added to what comes.
        """
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                wide = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
                return _AttentionInCache.forward(ctx, heads, scale, mask, onto_query, *wide)
        of_heads = [_by_head(part, heads, 3 // len(parts)).flatten(1, 2) for part in parts]
        query, key, value = (part for together in of_heads for part in together.unbind())
        nothing = query.new_empty(())
        # in bits: those of e, divided by log 2
        logits = torch.baddbmm(nothing, key, query.mT, beta=0, alpha=scale / math.log(2))
        weights = logits.exp2()
        if mask is not None:
            mask = mask.mT.contiguous().unsqueeze(1)  # of keys and queries, as the weights
            weights.unflatten(0, (-1, heads)).mul_(mask.to(weights.dtype))
        total = weights.sum(dim=1, keepdim=True)
        least, most = (bound.item() for bound in total.aminmax())
        if least > BOUND and most < 1 / BOUND:
            weights.div_(total)
        else:  # or not a number
            logits.mul_(math.log(2))
            if mask is not None:
                of_tasks = logits.unflatten(0, (-1, heads)).masked_fill_(mask == 0, -math.inf)
                if are_counts(mask):
                    of_tasks.add_(mask.log().clamp(min=0))  # of those that are there
            weights = logits.softmax(dim=1)
        ctx.save_for_backward(weights, *of_heads)
        ctx.heads, ctx.scale, ctx.onto_query = heads, scale, onto_query
        ctx.shapes = [part.shape for part in parts]
        if onto_query:
            attended = torch.baddbmm(query, weights.mT, value)
        else:
            attended = torch.bmm(weights.mT, value)
        shape = *ctx.shapes[-1][:-1], ctx.shapes[-1][-1] * len(parts) // 3
        return _side_by_side(attended.unflatten(0, (1, -1, heads)), torch.Size(shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return _AttentionInCache._gradients(ctx, gradient)
        return _AttentionInCache._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *of_heads = ctx.saved_tensors
        query, key, value = (part for together in of_heads for part in together.unbind())
        gradient = _by_head(gradient, ctx.heads).flatten(0, 2)
        of_weights = torch.bmm(value, gradient.mT)
        of_logits = torch._softmax_backward_data(of_weights, weights, 1, weights.dtype)
        gradients = [torch.empty_like(together) for together in of_heads]
        of_query, of_key, of_value = (part for together in gradients for part in together.unbind())
        onto = gradient if ctx.onto_query else of_query
        beta = int(ctx.onto_query)
        torch.baddbmm(onto, of_logits.mT, key, beta=beta, alpha=ctx.scale, out=of_query)
        torch.baddbmm(of_key, of_logits, query, beta=0, alpha=ctx.scale, out=of_key)
        torch.bmm(weights, gradient, out=of_value)
        apart = (together.unflatten(1, (-1, ctx.heads)) for together in gradients)
        return None, None, None, None, *map(_side_by_side, apart, ctx.shapes)


def _by_head(part: Tensor, heads: int, number: int = 1) -> Tensor:
    """`number` parts side by side, `[tasks, n, number · width]` → `[number, tasks, heads, n,
    width / heads]`.

    Samples `[samples, tasks, n, width]` side by side, `[1, tasks, heads, n, samples · width /
    heads]`.
    """
    if part.dim() == 4:
        of_samples = part.unflatten(-1, (heads, -1)).permute(1, 3, 2, 0, 4)
        return of_samples.flatten(3)[None]
    return part.unflatten(-1, (number, heads, -1)).permute(2, 0, 3, 1, 4)


def _side_by_side(parts: Tensor, shape: torch.Size) -> Tensor:
    """What `_by_head` made of a tensor of a shape, put together again; n may be another one."""
    if len(shape) == 4:
        return parts[0].unflatten(3, (shape[0], -1)).permute(3, 0, 2, 1, 4).flatten(3)
    return parts.permute(1, 3, 0, 2, 4).flatten(2)


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
            bias = weight[:width] @ before.bias  # what all keys have in common changes no softmax
            weight = weight @ before.weight
        of_query, of_key = weight.chunk(2)
        query, key = F.linear(query, of_query, bias), F.linear(key, of_key)
        value = F.linear(value, of_value)
        return self._finished(self._attend(query, key, value, mask=mask))

    def _attend(self, *parts: Tensor, mask: Tensor | None) -> Tensor:
        return attend_onto(*parts, heads=self.heads, mask=mask, scale=self.scale)

    def _finished(self, seen: Tensor) -> Tensor:
        hidden = self.norm1(seen.flatten(0, -2))  # all points as rows of one matrix
        return self.norm2(hidden + self.out(hidden).relu_()).unflatten(0, seen.shape[:-1])
