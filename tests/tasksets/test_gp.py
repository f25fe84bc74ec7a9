"""Gaussian processes: exactly drawn, and scored by what nobody can beat."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal

from metabatch_cli.batching import Task
from tasksets.gp import GaussianProcess
from tasksets.kernels import RBF, Kernel, Matern, Periodic

RANGES = {"lengthscale": (0.1, 0.6), "amplitude": (0.1, 1.0)}
TNP = [RBF(**RANGES), Matern(**RANGES), Periodic(**RANGES, period=(0.1, 0.5))]
seeds = st.integers(0, 2**63 - 1)


def process(kernel: Kernel | None = None, **changes: object) -> GaussianProcess:
    sizes = {"min_pts": 3, "max_ctx_pts": 46, "total_tgt_pts": 49, "sizes": "rest"}
    return GaussianProcess(kernel or RBF(**RANGES), **{**sizes, **changes})


def make(
    taskset: GaussianProcess, indices: object, n_context: int = 6, n_target: int = 9, seed: int = 0
) -> Task:
    generator = torch.Generator().manual_seed(seed % 2**32)
    return taskset.__gettasks__(torch.as_tensor(indices), n_context, n_target, generator)


def naively(taskset: GaussianProcess, tasks: Task) -> MultivariateNormal:
    """The targets' distribution given the contexts, by the textbook (R&W eq. 2.22–2.24)."""
    context_x, target_x = tasks.context_x.double(), tasks.target_x.double()
    parameters, kernel = tasks.aux["parameters"].double(), taskset.dataset
    noise = taskset.noise**2
    own = kernel(context_x, context_x, parameters) + noise * torch.eye(context_x.shape[1])
    cross = kernel(target_x, context_x, parameters)
    gain = cross @ torch.linalg.inv(own)
    mean = (gain @ tasks.context_y.double())[..., 0]
    prior = kernel(target_x, target_x, parameters)
    covariance = prior - gain @ cross.mT + noise * torch.eye(target_x.shape[1])
    return MultivariateNormal(mean, covariance)


@pytest.mark.parametrize("kernel", TNP)
@pytest.mark.parametrize("n_context", [0, 1, 7])
@given(seed=seeds)
def test_the_oracle_is_the_posterior_of_the_textbook(kernel, n_context, seed):
    taskset = process(kernel, noise=0.1)
    tasks = make(taskset, range(4), n_context, 5, seed)
    scores, expected = taskset.oracle(tasks), naively(taskset, tasks)
    y = tasks.target_y[..., 0].double()
    joint = expected.log_prob(y) / 5
    single = Normal(expected.mean, expected.stddev).log_prob(y).mean(-1)
    torch.testing.assert_close(scores["log_likelihood@scoring=joint"], joint, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores["log_likelihood"], single, rtol=1e-5, atol=1e-5)
    error = (y - expected.mean).square().mean(-1)
    torch.testing.assert_close(scores["mse"], error, rtol=1e-5, atol=1e-8)


def test_the_noise_is_the_standard_deviation_of_y():
    taskset = process(RBF(lengthscale=1.0, amplitude=1e-6), noise=0.3)
    y = make(taskset, range(500), 20, 20).target_y
    assert y.std().item() == pytest.approx(0.3, rel=0.05)
    scores = taskset.oracle(make(taskset, range(500), 20, 20))["log_likelihood"]
    expected = -0.5 * math.log(2 * math.pi * math.e * 0.3**2)
    assert scores.mean().item() == pytest.approx(expected, abs=0.03)
