"""Trainings as processes: killed, interrupted, resumed, swept, scored."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.program import TINY, metabatch, only_message, start, wait_until
from tests.engine import examples
from tests.engine.examples import assert_same_run, differences, result, rows, state

HOLD = '''
"""A logger that says when a row is written, and waits there for its end."""

import os
import re
import signal
from pathlib import Path


class Hold:
    def __init__(self, directory):
        self.directory = Path(directory)

    def log(self, row):
        if str(row["step"]) == os.environ.get("HOLD_AT"):
            (self.directory / "held").touch()
            signal.pause()

    def rewind(self, step):
        pass

    def close(self):
        pass
'''
MY_TASKS = '''
import random

import numpy as np

from metabatch_cli import TaskSet


class MyTaskSet(TaskSet):
    """Written for the original MetaBatch."""

    def __init__(self, task_data, min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts=None,
                 eval=False, predict_full_target=False, predict_full_target_during_eval=False):
        super().__init__(min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts, eval,
                         predict_full_target, predict_full_target_during_eval)
        self.slopes = np.linspace(-1, 1, task_data)

    def __len__(self):
        return len(self.slopes)

    def __gettask__(self, index, n_context, n_target):
        x = np.random.rand(n_context + n_target, 1).astype(np.float32)
        y = (self.slopes[index] * x + random.random()).astype(np.float32)
        return {
            "context_x": x[:n_context], "context_y": y[:n_context],
            "target_x": x[n_context:], "target_y": y[n_context:],
        }
'''
MINE = """
# @package _global_
# My own tasks.
defaults:
  - override /taskset: null
  - override /model: cnp
  - override /learner: neural_process
taskset:
  _target_: my_tasks.MyTaskSet
  task_data: 40
  min_pts: 1
  max_ctx_pts: 5
  max_tgt_pts: 10
"""


def only_run(parent: Path) -> Path:
    """The one run below a folder."""
    (config,) = parent.rglob("config.yaml")
    return config.parent


def in_this_process(directory: Path, *overrides: str) -> Path:
    """The same training without a break, in this process."""
    examples.run(directory, *overrides)
    return directory


# --- train, then eval ------------------------------------------------------------------------


def test_a_run_is_trained_and_scored_on_other_tasks(tmp_path):
    done = metabatch("train", *TINY, "seed=3", cwd=tmp_path)
    assert "test/log_likelihood" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    directory = only_run(tmp_path / "outputs")
    assert result(directory)["status"] == "completed"
    assert "seed=3" in (directory / "overrides.yaml").read_text()
    assert_same_run(directory, in_this_process(tmp_path / "here", "seed=3"))

    # the tasks it was tested on: the same scores again
    path = os.path.relpath(directory, tmp_path)
    said = metabatch("eval", f"run={path}", cwd=tmp_path).stdout
    (file,) = (directory / "evaluations").glob("*.json")
    assert str(file) in said
    written = json.loads(file.read_text())
    assert written["metrics"] == result(directory)["metrics"]
    assert written["digests"] == result(directory)["digests"]

    # other ones
    before = {name: examples.as_bytes(w) for name, w in state(directory)["learner"].items()}
    metabatch(
        "eval",
        f"run={path}",
        "evaluation.tasks=8",
        "taskset.noise=0.5",
        "trainer.test_on=last",
        cwd=tmp_path,
    )
    (other,) = set((directory / "evaluations").glob("*.json")) - {file}
    written = json.loads(other.read_text())
    assert set(written["metrics"]) == {
        f"test/{name}@noise=0.5"
        for name in ("log_likelihood", "mse", "rmse", "calibration_error", "sharpness")
    }
    assert all(entry["tasks"] == 8 for entry in written["metrics"].values())
    assert written["weights"] == "last"
    assert written["step"] == 10
    after = {name: examples.as_bytes(w) for name, w in state(directory)["learner"].items()}
    assert before == after


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a completed run in it."""
    folder = tmp_path_factory.mktemp("trained")
    in_this_process(folder / "run")
    return folder


def test_scoring_a_value_after_the_other_writes_a_file_for_each_that_can_be(trained):
    done = metabatch("eval", "-m", "run=run", "taskset.max_ctx_pts=2,0,3", cwd=trained, code=1)
    (message,) = done.stderr.splitlines()
    assert message.startswith("metabatch: taskset.max_ctx_pts=0: taskset.max_ctx_pts=0 is smaller")
    names = {file.name for file in (trained / "run" / "evaluations").glob("*.json")}
    assert names == {"taskset.max_ctx_pts=2.json", "taskset.max_ctx_pts=3.json"}
    assert {path.name for path in trained.iterdir()} == {"run"}


def test_a_run_that_is_older_than_a_key_of_evaluation_can_be_scored_by_it(tmp_path):
    in_this_process(tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for key in ("predict", "order"):
        del config["evaluation"][key]
    file.write_text(yaml.safe_dump(config))
    said = metabatch("eval", "run=run", "evaluation.predict=autoregressive", cwd=tmp_path).stdout
    assert "log_likelihood@scoring=joint,predict=autoregressive" in said
    written = tmp_path / "run" / "evaluations" / "evaluation.predict=autoregressive.json"
    assert json.loads(written.read_text())["overrides"] == ["evaluation.predict=autoregressive"]
    done = metabatch("train", *TINY, "hydra.run.dir=run", cwd=tmp_path)
    assert "completed before" in done.stdout
    done = metabatch("eval", "run=run", "evaluation.predicts=once", cwd=tmp_path, code=1)
    assert "did you mean 'predict'?" in only_message(done)


@pytest.mark.parametrize(
    "word",
    ["taskset.max_ctx_pts=0", "taskset.nois=1", "taskset.split=val", "trainer.threads=0",
     "trainer.threads=a"],
)  # fmt: skip
def test_a_mistake_in_scoring_is_one_message_and_writes_nothing(trained, word):
    before = examples.fingerprint(trained)
    done = metabatch("eval", "run=run", word, cwd=trained, code=1)
    assert word.partition("=")[0] in only_message(done)
    assert examples.fingerprint(trained) == before


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer.lr=0.1", "a run is scored as it was trained"),
        ("evaluation=ranges", "a run is scored with its own task set, network and evaluation"),
        ("trainer.max_steps=5", "a run is scored as it was trained"),
        ("loader.batch_size=4", "in batches of evaluation.batch_size"),
        ("trainer={max_steps:5}", "a run is scored as it was trained"),
        ("evaluation.figures=false", "has no part in a score"),
        ("learner.samples=5", "a test goes by learner.eval_samples"),
        ("learner.objective=likelihood", "is about training"),
        ("learner.loss_on=context+target", "is about training"),
        ("learner.loss_per=task", "is about training"),
        ("taskset.split=train", "has no effect"),
        ("evaluation.order=random", "is of evaluation.predict=autoregressive only"),
    ],
)
def test_what_is_about_training_is_no_part_of_scoring(trained, word, said):
    before = examples.fingerprint(trained)
    done = metabatch("eval", "run=run", word, cwd=trained, code=1)
    assert f"{word}: " in only_message(done)
    assert said in only_message(done)
    assert examples.fingerprint(trained) == before


def test_a_training_that_fails_at_once_takes_away_only_the_folders_that_it_made(tmp_path):
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    places = ["mine/empty", "mine/../mine/empty", "mine/new/run", f"'{tmp_path}/mine/other'"]
    for word in ("hydra.run.dir=" + place for place in [*places, "new/run"]):
        words = ["loader.batch_size=6", "loader.shards=4", word]
        only_message(metabatch("train", *TINY, *words, cwd=tmp_path, code=1))
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
        assert left == {"mine", "mine/empty"}


def test_an_unknown_key_of_a_run_is_named_with_the_nearest(trained):
    done = metabatch("eval", "run=run", "taskset.nois=1", cwd=trained, code=1)
    assert "did you mean 'noise'?" in only_message(done)


def test_a_completed_run_is_not_trained_again_by_either_command(trained):
    before = examples.fingerprint(trained)
    done = metabatch("train", *TINY, "hydra.run.dir=run", cwd=trained)
    assert "completed before, at step 10" in done.stdout
    done = metabatch("resume", "run", cwd=trained)
    assert "completed before, at step 10" in done.stdout
    assert examples.fingerprint(trained) == before


# --- killed, and taken up again --------------------------------------------------------------


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def gone(process: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_run_killed_twice_and_resumed_by_either_command_is_as_if_undisturbed(tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    overrides = (
        "trainer.max_steps=60",
        "trainer.checkpoint_every=9",
        "trainer.eval_every=20",
        "trainer.log_every=4",
    )
    command = (
        "train",
        *TINY,
        *overrides,
        "loader.workers=2",
        "+logger.hold._target_=hold.Hold",
        "hydra.run.dir=run",
    )
    directory, workers = tmp_path / "run", []
    for step, saved in ((20, 18), (48, 45)):
        (directory / "held").unlink(missing_ok=True)
        process = start(*command, cwd=tmp_path, HOLD_AT=str(step))
        try:
            wait_until((directory / "held").exists, process, tmp_path)
            workers += children(process.pid)
        finally:
            process.kill()
            process.wait()
        assert json.loads((directory / "result.json").read_text())["status"] == "running"
        assert state(directory)["step"] == saved
        assert rows(directory)[-1]["step"] == step
    assert len(workers) >= 4
    metabatch("resume", "run", cwd=tmp_path)
    assert_same_run(directory, in_this_process(tmp_path / "whole", *overrides))

    for worker in workers:  # they notice within seconds that nobody is left to work for
        wait_until(lambda worker=worker: gone(worker), process=Nobody(), cwd=tmp_path)


class Nobody:
    """A process that is waited for no longer."""

    def poll(self) -> None:
        return None


@pytest.mark.parametrize(
    ("signum", "workers", "to"),
    [
        (signal.SIGINT, 0, "the process"),
        pytest.param(signal.SIGINT, 2, "its group", marks=pytest.mark.slow),
        (signal.SIGTERM, 2, "its group"),
    ],
)
def test_a_signal_ends_a_training_with_its_step_saved(tmp_path, signum, workers, to):
    constant = ("scheduler=none", "trainer.eval_every=1000000", "trainer.log_every=1")
    directory = tmp_path / "run"
    process = start(
        "train",
        *TINY,
        *constant,
        "trainer.max_steps=1000000",
        "trainer.checkpoint_every=1000000",
        f"loader.workers={workers}",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    try:
        metrics = directory / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process, tmp_path)
        (os.killpg if to == "its group" else os.kill)(process.pid, signum)
        assert process.wait(60) == 128 + signum, (tmp_path / "said").read_text()
    finally:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    assert "metabatch resume" in said
    found = result(directory)
    assert found["status"] == "interrupted"
    step = found["step"]
    assert step == state(directory)["step"] == rows(directory)[-1]["step"]
    assert step >= 1
    whole = in_this_process(
        tmp_path / "whole",
        *constant,
        "trainer.checkpoint_every=1000000",
        f"trainer.max_steps={step}",
    )
    for key in ("learner", "optimizer", "loader", "random"):
        assert differences(state(directory)[key], state(whole)[key]) == [], key


# --- sweeps, checks, tasks of one's own ------------------------------------------------------


def test_a_sweep_has_a_completed_run_for_each_pair_of_values(tmp_path):
    metabatch("train", "-m", *TINY, "seed=0,1", "model.decoder_depth=1,2", cwd=tmp_path)
    results = sorted(tmp_path.glob("multirun/*/*/*/result.json"))
    names = [f"model.decoder_depth={depth},seed={seed}" for depth in (1, 2) for seed in (0, 1)]
    assert [file.parent.name for file in results] == names
    found = [json.loads(file.read_text()) for file in results]
    assert all(entry["status"] == "completed" for entry in found)
    assert sorted(entry["seed"] for entry in found) == [0, 0, 1, 1]
    assert len({entry["metrics"]["test/mse"]["mean"] for entry in found}) == 4
    assert len({entry["digests"]["test"] for entry in found}) == 1
    said = metabatch("report", "multirun", cwd=tmp_path).stdout
    assert "4 runs of 2 configurations" in said
    assert re.search(
        r"^model.decoder_depth +log_likelihood +runs +time *\n1 .* 2 +0:00", said, re.M
    )


def test_checking_says_what_would_happen_and_leaves_nothing(tmp_path):
    (tmp_path / "scratch").mkdir()
    done = metabatch("check", *TINY, cwd=tmp_path, TMPDIR=str(tmp_path / "scratch"))
    for said in ("CNP", "context_x", "batches/s", "steps/s", "all is well"):
        assert said in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list((tmp_path / "scratch").glob("metabatch*")) == []  # torch leaves a folder of its own


def test_tasks_of_ones_own_are_trained_from_the_current_directory(tmp_path):
    (tmp_path / "my_tasks.py").write_text(MY_TASKS)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(MINE)
    metabatch(
        "train",
        "--config-dir",
        "conf",
        "+experiment=mine",
        *TINY[1:],
        "loader.workers=1",
        cwd=tmp_path,
    )
    directory = only_run(tmp_path / "outputs")
    found = result(directory)
    assert found["status"] == "completed"
    assert found["metrics"]["test/mse"]["tasks"] == 16
    assert "MyTaskSet" in (directory / "train.log").read_text()
