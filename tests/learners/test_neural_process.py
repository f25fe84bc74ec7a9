"""The neural-process learner: its loss and its scores are what their names say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.models.gnp import GNP
from metabatch_cli.models.np import NP
from metabatch_cli.models.tnp import TNPA, TNPND
from tests.learners.examples import regression


class Flat(nn.Module):
    """Mean 0 and σ = 2 everywhere, for both dimensions of y."""

    def forward(self, context_x, context_y, target_x):
        mean = target_x.new_zeros(*target_x.shape[:2], 2)
        return Independent(Normal(mean, torch.full_like(mean, 2.0)), 1)


def test_log_likelihood_is_nats_per_target_point_summed_over_the_dimensions_of_y():
    tasks = regression(dim_y=2)
    scores = NeuralProcess(Flat()).score(tasks)
    by_hand = -0.5 * (tasks.target_y / 2) ** 2 - math.log(2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(scores["log_likelihood"], by_hand.sum(-1).mean(1))


def test_the_loss_is_minus_the_mean_log_likelihood():
    tasks = regression(dim_y=2)
    learner = NeuralProcess(Flat())
    torch.testing.assert_close(learner(tasks), -learner.score(tasks)["log_likelihood"].mean())


def test_mse_is_the_mean_square_over_targets_and_dimensions():
    tasks = regression(dim_y=2)
    torch.testing.assert_close(
        NeuralProcess(Flat()).score(tasks)["mse"], (tasks.target_y**2).mean(dim=(1, 2))
    )


class Plain(nn.Module):
    """As anybody would write it at first: a normal distribution of every number."""

    def forward(self, context_x, context_y, target_x):
        mean = context_y.mean(dim=1, keepdim=True).expand(-1, target_x.shape[1], -1)
        return Normal(mean, torch.ones_like(mean))


def test_a_distribution_of_numbers_is_one_of_targets():
    tasks = regression(dim_y=2)
    mean = tasks.context_y.mean(dim=1, keepdim=True).expand_as(tasks.target_y)
    expected = Normal(mean, 1.0).log_prob(tasks.target_y).sum(dim=2).mean(dim=1)
    torch.testing.assert_close(NeuralProcess(Plain()).score(tasks)["log_likelihood"], expected)


def test_what_is_no_distribution_is_named():
    with pytest.raises(TypeError, match=r"the network gives a Tensor.*torch Distribution"):
        NeuralProcess(Tensorial())(regression())


class Tensorial(Plain):
    def forward(self, *points):
        return super().forward(*points).mean


@pytest.mark.parametrize("model", [GNP, TNPA, TNPND])
def test_a_joint_network_that_is_trained_by_its_marginals_is_pointed_out(model):
    network = model(dim_x=1, dim_y=1)
    note = NeuralProcess(network).note
    assert "scoring=joint" in note
    assert model.__name__ in note
    assert NeuralProcess(network, scoring="joint").note == ""


def test_a_network_of_marginals_is_not():
    assert NeuralProcess(Flat()).note == ""
    assert NeuralProcess(NP(dim_x=1, dim_y=1), objective="iwae").note == ""
