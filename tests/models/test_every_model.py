"""Every conditional model: symmetries, padding, small contexts. A model is a line in examples.py.

In float64: equality is up to the order of sums.
"""

from __future__ import annotations

import inspect
import math
from importlib import import_module

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from metabatch_cli.batching import PaddedTask, Task
from metabatch_cli.config.check import FROM_SPEC
from metabatch_cli.config.compose import config_dir
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.predictive import Predictive, joint_log_prob, marginals
from metabatch_cli.models.tnp import TNPND
from tests.models.examples import MODELS, Points, model, padded, points, predict

seeds = st.integers(0, 2**16)
sizes = st.integers(1, 6)
every_model = pytest.mark.parametrize("name", MODELS)


# a bootstrap draws other points in another order, or with padding
same_draws_for_other_points = pytest.mark.parametrize(
    "name", [name for name, example in MODELS.items() if example.draws != "points"]
)
without_draws = pytest.mark.parametrize(
    "name", [name for name, example in MODELS.items() if example.draws is None]
)


def assert_same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def moments(network: nn.Module, batch: Points) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every target, `[tasks, n_target, dim_y]`."""
    alone = marginals(predict(network, batch))
    return alone.mean, alone.stddev


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    network.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


def likelihoods(network: nn.Module, batch: Points) -> tuple[Tensor, Tensor]:
    """Of each target `[tasks, n_target]`, 0 where it is not real; and of all together `[tasks]`."""
    prediction = predict(network, batch)
    alone = marginals(prediction).log_prob(batch.target_y)
    if batch.target_mask is not None:
        alone = alone.masked_fill(~batch.target_mask, 0)
    return alone, joint_log_prob(prediction, batch.target_y, batch.target_mask)


# --- the table ---------------------------------------------------------------------------------


def shipped() -> dict[str, dict]:
    """The YAML of every network that is given a context, by name."""
    found = {}
    for path in sorted((config_dir() / "model").glob("*.yaml")):
        node = yaml.safe_load(path.read_text())
        if "_target_" not in node:  # other values for a network that has a file of its own
            continue
        if "context_x" in inspect.signature(target(node).forward).parameters:
            found[path.stem] = node
    return found


def target(node: dict) -> type[nn.Module]:
    module, _, name = node["_target_"].rpartition(".")
    return getattr(import_module(module), name)


def test_every_conditional_model_has_an_example_here():
    assert {name.partition(",")[0] for name in MODELS} == set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_models_yaml_says_all_that_can_be_chosen_and_what_is_chosen_by_default(name):
    node = shipped()[name]
    own = [kind for kind in target(node).__mro__ if "__init__" in vars(kind)]
    passing_on = [kind for kind in own if "arguments" in inspect.signature(kind).parameters]
    constructor = next(kind for kind in own if kind not in passing_on)
    parameters = inspect.signature(constructor).parameters
    defaults = {
        name: list(p.default) if isinstance(p.default, tuple) else p.default
        for name, p in parameters.items()
        if name not in FROM_SPEC
    }
    assert {key: value for key, value in node.items() if key != "_target_"} == defaults


# --- shapes ------------------------------------------------------------------------------------


@every_model
@given(sizes, st.integers(0, 6), sizes, seeds)
def test_the_prediction_is_of_every_target(name, n_tasks, n_context, n_target, seed):
    batch = points(name, n_tasks, n_context, n_target, seed)
    prediction = predict(model(name), batch)
    alone = marginals(prediction)
    shape = batch.target_y.shape
    assert alone.batch_shape == (n_tasks, n_target)
    assert alone.event_shape == shape[2:]
    assert alone.mean.shape == alone.stddev.shape == shape
    assert alone.mean.dtype == torch.float64
    assert alone.log_prob(batch.target_y).isfinite().all()
    together = joint_log_prob(prediction, batch.target_y)
    assert together.shape == (n_tasks,)
    assert together.isfinite().all()
    assert prediction.sample((2,)).shape == (2, *shape)
    if isinstance(prediction, Predictive):
        assert prediction.batch_shape == (n_tasks,)
        assert prediction.event_shape == shape[1:]


@every_model
def test_under_bfloat16_the_distribution_keeps_32_bits(name):
    batch = Points(*(part.float() for part in points(name)[:4]))
    network = model(name).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = predict(network, batch)
        alone, together = likelihoods(network, batch)
    assert marginals(prediction).mean.dtype == torch.float32
    assert marginals(prediction).stddev.dtype == torch.float32
    assert prediction.sample().dtype == torch.float32
    assert alone.dtype == together.dtype == torch.float32
    exact = moments(network, batch)
    rough = marginals(prediction)
    torch.testing.assert_close(rough.mean, exact[0], rtol=0.1, atol=0.1)
    torch.testing.assert_close(rough.stddev, exact[1], rtol=0.1, atol=0.1)


# --- symmetries --------------------------------------------------------------------------------


@same_draws_for_other_points
@given(sizes, seeds)
def test_the_order_of_the_context_does_not_matter(name, n_context, seed):
    batch = points(name, n_context=n_context, seed=seed)
    order = torch.randperm(n_context, generator=torch.Generator().manual_seed(seed))
    other = batch._replace(context_x=batch.context_x[:, order], context_y=batch.context_y[:, order])
    network = model(name)
    assert_same(moments(network, batch), moments(network, other))


@every_model
@given(sizes, seeds)
def test_targets_are_predicted_in_their_order(name, n_target, seed):
    batch = points(name, n_target=n_target, seed=seed)
    order = torch.randperm(n_target, generator=torch.Generator().manual_seed(seed))
    network = model(name)
    other = moments(network, batch._replace(target_x=batch.target_x[:, order]))
    assert_same(tuple(part[:, order] for part in moments(network, batch)), other)


@pytest.mark.parametrize("name", [name for name, example in MODELS.items() if example.apart])
@given(st.integers(2, 6), seeds)
def test_a_targets_marginal_is_the_same_without_the_other_targets(name, n_target, seed):
    batch = points(name, n_target=n_target, seed=seed)
    network = model(name)
    alone = moments(network, batch._replace(target_x=batch.target_x[:, :1]))
    assert_same(tuple(part[:, :1] for part in moments(network, batch)), alone)


@without_draws
@given(seeds)
def test_a_batchs_other_tasks_do_not_matter(name, seed):
    batch = points(name, n_tasks=3, seed=seed)
    network = model(name)
    together = likelihoods(network, batch)
    for i in range(3):
        alone = likelihoods(network, Points(*(part[i : i + 1] for part in batch[:4])))
        assert_same(tuple(part[i : i + 1] for part in together), alone)


@every_model
def test_the_context_matters(name):
    batch = points(name, n_context=6)
    network = model(name)
    one = moments(network, batch)
    other = moments(network, batch._replace(context_y=batch.context_y + 1))
    assert (one[0] - other[0]).abs().amax(dim=(1, 2)).min() > 1e-6


# --- small contexts ----------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("n_context", [0, 1])
def test_an_empty_context_and_one_of_a_single_point_are_learned_from(name, n_context):
    batch = points(name, n_context=n_context)
    network = model(name)
    alone, together = likelihoods(network, batch)
    found = gradients(network, alone.sum() + together.sum())
    assert all(part.isfinite().all() for part in found)
    assert any(part.any() for part in found)


@without_draws
def test_without_context_all_tasks_are_predicted_alike(name):
    batch = points(name, n_context=0)
    same = batch._replace(target_x=batch.target_x[:1].expand_as(batch.target_x))
    for part in moments(model(name), same):
        assert_same(part, part[:1].expand_as(part))


@same_draws_for_other_points
@given(sizes, seeds)
def test_a_context_that_is_all_padding_is_an_empty_one(name, more, seed):
    batch = points(name, n_context=0, seed=seed)
    network = model(name)
    found = []
    for one in (batch, padded(batch, more, 0, fill=1.0, seed=seed)):
        alone, together = likelihoods(network, one)
        found.append([alone, together, *gradients(network, alone.sum() + together.sum())])
    assert_same(*found)


# --- padding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, example in MODELS.items() if example.draws == "points"])
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), seeds)
def test_a_bootstrap_draws_as_many_points_as_are_real_whatever_the_padding(
    name, n_context, more, still_more, seed
):
    batch = points(name, n_context=n_context, seed=seed)
    network = model(name)
    found = []
    for length in (more, more + still_more):
        alone, together = likelihoods(network, padded(batch, length, 0, fill=1.0, seed=length))
        found.append([alone, together, *gradients(network, alone.sum() + together.sum())])
    assert_same(*found)


@pytest.mark.parametrize("name", [n for n, example in MODELS.items() if example.draws == "points"])
@given(st.integers(1, 4), seeds)
def test_a_bootstrap_is_the_encoding_of_the_points_that_were_drawn(name, n_context, seed):
    batch, network = points(name, n_context=n_context, seed=seed), model(name)
    x, y = batch.context_x, batch.context_y
    drawn = torch.randint(n_context, (2, len(x), n_context))
    counts = F.one_hot(drawn, n_context).sum(dim=2).to(x.dtype)
    by_counts = network.encode(x, y, batch.target_x, counts)
    for sample, chosen in enumerate(drawn):
        own = (part.gather(1, chosen[..., None].expand(part.shape)) for part in (x, y))
        expected = network.encode(*own, batch.target_x)
        assert_same([code[sample] for code in by_counts], expected)


@given(sizes, st.integers(1, 3), seeds)
def test_the_published_covariance_of_tnp_nd_heeds_padding(n_target, more, seed):
    torch.manual_seed(seed)
    network = TNPND(2, 2, rank=3, covariance="cholesky", width=8, heads=2, hidden=8).double()
    batch = points("tnp_nd", n_target=n_target, seed=seed)
    plain, longer = (likelihoods(network, b) for b in (batch, padded(batch, 2, more, fill=1.0)))
    assert_same((longer[0][:, :n_target], longer[1]), plain)


def test_a_tnp_nd_has_one_of_two_covariances():
    with pytest.raises(ValueError, match=r"covariance='diagonal': choose from low_rank, cholesky"):
        TNPND(1, 1, covariance="diagonal")


def test_a_deviation_is_made_in_one_of_three_ways():
    with pytest.raises(ValueError, match=r"sigma='softplus': choose from scaled, additive, exp"):
        predict(CNP(2, 2, width=8, sigma="softplus").double(), points("cnp"))


@same_draws_for_other_points
@given(st.integers(0, 4), sizes, st.integers(0, 3), st.integers(1, 3), seeds)
def test_padding_changes_neither_prediction_nor_gradient(
    name, n_context, n_target, more_context, more_target, seed
):
    batch = points(name, n_context=n_context, n_target=n_target, seed=seed)
    longer = padded(batch, more_context, more_target, fill=1.0, seed=seed)
    network = model(name)
    found = []
    for one in (batch, longer):
        alone, together = likelihoods(network, one)
        loss = alone.sum() + together.sum()
        found.append([alone[:, :n_target], together, *gradients(network, loss)])
    assert_same(*found)


@same_draws_for_other_points
@pytest.mark.parametrize("fill", [1e6, math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scoring", ["marginal", "joint"])
@pytest.mark.parametrize("loss_on", ["target", "context+target"])
def test_whatever_stands_in_the_padding_is_not_learned(name, fill, scoring, loss_on):
    batch = points(name)
    learner = NeuralProcess(model(name), scoring=scoring, loss_on=loss_on, samples=3)
    plain, litter = Task(*batch[:4]), padded(batch, 2, 3, fill)
    found = []
    for tasks in (plain, PaddedTask(**litter._asdict())):
        torch.manual_seed(0)
        loss = learner(tasks)
        found.append([loss.detach(), *gradients(learner, loss)])
        torch.manual_seed(0)
        found[-1] += learner.score(tasks).values()
    assert all(part.isfinite().all() for part in found[1])
    assert_same(*found)


@without_draws
def test_tasks_of_different_sizes_are_predicted_as_if_alone(name):
    network = model(name)
    tasks = [
        points(name, 1, n_context, n_target, seed)
        for seed, (n_context, n_target) in enumerate([(5, 2), (0, 4), (1, 1), (3, 3)])
    ]
    longer = [
        padded(task, 6 - task.context_x.shape[1], 5 - task.target_x.shape[1], fill=1.0)
        for task in tasks
    ]
    together = likelihoods(network, Points(*map(torch.cat, zip(*longer, strict=True))))
    for i, task in enumerate(tasks):
        alone, joint = likelihoods(network, task)
        assert_same(together[0][i : i + 1, : alone.shape[1]], alone)
        assert_same(together[1][i : i + 1], joint)
