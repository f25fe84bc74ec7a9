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
from omegaconf import OmegaConf

from metabatch_cli.batching import TaskLoader, digest
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.compose import compose
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.engine import random_states
from metabatch_cli.engine.evaluator import (
    Z95,
    Evaluation,
    evaluate,
    is_beaten,
    monitored,
    over_points,
    qualified,
    summarise,
)
from metabatch_cli.engine.parts import Parts
from metabatch_cli.engine.precision import Precision
from metabatch_cli.learners.autoregressive import AUTOREGRESSIVE, AutoregressiveDeployment
from metabatch_cli.learners.learner import Metric
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.models.calibration import LEVELS
from metabatch_cli.models.cnp import CNP
from metabatch_cli.report.interval import t_quantile
from tasksets.functions import Functions, Sine
from tasksets.gp import GaussianProcess
from tasksets.kernels import RBF
from tests.engine.examples import Cheat, Groups, Noisy, WithOracle, differences, parts, settings
from tests.learners.test_autoregressive import NOISE, ExactGP

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
    entry = summarise(torch.tensor(values, dtype=torch.float64), torch.arange(len(values)))
    assert entry["mean"] == pytest.approx(statistics.fmean(values), abs=1e-9)
    half = 1.959963984540054 * statistics.stdev(values) / math.sqrt(len(values))
    assert entry["ci95"] == pytest.approx(half, abs=1e-7)
    half *= t_quantile(len(values) - 1) / Z95
    assert entry["ci95_over_batches"] == pytest.approx(half, abs=1e-7)  # each of its own
    assert entry["tasks"] == len(values)


def test_a_single_task_has_no_interval():
    entry = summarise(torch.tensor([3.0]), torch.tensor([0]))
    assert entry == {"mean": 3.0, "ci95": None, "ci95_over_batches": None, "tasks": 1}


def test_a_single_batch_has_no_interval_over_batches():
    entry = summarise(torch.tensor([3.0, 5.0]), torch.tensor([7, 7]))
    assert entry["ci95"] > 0
    assert entry["ci95_over_batches"] is None


def test_intervals_over_batches_cover_the_mean_where_batches_have_something_in_common():
    generator, over_tasks, over_batches = torch.Generator().manual_seed(0), 0, 0
    batches = torch.arange(100).repeat_interleave(8)[:-3]  # the last one is cut off
    for _ in range(1000):
        common = torch.randn(100, generator=generator, dtype=torch.float64)
        own = torch.randn(len(batches), generator=generator, dtype=torch.float64)
        entry = summarise(common[batches] + own, batches)
        over_tasks += abs(entry["mean"]) <= entry["ci95"]
        over_batches += abs(entry["mean"]) <= entry["ci95_over_batches"]
    assert 920 <= over_batches <= 975
    assert over_tasks < 800


def test_scores_know_which_batch_they_are_of():
    sets = {"": loader(batch_size=4)}
    one, two = (evaluated(network(), sets, n_tasks=n).metrics["test/mse"] for n in (4, 8))
    assert one["ci95_over_batches"] is None
    # the mean of two batches' means, as far from the one as from the other
    half = t_quantile(1) * abs(one["mean"] - two["mean"])
    assert two["ci95_over_batches"] == pytest.approx(half)


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


def test_a_metric_that_is_scored_otherwise_is_another_one():
    evaluation = Evaluation(
        {
            "val/log_likelihood@kernel=rbf": {"mean": 1.0},
            "val/log_likelihood@kernel=rbf,scoring=joint": {"mean": 10.0},
            "val/log_likelihood@kernel=matern": {"mean": 3.0},
            "val/log_likelihood@kernel=matern,scoring=joint": {"mean": 30.0},
        }
    )
    assert evaluation.find("val", "log_likelihood") == 2.0
    assert evaluation.find("val", "log_likelihood@scoring=joint") == 20.0


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
        ("logloss", "logloss", False),
        ("rmse", "rmse", False),
        ("log_likelihood", "log_likelihood", True),
        ("recall@k=5", "recall@k=5", True),
        ("calibration_error", "calibration_error", False),
        ("error_rate@shots=1", "error_rate@shots=1", False),
        ("NLL", "NLL", False),
        ("crps", "crps", False),
        ("terror", "terror", True),
    ],
)
def test_which_end_of_a_metric_is_its_best(monitor, name, higher):
    assert monitored(Metric("accuracy", True), monitor) == Metric(name, higher)


@pytest.mark.parametrize("monitor", ["nll", "val/nll", "nll@shots=5", "val/nll@shots=5"])
def test_a_learner_knows_which_end_of_its_own_metric_is_the_best(monitor):
    assert not monitored(Metric("nll", False), monitor).higher_is_better


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
        f"test/{name}@{of_set}" for name in ("mse", "rmse", "log_likelihood") for of_set in sets
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


# --- every point alike -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 50)), min_size=1, max_size=30))
def test_over_points_is_the_mean_over_all_points(pairs):
    values, points = torch.tensor(pairs, dtype=torch.float64).T
    every = [value for value, number in pairs for _ in range(number)]
    entry = over_points(values, points)
    assert entry["mean"] == pytest.approx(statistics.fmean(every), abs=1e-9)
    assert entry["points"] == len(every)
    assert (entry["ci95"] is None) == (len(pairs) == 1)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50), st.integers(1, 9))
def test_where_tasks_are_of_one_size_tasks_and_points_count_the_same(values, size):
    values = torch.tensor(values, dtype=torch.float64)
    entry = summarise(values, torch.arange(len(values)))
    points = over_points(values, torch.full_like(values, size))
    assert points["mean"] == pytest.approx(entry["mean"], abs=1e-9)
    assert points["ci95"] == pytest.approx(entry["ci95"], abs=1e-7)


def test_intervals_over_points_cover_the_mean_as_often_as_they_say():
    generator, covered = torch.Generator().manual_seed(0), {1: 0, 2: 0}
    for _ in range(1000):
        points = torch.randint(1, 40, (400,), generator=generator).double()
        # large tasks score otherwise: E[v w] / E[w] is not E[v]
        noise = torch.randn(400, generator=generator, dtype=torch.float64).abs()
        values = points.sqrt() * (1 + noise)
        for power in covered:
            truth = (points.new_tensor(range(1, 40)) ** (1 + power / 2)).sum() / sum(range(1, 40))
            truth *= 1 + (2 / math.pi) ** 0.5 if power == 1 else 2 + 2 * (2 / math.pi) ** 0.5
            entry = over_points(values, points, power)
            covered[power] += abs(entry["mean"] - truth ** (1 / power)) <= entry["ci95"]
    assert all(920 <= number <= 975 for number in covered.values()), covered


def test_the_rmse_over_points_is_the_root_of_the_mean_over_points():
    metrics = evaluated(network(), {"": loader(batch_size=3, max_tgt_pts=40)}).metrics
    root, square = (metrics[f"test/{name}"]["over_points"] for name in ("rmse", "mse"))
    assert root["mean"] == pytest.approx(square["mean"] ** 0.5)
    assert root["ci95"] == pytest.approx(square["ci95"] / (2 * root["mean"]))
    assert metrics["test/mse"]["mean"] != pytest.approx(square["mean"])


def test_padding_is_no_point():
    tasks = TaskLoader(Groups(1, 5, 9), 4, shuffle=True)
    entry = evaluated(network(), {"": tasks}).metrics["test/mse"]
    masks = [tasks.batch_at(step).target_mask[: 10 - 4 * step] for step in range(3)]
    assert entry["over_points"]["points"] == sum(int(mask.sum()) for mask in masks)


# --- what is said of a score -----------------------------------------------------------------


def test_a_log_likelihood_says_how_it_was_scored():
    learner = AutoregressiveDeployment(network())
    metrics = evaluated(learner, {"": loader()}).metrics
    said = {name: {k: v for k, v in e.items() if isinstance(v, str)} for name, e in metrics.items()}
    assert said == {
        "test/log_likelihood": {"scoring": "marginal"},
        f"test/{AUTOREGRESSIVE}": {"scoring": "joint", "predict": "autoregressive"},
        "test/mse": {},
        "test/rmse": {},
    }


def test_the_oracle_of_a_joint_score_is_the_joint_one_however_it_was_predicted():
    learner = AutoregressiveDeployment(exact_learner())
    metrics = evaluated(learner, {"": gaussian_process()}, n_tasks=16).metrics
    entry = metrics[f"test/{AUTOREGRESSIVE}"]
    assert entry["oracle"] == pytest.approx(entry["mean"], abs=1e-3)
    assert entry["oracle"] != pytest.approx(metrics["test/log_likelihood"]["oracle"], abs=1e-2)
    assert entry["over_points"]["oracle"] == pytest.approx(entry["over_points"]["mean"], abs=1e-3)


# --- calibration -----------------------------------------------------------------------------


def gaussian_process(noise: float = NOISE) -> TaskLoader:
    dataset = RBF(lengthscale=[0.5, 0.5], amplitude=[1.0, 1.0])
    taskset = GaussianProcess(dataset, 3, 10, None, 20, sizes="rest", noise=noise, split="test")
    return TaskLoader(taskset, 16, seed=0)


def exact_learner(kind=NeuralProcess):
    return kind(ExactGP())


def calibration_of(learner):
    return evaluate(
        learner, {"": gaussian_process()}, Precision(64, torch.device("cpu")), split="test",
        n_tasks=200, calibrated=True,
    )  # fmt: skip


class Wide(ExactGP):
    """Twice the spread that is right."""

    def forward(self, *given, **more):
        exact = super().forward(*given, **more).base_dist
        return torch.distributions.Independent(
            torch.distributions.Normal(exact.loc, 2 * exact.scale), 1
        )


def test_an_exact_posterior_is_calibrated_and_a_wide_one_is_not():
    exact, wide = calibration_of(exact_learner()), calibration_of(NeuralProcess(Wide()))
    curve = exact.calibration["test"]
    assert curve["levels"] == list(LEVELS)
    assert curve["coverage"] == pytest.approx(list(LEVELS), abs=0.04)
    assert exact.metrics["test/calibration_error"]["mean"] < 0.02
    # half as far in units of its σ: |z| ≤ 2 q
    quantile = torch.special.ndtri((1 + torch.tensor(LEVELS)) / 2)
    expected = (2 * torch.special.ndtr(2 * quantile) - 1).tolist()
    assert wide.calibration["test"]["coverage"] == pytest.approx(expected, abs=0.04)
    assert wide.metrics["test/calibration_error"]["mean"] > 0.15
    sharp, less = (found.metrics["test/sharpness"]["mean"] for found in (exact, wide))
    assert less == pytest.approx(2 * sharp)
    # an exact posterior errs as much as it says
    assert sharp == pytest.approx(exact.metrics["test/rmse"]["over_points"]["mean"], rel=0.1)


def test_calibration_is_measured_only_where_it_is_asked_for_and_changes_no_score():
    with_it, without = (
        evaluate(network(Noisy), {"": loader()}, PRECISION, split="val", n_tasks=9, calibrated=on)
        for on in (True, False)
    )
    extra = {"val/calibration_error", "val/sharpness"}
    assert set(with_it.metrics) - set(without.metrics) == extra
    assert without.calibration == {}
    assert {k: v for k, v in with_it.metrics.items() if k not in extra} == without.metrics


def test_calibration_skips_padding_and_tasks_without_targets():
    tasks = TaskLoader(Groups(1, 5, 9), 4, shuffle=True)
    entry = evaluate(
        network(), {"": tasks}, PRECISION, split="test", n_tasks=10, calibrated=True
    ).metrics  # fmt: skip
    assert math.isfinite(entry["test/calibration_error"]["mean"])
    assert entry["test/sharpness"]["over_points"] == {
        key: value for key, value in entry["test/sharpness"].items() if key in ("mean", "ci95")
    } | {"points": entry["test/mse"]["over_points"]["points"]}


# --- nobody beats the oracle -----------------------------------------------------------------


@pytest.mark.parametrize("model", [ExactGP, Wide, lambda: CNP(1, 1, width=8)])
def test_no_model_beats_the_oracle(model):
    learner = AutoregressiveDeployment(NeuralProcess(model()).double())
    precision = Precision(64, torch.device("cpu"))
    evaluation = evaluate(
        learner, {"": gaussian_process()}, precision, split="test", n_tasks=200
    )  # fmt: skip
    with_oracle = [name for name, entry in evaluation.metrics.items() if "oracle" in entry]
    assert set(with_oracle) == {"test/log_likelihood", f"test/{AUTOREGRESSIVE}", "test/mse"}
    assert evaluation.warnings == []


def test_a_score_that_cannot_be_is_pointed_out():
    learner = exact_learner(Cheat)
    (warning,) = evaluated(learner, {"x=1": gaussian_process()}, n_tasks=50).warnings
    assert warning.startswith("test/log_likelihood@x=1 = ")
    assert "oracle" in warning


@pytest.mark.parametrize("higher", [True, False])
def test_beating_the_oracle_is_a_question_of_paired_differences(higher):
    generator = torch.Generator().manual_seed(0)
    oracle = 10 * torch.randn(1000, generator=generator, dtype=torch.float64)
    noise = torch.randn(1000, generator=generator, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    sign, metric = 1 if higher else -1, Metric("any", higher)
    for errors, beaten in ((4.0, True), (2.0, False), (-9.0, False)):
        own = oracle + noise + sign * errors / 1000**0.5
        assert is_beaten(oracle, own, metric) == beaten
    assert not is_beaten(oracle[:1], oracle[:1] + sign * 99, metric)
    assert not is_beaten(oracle, oracle, metric)
    assert not is_beaten(oracle, oracle + sign * 1e-6, metric)


# --- how the test predicts -------------------------------------------------------------------


def test_the_test_may_predict_one_target_after_the_other():
    declared = parts("evaluation.predict=autoregressive", "evaluation.order=random")
    declared.build()
    assert declared.deployed.learner is declared.learner
    assert declared.deployed.order == "random"
    metrics = declared.score().metrics
    assert f"test/{AUTOREGRESSIVE}" in metrics
    assert declared.score().metrics == metrics  # the seed draws the order
    assert parts().deployed.why_not_autoregressive() is None


def test_a_learner_that_cannot_predict_so_is_refused_before_training():
    config = settings("evaluation.predict=autoregressive").copy()
    config.learner = OmegaConf.create({"_target_": "tests.engine.examples.Scripted"})
    declared = Parts(check(resolve(config)))
    with pytest.raises(ConfigError, match=r"evaluation\.predict.*Scripted cannot"):
        declared.build()


def test_the_ranges_are_among_the_contexts_elsewhere_and_beyond_them():
    words = ("taskset=gp", "model=cnp", "learner=neural_process", "evaluation=ranges")
    loaders = Parts(check(resolve(compose(*words)))).evaluation_loaders("test")
    found = {}
    for name, tasks in loaders.items():
        batch = tasks.batch_at(0)
        found[name] = [
            (round(x.min().item()), round(x.max().item()))
            for x in (batch.context_x, batch.target_x)
        ]
    near, far = (-2, 2), (2, 6)
    assert found == {
        "range=interpolation": [near, near],
        "range=shifted": [far, far],
        "range=extrapolation": [near, far],
    }
