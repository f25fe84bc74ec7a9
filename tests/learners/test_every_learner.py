"""What every learner promises the training loop."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.distributions import Distribution

from metabatch_cli.config.compose import config_dir
from tests.learners.examples import every_learner, one_task

LEARNERS = every_learner()


@pytest.fixture(params=list(LEARNERS))
def case(request):
    return every_learner()[request.param]


def test_every_shipped_learner_is_tested_here():
    shipped = {file.stem for file in (config_dir() / "learner").glob("*.yaml")}
    assert shipped == {name.partition("-")[0] for name in LEARNERS}


def test_the_loss_is_a_number_from_which_every_parameter_learns(case):
    learner, tasks = case
    loss = learner.train()(tasks)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    loss.backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_loss_is_the_mean_over_its_tasks(case):
    learner, tasks = case
    learner.train()
    alone = [learner(one_task(tasks, i)) for i in range(len(tasks.target_x))]
    torch.testing.assert_close(learner(tasks), torch.stack(alone).mean())


def test_scores_are_a_number_for_each_task_and_hold_the_metric(case):
    learner, tasks = case
    scores = learner.eval().score(tasks)
    assert learner.metric.name in scores
    for values in scores.values():
        assert values.shape == (len(tasks.target_x),)
        assert values.isfinite().all()


def test_scoring_changes_no_byte_of_the_learner(case):
    learner, tasks = case
    learner.eval()
    before = {name: part.clone() for name, part in learner.state_dict().items()}
    learner.score(tasks)
    learner.predict(*tasks[:3])
    after = learner.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_a_prediction_is_a_distribution_at_each_target_that_gives_its_y_a_probability(case):
    learner, tasks = case
    prediction = learner.eval().predict(*tasks[:3])
    assert isinstance(prediction, Distribution)
    assert prediction.batch_shape == tasks.target_x.shape[:2]
    assert prediction.log_prob(tasks.target_y).shape == tasks.target_x.shape[:2]


def test_a_tasks_score_does_not_depend_on_the_batchs_other_tasks(case):
    learner, tasks = case
    before = deepcopy(learner.state_dict())
    for mode in (True, False):
        learner.train(mode)
        together = learner.score(tasks)
        alone = [learner.score(one_task(tasks, i)) for i in range(len(tasks.target_x))]
        for name, values in together.items():
            torch.testing.assert_close(values, torch.cat([score[name] for score in alone]))
        learner.load_state_dict(before)  # those of training may count
