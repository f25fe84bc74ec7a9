"""Conv-4: shapes, bytes, and whose statistics normalise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.models.conv4 import Conv4
from metabatch_cli.models.normalisation import BatchNorm


def bytes_of(n_images: int, channels: int = 1, side: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_images, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def conv4(channels: int = 1, side: int = 16, **more: object) -> Conv4:
    torch.manual_seed(0)
    return Conv4((channels, side, side), width=4, **more).double()


def test_an_omniglot_image_has_the_64_features_of_the_paper():
    model = Conv4((1, 28, 28))
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 64)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64] * 4


@pytest.mark.parametrize(
    ("channels", "side", "depth", "features"), [(1, 16, 4, 4), (3, 17, 3, 16), (3, 84, 4, 100)]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_features_follow_from_width_depth_and_size(channels, side, depth, features, channels_last):
    model = conv4(channels, side, depth=depth, channels_last=channels_last)
    assert model(bytes_of(2, channels, side)).shape == (2, features)


@pytest.mark.parametrize(("side", "depth", "places"), [(28, 4, 4), (5, 2, 4), (17, 3, 9)])
@pytest.mark.parametrize("average", [True, False])
def test_strides_halve_an_image_and_round_up(side, depth, places, average):
    model = conv4(1, side, depth=depth, strided=True, average=average)
    assert model(bytes_of(2, side=side)).shape == (2, 4 if average else 4 * places)


def test_mamls_network_for_omniglot_has_means_of_64_channels():
    model = Conv4((1, 28, 28), dim_y=5, strided=True, average=True, head=True)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.MaxPool2d)]
    assert model.head.in_features == 64
    places = Conv4((1, 28, 28), strided=True)
    places.load_state_dict(model.state_dict(), strict=False)
    images = bytes_of(3, side=28).float() / 255
    means = places(images).unflatten(1, (64, -1)).mean(2)
    torch.testing.assert_close(model.features(images), means)


@pytest.mark.parametrize("dim_y", [1, 5])
def test_a_head_has_an_output_for_each_dimension(dim_y):
    assert conv4(dim_y=dim_y, head=True)(bytes_of(3)).shape == (3, dim_y)


@given(st.integers(0, 2**31))
def test_bytes_are_the_numbers_from_0_to_1(seed):
    model = conv4(norm="none")
    images = bytes_of(2, seed=seed)
    torch.testing.assert_close(model(images), model(images.double() / 255), rtol=0, atol=0)


def test_the_memory_layout_changes_nothing_but_speed():
    images = bytes_of(4, channels=3)
    one, other = conv4(3, channels_last=True), conv4(3, channels_last=False)
    torch.testing.assert_close(one(images), other(images))


@pytest.mark.parametrize(("side", "depth"), [(15, 4), (7, 3), (1, 1)])
def test_an_image_too_small_to_be_halved_is_refused_with_both_numbers(side, depth):
    with pytest.raises(ValueError, match=rf"depth={depth} .*{side}×{side}.*{2**depth}×{2**depth}"):
        Conv4((1, side, side), depth=depth)
    assert Conv4((1, 2**depth, 2**depth), width=2, depth=depth)(bytes_of(2, side=2**depth)).shape


def test_transductive_keeps_no_statistics_and_is_the_same_in_both_modes():
    model = conv4(norm="transductive")
    assert not list(model.buffers())
    images = bytes_of(6)
    torch.testing.assert_close(model.train()(images), model.eval()(images))
    assert not torch.allclose(model(images)[:3], model(images[:3]))  # those at hand count


def test_batch_learns_running_statistics_by_which_each_image_is_embedded_alone():
    model = conv4(norm="batch")
    before = [buffer.clone() for buffer in model.buffers()]
    model.train()(bytes_of(6))
    after = list(model.buffers())
    assert not all(map(torch.equal, before, after))
    images = bytes_of(6, seed=1)
    model.eval()
    torch.testing.assert_close(model(images)[:3], model(images[:3]))


def test_none_has_no_normalisation_but_a_bias():
    model = conv4(norm="none")
    assert not [m for m in model.modules() if isinstance(m, BatchNorm)]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, torch.nn.Conv2d))


@pytest.mark.parametrize(("pools", "side"), [(0, 28), (2, 7), (4, 1)])
def test_maps_are_halved_as_often_as_is_said(pools, side):
    model = Conv4((1, 28, 28), width=3, pools=pools, flatten=False)
    assert model(bytes_of(2, side=28)).shape == (2, 3, side, side)
    assert model.blocks[0].weight.shape == (3, 1, 3, 3)
    flat = Conv4((1, 28, 28), width=3, pools=pools)
    flat.load_state_dict(model.state_dict())
    images = bytes_of(2, side=28)
    torch.testing.assert_close(flat.eval()(images), model.eval()(images).flatten(1))


def test_maps_for_a_head_and_more_pools_than_blocks_are_refused():
    with pytest.raises(ValueError, match="flatten=False"):
        Conv4((1, 28, 28), head=True, flatten=False)
    with pytest.raises(ValueError, match="pools=5 is more than depth=4"):
        Conv4((1, 64, 64), pools=5)
    with pytest.raises(ValueError, match="pools=3 halves"):
        Conv4((1, 7, 7), pools=3)


def test_in_evaluation_it_is_its_layers_one_after_the_other():
    model = conv4(norm="batch")
    model.train()(bytes_of(6))
    images = bytes_of(3, seed=1).double() / 255
    torch.testing.assert_close(model.eval()(images), model.blocks(images))
