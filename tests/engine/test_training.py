"""The training loop: how long, how exact, what it writes, and how it fails."""

from __future__ import annotations

import json
import math
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from metabatch_cli.config.build import build_taskset
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.engine.load import load_run
from metabatch_cli.engine.parts import Parts
from metabatch_cli.engine.run import train
from metabatch_cli.engine.trainer import TrainingFailed
from tasksets.functions import Functions
from tests.engine import examples
from tests.engine.examples import (
    HERE,
    Killed,
    Watcher,
    assert_same_run,
    differences,
    kill_at,
    learner,
    parts,
    result,
    rows,
    run,
    settings,
    settings_of,
    state,
)


def scripted(**arguments: object) -> tuple[str, ...]:
    return learner("Scripted", **arguments)


def training_rows(directory):
    return [row for row in rows(directory) if "loss" in row]


def validation_rows(directory):
    return [row for row in rows(directory) if "loss" not in row]


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_every", "eval_every"), [(1, 5), (3, 4), (20, 20), (10, 1)])
def test_rows_come_when_they_are_due_and_at_the_end(tmp_path, log_every, eval_every):
    run(tmp_path, f"trainer.log_every={log_every}", f"trainer.eval_every={eval_every}")

    def due(every: int) -> list[int]:
        return sorted({*range(every, 11, every), 10})

    assert [row["step"] for row in training_rows(tmp_path)] == due(log_every)
    assert [row["step"] for row in validation_rows(tmp_path)] == due(eval_every)


def test_a_training_row_has_the_mean_loss_since_the_row_before(tmp_path):
    run(tmp_path / "every", "trainer.log_every=1")
    run(tmp_path / "third", "trainer.log_every=3")
    losses = [row["loss"] for row in training_rows(tmp_path / "every")]
    for row in training_rows(tmp_path / "third"):
        first = (row["step"] - 1) // 3 * 3
        part = losses[first : row["step"]]
        assert row["loss"] == pytest.approx(sum(part) / len(part), rel=1e-12)


def test_rows_have_learning_rate_and_rising_seconds(tmp_path):
    run(tmp_path, "scheduler=cosine")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "loss" in row]
    rates = [row["lr"] for row in found]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    seconds = [row["seconds"] for row in found]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


def test_validation_rows_have_mean_and_interval_of_each_metric(tmp_path):
    run(tmp_path)
    for row in validation_rows(tmp_path):
        for name in ("val/log_likelihood", "val/mse"):
            assert isinstance(row[name], float)
            assert row[f"{name}/ci95"] > 0
            assert f"{name}/oracle" not in row


def test_a_validation_does_not_disturb_the_training(tmp_path):
    noisy = learner("Noisy")
    run(tmp_path / "often", *noisy, "trainer.eval_every=1", "trainer.checkpoint_every=1")
    run(tmp_path / "never", *noisy, "trainer.eval_every=100", "trainer.checkpoint_every=100")
    for key in ("learner", "optimizer", "loader", "random"):
        often, never = state(tmp_path / "often")[key], state(tmp_path / "never")[key]
        assert differences(often, never) == [], key
    assert training_rows(tmp_path / "often") == training_rows(tmp_path / "never")


# --- how long --------------------------------------------------------------------------------


def test_training_ends_when_validations_have_not_improved_for_as_long_as_patience(tmp_path):
    run(tmp_path, *scripted(best_at=4), "trainer.eval_every=1", "trainer.patience=3")
    assert result(tmp_path)["status"] == "completed"
    assert result(tmp_path)["step"] == 7
    assert state(tmp_path, "best")["step"] == 4


def test_patience_begins_anew_with_every_gain(tmp_path):
    run(tmp_path, *scripted(best_at=9), "trainer.eval_every=1", "trainer.patience=1")
    assert result(tmp_path)["step"] == 10
    assert state(tmp_path, "best")["step"] == 9


def test_training_ends_when_its_time_is_over(tmp_path, monkeypatch):
    seconds = count()
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr("metabatch_cli.engine.trainer.time", clock)
    # from step to step a look at the clock, and another one for a row
    run(tmp_path, "trainer.max_time=9")
    assert result(tmp_path)["status"] == "completed"
    assert 0 < result(tmp_path)["step"] < 10
    last = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert last >= 9


def test_time_counts_over_all_resumes(tmp_path, monkeypatch):
    constant = ("scheduler=none", "trainer.max_steps=2")
    run(tmp_path, *constant)
    file = tmp_path / "checkpoints" / "last.pt"
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "seconds": 1000.0}, file)
    run(tmp_path, "scheduler=none", "trainer.max_steps=10", "trainer.max_time=1000")
    assert result(tmp_path)["step"] == 2


def test_a_run_that_ended_early_is_complete_and_stays_so(tmp_path):
    overrides = (*scripted(best_at=4), "trainer.eval_every=1", "trainer.patience=3")
    run(tmp_path, *overrides)
    steps = []
    again = run(tmp_path, *overrides, after_step=steps.append)
    assert steps == []
    assert again["step"] == 7


# --- which weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(("test_on", "step"), [("best", 4), ("last", 10)])
def test_the_final_test_takes_the_weights_that_it_was_told_to(tmp_path, test_on, step):
    run(tmp_path, *scripted(best_at=4), "trainer.eval_every=2", f"trainer.test_on={test_on}")
    assert state(tmp_path, "best")["step"] == 4
    assert state(tmp_path)["step"] == 10
    closeness = result(tmp_path)["metrics"]["test/closeness"]["mean"]
    assert closeness == -abs(step - 4)


def test_an_equal_score_is_no_better_one(tmp_path):
    # closeness is −1 at steps 4 and 6
    run(tmp_path, *scripted(best_at=5), "trainer.eval_every=2")
    assert state(tmp_path, "best")["step"] == 4


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    run(tmp_path, *scripted(best_at=4, score_nan_at=1), "trainer.eval_every=1")
    assert state(tmp_path, "best")["step"] == 4
    first = validation_rows(tmp_path)[0]
    assert first["val/closeness"] is None


@pytest.mark.parametrize("monitor", ["error", "val/error"])
def test_another_metric_can_pick_the_best_where_less_is_better(tmp_path, monitor):
    run(tmp_path, *scripted(best_at=4), "trainer.eval_every=1", f"trainer.monitor={monitor}")
    assert state(tmp_path, "best")["step"] == 4
    assert state(tmp_path, "best")["score"] == 0


def test_a_metric_to_monitor_that_is_not_there_is_named_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "run", "trainer.monitor=log_likelyhood")
    said = str(caught.value)
    assert said.startswith("trainer.monitor=log_likelyhood: ")
    assert "did you mean 'log_likelihood'?" in said
    assert "mse" in said
    assert not (tmp_path / "run").exists()


# --- how exact -------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_parts_is_the_same_step_to_rounding(tmp_path, accumulate):
    run(tmp_path / "whole", "trainer.precision=64")
    run(tmp_path / "parts", "trainer.precision=64", f"trainer.accumulate={accumulate}")
    whole, in_parts = state(tmp_path / "whole")["learner"], state(tmp_path / "parts")["learner"]
    torch.testing.assert_close(in_parts, whole, rtol=1e-9, atol=1e-11)
    assert differences(in_parts, whole) != []  # they did take another way
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_parts_that_do_not_make_a_whole_are_refused_with_those_that_do(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "run", "trainer.accumulate=3")
    assert str(caught.value).startswith("trainer.accumulate=3: ")
    assert "1, 2, 4" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("precision", "dtype"), [(64, torch.float64), (32, torch.float32), ("bf16", torch.float32)]
)
def test_weights_and_their_optimizer_are_of_the_precision(tmp_path, precision, dtype):
    run(tmp_path, f"trainer.precision={precision}")
    saved = state(tmp_path)
    assert {weight.dtype for weight in saved["learner"].values()} == {dtype}
    moments = [entry["exp_avg"] for entry in saved["optimizer"]["state"].values()]
    assert {moment.dtype for moment in moments} == {dtype}


def test_bf16_computes_in_bfloat16_and_comes_close_to_32_bits(tmp_path):
    run(tmp_path / "32")
    run(tmp_path / "bf16", "trainer.precision=bf16")
    losses = [
        torch.tensor([row["loss"] for row in training_rows(tmp_path / name)])
        for name in ("32", "bf16")
    ]
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)


def test_a_gradient_is_no_longer_than_clip_norm(tmp_path):
    # plain gradient descent at rate 1: a step is as long as its gradient
    plain = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.lr=1")
    lengths = []
    for norm in ("null", "1e-3"):
        directory = tmp_path / norm
        overrides = (*plain, "scheduler=none", "trainer.max_steps=1", f"trainer.clip_norm={norm}")
        before = dict(parts(*overrides).learner.state_dict())
        run(directory, *overrides)
        after = state(directory)["learner"]
        moves = [(after[name] - before[name]).flatten() for name in before]
        lengths.append(torch.cat(moves).norm().item())
    assert lengths[0] > 0.1
    assert lengths[1] == pytest.approx(1e-3, rel=1e-2)


def test_overfitting_sees_one_batch_again_and_again(tmp_path):
    still = ("optimizer.lr=0", "scheduler=none")
    run(tmp_path / "one", *still, "trainer.overfit=true")
    run(tmp_path / "many", *still)
    assert len({row["loss"] for row in training_rows(tmp_path / "one")}) == 1
    assert len({row["loss"] for row in training_rows(tmp_path / "many")}) == 10


@pytest.mark.parametrize("seed", [0, -5, 2**40])
def test_the_same_configuration_in_another_directory_gives_the_same_weights(tmp_path, seed):
    for name in ("one", "other"):
        run(tmp_path / name, *learner("Noisy"), f"seed={seed}")
        torch.seed()
    assert differences(state(tmp_path / "one"), state(tmp_path / "other")) == []
    run(tmp_path / "third", *learner("Noisy"), f"seed={seed + 1}")
    assert differences(state(tmp_path / "one")["learner"], state(tmp_path / "third")["learner"])


def test_the_number_of_workers_does_not_change_the_weights(tmp_path):
    for workers in (0, 2):
        run(tmp_path / str(workers), *learner("Noisy"), f"loader.workers={workers}")
    assert differences(state(tmp_path / "0"), state(tmp_path / "2")) == []


def test_a_profile_is_written_where_it_is_asked_for(tmp_path):
    run(tmp_path, "trainer.profile=true", "trainer.max_steps=2")
    assert "traceEvents" in json.loads((tmp_path / "profile.json").read_text())


# --- how it fails ----------------------------------------------------------------------------


def finite(tree) -> bool:
    if isinstance(tree, torch.Tensor):
        return bool(tree.isfinite().all()) if tree.is_floating_point() else True
    if isinstance(tree, dict):
        return all(finite(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return all(finite(value) for value in tree)
    return not isinstance(tree, float) or math.isfinite(tree)


@pytest.mark.parametrize("nan_at", [1, 4, 5, 6, 10])
@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_that_is_no_number_ends_the_training_with_step_batch_and_checkpoint(
    tmp_path, nan_at, every
):
    overrides = (*scripted(nan_at=nan_at), f"trainer.checkpoint_every={every}")
    with pytest.raises(TrainingFailed) as caught:
        run(tmp_path, *overrides)
    said = str(caught.value)
    assert f"not finite at step {nan_at}\n" in said
    assert f"BatchSpec(step={nan_at - 1}, " in said
    last = tmp_path / "checkpoints" / "last.pt"
    assert (str(last) if last.exists() else "none yet") in said
    assert last.exists() == (nan_at > every)
    found = result(tmp_path)
    assert found["status"] == "failed"
    assert f"step {nan_at}" in found["error"]
    if last.exists():
        assert state(tmp_path)["step"] == (nan_at - 1) // every * every
        assert finite(state(tmp_path))
    assert all(row["loss"] is not None for row in training_rows(tmp_path))


@pytest.mark.parametrize("step", [4, 10])
def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(tmp_path, step):
    overrides = (*scripted(bad_gradient_at=step, best_at=99), "trainer.checkpoint_every=1")
    overrides += ("trainer.clip_norm=null", "trainer.eval_every=1")
    with pytest.raises(TrainingFailed):
        run(tmp_path, *overrides)
    assert finite(state(tmp_path))
    assert finite(state(tmp_path, "best"))


@pytest.mark.parametrize("overrides", [(), ("trainer.checkpoint_every=2",)])
def test_an_error_of_the_learner_is_recorded_and_what_was_saved_can_be_taken_up(
    tmp_path, overrides
):
    with pytest.raises(ArithmeticError, match="no step 7"):
        run(tmp_path, *scripted(fail_at=7), *overrides)
    found = result(tmp_path)
    assert found["status"] == "failed"
    assert found["error"] == "ArithmeticError: no step 7"
    assert "no step 7" in (tmp_path / "train.log").read_text()
    assert state(tmp_path)["step"] in (5, 6)
    assert load_run(tmp_path).step in (5, 6)


def test_an_error_of_the_task_set_names_the_batch(tmp_path, monkeypatch):
    def broken(self, index, n_context, n_target):
        raise KeyError("column")

    monkeypatch.setattr(examples.OldStyle, "__gettask__", broken)
    with pytest.raises(KeyError, match="column") as caught:
        run(tmp_path / "run", taskset="OldStyle")
    assert "while creating BatchSpec(step=0" in "".join(caught.value.__notes__)
    assert not (tmp_path / "run").exists()


# --- task sets of other hands ----------------------------------------------------------------


@pytest.mark.parametrize("taskset", ["OldStyle", "Minimal"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_that_says_nothing_of_itself_trains(tmp_path, taskset, workers):
    done = run(tmp_path, f"loader.workers={workers}", taskset=taskset)
    assert done["status"] == "completed"
    assert done["metrics"]["test/mse"]["tasks"] == 16


@pytest.mark.parametrize(
    ("taskset", "split"),
    [
        ("OldStyle", "train"),
        ("OldStyle", "val"),
        ("OldStyle", "test"),
        ("Minimal", "train"),
        ("Minimal", "val"),
        ("Minimal", "test"),
    ],
)
def test_a_set_knows_whether_its_tasks_are_held_out(taskset, split):
    built = build_taskset(check(resolve(settings_of(taskset))), split)
    assert built.split == split
    assert built.eval == (split != "train")


# --- balanced classes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        (("loader=balanced",), 0.5),
        (("loader=balanced", "loader.balance.alpha=0", "loader.balance.kind=random"), 0.2),
        (("loader.balance={alpha: 0.5, kind: random}",), 0.35),
        (("+loader.balance.alpha=1.0",), 0.5),
    ],
)
def test_a_configuration_says_in_which_shares_classes_come(overrides, share):
    balanced = Parts(check(resolve(settings_of("Labelled", *overrides))))
    classes, plan = balanced.taskset.classes, balanced.loader.plan
    drawn = torch.cat([classes[plan.indices(step)] for step in range(500)])
    assert abs(drawn.double().mean() - share) < 0.04


def test_a_balanced_training_is_resumed_to_the_same_weights(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    arguments = {"taskset": "Labelled"}
    run(straight, "loader=balanced", **arguments)
    with pytest.raises(Killed):
        run(killed, "loader=balanced", after_step=kill_at(7), **arguments)
    run(killed, "loader=balanced", **arguments)
    assert_same_run(straight, killed)


def test_what_cannot_be_balanced_is_said_under_the_loader(tmp_path):
    with pytest.raises(UserError, match=r"^loader\.balance needs to know the class of each task"):
        run(tmp_path, "loader=balanced", taskset="Minimal")
    with pytest.raises(UserError, match=r"^loader\.batch_size=1 is smaller than the number of cl"):
        run(tmp_path, "loader=balanced", "loader.batch_size=1", taskset="Labelled")


def test_the_examples_are_where_the_configurations_say():
    assert __name__.rpartition(".")[0] + ".examples" == HERE


class Hole(Functions):
    """A number is missing in the third task."""

    def __gettasks__(self, *arguments, **more):
        tasks = super().__gettasks__(*arguments, **more)
        tasks.target_y[2, 0] = math.nan
        return tasks


class HoleInMappings(Hole):
    def __gettasks__(self, *arguments, **more):
        return super().__gettasks__(*arguments, **more)._asdict()


@pytest.mark.parametrize("taskset", ["Hole", "HoleInMappings"])
def test_numbers_that_are_missing_in_the_data_are_found_there(tmp_path, taskset):
    config = settings().copy()
    config.taskset["_target_"] = f"{__name__}.{taskset}"
    with pytest.raises(TrainingFailed, match=r"target_y of its task 2 is not finite: the data"):
        train(config, tmp_path, reporter=Watcher())
