"""Coverage of central intervals: of every kind of prediction, each dimension by itself."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, Laplace, Normal

from metabatch_cli.models.calibration import LEVELS, calibration, probability_below
from metabatch_cli.models.predictive import JointNormal, Paths

TASKS, TARGETS = 2, 3


def paths(dim_y: int = 2, samples: int = 4) -> Paths:
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(samples, TASKS, TARGETS, dim_y, generator=generator)
    sigma = torch.rand(samples, TASKS, TARGETS, dim_y, generator=generator) + 0.1
    return Paths(Independent(Normal(mean, sigma), 1))


def joint(dim_y: int = 2) -> JointNormal:
    generator = torch.Generator().manual_seed(0)
    size = TARGETS * dim_y
    root = torch.randn(TASKS, size, size, generator=generator).tril()
    root.diagonal(dim1=1, dim2=2).abs_().add_(0.1)
    return JointNormal(torch.randn(TASKS, TARGETS, dim_y, generator=generator), root)


@pytest.mark.parametrize("dim_y", [1, 2])
@pytest.mark.parametrize("prediction", [paths, joint])
def test_the_probability_below_is_that_of_samples(prediction, dim_y):
    torch.manual_seed(0)
    predicted = prediction(dim_y)
    y = predicted.mean + 0.3
    found = probability_below(predicted.marginals, y)
    counted = (predicted.sample(torch.Size([20_000])) <= y).double().mean(dim=0)
    assert found.shape == (TASKS, TARGETS, dim_y)
    torch.testing.assert_close(found.double(), counted, atol=0.02, rtol=0)


@pytest.mark.parametrize("prediction", [paths, joint])
def test_what_is_drawn_from_a_prediction_is_covered_as_it_says(prediction):
    torch.manual_seed(0)
    predicted, levels = prediction(), torch.tensor(LEVELS)
    drawn = predicted.sample(torch.Size([4000]))
    coverage = torch.stack([calibration(predicted, y, None, levels).coverage for y in drawn])
    torch.testing.assert_close(coverage.mean(dim=(0, 1)), levels, atol=0.015, rtol=0)


def test_coverage_and_variance_are_means_over_real_points_and_dimensions():
    prediction = Independent(Normal(torch.zeros(2, 3, 2), torch.tensor([1.0, 3.0])), 1)
    # in units of σ: only 0.1 is in the central half, which ends at 0.674
    y = torch.tensor([0.1, 2.0, 99.0])[None, :, None] * torch.tensor([1.0, 3.0])
    y = torch.stack([y[0], y[0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    found = calibration(prediction, y, mask, torch.tensor([0.5, 0.99]))
    torch.testing.assert_close(found.coverage[0], torch.tensor([0.5, 1.0]))
    assert found.variance[0] == 5.0
    assert found.coverage[1].isnan().all()
    assert found.variance[1].isnan()


def test_any_distribution_that_has_a_distribution_function_will_do():
    laplace = Independent(Laplace(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), 1)
    assert probability_below(laplace, torch.zeros(1, 1, 1)) == 0.5
    classes = Categorical(logits=torch.zeros(1, 1, 3))
    assert calibration(classes, torch.zeros(1, 1, 1), None, torch.tensor([0.5])) is None
