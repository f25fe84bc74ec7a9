"""Joint predictions: densities, marginals and samples against what defines them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from metabatch_cli.models.predictive import (
    Autoregressive,
    JointNormal,
    LowRankNormal,
    Paths,
    Predictive,
    joint_log_prob,
    log_mean_exp,
    marginals,
)

KINDS = ["paths", "joint", "low rank", "autoregressive"]
every_kind = pytest.mark.parametrize("kind", KINDS)
N_TASKS, RANK, SAMPLES = 3, 2, 4
MASK = torch.tensor([[True, True, True, True], [True, False, True, False], [False] * 4])

sizes = st.integers(1, 5)
dims = st.integers(1, 3)
seeds = st.integers(0, 2**16)


def parts(n_target: int, dim_y: int, seed: int = 0) -> dict[str, Tensor]:
    """Numbers of which all the predictions are made, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n = n_target * dim_y
    root = torch.tril(normal(N_TASKS, n, n)) * 0.5
    root.diagonal(dim1=1, dim2=2).abs_().add_(0.3)
    return {
        "mean": normal(N_TASKS, n_target, dim_y),
        "root": root,
        "factor": normal(N_TASKS, n_target, dim_y, RANK),
        "sigma": normal(N_TASKS, n_target, dim_y).abs() + 0.2,
        "means": normal(SAMPLES, N_TASKS, n_target, dim_y),
        "sigmas": normal(SAMPLES, N_TASKS, n_target, dim_y).abs() + 0.2,
        "y": normal(N_TASKS, n_target, dim_y),
    }


def independent(mean: Tensor, sigma: Tensor) -> Independent:
    return Independent(Normal(mean, sigma, validate_args=False), 1, validate_args=False)


def chain(p: dict[str, Tensor]) -> tuple[Callable[[], Distribution], Callable[..., Distribution]]:
    """Each y is 0.7 of the sum of those before it, and a mean and noise of its own."""

    def given_y(y: Tensor) -> Independent:
        before = y.cumsum(dim=-2) - y
        return independent(p["mean"] + 0.7 * before, p["sigma"])

    def alone() -> Independent:
        mean, root = chain_moments(p)
        return independent(mean, root.square().sum(dim=-1).sqrt())

    return alone, given_y


def chain_moments(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean `[tasks, n, y]` and root of the covariance `[tasks, n, y, n]` of that chain.

    y = A·(mean + σ·ε) with A = (1 − 0.7·L)⁻¹, L being 1 below the diagonal.
    """
    n = p["mean"].shape[1]
    below = torch.ones(n, n, dtype=torch.float64).tril(-1)
    through = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - 0.7 * below)
    mean = through @ p["mean"]
    root = through[None, :, None, :] * p["sigma"].mT[:, None]
    return mean, root


def predictive(kind: str, p: dict[str, Tensor], mask: Tensor | None = None) -> Predictive:
    if kind == "paths":
        return Paths(independent(p["means"], p["sigmas"]), mask)
    if kind == "joint":
        return JointNormal(p["mean"], p["root"], mask)
    if kind == "low rank":
        return LowRankNormal(p["mean"], p["factor"], p["sigma"], mask)
    return Autoregressive(*chain(p), p["mean"], mask)


def covariance(kind: str, p: dict[str, Tensor]) -> Tensor:
    """Of all numbers of a task, `[tasks, n, n]`."""
    if kind == "joint":
        return p["root"] @ p["root"].mT
    if kind == "low rank":
        factor = p["factor"].flatten(1, 2)
        return factor @ factor.mT + torch.diag_embed(p["sigma"].flatten(1).square())
    _, root = chain_moments(p)  # dimensions of y are independent of each other
    n_tasks, n_target, dim_y, _ = root.shape
    full = torch.zeros(n_tasks, n_target, dim_y, n_target, dim_y, dtype=root.dtype)
    for j in range(dim_y):
        full[:, :, j, :, j] = root[:, :, j] @ root[:, :, j].mT
    return full.flatten(3, 4).flatten(1, 2)


def naive(kind: str, p: dict[str, Tensor], mask: Tensor, y: Tensor) -> Tensor:
    """Log densities of tasks one by one, from their real targets only."""
    found = []
    for task in range(N_TASKS):
        real = mask[task]
        if not real.any():
            found.append(torch.zeros([], dtype=torch.float64))
            continue
        if kind == "paths":
            mean, sigma = p["means"][:, task, real], p["sigmas"][:, task, real]
            of_paths = Normal(mean, sigma).log_prob(y[task, real]).sum(dim=(1, 2)).exp()
            found.append(of_paths.mean().log())
            continue
        numbers = real.repeat_interleave(y.shape[2])
        mean = (chain_moments(p)[0] if kind == "autoregressive" else p["mean"])[task]
        block = covariance(kind, p)[task][numbers][:, numbers]
        normal = MultivariateNormal(mean[real].flatten(), block)
        found.append(normal.log_prob(y[task, real].flatten()))
    return torch.stack(found)


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@every_kind
@given(sizes, dims, seeds)
def test_the_density_is_the_one_written_out(kind, n_target, dim_y, seed):
    p = parts(n_target, dim_y, seed)
    everything = torch.ones(N_TASKS, n_target, dtype=torch.bool)
    expected = naive(kind, p, everything, p["y"])
    assert_same(predictive(kind, p).log_prob(p["y"]), expected)
    assert_same(predictive(kind, p, everything).log_prob(p["y"]), expected)


# an autoregressive prediction has padding at the end only: what is before a target is given to it
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("rubbish", [0.0, 1e6, math.nan, math.inf])
@given(dims, seeds)
def test_the_density_is_that_of_real_targets(kind, rubbish, dim_y, seed):
    p = parts(4, dim_y, seed)
    y = p["y"].masked_fill(~MASK[..., None], rubbish)
    prediction = predictive(kind, p, MASK)
    assert_same(prediction.log_prob(y), naive(kind, p, MASK, p["y"]))
    assert_same(joint_log_prob(prediction, y), naive(kind, p, MASK, p["y"]))


def test_an_autoregressive_density_is_that_of_the_real_targets_before_padding():
    p = parts(4, 2)
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    y = p["y"].masked_fill(~mask[..., None], math.nan)
    found = predictive("autoregressive", p, mask).log_prob(y)
    assert_same(found, naive("autoregressive", p, mask, p["y"]))


def test_an_autoregressive_density_is_asked_for_one_value_at_a_time():
    p = parts(4, 2)
    alone, given_y = chain(p)
    shapes = []

    def one(y: Tensor) -> Distribution:
        shapes.append(y.shape)  # a network takes no more dimensions than these
        return given_y(y)

    values = torch.stack([p["y"], p["y"] + 1])
    prediction = Autoregressive(alone, one, p["mean"])
    together = prediction.log_prob(values)
    assert set(shapes) == {p["y"].shape}
    assert_same(together, torch.stack([prediction.log_prob(value) for value in values]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_densities_of_several_values_at_once_are_those_of_each(kind, mask):
    p = parts(4, 2)
    prediction = predictive(kind, p, mask)
    values = torch.stack([p["y"] + shift for shift in range(5)])
    together = prediction.log_prob(values)
    assert together.shape == (5, N_TASKS)
    assert_same(together, torch.stack([prediction.log_prob(value) for value in values]))


@every_kind
@pytest.mark.parametrize("dim_y", [1, 2])
def test_mean_and_variance_are_those_of_samples(kind, dim_y):
    p = parts(3, dim_y, seed=1)
    prediction = predictive(kind, p)
    torch.manual_seed(0)
    count = 4000
    drawn = prediction.sample((count,))
    assert drawn.shape == (count, N_TASKS, 3, dim_y)
    error = drawn.std(dim=0) / math.sqrt(count)
    assert ((drawn.mean(dim=0) - prediction.mean).abs() < 5 * error).all()
    spread = (drawn - drawn.mean(dim=0)).square()
    error = spread.std(dim=0) / math.sqrt(count)
    assert ((spread.mean(dim=0) - prediction.variance).abs() < 5 * error).all()
    assert_same(prediction.stddev.square(), prediction.variance)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dim_y", [1, 2])
def test_samples_have_the_covariance_of_the_density(kind, dim_y):
    p = parts(3, dim_y, seed=2)
    torch.manual_seed(0)
    drawn = predictive(kind, p).sample((20000,) if kind != "autoregressive" else (4000,))
    expected = covariance(kind, p)
    for task in range(N_TASKS):
        found = drawn[:, task].flatten(1).T.cov()
        scale = expected[task].diagonal().sqrt()
        wrong = (found - expected[task]).abs() / scale[:, None] / scale
        assert wrong.max() < 0.1


@every_kind
@given(dims, seeds)
def test_marginals_are_those_of_one_target_alone(kind, dim_y, seed):
    p = parts(4, dim_y, seed)
    alone = marginals(predictive(kind, p))
    assert alone.batch_shape == (N_TASKS, 4)
    assert alone.event_shape == (dim_y,)
    found = alone.log_prob(p["y"])
    for target in range(4):
        mask = torch.zeros(N_TASKS, 4, dtype=torch.bool)
        mask[:, target] = True
        assert_same(found[:, target], naive(kind, p, mask, p["y"]))


@every_kind
@pytest.mark.parametrize("mask", [None, torch.arange(4) < torch.tensor([[4], [2], [0]])])
@given(dims, seeds)
def test_in_other_units_the_density_changes_by_their_volume(kind, mask, dim_y, seed):
    p = parts(4, dim_y, seed)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(dim_y, generator=generator, dtype=torch.float64)
    scale = torch.rand(dim_y, generator=generator, dtype=torch.float64) * 3 + 0.1
    prediction = predictive(kind, p, mask)
    moved = prediction.scaled(shift, scale)
    assert type(moved) is type(prediction)
    assert moved.mask is prediction.mask
    y = shift + scale * p["y"]
    count = 4 if mask is None else mask.sum(dim=1)
    assert_same(moved.log_prob(y), prediction.log_prob(p["y"]) - count * scale.log().sum())
    assert_same(moved.mean, prediction.mean * scale + shift)
    assert_same(moved.stddev, prediction.stddev * scale)
    alone = prediction.marginals.log_prob(p["y"]) - scale.log().sum()
    assert_same(moved.marginals.log_prob(y), alone)
    torch.manual_seed(0)
    one = prediction.sample()
    torch.manual_seed(0)
    assert_same(moved.sample(), one * scale + shift)


@every_kind
@pytest.mark.parametrize("shape", [(), (2,), [2], torch.Size([2, 3])])
def test_samples_have_the_shape_that_was_asked_for(kind, shape):
    prediction = predictive(kind, parts(2, 3))
    drawn = prediction.sample(shape)
    assert drawn.shape == (*shape, N_TASKS, 2, 3)
    assert drawn.dtype == torch.float64
    assert prediction.batch_shape == (N_TASKS,)
    assert prediction.event_shape == (2, 3)


@pytest.mark.parametrize("kind", KINDS[1:3])
def test_samples_carry_gradients_to_mean_and_covariance(kind):
    p = {name: part.requires_grad_() for name, part in parts(3, 2).items() if name != "root"}
    p["root"] = parts(3, 2)["root"].requires_grad_()
    predictive(kind, p).rsample((5,)).square().sum().backward()
    used = ["mean", "root"] if kind == "joint" else ["mean", "factor", "sigma"]
    assert all(p[name].grad is not None and p[name].grad.any() for name in used)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_padding_has_no_gradient(kind):
    p = {name: part.requires_grad_() for name, part in parts(4, 2).items()}
    predictive(kind, p, MASK).log_prob(
        p["y"].masked_fill(~MASK[..., None], math.nan)
    ).sum().backward()
    names = {
        "paths": ["means", "sigmas"],
        "joint": ["mean"],
        "low rank": ["mean", "factor", "sigma"],
    }
    for name in names[kind]:
        found = p[name].grad
        assert found.isfinite().all()
        per_target = found if name not in ("means", "sigmas") else found.movedim(0, 2)
        assert not per_target[~MASK].any()
        assert per_target[MASK].any()


@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision_the_density_is_computed_in_double(kind):
    """Noise a thousandth of what targets have in common: single precision is lost there."""
    p = parts(5, 1)
    if kind in ("joint", "low rank"):
        p["factor"], p["sigma"] = p["factor"] * 10, p["sigma"] * 0.001
    single = {name: part.float() for name, part in p.items()}
    again = {name: part.double() for name, part in single.items()}
    if kind == "joint":
        root = torch.linalg.cholesky(covariance("low rank", again))
        single["root"], again["root"] = root, root
    y = single["mean"] + 0.001 if kind in ("joint", "low rank") else single["y"]
    found = predictive(kind, single).log_prob(y)
    assert found.dtype == torch.float32
    expected = predictive(kind, again).log_prob(y.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert predictive(kind, single).sample().dtype == torch.float32


def test_low_rank_functions_are_samples_without_each_targets_own_noise():
    torch.manual_seed(0)
    mean, factor = torch.randn(2, 5, 1), torch.randn(2, 5, 1, 3)
    drawn = LowRankNormal(mean, factor, torch.ones(2, 5, 1)).functions(20_000).squeeze(-1)
    torch.testing.assert_close(drawn.mean(dim=0), mean[..., 0], rtol=0, atol=0.1)
    for task in range(2):
        covariance = factor[task, :, 0] @ factor[task, :, 0].mT
        torch.testing.assert_close(drawn[:, task].mT.cov(), covariance, rtol=0.1, atol=0.1)


def test_low_rank_without_targets_has_density_1():
    p = parts(0, 2)
    assert_same(predictive("low rank", p).log_prob(p["y"]), torch.zeros(N_TASKS).double())


@given(st.integers(1, 6), seeds)
def test_a_rank_above_the_number_of_targets_does_no_harm(rank, seed):
    p = parts(2, 1, seed)
    generator = torch.Generator().manual_seed(seed)
    p["factor"] = torch.randn(N_TASKS, 2, 1, rank, generator=generator, dtype=torch.float64)
    expected = naive("low rank", p, torch.ones(N_TASKS, 2, dtype=torch.bool), p["y"])
    assert_same(predictive("low rank", p).log_prob(p["y"]), expected)


def test_an_ordinary_distribution_is_scored_together_by_a_sum_over_real_targets():
    p = parts(4, 2)
    prediction = independent(p["mean"], p["sigma"])
    of_targets = Normal(p["mean"], p["sigma"]).log_prob(p["y"]).sum(dim=2)
    assert marginals(prediction) is prediction
    assert_same(joint_log_prob(prediction, p["y"]), of_targets.sum(dim=1))
    assert_same(joint_log_prob(prediction, p["y"], MASK), (of_targets * MASK).sum(dim=1))


def test_log_mean_exp_is_the_log_of_a_mean_without_overflow():
    values = torch.tensor([[1000.0, 1000.0], [-1000.0, -1000.0 + math.log(3)]])
    expected = torch.tensor([1000.0, -1000.0 + math.log(2)])
    torch.testing.assert_close(log_mean_exp(values, dim=1), expected)


@pytest.mark.parametrize(("n", "rank"), [(6, 12), (6, 6), (12, 3)])
@pytest.mark.parametrize("sigma", [0.1, 1e-3, 1e-5, 1e-9])
def test_a_low_rank_density_keeps_its_digits_where_sigma_is_small(
    n: int, rank: int, sigma: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(2, n, rank, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, n, generator=generator, dtype=torch.float64)
    y = factor.sum(dim=2) + sigma * noise
    sigmas = torch.full((2, n, 1), sigma, dtype=torch.float64)
    own = LowRankNormal(torch.zeros(2, n, 1), factor[:, :, None], sigmas)
    own.dtype = torch.float64
    # in the factor's space, where nothing is large: y has coordinates of its own, and a rest
    q, r = torch.linalg.qr(factor, mode="complete")
    inside, rest = (q.mT @ y[..., None])[..., 0].split([min(n, rank), n - min(n, rank)], dim=1)
    r = r[:, : min(n, rank)]
    covariance = r @ r.mT + sigma**2 * torch.eye(min(n, rank))
    expected = MultivariateNormal(torch.zeros(min(n, rank)).double(), covariance).log_prob(inside)
    expected += Normal(0, sigma).log_prob(rest).sum(dim=1)
    torch.testing.assert_close(own.log_prob(y[..., None]), expected, rtol=1e-6, atol=1e-6)
