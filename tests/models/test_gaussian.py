"""The density of a network's normal distribution is torch's, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from metabatch_cli.models.gaussian import Gaussian


@pytest.mark.parametrize("sigma", [1e-4, 1.0, 1e4])
def test_a_density_is_torchs(sigma):
    torch.manual_seed(0)
    shape = (4, 6, 2)
    parts = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
        (torch.rand(shape, dtype=torch.float64) * sigma).requires_grad_(),
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
    ]
    mean, deviation, y = parts
    found = Gaussian(mean, deviation).log_prob(y)
    expected = Normal(mean, deviation).log_prob(y)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad(density, parts, direction) for density in (found, expected))
    )


def test_it_is_one_of_torchs_distributions():
    one, other = Gaussian(torch.zeros(3), torch.ones(3)), Normal(torch.ones(3), torch.ones(3))
    torch.testing.assert_close(kl_divergence(one, other), torch.full((3,), 0.5))
    assert isinstance(one.expand((2, 3)), Gaussian)
