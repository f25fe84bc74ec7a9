"""What neural processes minimise, against what the formulas say; and the data's own units."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import kl_divergence

from metabatch_cli.batching import Task
from metabatch_cli.batching.ragged import pad
from metabatch_cli.learners.neural_process import JOINT, NeuralProcess
from metabatch_cli.models.bnp import BNP
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.gnp import GNP
from metabatch_cli.models.np import NP
from metabatch_cli.models.predictive import marginals
from metabatch_cli.models.tnp import TNPA, TNPND
from tests.learners.examples import regression

small = {"width": 8, "heads": 2, "hidden": 8, "depth": 2}


def of(kind, **arguments):
    torch.manual_seed(0)
    return kind(1, 1, **arguments).double()


def latent():
    return of(NP, width=8, dim_latent=3)


MODELS = {
    "likelihood": lambda: of(CNP, width=8),
    "elbo": latent,
    "iwae": latent,
    "bootstrap": lambda: of(BNP, width=8),
}


def all_points(tasks: Task) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.cat([tasks.context_x, tasks.target_x], dim=1),
        torch.cat([tasks.context_y, tasks.target_y], dim=1),
    )


@pytest.mark.parametrize("objective", MODELS)
@pytest.mark.parametrize("loss_on", ["target", "context+target"])
def test_every_objective_is_a_number_from_which_every_parameter_learns(objective, loss_on):
    learner = NeuralProcess(MODELS[objective](), objective=objective, loss_on=loss_on)
    loss = learner.train()(regression())
    assert loss.shape == ()
    loss.backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("objective", ["likelihood", "elbo", "iwae"])
@pytest.mark.parametrize("loss_on", ["target", "context+target"])
def test_padding_is_not_in_the_loss(objective, loss_on):
    tasks = regression()
    learner = NeuralProcess(MODELS[objective](), objective=objective, loss_on=loss_on).train()
    longer = pad([Task(*(part[i] for part in tasks[:4])) for i in range(3)])
    longer = longer._replace(
        **{
            name: torch.cat([part, torch.full_like(part[:, :2], 7)], dim=1)
            for name, part in longer._asdict().items()
            if name not in ("aux", "context_mask", "target_mask")
        },
        **{
            name: torch.cat([mask, torch.zeros_like(mask[:, :2])], dim=1)
            for name, mask in longer.masks.items()
        },
    )
    torch.manual_seed(1)
    plain = learner(tasks)
    torch.manual_seed(1)
    torch.testing.assert_close(learner(longer), plain)


def test_elbo_is_the_expected_likelihood_less_the_divergence_from_the_contexts_belief():
    tasks, model = regression(), latent()
    learner = NeuralProcess(model, objective="elbo", samples=3, loss_per="task")
    torch.manual_seed(1)
    loss = learner.train()(tasks)
    torch.manual_seed(1)
    prior = model.latent(tasks.context_x, tasks.context_y)
    posterior = model.latent(*all_points(tasks))
    z = posterior.rsample([3])
    paths = model.decode(z, tasks.context_x, tasks.context_y, tasks.target_x)
    expected = paths.log_prob(tasks.target_y).sum(-1).mean(0)
    torch.testing.assert_close(loss, (kl_divergence(posterior, prior) - expected).mean())


def test_iwae_weighs_draws_by_how_likely_the_context_held_them():
    tasks, model = regression(), latent()
    learner = NeuralProcess(model, objective="iwae", samples=5)
    torch.manual_seed(1)
    loss = learner.train()(tasks)
    torch.manual_seed(1)
    prior = model.latent(tasks.context_x, tasks.context_y)
    posterior = model.latent(*all_points(tasks))
    z = posterior.rsample([5])
    paths = model.decode(z, tasks.context_x, tasks.context_y, tasks.target_x)
    weights = [
        paths.log_prob(tasks.target_y)[k].sum(-1) + prior.log_prob(z[k]) - posterior.log_prob(z[k])
        for k in range(5)
    ]
    bound = (sum(weight.exp() for weight in weights) / 5).log()
    torch.testing.assert_close(loss, -(bound / tasks.target_y.shape[1]).mean())


def test_iwae_with_more_draws_is_a_tighter_bound_on_average():
    tasks = regression()
    means = []
    for samples in (1, 50):
        learner = NeuralProcess(latent(), objective="iwae", samples=samples).train()
        torch.manual_seed(0)
        with torch.no_grad():
            means.append(torch.stack([learner(tasks) for _ in range(60)]).mean())
    assert means[1] < means[0]


def test_the_loss_on_context_and_targets_is_about_all_points():
    tasks, model = regression(), of(CNP, width=8)
    x, y = all_points(tasks)
    by_hand = -model(tasks.context_x, tasks.context_y, x).log_prob(y).mean()
    torch.testing.assert_close(NeuralProcess(model, loss_on="context+target")(tasks), by_hand)


def test_a_loss_per_task_is_the_sum_over_its_points():
    tasks, model = regression(), of(CNP, width=8)
    per_task = NeuralProcess(model, loss_per="task")(tasks)
    per_point = NeuralProcess(model)(tasks)
    torch.testing.assert_close(per_task, per_point * tasks.target_y.shape[1])


@pytest.mark.parametrize("kind", [TNPA, TNPND, GNP])
def test_a_joint_score_is_of_all_targets_together_and_named_so(kind):
    arguments = {"rank": 3, "width": 8, "heads": 2} if kind is GNP else small
    learner = NeuralProcess(of(kind, **arguments), scoring="joint").eval()
    tasks = regression()
    scores = learner.score(tasks)
    assert learner.metric.name == JOINT
    prediction = learner.predict(*tasks[:3])
    torch.testing.assert_close(
        scores[JOINT], prediction.log_prob(tasks.target_y) / tasks.target_y.shape[1]
    )
    torch.testing.assert_close(
        scores["log_likelihood"], marginals(prediction).log_prob(tasks.target_y).mean(1)
    )
    torch.testing.assert_close(learner(tasks), -scores[JOINT].mean())


def test_tnp_a_follows_the_chain_rule():
    tasks, model = regression(n_target=4), of(TNPA, **small)
    joint = model(*tasks[:3]).log_prob(tasks.target_y)
    one_by_one = 0
    for target in range(4):
        # the targets before it are seen with their y; those after it are not there at all
        part = tasks.target_x[:, : target + 1]
        given = model(tasks.context_x, tasks.context_y, part).given(tasks.target_y[:, : target + 1])
        one_by_one = one_by_one + given.log_prob(tasks.target_y[:, : target + 1])[:, target]
    torch.testing.assert_close(joint, one_by_one)
    first = model(*tasks[:3]).marginals.log_prob(tasks.target_y)[:, 0]
    torch.testing.assert_close(
        model(*tasks[:2], tasks.target_x[:, :1]).log_prob(tasks.target_y[:, :1]), first
    )


def test_what_stands_in_a_later_target_does_not_change_an_earlier_one():
    tasks, model = regression(), of(TNPA, **small)
    other = tasks.target_y.clone()
    other[:, 3:] += 100
    one, two = (model(*tasks[:3]).given(y) for y in (tasks.target_y, other))
    torch.testing.assert_close(one.mean[:, :4], two.mean[:, :4])
    assert not torch.allclose(one.mean[:, 4:], two.mean[:, 4:])


@pytest.mark.parametrize(
    ("objective", "said"),
    [("elbo", "no latent variable"), ("iwae", "no latent"), ("bootstrap", "no bootstrap")],
)
def test_an_objective_that_a_model_cannot_have_is_refused(objective, said):
    with pytest.raises(ValueError, match=rf"objective='{objective}'.*{said}.*likelihood"):
        NeuralProcess(of(CNP, width=8), objective=objective)


@pytest.mark.parametrize("name", ["objective", "scoring", "loss_on", "loss_per"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}='joined': choose from "):
        NeuralProcess(of(CNP, width=8), **{name: "joined"})


# --- units -------------------------------------------------------------------------------------

UNITS = {"x_mean": [3.0], "x_std": [10.0], "y_mean": [-40.0], "y_std": [5.0]}


def moved(tasks: Task) -> Task:
    """The same tasks in other units."""
    x = [part * 10 + 3 for part in (tasks.context_x, tasks.target_x)]
    y = [part * 5 - 40 for part in (tasks.context_y, tasks.target_y)]
    return Task(x[0], y[0], x[1], y[1])


MOVED = {
    "cnp": (lambda: of(CNP, width=8), {}),
    "np": (latent, {"objective": "iwae"}),
    "tnp_a": (lambda: of(TNPA, **small), {"scoring": "joint"}),
    "tnp_nd": (lambda: of(TNPND, **small), {"scoring": "joint"}),
    "gnp": (lambda: of(GNP, rank=3, width=8, heads=2), {"scoring": "joint"}),
}


@pytest.mark.parametrize("name", MOVED)
def test_data_in_other_units_are_the_same_data(name):
    make, arguments = MOVED[name]
    plain = NeuralProcess(make(), **arguments)
    scaled = NeuralProcess(make(), **arguments, units=UNITS).double()
    tasks = regression()
    torch.manual_seed(1)
    loss = plain.train()(tasks)
    torch.manual_seed(1)
    torch.testing.assert_close(scaled.train()(moved(tasks)), loss)
    torch.manual_seed(1)
    one = plain.eval().score(tasks)
    torch.manual_seed(1)
    other = scaled.eval().score(moved(tasks))
    for metric in one:
        if metric.startswith("log_likelihood"):  # a density of numbers five times as far apart
            torch.testing.assert_close(other[metric], one[metric] - math.log(5))
    torch.testing.assert_close(other["mse"], one["mse"] * 25)
    torch.testing.assert_close(other["rmse"], one["rmse"] * 5)
    torch.manual_seed(1)
    mean = marginals(plain.predict(*tasks[:3])).mean
    torch.manual_seed(1)
    in_units = marginals(scaled.predict(*moved(tasks)[:3])).mean
    torch.testing.assert_close(in_units, mean * 5 - 40)


def test_units_are_saved_with_the_weights():
    learner = NeuralProcess(of(CNP, width=8), units=UNITS)
    assert learner.state_dict()["units.y_std"].tolist() == [5.0]


def test_without_any_there_are_no_units():
    learner = NeuralProcess(of(CNP, width=8), units={})
    assert not [name for name in learner.state_dict() if "units" in name]


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ({"mean": 0.0, "std": 1.0}, r"units has no 'x_mean', only mean, std"),
        (UNITS | {"y_std": [0.0]}, r"units\.y_std=\[0\.0\] must be above 0"),
    ],
)
def test_units_that_cannot_be_are_refused(units, said):
    with pytest.raises(ValueError, match=said):
        NeuralProcess(of(CNP, width=8), units=units)


def test_a_bootstrap_draws_only_real_points():
    task = Task(*(part[0] for part in regression(1, 3, 4)[:4]))
    longer = Task(*(part[0] for part in regression(1, 9, 4)[:4]))
    batch = pad([task, longer])
    batch.context_y[0, 3:] = float("nan")
    learner = NeuralProcess(of(BNP, width=8), objective="bootstrap", loss_on="context+target")
    assert learner.train()(batch).isfinite()
    assert all(values.isfinite().all() for values in learner.eval().score(batch).values())
