"""A block of attention as one operation is the one that autograd puts together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metabatch_cli.models import attention, attention_block
from metabatch_cli.models.attention_block import AttentionBlock

TASKS, QUERIES, KEYS, WIDTH, HEADS = 3, 7, 5, 16, 4


def block(dtype=torch.float64, heads=HEADS):
    torch.manual_seed(0)
    made = AttentionBlock(WIDTH, heads)
    for norm in (made.norm1, made.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made.to(dtype)


def inputs(size=1.0):
    shapes = [(TASKS, n, WIDTH) for n in (QUERIES, KEYS, KEYS)]
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [part.requires_grad_() for part in (query, key * size, value)]


def masks(kind):
    if kind is None:
        return None
    if kind == "counts":
        return torch.randint(1, 3, (TASKS, KEYS)).double()
    shape = (TASKS, QUERIES, KEYS) if kind == "pairs" else (TASKS, KEYS)
    mask = torch.rand(shape) > 0.5
    mask[..., 0] = True
    mask[0] &= kind != "a task without any"
    return mask


def values_and_gradients(compute, parts):
    y = compute()
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, parts, torch.randn_like(y))]


@pytest.fixture
def operations(monkeypatch):
    """One number for every time that a block was one operation."""
    done = []
    at_once = AttentionBlock._at_once

    def noted(self, *parts):
        done.append(1)
        return at_once(self, *parts)

    monkeypatch.setattr(AttentionBlock, "_at_once", noted)
    return done


@pytest.mark.parametrize("masked", [None, "some", "a task without any", "pairs", "counts"])
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("few", [1, 32])
def test_attention_to_others(monkeypatch, operations, few, merged, size, masked):
    monkeypatch.setattr(attention, "FEW", few)
    made, before = block(), nn.Linear(WIDTH, WIDTH).double() if merged else None
    query, key, value = inputs(size)
    mask = masks(masked)
    parts = [query, key, value, *made.parameters(), *(before.parameters() if before else ())]
    found = values_and_gradients(lambda: made(query, key, value, mask, before), parts)
    assert len(operations) == (masked not in ("pairs", "a task without any"))
    monkeypatch.setattr(attention_block, "in_cache", lambda *_: False)
    expected = values_and_gradients(lambda: made(query, key, value, mask, before), parts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("masked", [None, "some", "a task without any", "counts"])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_attention_to_each_other(monkeypatch, operations, size, masked):
    made, mask = block(), masks(masked)
    points = (inputs()[2].detach() * size).requires_grad_()
    parts = [points, *made.parameters()]
    found = values_and_gradients(lambda: made.between(points, mask), parts)
    assert len(operations) == (masked != "a task without any")
    monkeypatch.setattr(attention_block, "in_cache", lambda *_: False)
    torch.testing.assert_close(
        found, values_and_gradients(lambda: made.between(points, mask), parts)
    )


@pytest.mark.parametrize("masked", [None, "some"])
def test_queries_and_keys_may_have_another_width_before_they_are_merged(
    monkeypatch, operations, masked
):
    made, before, mask = block(), nn.Linear(2, WIDTH).double(), masks(masked)
    query, key, value = inputs()
    query, key = (part[..., :2].detach().requires_grad_() for part in (query, key))
    parts = [query, key, value, *made.parameters(), *before.parameters()]
    found = values_and_gradients(lambda: made(query, key, value, mask, before), parts)
    assert operations
    monkeypatch.setattr(attention_block, "in_cache", lambda *_: False)
    expected = values_and_gradients(lambda: made(query, key, value, mask, before), parts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("narrow", [False, True])
def test_gradients_may_be_asked_for_inside_mixed_precision(operations, narrow):
    made, (query, key, value) = block(torch.float32), inputs()
    parts = [part.detach().float().requires_grad_() for part in (query, key, value)]
    loss = made(*parts).square().sum()
    expected = torch.autograd.grad(loss, parts, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        torch.testing.assert_close(torch.autograd.grad(loss, parts), expected)
    assert operations


@pytest.mark.parametrize("heads", [1, WIDTH])
@pytest.mark.parametrize("n", [1, KEYS])
def test_any_number_of_heads_and_points(monkeypatch, operations, n, heads):
    made = block(heads=heads)
    query, key, value = (part[:, :n] for part in inputs())
    parts = [query, key, value, *made.parameters()]
    both = lambda: made(query, key, made.between(value))  # noqa: E731
    found = values_and_gradients(both, parts)
    assert len(operations) == 2
    monkeypatch.setattr(attention_block, "in_cache", lambda *_: False)
    torch.testing.assert_close(found, values_and_gradients(both, parts))


def test_the_first_points_are_also_among_themselves():
    made, points = block(), inputs()[2]
    both = made.between(points, first=2)
    apart = torch.cat([made.between(points[:, :2]), made.between(points)], dim=1)
    torch.testing.assert_close(both, apart)


def test_only_what_is_asked_for_has_a_gradient():
    made = block()
    query, key, value = (part.detach() for part in inputs())
    made(query, key, value.requires_grad_()).sum().backward()
    assert value.grad is not None
    assert query.grad is None
    assert all(weight.grad is not None for weight in made.parameters())


@pytest.mark.parametrize("masked", [None, "some"])
def test_in_mixed_precision_a_block_is_what_it_is_in_full_but_for_rounding(operations, masked):
    made = block(torch.float32)
    query, key, value = (part.detach().float() for part in inputs())
    mask = masks(masked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(query, key, value, mask)
    assert not operations
    torch.testing.assert_close(found, made(query, key, value, mask), rtol=0.05, atol=0.05)


def test_a_second_derivative_is_refused_where_it_is_asked_for():
    made, points = block(), inputs()[2]
    (once,) = torch.autograd.grad(made.between(points).square().sum(), points, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once.sum().backward()
