"""Attention to a context: the context's points are keys and values, and nobody else is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
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
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    few = query.shape[:3].numel() * key.shape[2] <= IN_CACHE and query.device.type == "cpu"
    if few and mask is None:
        attended = _attend_in_cache(query, key, value, scale)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    attended = attended.transpose(1, 2).flatten(2)
    return attended if seen is None else attended.masked_fill(~seen, 0)


def _attend_in_cache(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """`F.scaled_dot_product_attention` where all logits fit in a processor's cache.

    Keys come first in the logits: a softmax over a last dimension shorter than a vector of the
    processor, as few keys are, would take up to ten times as long.
    """
    query = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    parts = [part.flatten(0, 1) for part in (query, key, value)]
    weights = torch.bmm(parts[1], parts[0].mT).softmax(1)
    return torch.bmm(weights.mT, parts[2]).unflatten(0, query.shape[:2])


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
