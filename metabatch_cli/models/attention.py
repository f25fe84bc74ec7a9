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
BOUND = 1e-15  # of sums of exponentials


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
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, :]
    seen = None if mask is None else mask.any(dim=-1, keepdim=True)
    if mask is not None and seen is not None:
        mask = mask.masked_fill(~seen, 1)[:, None]  # a row without any key has no softmax
    few = 0 < query.shape[:2].numel() * heads * key.shape[1] <= IN_CACHE
    if few and query.device.type == "cpu" and not torch.compiler.is_compiling():
        scale = 1 / math.sqrt(query.shape[2] // heads) if scale is None else scale
        attended = _AttentionInCache.apply(query, key, value, heads, scale, mask)
    else:
        mask = mask.log() if are_counts(mask) else mask
        of_heads = _by_head(query, heads), _by_head(key, heads), _by_head(value, heads)
        attended = F.scaled_dot_product_attention(*of_heads, attn_mask=mask, scale=scale)
        attended = _side_by_side(attended, value.shape)
    return attended if seen is None else attended.masked_fill(~seen, 0)


class _AttentionInCache(torch.autograd.Function):
    """`F.scaled_dot_product_attention` where all logits fit in a processor's cache.

    Keys come first in the logits: over a last dimension shorter than a vector of the processor,
    as few keys are, a softmax would take up to ten times as long. And exponentials are taken of
    the logits as they are: finding the largest of each task and query takes longer than all else,
    and is done only if a sum turns out too large or too small.

    In float32 under autocast. Not to be differentiated twice.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.shapes = [part.shape for part in (query, key, value)]
        query, key, value = (_by_head(part, heads).flatten(0, 1) for part in (query, key, value))
        weights = torch.bmm(key, query.mT).mul_(scale).exp_()
        if mask is not None:
            weights.unflatten(0, (-1, heads)).mul_(mask.mT.contiguous().to(weights.dtype))
        total = weights.sum(dim=1, keepdim=True)
        least, most = (bound.item() for bound in total.aminmax())
        if least > BOUND and most < 1 / BOUND:
            weights.div_(total)
        else:  # or not a number
            logits = torch.bmm(key, query.mT).mul_(scale)
            if mask is not None:
                of_heads = logits.unflatten(0, (-1, heads)).masked_fill_(mask.mT == 0, -math.inf)
                if are_counts(mask):
                    of_heads.add_(mask.mT.log().clamp(min=0))  # of those that are there
            weights = logits.softmax(dim=1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.heads, ctx.scale = heads, scale
        attended = torch.bmm(weights.mT, value).unflatten(0, (-1, heads))
        return _side_by_side(attended, ctx.shapes[2])

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, weights = ctx.saved_tensors
        gradient = _by_head(gradient, ctx.heads).flatten(0, 1)
        of_weights = torch.bmm(value, gradient.mT)
        of_logits = torch._softmax_backward_data(of_weights, weights, 1, weights.dtype)
        of_logits.mul_(ctx.scale)
        of_parts = (
            torch.bmm(of_logits.mT, key),
            torch.bmm(of_logits, query),
            torch.bmm(weights, gradient),
        )
        of_heads = (part.unflatten(0, (-1, ctx.heads)) for part in of_parts)
        gradients = map(_side_by_side, of_heads, ctx.shapes)
        return *gradients, None, None, None


def _by_head(part: Tensor, heads: int) -> Tensor:
    """`[tasks, n, width]` → `[tasks, heads, n, width / heads]`.

    Samples `[samples, tasks, n, width]` side by side, `[tasks, heads, n, samples · width / heads]`.
    """
    part = part.unflatten(-1, (heads, -1))
    if part.dim() == 4:
        return part.transpose(1, 2)
    return part.permute(1, 3, 2, 0, 4).flatten(3)


def _side_by_side(part: Tensor, shape: torch.Size) -> Tensor:
    """What `_by_head` made of a tensor of a shape, put together again; n may be another one."""
    if len(shape) == 3:
        return part.transpose(1, 2).flatten(2)
    return part.unflatten(3, (shape[0], -1)).permute(3, 0, 2, 1, 4).flatten(3)


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
        self.of_query = nn.Linear(width, width, bias=False)
        self.of_key = nn.Linear(width, width, bias=False)
        self.of_value = nn.Linear(width, width, bias=False)
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
        # one product for all three is faster than three
        weights = [part.weight for part in (self.of_query, self.of_key, self.of_value)]
        query, key, value = F.linear(points, torch.cat(weights)).chunk(3, dim=-1)
        attended = attend(query, key, value, self.heads, mask, self.scale)
        if first:
            asked, of_key, of_value = (part[:, :first] for part in (query, key, value))
            known = None if mask is None else mask[:, :first]
            alone = attend(asked, of_key, of_value, self.heads, known, self.scale)
            query = torch.cat([asked, query], dim=1)
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
        """`query [tasks, n_query, width]`, `key`, `value [tasks, n_key, width]` → as `query`;
        of samples of values, or by counts, as `attend`.

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
        hidden = self.norm1((query + attended).flatten(0, -2))  # all points as rows of one matrix
        return self.norm2(hidden + self.out(hidden).relu_()).unflatten(0, attended.shape[:-1])
