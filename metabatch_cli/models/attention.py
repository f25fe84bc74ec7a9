"""Attention to a context: the context's points are keys and values, and nobody else is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IN_CACHE = 1 << 20  # logits


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
        key, value: `[tasks, n_key, width]`; `n_key` may be 0.
        heads: the parts that the width is cut into.
        mask: bool `[tasks, n_key]`, True where a key is real, or `[tasks, n_query, n_key]` (tasks
            may be 1), True where the query sees the key; None if everybody sees everything.
        scale: of the logits; None for `1/√(width of a head)`.

    Returns:
        `[tasks, n_query, width]`.
    """
    if not key.shape[1]:
        return query.new_zeros(query.shape)
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, :]
    seen = None if mask is None else mask.any(dim=-1, keepdim=True)
    if mask is not None and seen is not None:
        mask = (mask | ~seen)[:, None]  # a row without any key has no softmax
    if query.device.type == "cpu" and query.shape[:2].numel() * heads * key.shape[1] <= IN_CACHE:
        scale = 1 / math.sqrt(query.shape[2] // heads) if scale is None else scale
        attended = _AttentionInCache.apply(query, key, value, heads, mask, scale)
    else:
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        attended = attended.transpose(1, 2).flatten(2)
    return attended if seen is None else attended.masked_fill(~seen, 0)


class _AttentionInCache(torch.autograd.Function):
    """Attention whose logits all fit in a processor's cache: faster there than torch's own.

    Logits are computed with the queries last: a softmax over a last dimension that is shorter
    than a vector of the processor, as few keys are, takes up to ten times as long. The gradient
    is written out, as the bookkeeping of a dozen small operations would cost as much as they do.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        query, key, value = _split(query * scale, heads), _split(key, heads), _split(value, heads)
        logits = torch.bmm(key, query.mT)
        if mask is not None:  # [tasks or 1, 1, n_query, n_key]
            parts = logits.view(-1, heads, *logits.shape[1:])
            logits = parts.masked_fill(~mask.mT, -math.inf).view_as(logits)
        weights = logits.softmax(1).to(value.dtype)
        ctx.save_for_backward(query, key, value, weights)
        ctx.heads, ctx.scale = heads, scale
        return _merge(torch.bmm(weights.mT, value), heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, weights = ctx.saved_tensors
        grad = _split(grad, ctx.heads)
        of_weights = torch.bmm(value, grad.mT)
        of_logits = torch._softmax_backward_data(of_weights, weights, 1, weights.dtype)
        grads = (
            torch.bmm(of_logits.mT, key).mul_(ctx.scale),
            torch.bmm(of_logits, query),
            torch.bmm(weights, grad),
        )
        return *(_merge(part, ctx.heads) for part in grads), None, None, None


def _split(part: Tensor, heads: int) -> Tensor:
    """`[tasks, n, width]` → `[tasks · heads, n, width / heads]`."""
    tasks, n, width = part.shape
    parts = part.view(tasks, n, heads, width // heads).transpose(1, 2)
    return parts.reshape(tasks * heads, n, width // heads)


def _merge(part: Tensor, heads: int) -> Tensor:
    """`[tasks · heads, n, width / heads]` → `[tasks, n, width]`."""
    both, n, width = part.shape
    parts = part.view(both // heads, heads, n, width).transpose(1, 2)
    return parts.reshape(both // heads, n, heads * width)


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
        if width % heads:
            raise ValueError(f"heads={heads} do not divide width={width}")
        self.heads = heads
        self.scale = 1 / math.sqrt(width)
        self.of_query = nn.Linear(width, width, bias=False)
        self.of_key = nn.Linear(width, width, bias=False)
        self.of_value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def between(self, points: Tensor, mask: Tensor | None = None, first: int = 0) -> Tensor:
        """Self-attention: `points [tasks, n, width]` look at each other.

        Args:
            first: so many points at the beginning also look at each other only; what comes of
                them is put before the rest, `[tasks, first + n, width]`.
        """
        # one product for all three is faster than three
        weights = [part.weight for part in (self.of_query, self.of_key, self.of_value)]
        query, key, value = F.linear(points, torch.cat(weights)).chunk(3, dim=-1)
        attended = attend(query, key, value, self.heads, mask, self.scale)
        if first:
            among = [part[:, :first] for part in (query, key, value)]
            known = None if mask is None else mask[:, :first]
            alone = attend(*among, self.heads, known, self.scale)  # type: ignore[misc]
            query = torch.cat([among[0], query], dim=1)
            attended = torch.cat([alone, attended], dim=1)
        return self._finished(query, attended)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        before: nn.Linear | None = None,
    ) -> Tensor:
        """`query [tasks, n_query, width]`, `key`, `value [tasks, n_key, width]` → as `query`.

        Args:
            before: a linear layer that queries and keys have still to go through; it is merged
                into the block's own, as two products of weights are cheaper than two of points.
        """
        if before is None:
            query, key = self.of_query(query), self.of_key(key)
        else:
            query, key = (
                F.linear(part, own.weight @ before.weight, own.weight @ before.bias)
                for part, own in ((query, self.of_query), (key, self.of_key))
            )
        value = self.of_value(value)
        return self._finished(query, attend(query, key, value, self.heads, mask, self.scale))

    def _finished(self, query: Tensor, attended: Tensor) -> Tensor:
        hidden = self.norm1(query + attended)
        return self.norm2(hidden + F.relu(self.out(hidden)))
