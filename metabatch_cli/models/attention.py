"""Attention to a context: the context's points are keys and values, and nobody else is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
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
    if in_cache(query, key, heads):
        scale = _usual_scale(query.shape[2], heads) if scale is None else scale
        attended = _AttentionInCache.apply(heads, scale, mask, query, key, value)
    else:
        mask = None if mask is None else mask[:, None]
        mask = mask.log() if are_counts(mask) else mask
        q, k, v = (by_head(part, heads) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if value.dim() == 3:
            attended = attended.transpose(1, 2).flatten(2)  # mostly as it lies
        else:
            attended = side_by_side(attended.flatten(0, 1), heads, value.shape)
    return attended if seen is None else attended.masked_fill(~seen, 0)


def in_cache(query: Tensor, key: Tensor, heads: int) -> bool:
    """Whether `_AttentionInCache` is the fastest: on a CPU, with few logits, not compiled."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return 0 < query.shape[:2].numel() * heads * key.shape[1] <= IN_CACHE


def everybody_sees(mask: Tensor | None) -> bool:
    """Whether every task is known to have a key: by no mask, or by one `[tasks, n_key]`."""
    return mask is None or (mask.dim() == 2 and bool(mask.any(dim=1).all()))


def _usual_scale(width: int, heads: int) -> float:
    return 1 / math.sqrt(width // heads)


def once_in_full_precision(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For gradients written by hand: computed outside autocast, and not differentiable again.

    The guard against second derivatives costs time, and stands only where there could be one.
    """
    guarded = once_differentiable(backward)

    @wraps(backward)
    def chosen(ctx: Any, *gradients: Tensor) -> Any:
        gradients_of = guarded if torch.is_grad_enabled() else backward
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return gradients_of(ctx, *gradients)
        return gradients_of(ctx, *gradients)

    return chosen


class _AttentionInCache(torch.autograd.Function):
    """`F.scaled_dot_product_attention` where all logits fit in a processor's cache: `attention`.

    In float32 under autocast. Not to be differentiated twice.
    """

    @staticmethod
    def forward(ctx: Any, heads: int, scale: float, mask: Tensor | None, *parts: Tensor) -> Tensor:
        """Queries, keys and values as of `attend`; `mask` likewise, with all its dimensions."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                wide = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
                return _AttentionInCache.forward(ctx, heads, scale, mask, *wide)
        kept = [by_head(part, heads).flatten(0, 1) for part in parts]
        attended, weights = attention(kept, scale, heads, mask)
        ctx.save_for_backward(weights, *kept)
        ctx.heads, ctx.scale = heads, scale
        ctx.shapes = [part.shape for part in parts]
        return side_by_side(attended, heads, parts[-1].shape)

    @staticmethod
    @once_in_full_precision
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *kept = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in kept]
        gradient = by_head(gradient, ctx.heads).flatten(0, 1)
        put_gradients_of_attention(gradients, gradient, weights, kept, ctx.scale)
        of_parts = [
            side_by_side(part, ctx.heads, shape)
            for part, shape in zip(gradients, ctx.shapes, strict=True)
        ]
        return None, None, None, *of_parts


def attention(
    parts: Sequence[Tensor],
    scale: float,
    heads: int = 1,
    mask: Tensor | None = None,
    steep: bool = False,
    onto_query: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of each task and head by itself, for operations that have gradients of their own.

    Keys come first in the weights: over a last dimension shorter than a vector of the processor,
    as few keys are, a softmax would take up to ten times as long. And exponentials are taken of
    the logits as they are, where these are not expected to be `steep`: finding the largest of each
    task and query takes longer than all else, and is done only if a sum turns out too large or too
    small. They are powers of 2, for which torch has its own vectorised kernel; that of e is MKL's,
    four times slower on AMD.

    Args:
        parts: queries `[tasks · heads, n_query, dim]`, keys `[tasks · heads, n_key, dim]`, values
            `[tasks · heads, n_key, dim_value]`.
        scale: of the logits.
        heads: of a task, which have a mask in common.
        mask: as of `attend`, with all its dimensions, or None.
        steep: whether logits are expected to be hundreds apart. Then nothing is tried that would
            overflow unless the largest is found first. It changes roundings only.
        onto_query: whether the queries are added to what comes.

    Returns:
        What is attended to, `[tasks · heads, n_query, dim_value]`, and the weights by which,
        `[tasks · heads, n_key, n_query]`.
    """
    query, key, value = parts
    weights = _weights(query, key, scale, heads, mask, steep)
    if onto_query:
        return torch.baddbmm(query, weights.mT, value), weights
    return torch.bmm(weights.mT, value), weights


def put_gradients_of_attention(
    gradients: Sequence[Tensor],
    gradient: Tensor,
    weights: Tensor,
    parts: Sequence[Tensor],
    scale: float,
    onto_query: bool = False,
) -> None:
    """Write into `gradients` those of the three parts, from that of what `attention` returned."""
    query, key, value = parts
    of_query, of_key, of_value = gradients
    of_weights = torch.bmm(value, gradient.mT)
    of_logits = torch._softmax_backward_data(of_weights, weights, 1, weights.dtype)
    onto, beta = (gradient, 1) if onto_query else (of_query, 0)
    torch.baddbmm(onto, of_logits.mT, key, beta=beta, alpha=scale, out=of_query)
    torch.baddbmm(of_key, of_logits, query, beta=0, alpha=scale, out=of_key)
    torch.bmm(weights, gradient, out=of_value)


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


def by_head(part: Tensor, heads: int) -> Tensor:
    """`[tasks, n, width]` → `[tasks, heads, n, width / heads]`.

    Samples `[samples, tasks, n, width]` side by side, `[tasks, heads, n, samples · width / heads]`.
    """
    if part.dim() == 4:
        return part.unflatten(-1, (heads, -1)).permute(1, 3, 2, 0, 4).flatten(3)
    tasks, n, width = part.shape
    return part.view(tasks, n, heads, width // heads).transpose(1, 2)


def side_by_side(part: Tensor, heads: int, shape: torch.Size) -> Tensor:
    """What was made by head of tensors of a shape, tasks and heads in one dimension, put together;
    n may be another one."""
    n, width = part.shape[-2:]
    if len(shape) == 4:
        samples, tasks = shape[:2]
        apart = part.view(tasks, heads, n, samples, width // samples)
        return apart.permute(3, 0, 2, 1, 4).flatten(3)
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
