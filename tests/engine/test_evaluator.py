"""Evaluation: frozen tasks, honest intervals, names that say what was measured."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching import TaskLoader, digest
from metabatch_cli.engine import random_states
from metabatch_cli.engine.evaluator import Evaluation, evaluate, monitored, qualified, summarise
from metabatch_cli.engine.precision import Precision
from metabatch_cli.learners.learner import Metric
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.models.cnp import CNP
from tasksets.functions import Functions, Sine
from tests.engine.examples import Noisy, WithOracle, differences, parts

PRECISION = Precision(32, torch.device("cpu"))
scores = st.lists(st.floats(-100, 100), min_size=2, max_size=50)
words = st.sampled_from(["mse", "accuracy", "log_likelihood"])
qualifiers = st.lists(st.sampled_from(["shots=1", "ways=5", "noise=0"]), unique=True).map(",".join)
steps = st.sampled_from(["", "steps=1", "steps=10"])


def network(kind=NeuralProcess):
    torch.manual_seed(0)
    return kind(CNP(1, 1, width=8, encoder_depth=1, decoder_depth=2))


def loader(batch_size: int = 4, kind=Functions, seed: int = 0, **changes: object) -> TaskLoader:
    arguments = {"min_pts": 1, "max_ctx_pts": 5, "max_tgt_pts": 8, "split": "test", **changes}
    return TaskLoader(kind(Sine(), **arguments), batch_size, shuffle=True, seed=seed)


def evaluated(learner, loaders, n_tasks: int = 10) -> Evaluation:
    return evaluate(learner, loaders, PRECISION, split="test", n_tasks=n_tasks)


# --- numbers and names -----------------------------------------------------------------------


@given(scores)
def test_means_and_intervals_are_those_of_the_textbook(values):
    entry = summarise(torch.tensor(values, dtype=torch.float64))
    assert entry["mean"] == pytest.approx(statistics.fmean(values), abs=1e-9)
    half = 1.959963984540054 * statistics.stdev(values) / math.sqrt(len(values))
    assert entry["ci95"] == pytest.approx(half, abs=1e-7)
    assert entry["tasks"] == len(values)


def test_a_single_task_has_no_interval():
    assert summarise(torch.tensor([3.0])) == {"mean": 3.0, "ci95": None, "tasks": 1}


@given(words, steps, qualifiers)
def test_a_name_says_first_the_set_and_then_the_learners_own_qualifiers(word, own, of_set):
    name = f"{word}@{own}" if own else word
    full = qualified(name, of_set)
    base, _, rest = full.partition("@")
    assert base == word
    assert rest == ",".join(part for part in (of_set, own) if part)


def test_the_name_of_the_contract():
    assert qualified("mse@steps=1", "shots=10") == "mse@shots=10,steps=1"
    assert qualified("accuracy", "ways=5,shots=1") == "accuracy@ways=5,shots=1"
    assert qualified("mse", "") == "mse"


def test_a_metric_is_found_by_its_exact_name_first():
    evaluation = Evaluation(
        {"val/mse": {"mean": 1.0}, "val/mse@shots=1": {"mean": 2.0}, "test/mse": {"mean": 9.0}}
    )
    assert evaluation.find("val", "mse") == 1.0
    assert evaluation.find("val", "mse@shots=1") == 2.0
    assert evaluation.find("test", "mse") == 9.0


def test_a_metric_is_the_mean_over_all_sets_that_have_it():
    evaluation = Evaluation(
        {
            "val/mse@shots=1,steps=1": {"mean": 1.0},
            "val/mse@shots=5,steps=1": {"mean": 3.0},
            "val/mse@shots=5,steps=0": {"mean": 100.0},
            "val/rmse@shots=5,steps=1": {"mean": 1000.0},
            "test/mse@shots=5,steps=1": {"mean": 10000.0},
        }
    )
    assert evaluation.find("val", "mse@steps=1") == 2.0
    assert evaluation.find("val", "mse@shots=5,steps=1") == 3.0
    assert evaluation.find("val", "mse@steps=1,shots=5") == 3.0
    assert evaluation.find("val", "mse@shots=1") == 1.0


def test_a_metric_that_is_not_there_is_none():
    assert Evaluation().find("val", "mse") is None
    assert Evaluation({"val/mse": {"mean": 1.0}}).find("val", "ms") is None
    assert Evaluation({"val/mse": {"mean": 1.0}}).find("test", "mse") is None
    assert Evaluation({"val/mse": {"mean": 1.0}}).find("val", "mse@shots=1") is None


@pytest.mark.parametrize(
    ("monitor", "name", "higher"),
    [
        (None, "accuracy", True),
        ("accuracy", "accuracy", True),
        ("mse", "mse", False),
        ("val/mse@shots=1", "mse@shots=1", False),
        ("my_loss", "my_loss", False),
        ("rmse", "rmse", False),
        ("log_likelihood", "log_likelihood", True),
        ("recall@k=5", "recall@k=5", True),
    ],
)
def test_which_end_of_a_metric_is_its_best(monitor, name, higher):
    assert monitored(Metric("accuracy", True), monitor) == Metric(name, higher)


def test_better_is_more_or_less_and_never_the_same():
    more, less = Metric("accuracy", True), Metric("mse", False)
    assert more.is_better(0.0, None)
    assert less.is_better(0.0, None)
    assert more.is_better(2, 1)
    assert not less.is_better(2, 1)
    assert less.is_better(1, 2)
    assert not more.is_better(1, 1)
    assert not less.is_better(1, 1)


# --- the tasks -------------------------------------------------------------------------------


@given(st.integers(1, 23), st.integers(1, 9))
def test_exactly_as_many_tasks_are_scored_as_were_asked_for(n_tasks, batch_size):
    entry = evaluated(network(), {"": loader(batch_size)}, n_tasks).metrics["test/mse"]
    assert entry["tasks"] == n_tasks


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_a_finite_set_is_scored_once_through(batch_size):
    evaluation = evaluated(network(), {"": loader(batch_size, n_tasks=7)}, n_tasks=100)
    assert evaluation.metrics["test/mse"]["tasks"] == 7


def test_scores_are_those_of_the_first_batches():
    learner, tasks = network().eval(), loader()
    with torch.no_grad():
        by_hand = torch.cat([learner.score(tasks.batch_at(step))["mse"] for step in range(3)])[:10]
    evaluation = evaluated(learner, {"": tasks})
    assert evaluation.metrics["test/mse"]["mean"] == pytest.approx(by_hand.mean().item())


def test_digests_name_the_tasks_and_nothing_else():
    one = evaluated(network(), {"": loader()}).digests["test"]
    torch.manual_seed(1)
    other_learner = NeuralProcess(CNP(1, 1, width=4))
    assert evaluated(other_learner, {"": loader()}).digests["test"] == one
    assert evaluated(network(), {"": loader()}, n_tasks=9).digests["test"] != one
    assert evaluated(network(), {"": loader(seed=1)}).digests["test"] != one
    assert evaluated(network(), {"": loader(noise=0.1)}).digests["test"] != one


def test_several_sets_have_entries_and_digests_of_their_own():
    sets = {"noise=0": loader(), "noise=1": loader(noise=1.0)}
    evaluation = evaluated(network(), sets)
    assert set(evaluation.metrics) == {
        f"test/{name}@{of_set}" for name in ("mse", "log_likelihood") for of_set in sets
    }
    assert set(evaluation.digests) == {"test@noise=0", "test@noise=1"}
    assert len(set(evaluation.digests.values())) == 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_tasks_do_not_depend_on_the_training_seed(split):
    def digests(*overrides: str) -> list[str]:
        (tasks,) = parts(*overrides).evaluation_loaders(split).values()
        return [digest(tasks.batch_at(step)) for step in range(3)]

    frozen = digests()
    for override in ("seed=1", "loader.batch_size=8", "loader.shards=2", "trainer.precision=64"):
        assert digests(override) == frozen, override
    assert digests("evaluation.seed=1") != frozen


def test_the_three_splits_have_tasks_of_their_own():
    declared = parts("loader.batch_size=16")
    loaders = [declared.loader]
    for split in ("val", "test"):
        loaders += declared.evaluation_loaders(split).values()
    assert len({digest(tasks.batch_at(0)) for tasks in loaders}) == 3


def test_the_sizes_of_the_test_tasks_are_these_for_ever():
    # integers are the same on every machine: a change of this list changes published results
    (tasks,) = parts().evaluation_loaders("test").values()
    sizes = [(spec.n_context, spec.n_target) for spec in map(tasks.plan.spec, range(6))]
    assert sizes == [(5, 33), (14, 38), (20, 20), (17, 22), (1, 23), (12, 50)]


# --- what is left behind ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_mode_weights_gradients_and_generators_as_they_were(training):
    learner = network(Noisy).train(training)
    before = {name: part.clone() for name, part in learner.state_dict().items()}
    states = random_states.random_states()
    evaluated(learner, {"": loader()})
    assert learner.training == training
    assert differences(dict(learner.state_dict()), before) == []
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert differences(random_states.random_states(), states) == []


def test_the_mode_comes_back_after_an_error_too():
    class Fails(NeuralProcess):
        def score(self, tasks):
            assert not self.training
            raise ArithmeticError

    learner = network(Fails).train()
    with pytest.raises(ArithmeticError):
        evaluated(learner, {"": loader()})
    assert learner.training


def test_a_learner_that_draws_when_it_scores_scores_the_same_every_time():
    learner, found = network(Noisy), []
    for _ in range(2):
        random.seed()
        np.random.seed()
        torch.seed()
        found.append(evaluated(learner, {"": loader()}).metrics)
    assert found[0] == found[1]


def test_no_graph_is_built():
    class Watched(NeuralProcess):
        def score(self, tasks):
            scores = super().score(tasks)
            assert not any(values.requires_grad for values in scores.values())
            return scores

    evaluated(network(Watched), {"": loader()})


def test_an_oracle_is_averaged_over_the_same_tasks():
    tasks = loader(kind=WithOracle, noise=0.1)
    entry = evaluated(network(), {"": tasks}).metrics["test/log_likelihood"]
    by_hand = torch.cat(
        [tasks.dataset.oracle(tasks.batch_at(step))["log_likelihood"] for step in range(3)]
    )[:10]
    assert entry["oracle"] == pytest.approx(by_hand.double().mean().item())


class WithBaselines(WithOracle):
    """Two simple predictions, the second of which is scored by one metric that no learner has."""

    def baselines(self, tasks):
        zero = tasks.target_y.square().mean(dim=(1, 2))
        return {"zero": {"mse": zero, "rmse": zero.sqrt()}, "odd": {"rmse": zero.sqrt()}}


def test_baselines_are_averaged_over_the_same_tasks_and_stand_under_each_metric_they_know():
    tasks = loader(kind=WithBaselines, noise=0.1)
    metrics = evaluated(network(), {"": tasks}).metrics
    squares = [tasks.batch_at(step).target_y.square().mean(dim=(1, 2)) for step in range(3)]
    expected = torch.cat(squares)[:10].double().mean().item()
    assert metrics["test/mse"]["baselines"] == {"zero": pytest.approx(expected)}
    assert "baselines" not in metrics["test/log_likelihood"]
    assert "oracle" in metrics["test/log_likelihood"]


def test_a_metric_with_qualifiers_of_the_learner_has_the_baselines_of_its_base():
    class Qualified(NeuralProcess):
        def score(self, tasks):
            scores = super().score(tasks)
            return {"mse@steps=1": scores["mse"], "rmse@steps=1": scores["mse"].sqrt()}

    metrics = evaluated(
        network(Qualified), {"shots=3": loader(kind=WithBaselines, noise=0.1)}
    ).metrics
    assert set(metrics["test/mse@shots=3,steps=1"]["baselines"]) == {"zero"}
    assert set(metrics["test/rmse@shots=3,steps=1"]["baselines"]) == {"zero", "odd"}
