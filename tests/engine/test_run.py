"""A run and its directory: what is written, what is refused, what is read back."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import metabatch_cli
from metabatch_cli.batching import denormals
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.engine import random_states
from metabatch_cli.engine.load import load_run
from metabatch_cli.engine.run import train
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.trainer import Trainer
from metabatch_cli.learners.learner import Learner
from metabatch_cli.learners.neural_process import NeuralProcess
from tasksets.functions import Functions
from tests.engine.examples import (
    HERE,
    Killed,
    Watcher,
    differences,
    fingerprint,
    kill_at,
    learner,
    result,
    rows,
    run,
    settings,
    settings_of,
    state,
)

METRICS = ("log_likelihood", "mse", "rmse", "calibration_error", "sharpness")


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """A run that is only looked at."""
    directory = tmp_path_factory.mktemp("completed")
    train(settings(), directory, overrides=["seed=0"], reporter=Watcher())
    return directory


@pytest.fixture
def own(tmp_path):
    """A completed run to spoil."""
    run(tmp_path / "own")
    return tmp_path / "own"


# --- what is written -------------------------------------------------------------------------


def test_a_run_holds_the_files_that_the_contract_names(completed):
    found = {
        str(path.relative_to(completed)) for path in completed.rglob("*") if path.is_file()
    } - {".lock"}
    assert found == {
        "config.yaml",
        "overrides.yaml",
        "metrics.jsonl",
        "result.json",
        "train.log",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
    }


def test_denormal_numbers_are_flushed_in_a_training_and_not_after_it(tmp_path):
    seen = []
    train(settings(), tmp_path, reporter=Watcher(lambda _: seen.append(denormals.are_flushed())))
    assert seen == [True] * 10
    assert not denormals.are_flushed()


def test_the_result_has_the_entries_of_the_contract(completed):
    found = json.loads((completed / "result.json").read_text())
    assert {"status", "step", "seconds", "seed", "error", "metrics"} <= set(found)
    assert found["status"] == "completed"
    assert found["step"] == 10
    assert found["seconds"] > 0
    assert found["seed"] == 0
    assert found["error"] is None
    assert set(found["metrics"]) == {f"test/{name}" for name in METRICS}
    for name, entry in found["metrics"].items():
        of_tasks = set() if "calibration" in name or "sharpness" in name else {"ci95_over_batches"}
        assert set(entry) - {"scoring"} == {"mean", "ci95", "tasks", "over_points"} | of_tasks
        assert set(entry["over_points"]) == {"mean", "ci95", "points"}
        assert math.isfinite(entry["mean"])
        # no mean over tasks, no interval
        assert entry["ci95"] is None if name == "test/calibration_error" else entry["ci95"] > 0
        assert entry["tasks"] == 16
    assert found["metrics"]["test/log_likelihood"]["scoring"] == "marginal"
    assert {part: len(numbers) for part, numbers in found["calibration"]["test"].items()} == {
        "levels": 19,
        "coverage": 19,
    }
    assert list(found["digests"]) == ["test"]


def test_the_configuration_is_written_resolved(completed):
    text = (completed / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert "${" not in text
    assert "auto" not in text
    assert "???" not in text
    assert config["scheduler"]["T_max"] == 10
    assert config["model"]["width"] == 8
    assert config["fresh"] is False
    assert yaml.safe_load((completed / "overrides.yaml").read_text()) == ["seed=0"]


@pytest.mark.parametrize("key", ["loader.workers", "loader.device", "loader.pin_memory"])
def test_what_was_chosen_automatically_is_written_down(tmp_path, key):
    run(tmp_path, f"{key}=auto", "trainer.max_steps=1")
    value = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for part in key.split("."):
        value = value[part]
    assert value not in (None, "auto")


def test_the_result_is_true_while_the_training_goes_on(tmp_path):
    seen = []
    run(tmp_path, after_step=lambda step: seen.append(result(tmp_path)))
    assert {found["status"] for found in seen} == {"running"}
    assert all(found["error"] is None for found in seen)
    assert all(found["metrics"] == {} for found in seen)


def test_the_log_tells_what_was_done(completed):
    text = (completed / "train.log").read_text()
    assert "CNP" in text
    assert "test/log_likelihood = " in text
    assert "\x1b" not in text


def test_without_a_directory_there_is_a_new_one_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train(settings("trainer.max_steps=1"), reporter=Watcher())
    found = sorted(file.parent for file in tmp_path.glob("outputs/*/*/config.yaml"))
    assert len(found) == 2


def test_a_mapping_is_as_good_as_a_composed_configuration(tmp_path, completed):
    config = yaml.safe_load((completed / "config.yaml").read_text())
    train(config, tmp_path, reporter=Watcher())
    assert differences(state(tmp_path), state(completed)) == []
    assert rows(tmp_path) == rows(completed)


def test_the_public_names_are_there():
    for name in metabatch_cli.__all__:
        assert getattr(metabatch_cli, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        metabatch_cli.no_such_name  # noqa: B018


# --- the same configuration ------------------------------------------------------------------


def test_a_completed_run_prints_its_result_and_changes_nothing(own):
    before = fingerprint(own)
    reporter = Watcher()
    again = train(settings(), own, reporter=reporter)
    assert fingerprint(own) == before
    assert again == json.loads((own / "result.json").read_text())
    assert "test/log_likelihood" in reporter.text
    assert "completed before, at step 10" in reporter.text


def test_a_completed_run_is_not_trained_for_fewer_steps(own):
    constant = own.parent / "constant"
    run(constant, "scheduler=none")
    before = fingerprint(constant)
    run(constant, "scheduler=none", "trainer.max_steps=3")
    assert fingerprint(constant) == before


ALLOWED = [
    "loader.workers=1",
    "loader.prefetch_factor=5",
    "loader.persistent_workers=false",
    "loader.pin_memory=false",
    "loader.timeout=100",
    "trainer.log_every=2",
    "trainer.max_time=1000",
    "logger=csv",
]


@pytest.mark.parametrize("override", ALLOWED)
def test_what_no_number_depends_on_may_differ(tmp_path, override):
    with pytest.raises(Killed):
        run(tmp_path, "scheduler=none", after_step=kill_at(7))
    assert run(tmp_path, "scheduler=none", override)["status"] == "completed"


def test_all_that_may_differ_together_leaves_the_weights_as_they_are(tmp_path):
    run(tmp_path / "whole", *learner("Noisy"))
    with pytest.raises(Killed):
        run(tmp_path / "stopped", *learner("Noisy"), after_step=kill_at(7))
    run(tmp_path / "stopped", *learner("Noisy"), *ALLOWED)
    for key in ("learner", "optimizer", "random", "loader", "best"):
        one, other = state(tmp_path / "whole")[key], state(tmp_path / "stopped")[key]
        assert differences(one, other) == [], key
    written = yaml.safe_load((tmp_path / "stopped" / "config.yaml").read_text())
    assert written["loader"]["workers"] == 1


# --- another configuration -------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("seed=1",),
        ("model.width=9",),
        ("optimizer.lr=0.1", "taskset.noise=0.2"),
        ("loader.batch_size=8",),
        ("loader.shards=2",),
        ("trainer.eval_every=2",),
        ("trainer.precision=64",),
        ("optimizer=sgd",),
        ("scheduler=none",),
        ("evaluation.tasks=17",),
        ("+evaluation.test.noise=0.5",),
        ("trainer.threads=2",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("status", ["completed", "killed"])
def test_another_configuration_is_refused_by_its_keys_and_nothing_is_touched(
    tmp_path, completed, overrides, status
):
    directory = completed
    if status == "killed":
        directory = tmp_path
        with pytest.raises(Killed):
            run(directory, after_step=kill_at(7))
    before = fingerprint(directory)
    with pytest.raises(UserError) as caught:
        run(directory, *overrides)
    assert fingerprint(directory) == before
    said = str(caught.value)
    assert "holds a run of another configuration" in said
    for override in overrides:
        assert override.lstrip("+").partition("=")[0] in said
    assert "fresh=true" in said


def test_what_beats_the_oracle_is_said_at_the_end_and_logged(tmp_path):
    config = settings_of("WithOracle", *learner("Cheat")).copy()
    more = {"dataset": {"_target_": "tasksets.functions.Sine"}, "noise": 0.1}
    config.taskset = OmegaConf.merge(OmegaConf.create(more), config.taskset)
    watcher = Watcher()
    train(config, tmp_path, reporter=watcher)
    said = "warning: test/log_likelihood = "
    assert said in watcher.text
    assert said in (tmp_path / "train.log").read_text()


def test_a_run_may_be_older_than_a_key_that_has_its_default_now(own):
    saved = RunDirectory(own).read_config()
    for key in ("predict", "order", "seed"):
        del saved["evaluation"][key]
    for key in ("sizes", "x_range"):
        del saved["taskset"][key]  # a constructor's argument, which has a default too
    RunDirectory(own).write_config(saved)
    before = fingerprint(own)
    run(own)
    assert fingerprint(own) == before
    with pytest.raises(UserError, match=r"evaluation\.order: given in the run, random asked for"):
        run(own, "evaluation.order=random")


def test_both_values_of_a_key_are_said(completed):
    with pytest.raises(UserError, match=r"seed: 0 in the run, 7 asked for"):
        run(completed, "seed=7")


@pytest.mark.parametrize("mistake", ["model.width=0", "loader.batch_size=0", "taskset.min_pts=99"])
def test_a_mistake_touches_nothing_either(completed, mistake):
    before = fingerprint(completed)
    with pytest.raises(UserError):
        run(completed, mistake, "fresh=true")
    assert fingerprint(completed) == before


@pytest.mark.parametrize(
    "mistake", ["model.width=0", "taskset.min_pts=99", "loader.shards=3", "trainer.init_from=none"]
)
def test_a_mistake_makes_no_directory(tmp_path, mistake):
    with pytest.raises(UserError):
        run(tmp_path / "run", mistake)
    assert list(tmp_path.iterdir()) == []


def test_fresh_starts_anew_and_leaves_what_is_not_the_runs(own):
    (own / "notes.txt").write_text("mine")
    run(own, "fresh=true", "seed=1", "trainer.max_steps=5")
    assert result(own)["step"] == 5
    assert result(own)["seed"] == 1
    assert rows(own)[-1]["step"] == 5
    assert (own / "notes.txt").read_text() == "mine"
    config = yaml.safe_load((own / "config.yaml").read_text())
    assert config["fresh"] is False  # so that it can be resumed
    run(own, "seed=1", "trainer.max_steps=5")


@pytest.mark.parametrize("more", [[], ["fresh=true"]])
def test_a_checkpoint_that_nobody_knows_the_training_of_is_neither_resumed_nor_lost(own, more):
    (own / "config.yaml").unlink()
    before = fingerprint(own)
    with pytest.raises(UserError, match=r"holds checkpoints/last.pt, but no config.yaml"):
        run(own, "optimizer.lr=0.5", "trainer.max_steps=12", *more)
    assert fingerprint(own) == before


def test_fresh_touches_nothing_where_there_is_no_run(tmp_path):
    mine = [tmp_path / name for name in ("figures/a.png", "wandb/x", "metrics.csv")]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    run(tmp_path, "fresh=true")
    assert [file.read_text() for file in mine] == ["mine"] * 3


def test_the_score_of_a_run_that_time_ended_is_saved_too(tmp_path):
    changes = ["trainer.checkpoint_every=1", "trainer.eval_every=7", "trainer.max_steps=100"]
    with pytest.MonkeyPatch.context() as patch:
        ended = Trainer.finished
        patch.setattr(Trainer, "finished", lambda self: ended(self) or self.step == 2)
        run(tmp_path, *changes)
    assert result(tmp_path)["monitor"]["best"] is not None
    assert state(tmp_path)["best"] == result(tmp_path)["monitor"]["best"]
    assert state(tmp_path)["validated_at"] == 2


def test_a_directory_in_use_is_refused_and_nothing_in_it_is_touched(own):
    with RunDirectory(own).lock():
        before = fingerprint(own)
        for overrides in (("fresh=true",), ("fresh=true", "seed=1")):
            with pytest.raises(UserError, match="is in use"):
                run(own, *overrides)
        assert fingerprint(own) == before


# --- reading back ----------------------------------------------------------------------------


def test_a_run_that_is_read_back_scores_as_it_did(completed):
    loaded = load_run(completed)
    assert loaded.score().metrics == result(completed)["metrics"]
    assert loaded.score().digests == result(completed)["digests"]
    assert loaded.result == json.loads((completed / "result.json").read_text())


def test_reading_a_run_back_draws_nothing_and_writes_nothing(completed):
    before, states = fingerprint(completed), random_states.random_states()
    load_run(completed)
    assert fingerprint(completed) == before
    assert differences(random_states.random_states(), states) == []


@pytest.mark.parametrize("weights", ["best", "last"])
def test_a_learner_comes_back_with_the_weights_that_were_asked_for(completed, weights):
    loaded = load_run(completed, weights=weights)
    assert isinstance(loaded.learner, Learner)
    assert not loaded.learner.training
    saved = state(completed, weights)
    assert loaded.step == saved["step"]
    assert differences(dict(loaded.learner.state_dict()), dict(saved["learner"])) == []


def test_where_no_weights_were_the_best_yet_the_last_are_taken(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, "trainer.checkpoint_every=2", after_step=kill_at(4))
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    assert load_run(tmp_path).step == 2


def test_a_run_without_a_checkpoint_says_how_it_stands(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, after_step=kill_at(1))
    with pytest.raises(UserError, match=r"has no checkpoint yet \(status: failed\)"):
        load_run(tmp_path)


def test_what_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="there is no such directory"):
        load_run(tmp_path / "nothing")


def test_weights_that_do_not_fit_the_configuration_are_refused_by_the_files_name(completed):
    config = yaml.safe_load((completed / "config.yaml").read_text())
    config["model"]["width"] = 9
    with pytest.raises(UserError, match=r"best.pt: does not fit the network") as caught:
        load_run(completed, config=config)
    assert "changed since: model.width=9" in str(caught.value)
    assert "[9, 2] in it, and [8, 2] was trained" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_of_another_machine_is_read_back_on_the_cpu_unless_told_otherwise(own):
    text = (own / "config.yaml").read_text()
    (own / "config.yaml").write_text(text.replace("device: cpu", "device: cuda:3"))
    assert next(load_run(own).learner.parameters()).device.type == "cpu"
    with pytest.raises(ConfigError, match="cuda:3"):
        load_run(own, device="cuda:3")


def test_tasks_of_every_split_can_be_read_from_a_run(completed):
    loaded = load_run(completed)
    for split in ("train", "val", "test"):
        assert loaded.taskset(split).split == split


def test_a_further_logger_writes_its_file(tmp_path):
    run(tmp_path, "logger=csv")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,lr,seconds")
    assert len(lines) == 1 + len(rows(tmp_path))


def test_an_oracle_stands_beside_the_score_that_it_bounds(tmp_path):
    overrides = (f"taskset._target_={HERE}.WithOracle", "taskset.noise=0.1")
    run(tmp_path, *overrides)
    entry = result(tmp_path)["metrics"]["test/log_likelihood"]
    # a normal distribution's own log-likelihood, in expectation −log σ√(2πe)
    assert entry["oracle"] == pytest.approx(
        -math.log(0.1 * math.sqrt(2 * math.pi * math.e)), abs=0.2
    )
    assert entry["oracle"] > entry["mean"]
    assert "oracle" not in result(tmp_path)["metrics"]["test/mse"]
    validated = [row for row in rows(tmp_path) if "val/mse" in row]
    assert all("val/log_likelihood/oracle" in row for row in validated)


def test_several_test_sets_stand_in_the_result_under_their_names(tmp_path):
    config = settings().copy()
    sets = {"noise=0": {"noise": 0.0}, "noise=1": {"noise": 1.0}}
    OmegaConf.update(config, "evaluation.test", sets, force_add=True)
    done = train(config, tmp_path, reporter=Watcher())
    assert set(done["metrics"]) == {f"test/{metric}@{name}" for metric in METRICS for name in sets}
    assert set(done["digests"]) == {"test@noise=0", "test@noise=1"}
    quiet, loud = (done["metrics"][f"test/mse@{name}"]["mean"] for name in sets)
    assert loud > quiet + 0.5


SCHEDULE = "torch.optim.lr_scheduler"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["scheduler=none", f"+scheduler={{_target_: {SCHEDULE}.ReduceLROnPlateau}}"],
            r"scheduler\._target_=.*ReduceLROnPlateau: its step\(\) wants metrics",
        ),
        (
            [
                "scheduler=none",
                f"+scheduler={{_target_: {SCHEDULE}.OneCycleLR, max_lr: 0.1, total_steps: 5}}",
            ],
            r"scheduler\.total_steps=5: the schedule is over before .*\n  allowed: at least 10",
        ),
        (
            ["~optimizer", "+optimizer={_target_: torch.optim.LBFGS}"],
            r"optimizer\._target_=.*LBFGS: its step\(\) wants closure",
        ),
    ],
)
def test_what_cannot_take_the_steps_of_a_training_is_refused_before_it(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


class OddLoss(NeuralProcess):
    def forward(self, tasks):
        return super().forward(tasks).expand(2)


class OddScore(NeuralProcess):
    def score(self, tasks):
        return {name: values.mean() for name, values in super().score(tasks).items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("OddLoss", r"OddLoss\.forward gives a tensor \[2\], and should .*: one number"),
        ("OddScore", r"OddScore\.score, 'log_likelihood' gives a tensor \[\], .*of each task one"),
    ],
)
def test_losses_and_scores_of_another_shape_are_refused_by_name(tmp_path, name, said):
    node = f"{{_target_: {__name__}.{name}}}"
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "run", "~learner", f"+learner={node}")


class TooFew(Functions):
    def __gettasks__(self, indices, *sizes, generator):
        return super().__gettasks__(indices[:3], *sizes, generator=generator)


def test_a_batch_of_too_few_tasks_is_refused(tmp_path):
    config = settings().copy()
    config.taskset["_target_"] = f"{__name__}.TooFew"
    with pytest.raises(ValueError, match=r"TooFew\.__gettasks__ made 3 tasks of 4 indices"):
        train(config, tmp_path / "run", reporter=Watcher())
