"""Convolutional neural processes: they move with their points, on a line and in images."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metabatch_cli.models.convcnp import ConvCNP
from metabatch_cli.models.convcnp_image import ConvCNPImage
from metabatch_cli.models.unet import UNet1d
from tasksets.images import pixel_centres

seeds = st.integers(0, 2**16)
PER_UNIT = 8


def convcnp(**more: object) -> ConvCNP:
    torch.manual_seed(0)
    options = {"points_per_unit": PER_UNIT, "channels": 6, "levels": 3} | more
    return ConvCNP(1, 1, **options).double()


def line(n_tasks: int = 3, n_context: int = 5, n_target: int = 4, seed: int = 0):
    """Context and targets within 4 units: x, y, target x, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(n_tasks, n_context + n_target, 1, generator=generator).double()
    y = torch.randn(n_tasks, n_context, 1, generator=generator).double()
    return x[:, :n_context], y, x[:, n_context:]


def moments(prediction) -> tuple[Tensor, Tensor]:
    return prediction.mean, prediction.stddev


def assert_same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# --- on a line ---------------------------------------------------------------------------------


@given(st.integers(-1000, 1000), st.integers(0, 5), seeds)
def test_points_that_move_by_whole_cells_take_the_prediction_with_them(cells, n_context, seed):
    context_x, context_y, target_x = line(n_context=n_context, seed=seed)
    model, shift = convcnp(), cells / PER_UNIT
    stay = moments(model(context_x, context_y, target_x))
    assert_same(moments(model(context_x + shift, context_y, target_x + shift)), stay)


def test_each_task_may_move_by_itself():
    context_x, context_y, target_x = line()
    shift = torch.tensor([-7.0, 0.0, 123.0]).double()[:, None, None] / PER_UNIT
    model = convcnp()
    stay = moments(model(context_x, context_y, target_x))
    assert_same(moments(model(context_x + shift, context_y, target_x + shift)), stay)


def test_the_targets_alone_do_not_move_the_prediction_with_them():
    context_x, context_y, target_x = line()
    model = convcnp()
    stay = model(context_x, context_y, target_x).mean
    assert not torch.allclose(model(context_x, context_y, target_x + 0.5).mean, stay)


@given(seeds, st.floats(0.0, 1.0))
def test_every_point_lies_on_its_tasks_grid_and_not_within_the_margin(seed, margin):
    context_x, _, target_x = line(seed=seed)
    model = convcnp(margin=margin)
    spread = torch.tensor([1.0, 3.0, 20.0]).double()[:, None, None]
    grid = model.grid(context_x * spread, target_x * spread)
    points = torch.cat([grid.context, grid.target], dim=1)
    real = torch.ones(3, len(grid.cells)).bool() if grid.real is None else grid.real
    lengths = real.sum(dim=1)
    least = margin * PER_UNIT
    assert (points >= least - 1e-9).all()
    assert (points <= lengths[:, None] - 1 - least + 1e-9).all()
    assert (lengths % 2**3 == 0).all()
    assert lengths.max() == len(grid.cells)
    # the shortest that will do
    needed = points.amax(dim=1) - points.amin(dim=1) + 2 * math.ceil(least) + 3
    assert (lengths < needed + 2**3).all()


def test_the_grid_begins_at_a_multiple_of_its_spacing():
    context_x, _, target_x = line()
    grid = convcnp().grid(context_x, target_x)
    start = context_x[..., 0] * PER_UNIT - grid.context
    assert_same(start, start.round())
    assert_same(start, start[:, :1].expand_as(start))


def test_padding_far_away_lengthens_no_grid():
    context_x, _, target_x = line()
    far = torch.full_like(context_x[:, :1], 1e9)
    masks = [torch.ones(3, n + 1).bool() for n in (5, 4)]
    for mask in masks:
        mask[:, -1] = False
    model = convcnp()
    padded = [torch.cat([x, far], dim=1) for x in (context_x, target_x)]
    with_padding = model.grid(*padded, *masks)
    assert torch.equal(with_padding.cells, model.grid(context_x, target_x).cells)


def test_the_context_is_on_the_grid_as_a_density_and_a_mean():
    model = convcnp(scale=1.0)
    context_x = torch.tensor([[[1.0], [1.0], [3.0]]]).double()
    context_y = torch.tensor([[[2.0], [4.0], [-1.0]]]).double()
    grid = model.grid(context_x, context_x)
    on_grid = model.encode(grid, context_y)[0]
    first, second = grid.context[0, 0].int(), grid.context[0, 2].int()
    torch.testing.assert_close(on_grid[first, 0].item(), 2.0)
    torch.testing.assert_close(on_grid[first + 1, 0].item(), 2 * math.exp(-0.5))
    torch.testing.assert_close(on_grid[second, 0].item(), 1.0)
    torch.testing.assert_close(on_grid[first, 1].item(), 3.0, rtol=1e-3, atol=0)
    torch.testing.assert_close(on_grid[second, 1].item(), -1.0, rtol=1e-3, atol=0)
    assert on_grid[(first + second) // 2].abs().max() < 1e-6  # far from both


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_what_is_constant_on_the_grid_is_read_as_it_is(value):
    context_x, _, target_x = line()
    model = convcnp()
    grid = model.grid(context_x, target_x)
    values = torch.full((3, len(grid.cells), 2), value).double()
    expected = torch.full((3, 4, 2), value).double()
    torch.testing.assert_close(model.read(grid, values), expected, rtol=1e-7, atol=0)


def test_frozen_scales_are_not_learned():
    for learn in (True, False):
        model = convcnp(learn_scale=learn)
        model(*line()).mean.sum().backward()
        assert (model.log_scales.grad is not None) is learn


def test_x_of_several_numbers_are_refused_with_the_model_for_images():
    with pytest.raises(ValueError, match=r"dim_x=2.*convcnp_image"):
        ConvCNP(2, 1)


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf, 1e9])
def test_an_x_that_is_no_number_or_in_a_wrong_unit_is_refused(x):
    context_x, context_y, target_x = line()
    context_x[0, 0] = x
    with pytest.raises(ValueError, match="points_per_unit=8 makes a grid of"):
        convcnp()(context_x, context_y, target_x)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), seeds)
def test_a_u_net_says_the_same_of_a_sequence_in_any_batch(lengths, levels, seed):
    torch.manual_seed(seed)
    net = UNet1d(2, 3, channels=4, levels=levels).double()
    each = [torch.randn(1, 2, length * 2**levels).double() for length in lengths]
    longest = max(part.shape[2] for part in each)
    batch = torch.cat(
        [torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in each]
    )
    real = torch.stack([torch.arange(longest) < part.shape[2] for part in each])
    together = net(batch, real)
    for found, part in zip(together, each, strict=True):
        assert_same(found[None, :, : part.shape[2]], net(part))
        assert not found[:, part.shape[2] :].any()


@pytest.mark.parametrize("make", [lambda: UNet1d(1, 1, kernel=4), lambda: convcnp(kernel=4)])
def test_a_kernel_without_a_middle_is_refused(make):
    with pytest.raises(ValueError, match="kernel=4"):
        make()


# --- in images ---------------------------------------------------------------------------------


def images(height: int = 6, width: int = 5, **more: object) -> ConvCNPImage:
    torch.manual_seed(0)
    options = {"channels": 6, "blocks": 1, "kernel": 3, "context_kernel": 3} | more
    return ConvCNPImage((1, height, width), 1, **options).double()


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_pixel_is_found_by_its_place(height, width):
    centres = pixel_centres(height, width).double()
    model = images(height, width)
    assert model.pixels(centres[None])[0].tolist() == list(range(height * width))
    corners = torch.tensor([[[-1.0, -1.0], [1.0, 1.0]]])
    assert model.pixels(corners)[0].tolist() == [0, height * width - 1]


def test_known_pixels_are_in_the_image_as_a_density_and_a_mean():
    model = images()
    with torch.no_grad():
        model.weights.fill_(math.log(math.e - 1))  # every weight 1
    pixels = torch.tensor([[0, 7, 29]])  # (0, 0), (1, 2), (5, 4)
    y = torch.tensor([[[1.0], [5.0], [-2.0]]]).double()
    density, data = model.encode(pixels, y)[0]
    assert_same(density[0, 1].item(), 2 / 3)  # beside the first two
    assert_same(data[0, 1].item(), 3.0)
    assert_same(density[0, 0].item(), 1 / 2)
    assert_same(data[5, 4].item(), -2.0)
    assert density[3, 0] == data[3, 0] == 0


def test_pixels_within_an_image_that_move_take_the_prediction_with_them():
    """Away from the edges, which are something to go by."""
    model = images(30, 30)
    centres = pixel_centres(30, 30).double().reshape(30, 30, 2)
    known, wanted = centres[10:12, 10:13].reshape(1, -1, 2), centres[12:14, 11:14].reshape(1, -1, 2)
    y = torch.randn(1, 6, 1).double()
    shift = centres[15, 13] - centres[10, 11]
    stay = moments(model(known, y, wanted))
    assert_same(moments(model(known + shift, y, wanted + shift)), stay)


@pytest.mark.parametrize("place", [1.1, -2.0, math.nan])
def test_places_outside_an_image_are_refused(place):
    x = torch.zeros(1, 2, 2).double()
    x[0, 1, 0] = place
    with pytest.raises(ValueError, match="outside"):
        images()(x, x[..., :1], x[:, :1])


def test_task_sets_without_images_are_refused():
    with pytest.raises(ValueError, match="image_shape is not known"):
        ConvCNPImage(None, 1)


@pytest.mark.parametrize("name", ["kernel", "context_kernel"])
def test_an_even_kernel_is_refused_by_its_name(name):
    with pytest.raises(ValueError, match=f"{name}=2 has no middle"):
        images(**{name: 2})
