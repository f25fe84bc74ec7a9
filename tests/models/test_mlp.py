"""The multi-layer perceptron: shapes and the initialisation that MAML's code has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metabatch_cli.models.mlp import MLP, SkinnyLinear, layers


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_last_dimension_is_mapped_and_the_others_stay(shape, depth):
    model = MLP(3, 2, width=8, depth=depth)
    assert model(torch.zeros(shape)).shape == (*shape[:-1], 2)
    assert sum(isinstance(layer, nn.Linear) for layer in model.layers) == depth + 1


def test_truncated_normal_weights_stay_within_two_standard_deviations():
    torch.manual_seed(0)
    model = MLP(1, 1, width=40, depth=2, init="truncated_normal")
    linear = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    weights = torch.cat([layer.weight.flatten() for layer in linear])
    assert weights.abs().max() <= 0.02
    # a normal cut at two standard deviations has 0.88 of its spread
    assert 0.0080 < weights.std() < 0.0096
    assert all(not layer.bias.any() for layer in linear)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 7, 5)])
def test_what_other_layers_made_may_go_through_the_rest(shape):
    torch.manual_seed(0)
    network = layers([2, 5, 4, 3])
    x = torch.randn(shape, requires_grad=True)
    expected = network[4](network[2:4](x.relu()))
    direction = torch.randn_like(expected)
    found = network(x * 1, start=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(y, [x, *network[2:].parameters()], direction)
            for y in (found, expected)
        )
    )


def test_a_layer_of_few_inputs_is_a_linear_layer():
    torch.manual_seed(0)
    network = layers([2, 8, 1])
    assert isinstance(network[0], SkinnyLinear)
    plain = nn.Linear(2, 8)
    plain.load_state_dict(network[0].state_dict())
    x = torch.randn(3, 9, 2, requires_grad=True)
    for points in (x, x.flatten(0, 1)):
        found, expected = network[0](points), plain(points)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, [x, *network[0].parameters()], direction),
            torch.autograd.grad(expected, [x, *plain.parameters()], direction),
        )
