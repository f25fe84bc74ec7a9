"""One target after the other: the chain rule, whatever the batch, the padding and the order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MixtureSameFamily, Normal

from metabatch_cli.batching import Task
from metabatch_cli.batching.ragged import pad
from metabatch_cli.learners.autoregressive import AUTOREGRESSIVE, AutoregressiveDeployment
from metabatch_cli.learners.maml import MAML
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.learners.protonet import ProtoNet
from metabatch_cli.models.bnp import BNP
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.predictive import Paths
from tasksets.gp import GaussianProcess
from tasksets.kernels import RBF
from tests.learners.examples import conv, mlp, one_task, regression

NOISE = 0.1
UNITS = {"x_mean": [0.5], "x_std": [2.0], "y_mean": [1.0], "y_std": [3.0]}


class ExactGP(nn.Module):
    """The posterior of each target alone, under an RBF kernel of length 0.5 and variance 1."""

    def forward(self, context_x, context_y, target_x, context_mask=None):
        if context_mask is None:
            context_mask = torch.ones_like(context_x[..., 0], dtype=torch.bool)
        both = context_mask[:, :, None] & context_mask[:, None, :]
        noisy = self.kernel(context_x, context_x) + NOISE**2 * torch.eye(context_x.shape[1])
        covariance = torch.where(both, noisy, torch.eye(context_x.shape[1]).to(noisy))
        between = self.kernel(target_x, context_x) * context_mask[:, None, :]
        solved = torch.linalg.solve(covariance, between.mT)
        mean = solved.mT @ context_y
        variance = 1 + NOISE**2 - (solved * between.mT).sum(1)
        return Independent(Normal(mean, variance.sqrt()[..., None]), 1)

    @staticmethod
    def kernel(x, z):
        return torch.exp(-2 * (x[:, :, None, 0] - z[:, None, :, 0]).square())


def gaussian_process(n_tasks=6, n_context=4, n_target=9):
    dataset = RBF(lengthscale=[0.5, 0.5], amplitude=[1.0, 1.0])
    taskset = GaussianProcess(dataset, 1, 5, 9, noise=NOISE)
    indices, generator = torch.arange(n_tasks), torch.Generator().manual_seed(0)
    tasks = taskset.__gettasks__(indices, n_context, n_target, generator)
    fields = (part.double() for part in tasks[:4])
    return taskset, Task(*fields, tasks.aux)


def network(**more) -> NeuralProcess:
    torch.manual_seed(0)
    return NeuralProcess(CNP(1, 1, width=8), **more).double().eval()


def one_by_one(learner: NeuralProcess, tasks: Task) -> torch.Tensor:
    """The chain rule in a loop over targets: `[tasks]`, nats of all targets together."""
    total = torch.zeros(len(tasks.target_x), dtype=torch.float64)
    x, y = tasks.context_x, tasks.context_y
    for target in range(tasks.target_x.shape[1]):
        next_x, next_y = (part[:, target : target + 1] for part in tasks[2:4])
        total += learner.predict(x, y, next_x).log_prob(next_y)[:, 0]
        x, y = torch.cat([x, next_x], dim=1), torch.cat([y, next_y], dim=1)
    return total


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_context", [0, 5])
@pytest.mark.parametrize("most_points", [1, 40, 2**16])
@pytest.mark.parametrize("units", [None, UNITS])
def test_the_joint_score_is_the_sum_of_the_conditionals(n_context, most_points, units):
    learner, tasks = network(units=units), regression(n_context=n_context)
    deployed = AutoregressiveDeployment(learner, most_points=most_points)
    expected = one_by_one(learner, tasks) / 7
    torch.testing.assert_close(deployed.score(tasks)[AUTOREGRESSIVE], expected)


@torch.no_grad()
def test_a_model_that_is_exact_of_each_target_is_exact_of_all_together():
    taskset, tasks = gaussian_process()
    scores = AutoregressiveDeployment(NeuralProcess(ExactGP())).score(tasks)
    oracle = taskset.oracle(tasks)
    exact = {"atol": 1e-6, "rtol": 1e-6}
    joint = oracle["log_likelihood@scoring=joint"]
    torch.testing.assert_close(scores[AUTOREGRESSIVE], joint, **exact)
    torch.testing.assert_close(scores["log_likelihood"], oracle["log_likelihood"], **exact)
    assert (joint > oracle["log_likelihood"]).any()


def test_of_an_exact_model_the_order_does_not_matter():
    _, tasks = gaussian_process()
    given, other = (
        AutoregressiveDeployment(NeuralProcess(ExactGP()), order).score(tasks)[AUTOREGRESSIVE]
        for order in ("given", "random")
    )
    torch.testing.assert_close(given, other)


def test_a_random_order_is_the_score_of_targets_in_that_order():
    deployed, tasks = AutoregressiveDeployment(network(), "random"), regression()
    prediction = deployed.predict(*tasks[:3])
    assert prediction.order.sort(dim=1).values.tolist() == [list(range(7))] * 3
    shuffled = tasks._replace(
        target_x=tasks.target_x.take_along_dim(prediction.order[..., None], 1),
        target_y=tasks.target_y.take_along_dim(prediction.order[..., None], 1),
    )
    expected = one_by_one(deployed.learner, shuffled)
    torch.testing.assert_close(prediction.log_prob(tasks.target_y), expected)
    assert not torch.allclose(expected, one_by_one(deployed.learner, tasks))


def test_of_a_single_target_joint_is_marginal():
    scores = AutoregressiveDeployment(network()).score(regression(n_target=1))
    torch.testing.assert_close(scores[AUTOREGRESSIVE], scores["log_likelihood"])


def test_the_other_scores_are_the_learners_own():
    learner, tasks = network(), regression()
    scores = AutoregressiveDeployment(learner).score(tasks)
    scores.pop(AUTOREGRESSIVE)
    assert {name: value.tolist() for name, value in scores.items()} == {
        name: value.tolist() for name, value in learner.score(tasks).items()
    }


@pytest.mark.parametrize("order", ["given", "random"])
def test_padding_changes_nothing(order):
    whole = regression(n_context=5, n_target=7)
    sizes = [(5, 2), (0, 7), (3, 1)]
    tasks = [
        Task(
            *(part[row, :n_context] for part in whole[:2]),
            *(part[row, :n_target] for part in whole[2:4]),
        )
        for row, (n_context, n_target) in enumerate(sizes)
    ]
    padded = pad(tasks)
    nothing = torch.nan
    padded = padded._replace(
        context_y=padded.context_y.masked_fill(~padded.context_mask[..., None], nothing),
        target_x=padded.target_x.masked_fill(~padded.target_mask[..., None], nothing),
        target_y=padded.target_y.masked_fill(~padded.target_mask[..., None], nothing),
    )
    learner = NeuralProcess(ExactGP()) if order == "random" else network()
    deployed = AutoregressiveDeployment(learner, order, most_points=30)
    found = deployed.score(padded)[AUTOREGRESSIVE]
    for row, task in enumerate(tasks):
        alone = Task(*(part[None] for part in task[:4]))
        expected = one_by_one(learner, alone)[0] / len(task.target_x)
        torch.testing.assert_close(found[row], expected)
    drawn = deployed.predict(*padded[:2], padded.target_x, **padded.masks).sample([2])
    assert drawn[:, padded.target_mask].isfinite().all()


def test_a_task_without_targets_has_no_score():
    whole = regression()
    tasks = [Task(*(part[0] for part in whole[:4])), Task(*(part[1] for part in whole[:4]))]
    tasks[1] = tasks[1]._replace(target_x=whole.target_x[1, :0], target_y=whole.target_y[1, :0])
    scores = AutoregressiveDeployment(network()).score(pad(tasks))[AUTOREGRESSIVE]
    assert scores.isnan().tolist() == [False, True]


def test_a_task_scores_the_same_whatever_the_others_are():
    deployed, tasks = AutoregressiveDeployment(network(), most_points=50), regression()
    together = deployed.score(tasks)[AUTOREGRESSIVE]
    for row in range(3):
        alone = deployed.score(one_task(tasks, row))[AUTOREGRESSIVE]
        torch.testing.assert_close(together[row : row + 1], alone)


def test_log_prob_takes_samples_in_front():
    prediction = AutoregressiveDeployment(network()).predict(*regression()[:3])
    drawn = prediction.sample([2, 4])
    assert drawn.shape == (2, 4, 3, 7, 1)
    together = prediction.log_prob(drawn)
    assert together.shape == (2, 4, 3)
    torch.testing.assert_close(together[1, 2], prediction.log_prob(drawn[1, 2]))


def test_a_result_says_how_it_was_scored():
    deployed = AutoregressiveDeployment(network())
    assert deployed.about(AUTOREGRESSIVE) == {"scoring": "joint", "predict": "autoregressive"}
    assert deployed.about("log_likelihood") == {"scoring": "marginal"}
    assert deployed.about("mse") == {}


# --- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["given", "random"])
@torch.no_grad()
def test_samples_of_an_exact_model_have_the_posteriors_mean_and_covariance(order):
    _, tasks = gaussian_process(n_tasks=2, n_target=3)
    deployed = AutoregressiveDeployment(NeuralProcess(ExactGP()), order, most_points=5000)
    torch.manual_seed(0)
    drawn = deployed.predict(*tasks[:3]).sample([20_000])[..., 0]
    assert drawn.shape == (20_000, 2, 3)
    x, z = tasks.target_x, tasks.context_x
    noisy = ExactGP.kernel(z, z) + NOISE**2 * torch.eye(z.shape[1])
    told = torch.linalg.solve(noisy, ExactGP.kernel(z, x)).mT
    mean = (told @ tasks.context_y)[..., 0]
    covariance = ExactGP.kernel(x, x) + NOISE**2 * torch.eye(3) - told @ ExactGP.kernel(z, x)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    found = torch.stack([drawn[:, row].T.cov() for row in range(2)])
    torch.testing.assert_close(found, covariance, atol=0.04, rtol=0)


def test_the_marginals_are_the_models_own():
    learner, tasks = network(), regression()
    prediction, own = AutoregressiveDeployment(learner).predict(*tasks[:3]), None
    own = learner.predict(*tasks[:3])
    torch.testing.assert_close(prediction.mean, own.mean)
    torch.testing.assert_close(prediction.stddev, own.stddev)


# --- who can ---------------------------------------------------------------------------------


class Blind(nn.Module):
    """Takes no mask."""

    def forward(self, context_x, context_y, target_x):
        return Independent(Normal(torch.zeros_like(target_x), 1.0), 1)


@pytest.mark.parametrize(
    ("learner", "says"),
    [
        (lambda: MAML(mlp()), "MAML cannot"),
        (lambda: ProtoNet(conv("batch")), "ProtoNet cannot"),
        (lambda: NeuralProcess(Blind()), "Blind takes no context_mask"),
    ],
)
def test_a_learner_that_cannot_says_so(learner, says):
    with pytest.raises(ValueError, match=says):
        AutoregressiveDeployment(learner())


class TwoPaths(nn.Module):
    """Either all up or all down: a mixture, whose targets depend on each other."""

    def forward(self, context_x, context_y, target_x, context_mask=None):
        level = torch.tensor([-1.0, 1.0], dtype=target_x.dtype)[:, None, None, None]
        mean = level.expand(2, *target_x.shape)
        return Paths(Independent(Normal(mean, torch.ones_like(mean)), 1))


def test_a_joint_model_is_asked_for_one_target_at_a_time():
    learner, tasks = NeuralProcess(TwoPaths()), regression()
    scores = AutoregressiveDeployment(learner).score(tasks)
    assert isinstance(learner.predict(*tasks[:3]).marginals, MixtureSameFamily)
    # the context tells it nothing: one by one its targets are independent
    torch.testing.assert_close(scores[AUTOREGRESSIVE], scores["log_likelihood"])
    assert set(scores) > {"log_likelihood@scoring=joint", AUTOREGRESSIVE}


def test_the_contexts_of_bootstraps_are_among_the_points_at_a_time():
    found = []

    class Counting(BNP):
        def encode(self, context_x, context_y, target_x, mask=None):
            found.append(context_x.shape[:2].numel())
            return super().encode(context_x, context_y, target_x, mask)

    learner = NeuralProcess(Counting(1, 1, width=8), eval_samples=20).double().eval()
    for most_points in (2**16, 600):
        found.clear()
        AutoregressiveDeployment(learner, most_points=most_points).predict(
            *regression(n_context=5)[:3]
        ).log_prob(regression(n_context=5).target_y)
        assert max(found) <= most_points
    assert len(found) > 3


def test_an_order_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"order='sorted': choose from given, random"):
        AutoregressiveDeployment(network(), order="sorted")
