"""Attention of few points is torch's, in value and gradient, however large the logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from metabatch_cli.models import attention
from metabatch_cli.models.attention import attend, attend_onto

TASKS, QUERIES, KEYS, WIDTH, HEADS = 3, 7, 5, 16, 4
SHAPES = {"keys": (TASKS, KEYS), "pairs": (TASKS, QUERIES, KEYS), "all tasks": (1, QUERIES, KEYS)}


def inputs(size: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(TASKS, n, WIDTH) for n in (QUERIES, KEYS, KEYS)]
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [part.requires_grad_() for part in (query, key * size, value)]


def by_torch(parts: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    parts = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]
    if mask is not None:
        mask = (mask[:, None] if mask.dim() == 2 else mask)[:, None]
    return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [None, *SHAPES])
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_attention_is_torchs(size, masked):
    parts = inputs(size)
    mask = None
    if masked is not None:
        mask = torch.rand(SHAPES[masked]) > 0.5
        mask[..., 0] = True
    ours, theirs = attend(*parts, HEADS, mask), by_torch(parts, mask)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    ours, theirs = (torch.autograd.grad(seen, parts, direction) for seen in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [1.0, 10.0, 30.0, 100.0, 1e3])
def test_exponentials_of_float32_are_as_good_as_torchs(size):
    wide = inputs(size)
    narrow = [part.detach().float().requires_grad_() for part in wide]
    exact = by_torch(wide, None)
    ours, theirs = attend(*narrow, HEADS), by_torch(narrow, None)
    direction = torch.randn_like(exact)
    exact = [exact, *torch.autograd.grad(exact, wide, direction)]
    ours, theirs = (
        [seen, *torch.autograd.grad(seen, narrow, direction.float())] for seen in (ours, theirs)
    )
    for own, torchs, right in zip(ours, theirs, exact, strict=True):
        scale = right.abs().max()
        worst = ((torchs - right).abs().max() / scale).item()
        assert (own - right).abs().max() / scale < 3 * worst + 1e-6


@pytest.mark.parametrize("masked", [None, "some", "a task without any", "pairs", "counts"])
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize("few", [1, 32])
def test_what_is_attended_to_can_be_added_to_the_queries(
    monkeypatch, few, steep, together, size, masked
):
    monkeypatch.setattr(attention, "FEW", few)
    parts = inputs(size)
    if together:
        torch.manual_seed(0)
        side_by_side = torch.randn(TASKS, KEYS, 3 * WIDTH, dtype=torch.float64) * size**0.5
        parts = [side_by_side.requires_grad_()]
    query, key, value = parts if len(parts) == 3 else parts[0].chunk(3, dim=-1)
    mask = None
    if masked == "counts":
        mask = torch.randint(3, (2, TASKS, KEYS)).to(query.dtype)
    elif masked is not None:
        shape = (TASKS, query.shape[1], KEYS) if masked == "pairs" else (TASKS, KEYS)
        mask = torch.rand(shape) > 0.5
        mask[..., 0] = True
        mask[0] &= masked != "a task without any"
    seen = attend_onto(*parts, heads=HEADS, mask=mask, steep=steep)
    monkeypatch.setattr(attention, "IN_CACHE", 0)  # torch's own
    expected = query + attend(query, key, value, HEADS, mask)
    torch.testing.assert_close(seen, expected)
    direction = torch.randn_like(seen)
    seen, expected = (torch.autograd.grad(of, parts, direction) for of in (seen, expected))
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("hidden", [1e6, float("inf"), float("nan")])
def test_what_is_hidden_changes_nothing_even_if_its_exponential_is_infinite(hidden):
    query, key, value = inputs()
    mask = torch.ones(TASKS, KEYS, dtype=torch.bool)
    mask[:, -1] = False
    before = attend(query, key, value, HEADS, mask)
    changed = torch.cat([key[:, :-1], key[:, -1:] * hidden], dim=1)
    torch.testing.assert_close(attend(query, changed, value, HEADS, mask), before)


@pytest.mark.parametrize("n", [0, 1])
def test_no_query_sees_nothing_and_one_key_is_all_there_is(n):
    query, key, value = inputs()
    seen = attend(query[:, :n], key[:, :1], value[:, :1], HEADS)
    torch.testing.assert_close(seen, value[:, :1].expand(-1, n, -1))


@pytest.mark.parametrize("in_cache", [1 << 20, 0])
@pytest.mark.parametrize("masked", [False, True])
def test_samples_of_values_are_attended_to_as_each_by_itself(monkeypatch, in_cache, masked):
    monkeypatch.setattr(attention, "IN_CACHE", in_cache)
    query, key, value = inputs()
    values = torch.stack([value, value.square(), -value])
    mask = None
    if masked:
        mask = torch.rand(TASKS, KEYS) > 0.5
        mask[0] = False  # a task without any key
    together = attend(query, key, values, HEADS, mask)
    alone = torch.stack([attend(query, key, one, HEADS, mask) for one in values])
    torch.testing.assert_close(together, alone)
    direction, parts = torch.randn_like(alone), (query, key, value)
    together, alone = (
        torch.autograd.grad(seen, parts, direction, retain_graph=True) for seen in (together, alone)
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("in_cache", [1 << 20, 0])
@pytest.mark.parametrize("several", [False, True])
def test_a_point_that_counts_twice_is_two_points(monkeypatch, in_cache, several, size):
    monkeypatch.setattr(attention, "IN_CACHE", in_cache)
    query, key, value = inputs(size)
    drawn = torch.randint(KEYS, (2, TASKS, KEYS))
    counts = F.one_hot(drawn, KEYS).sum(dim=2).to(query.dtype)
    values = torch.stack([value, -value]) if several else value.expand(2, *value.shape)
    by_counts = attend(query, key, values if several else value, HEADS, counts)
    expected = [
        attend(query, *(p.gather(1, one[..., None].expand(p.shape)) for p in (key, own)), HEADS)
        for one, own in zip(drawn, values, strict=True)
    ]
    torch.testing.assert_close(by_counts, torch.stack(expected))


def test_nothing_that_counts_is_attended_to_as_0():
    query, key, value = inputs()
    counts = torch.ones(2, TASKS, KEYS, dtype=query.dtype)
    counts[1, 2] = 0
    seen = attend(query, key, value, HEADS, counts)
    assert not seen[1, 2].any()
    torch.testing.assert_close(seen[0], attend(query, key, value, HEADS))


@pytest.mark.parametrize("backward_inside", [False, True])
def test_in_mixed_precision_attention_is_in_32_bits(backward_inside):
    parts = torch.cat([part[:, :KEYS] for part in inputs()], dim=2).detach()
    narrow = parts.to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = attend_onto(narrow, heads=HEADS)
        with torch.autocast("cpu", enabled=backward_inside):
            (gradient,) = torch.autograd.grad(seen.square().sum(), narrow)
    wide = narrow.detach().float().requires_grad_()
    expected = attend_onto(wide, heads=HEADS)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), wide)
    torch.testing.assert_close(gradient, wanted.to(torch.bfloat16))


def test_a_second_derivative_is_refused_where_it_is_asked_for():
    query, key, value = inputs()
    (once,) = torch.autograd.grad(
        attend(query, key, value, HEADS).square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once.sum().backward()
