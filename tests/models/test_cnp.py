"""The conditional neural process: symmetries, shapes, and how sure it may be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metabatch_cli.models.cnp import CNP

small = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)


def tasks(n_tasks: int, n_context: int, n_target: int, dim_x: int, dim_y: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        normal(n_tasks, n_context, dim_x),
        normal(n_tasks, n_context, dim_y),
        normal(n_tasks, n_target, dim_x),
    )


def cnp(dim_x: int = 1, dim_y: int = 1, seed: int = 0, **more: object) -> CNP:
    torch.manual_seed(seed)
    return CNP(dim_x, dim_y, width=8, **more).double()


@given(small, st.integers(0, 6), small, small, small, seeds)
def test_the_prediction_has_a_distribution_for_each_target(
    n_tasks, n_context, n_target, dim_x, dim_y, seed
):
    prediction = cnp(dim_x, dim_y)(*tasks(n_tasks, n_context, n_target, dim_x, dim_y, seed))
    assert prediction.batch_shape == (n_tasks, n_target)
    assert prediction.event_shape == (dim_y,)
    assert prediction.mean.dtype == torch.float64


@given(st.integers(1, 8), seeds)
def test_the_order_of_the_context_does_not_matter(n_context, seed):
    context_x, context_y, target_x = tasks(3, n_context, 4, 2, 2, seed)
    order = torch.randperm(n_context, generator=torch.Generator().manual_seed(seed))
    model = cnp(2, 2, seed)
    one = model(context_x, context_y, target_x)
    other = model(context_x[:, order], context_y[:, order], target_x)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.stddev, other.stddev)


@given(st.integers(1, 8), seeds)
def test_targets_are_predicted_in_their_order_and_without_each_other(n_target, seed):
    context_x, context_y, target_x = tasks(3, 5, n_target, 2, 2, seed)
    order = torch.randperm(n_target, generator=torch.Generator().manual_seed(seed))
    model = cnp(2, 2, seed)
    all_together = model(context_x, context_y, target_x)
    permuted = model(context_x, context_y, target_x[:, order])
    torch.testing.assert_close(all_together.mean[:, order], permuted.mean)
    torch.testing.assert_close(all_together.stddev[:, order], permuted.stddev)
    alone = model(context_x, context_y, target_x[:, :1])
    torch.testing.assert_close(all_together.mean[:, :1], alone.mean)


@given(seeds)
def test_a_batchs_other_tasks_do_not_matter(seed):
    batch = tasks(4, 5, 6, 1, 1, seed)
    model = cnp(seed=seed)
    together = model(*batch).mean
    alone = torch.cat([model(*(part[i : i + 1] for part in batch)).mean for i in range(4)])
    torch.testing.assert_close(together, alone)


def test_without_context_all_tasks_are_predicted_alike_and_the_context_matters_otherwise():
    model = cnp()
    context_x, context_y, target_x = tasks(3, 5, 6, 1, 1, seed=1)
    same = target_x[:1].expand_as(target_x)
    empty = model(context_x[:, :0], context_y[:, :0], same).mean
    torch.testing.assert_close(empty, empty[:1].expand_as(empty))
    given_context = model(context_x, context_y, same).mean
    assert not torch.allclose(given_context[0], given_context[1])


@given(st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0]), seeds)
def test_no_prediction_is_surer_than_min_sigma(min_sigma, seed):
    context_x, context_y, target_x = tasks(2, 5, 6, 1, 1, seed)
    model = cnp(seed=seed, min_sigma=min_sigma)
    with torch.no_grad():
        model.decoder.layers[-1].weight.mul_(100)  # far into both ends of the softplus
    prediction = model(context_x, context_y, target_x)
    assert prediction.stddev.min() >= min_sigma
    most_likely = prediction.log_prob(prediction.mean)
    assert most_likely.max() <= -math.log(min_sigma * math.sqrt(2 * math.pi)) + 1e-9


@given(st.floats(0.001, 1.0), st.floats(-20, 20))
def test_sigma_is_that_of_the_papers_code(min_sigma, raw):
    model = cnp(min_sigma=min_sigma)
    with torch.no_grad():
        model.decoder.layers[-1].weight.zero_()
        model.decoder.layers[-1].bias.copy_(torch.tensor([3.0, raw]))
    prediction = model(*tasks(1, 2, 2, 1, 1, seed=0))
    sigma = min_sigma + (1 - min_sigma) * math.log1p(math.exp(raw))
    torch.testing.assert_close(prediction.stddev, torch.full_like(prediction.stddev, sigma))
    torch.testing.assert_close(prediction.mean, torch.full_like(prediction.mean, 3.0))


@given(st.integers(1, 5), st.integers(2, 4), seeds)
def test_points_that_are_seen_several_times_say_nothing_more(n_context, times, seed):
    context_x, context_y, target_x = tasks(2, n_context, 4, 1, 1, seed)
    model = cnp(seed=seed)
    once = model(context_x, context_y, target_x).mean
    often = model(context_x.repeat(1, times, 1), context_y.repeat(1, times, 1), target_x).mean
    torch.testing.assert_close(often, once)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "silu"])
@pytest.mark.parametrize(("encoder_depth", "decoder_depth"), [(1, 1), (2, 4), (4, 1)])
def test_depths_count_linear_layers(activation, encoder_depth, decoder_depth):
    model = cnp(activation=activation, encoder_depth=encoder_depth, decoder_depth=decoder_depth)
    parts = ((model.encoders[0].points, encoder_depth), (model.decoder.layers, decoder_depth))
    for part, depth in parts:
        assert sum(isinstance(layer, torch.nn.Linear) for layer in part) == depth
    assert model(*tasks(1, 2, 3, 1, 1, seed=0)).mean.shape == (1, 3, 1)


def test_under_bfloat16_the_distribution_keeps_32_bits():
    batch = [part.float() for part in tasks(2, 5, 6, 1, 1, seed=0)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = cnp().float()(*batch)
    assert prediction.mean.dtype == prediction.stddev.dtype == torch.float32
