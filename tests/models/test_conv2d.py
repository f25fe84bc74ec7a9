"""Patches times weights are a convolution with all its derivatives, for each task's weights too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.nn import functional as F

from metabatch_cli.models.conv2d import Conv2d, by_patches, weights_of_each_task

shapes = st.fixed_dictionaries(
    {
        "channels": st.integers(1, 3),
        "height": st.integers(3, 7),
        "width": st.integers(3, 7),
        "side": st.sampled_from([1, 2, 3]),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 1),
    }
)


def drawn(channels: int, height: int, width: int, side: int, tasks: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = new(tasks, 2, channels, height, width)
    return x, new(tasks, 4, channels, side, side), new(tasks, 4)


@settings(max_examples=40)
@given(shapes, st.booleans())
def test_patches_times_weights_are_a_convolution(shape, channels_last):
    stride, padding = shape.pop("stride"), shape.pop("padding")
    (x, *_), (weight, *_), (bias, *_) = drawn(**shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x, weight, bias, stride, padding)
    torch.testing.assert_close(by_patches(x, weight, bias, stride, padding), expected)


@settings(max_examples=15)
@given(shapes)
def test_all_tasks_together_have_the_derivatives_of_each_alone(shape):
    stride, padding = shape.pop("stride"), shape.pop("padding")
    x, weight, bias = drawn(**shape)

    def penalised(convolution):
        """The norm of a gradient: its own gradient takes second derivatives."""

        def loss(weight, x, bias):
            return convolution(x, weight, bias, stride, padding).tanh().square().sum()

        def norm(weight, x, bias):
            return sum(part.square().sum() for part in grad(loss, argnums=(0, 1))(weight, x, bias))

        return grad(norm, argnums=(0, 1, 2))

    together = vmap(penalised(by_patches))(weight, x, bias)
    alone = [penalised(F.conv2d)(*task) for task in zip(weight, x, bias, strict=True)]
    for number, part in enumerate(together):
        torch.testing.assert_close(part, torch.stack([task[number] for task in alone]))


def test_the_layer_is_torchs_until_tasks_have_weights_of_their_own():
    torch.manual_seed(0)
    layer, torchs = Conv2d(2, 3, 3, stride=2, padding=1), torch.nn.Conv2d(2, 3, 3, 2, 1)
    torchs.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 6, 6)
    assert torch.equal(layer(x), torchs(x))
    with weights_of_each_task():
        torch.testing.assert_close(layer(x), torchs(x))
    assert torch.equal(layer(x), torchs(x))


def test_what_cannot_be_patches_stays_torchs_own():
    layer = Conv2d(4, 4, 3, padding=1, groups=2)
    x = torch.randn(1, 4, 5, 5)
    with weights_of_each_task():
        torch.testing.assert_close(layer(x), torch.nn.Conv2d.forward(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_as_torchs_own_does(dtype):
    layer = Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = layer(x)
        with weights_of_each_task():
            found = layer(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
