"""R2D2: ridge regression of many tasks at once, whichever way it is solved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from metabatch_cli.learners.r2d2 import R2D2, ridge_regression
from tests.learners.examples import classification

counts = st.integers(1, 6)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@given(st.integers(1, 3), counts, counts, counts, st.floats(0.01, 100), st.integers(0, 2**31))
def test_the_gradient_of_the_penalised_squares_is_0(tasks, points, features, outputs, ridge, seed):
    x, y = normal(tasks, points, features, seed=seed), normal(tasks, points, outputs, seed=seed + 1)
    weights = ridge_regression(x, y, torch.tensor(ridge, dtype=torch.float64))
    gradient = x.mT @ (x @ weights - y) + ridge * weights
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.parametrize("points", [3, 5])  # on both sides of the four features
def test_points_of_zeros_change_nothing(points):
    x, y = normal(2, points, 4, seed=0), normal(2, points, 3, seed=1)
    longer = [F.pad(part, (0, 0, 0, 4)) for part in (x, y)]
    ridge = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(ridge_regression(*longer, ridge), ridge_regression(x, y, ridge))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("shots", [1, 30])
def test_logits_are_the_scaled_regression_of_the_classes(intercept, shots):
    tasks = classification(2, ways=3, shots=shots)
    tasks = tasks._replace(context_x=tasks[0] / 255.0, target_x=tasks[2] / 255.0)
    model = R2D2(nn.Flatten(), ridge=2.0, scale=3.0, intercept=intercept).double()
    found = model.predict(tasks.context_x.double(), tasks.context_y, tasks.target_x.double())
    for task in range(2):
        x, asked = (part[task].flatten(1).double() for part in (tasks.context_x, tasks.target_x))
        if intercept:
            x, asked = (torch.cat([part, torch.ones(len(part), 1)], dim=1) for part in (x, asked))
        y = F.one_hot(tasks.context_y[task]).double()
        weights = torch.linalg.inv(x.T @ x + 2 * torch.eye(x.shape[1])) @ x.T @ y
        torch.testing.assert_close(found.probs[task], (3 * asked @ weights).softmax(dim=-1))


def test_the_penalty_and_the_scale_are_learned_and_a_penalty_of_0_is_refused():
    model = R2D2(nn.Flatten(), ridge=5.0)
    assert {name for name, _ in model.named_parameters()} == {"log_ridge", "scale"}
    torch.testing.assert_close(model.log_ridge.exp().item(), 5.0)
    with pytest.raises(ValueError, match=r"ridge=0\.0 must be positive"):
        R2D2(nn.Flatten(), ridge=0.0)
