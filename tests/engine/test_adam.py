"""Our Adam is torch's to the bit, in what it does and in what it saves."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from metabatch_cli.batching import denormals
from metabatch_cli.engine import adam
from tests.engine.examples import parts

PAIRS = [(adam.Adam, torch.optim.Adam), (adam.AdamW, torch.optim.AdamW)]
SETTINGS = {"lr": 0.1, "weight_decay": 0.01, "fused": True}


def twice() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (4,), (2, 2), ()]]
    return weights, copy.deepcopy(weights)


def take_steps(weights, optimizer, steps, without=()):
    """Steps by gradients that their numbers decide; weights `without` have none."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for number, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = None if number in without else gradient
        optimizer.step()


def assert_the_same(optimizers, both):
    torch.testing.assert_close(*both, rtol=0, atol=0)
    ours, theirs = (optimizer.state_dict() for optimizer in optimizers)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("our_class", "their_class"), PAIRS)
@pytest.mark.parametrize("more", [{}, {"amsgrad": True}, {"maximize": True}, {"fused": False}])
def test_steps_are_torchs_with_weights_left_out_and_a_new_rate(our_class, their_class, more):
    both = twice()
    optimizers = [
        each(weights, **(SETTINGS | more))
        for each, weights in zip((our_class, their_class), both, strict=True)
    ]
    for weights, optimizer in zip(both, optimizers, strict=True):
        take_steps(weights, optimizer, range(3))
        take_steps(weights, optimizer, range(3, 5), without=(1,))
        optimizer.param_groups[0]["lr"] = 0.02
        take_steps(weights, optimizer, range(5, 8))
    assert_the_same(optimizers, both)


def test_a_weight_decay_that_is_decoupled_stays_so():
    both = twice()
    settings = {**SETTINGS, "weight_decay": 0.5, "decoupled_weight_decay": True}
    optimizers = [
        each(weights, **settings)
        for each, weights in zip((adam.Adam, torch.optim.Adam), both, strict=True)
    ]
    for weights, optimizer in zip(both, optimizers, strict=True):
        take_steps(weights, optimizer, range(3))
    assert_the_same(optimizers, both)


@pytest.mark.parametrize(("our_class", "their_class"), PAIRS)
def test_groups_have_their_own_rates(our_class, their_class):
    both = twice()
    optimizers = []
    for each, weights in zip((our_class, their_class), both, strict=True):
        groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.5, "betas": (0.5, 0.6)}]
        optimizers.append(each(groups, **SETTINGS))
        take_steps(weights, optimizers[-1], range(4))
    assert_the_same(optimizers, both)


@pytest.mark.parametrize(("our_class", "their_class"), PAIRS)
def test_each_goes_on_from_what_the_other_saved(our_class, their_class):
    both = twice()
    optimizers = [each(weights, **SETTINGS) for each, weights in
                  zip((our_class, their_class), both, strict=True)]  # fmt: skip
    saved = []
    for weights, optimizer in zip(both, optimizers, strict=True):
        take_steps(weights, optimizer, range(4))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved.append(torch.load(file, weights_only=True))
    for weights, optimizer, state in zip(both, optimizers, reversed(saved), strict=True):
        optimizer.load_state_dict(state)
        take_steps(weights, optimizer, range(4, 8))
    assert_the_same(optimizers, both)


def test_of_a_weight_without_gradient_a_training_remembers_nothing_in_the_end():
    with denormals.as_before():
        parts("trainer.max_steps=1000").build()
        (weight,) = weights = [nn.Parameter(torch.ones(64))]
        optimizer = adam.Adam(weights, lr=1e-3, fused=True)
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
        weight.grad = torch.zeros_like(weight)
        for _ in range(900):  # 0.9⁹⁰⁰ is 7e-42
            optimizer.step()
    assert not optimizer.state[weight]["exp_avg"].any()


@pytest.mark.parametrize(("our_class", "their_class"), PAIRS)
@pytest.mark.parametrize("more", [{}, {"amsgrad": True}])
def test_hooks_are_called_as_torchs_and_once(our_class, their_class, more):
    their_class(twice()[0], **SETTINGS)  # from now on torch wraps its own steps
    both = twice()
    said = [], []
    for each, weights, calls in zip((our_class, their_class), both, said, strict=True):
        optimizer = each(weights, **(SETTINGS | more))
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        take_steps(weights, optimizer, range(3))
    assert said[0] == said[1] == ["before", "after"] * 3
    torch.testing.assert_close(*both, rtol=0, atol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_forgotten_as_torchs(set_to_none):
    weights, _ = twice()
    optimizer = adam.Adam(weights, **SETTINGS)
    take_steps(weights, optimizer, range(2))
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [weight.grad for weight in weights]
    assert all(g is None if set_to_none else not g.any() for g in gradients)
