"""Sweeps: what is finished rests, what failed is named, and one that was killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from metabatch_cli.batching.auto import cores
from tests.cli.program import PATIENCE, SCRIPT, TINY, metabatch

SWEEP = ("train", "-m", *TINY, "hydra.sweep.dir=sweep")


def results(folder: Path) -> dict[str, dict]:
    files = folder.glob("sweep/*/result.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def given_threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", cores()))


def untouched(folder: Path) -> dict[str, int]:
    """When each completed job was last written to."""
    done = [name for name, found in results(folder).items() if found["status"] == "completed"]
    return {name: (folder / "sweep" / name / "result.json").stat().st_mtime_ns for name in done}


def test_run_again_with_further_values_a_sweep_runs_those_only(tmp_path):
    metabatch(*SWEEP, "seed=0,1", cwd=tmp_path)
    before = untouched(tmp_path)
    assert set(before) == {"seed=0", "seed=1"}
    done = metabatch(*SWEEP, "seed=1", "model.width=8,16", cwd=tmp_path)
    after = untouched(tmp_path)
    # width 8 and seed 1 is known by what was typed
    assert set(after) == set(before) | {"model.width=16"}
    assert all(after[name] == before[name] for name in before)
    assert "runs of 2 configurations" in done.stdout


def test_each_failure_is_told_with_its_reason_and_tried_once_more(tmp_path):
    done = metabatch(*SWEEP, "model.width=0,8", "seed=0,nope", cwd=tmp_path, code=1)
    found = results(tmp_path)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "model.width=0,seed=0": "failed",
        "model.width=8,seed=0": "completed",
        "model.width=0,seed=nope": "failed",
        "model.width=8,seed=nope": "failed",
    }
    for name, entry in found.items():
        if entry["status"] == "failed":
            assert f"failed      sweep/{name}" in done.stdout
            assert f"metabatch: {name}: " in done.stderr
    assert "model.width=0" in found["model.width=0,seed=0"]["error"]
    assert "Traceback" not in done.stdout + done.stderr
    before = untouched(tmp_path)
    metabatch(*SWEEP, "model.width=0,8", "seed=0", cwd=tmp_path, code=1)
    assert untouched(tmp_path) == before


@pytest.mark.slow
def test_what_failed_is_left_alone_if_nobody_wants_it_tried_again(tmp_path):
    failing = "optimizer.lr=1e30,0.001"  # the loss is soon no number
    metabatch(*SWEEP, failing, cwd=tmp_path, code=1)
    (name,) = (n for n, found in results(tmp_path).items() if found["status"] == "failed")
    file = tmp_path / "sweep" / name / "result.json"
    before = file.stat().st_mtime_ns
    done = metabatch(*SWEEP, failing, "hydra.sweeper.retry_failed=false", cwd=tmp_path, code=1)
    assert f"{name}: failed before: the loss is not finite" in done.stderr
    assert file.stat().st_mtime_ns == before


def test_a_choice_that_there_is_not_costs_its_own_job_only(tmp_path):
    done = metabatch(*SWEEP, "taskset=sine,sawtoth", cwd=tmp_path, code=1)
    found = results(tmp_path)
    assert found["taskset=sine"]["status"] == "completed"
    assert "did you mean 'sawtooth'?" in found["taskset=sawtoth"]["error"]
    assert "sweep/taskset=sawtoth" in done.stdout


@pytest.mark.slow
def test_of_parallel_jobs_too_a_failing_one_leaves_the_others_alone(tmp_path):
    words = [word for word in SWEEP if not word.startswith("trainer.threads")]
    words += ["model.width=oops,8,0,16", "launcher=parallel", "launcher.jobs=2"]
    done = metabatch(*words, cwd=tmp_path, code=1)
    found = {
        name.removeprefix("model.width="): r["status"] for name, r in results(tmp_path).items()
    }
    assert found == {"oops": "failed", "8": "completed", "0": "failed", "16": "completed"}
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_a_parallel_sweep_that_is_killed_goes_on_where_it_was(tmp_path, signum, code):
    words = [word for word in SWEEP if not word.startswith("trainer.threads")]
    words += ["seed=0,1,2", "trainer.max_steps=200", "trainer.checkpoint_every=50"]
    words += ["launcher=parallel", "launcher.jobs=2"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [SCRIPT, *words], cwd=tmp_path, stdout=said, stderr=said, start_new_session=True
        )
    until = time.monotonic() + PATIENCE
    while not untouched(tmp_path) or len(results(tmp_path)) < 2:
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < until, (tmp_path / "said").read_text()
        time.sleep(0.05)
    if signum == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, signum)
    assert process.wait(60) == code, (tmp_path / "said").read_text()
    before = untouched(tmp_path)
    done = metabatch(*words, cwd=tmp_path)
    after = untouched(tmp_path)
    assert set(after) == {"seed=0", "seed=1", "seed=2"}
    assert all(after[name] == before[name] for name in before)
    assert "3 runs of 1 configuration" in done.stdout
    for name in after:
        config = yaml.safe_load((tmp_path / "sweep" / name / "config.yaml").read_text())
        assert config["trainer"]["threads"] == min(max(cores() // 2, 1), given_threads())
        assert config["launcher"] == {"jobs": 2}


def test_one_job_at_a_time_beside_nobody_is_a_sweep_too(tmp_path):
    done = metabatch(*SWEEP, "seed=0,1", "launcher=parallel", "launcher.jobs=1", cwd=tmp_path)
    assert set(untouched(tmp_path)) == {"seed=0", "seed=1"}
    assert "2 runs of 1 configuration" in done.stdout


def test_jobs_beside_each_other_may_have_workers(tmp_path):
    """As many as they like: the batches are the same."""
    words = [*SWEEP, "launcher=parallel", "launcher.jobs=2", "seed=0", "loader.workers=0,1"]
    metabatch(*words, cwd=tmp_path)
    assert set(untouched(tmp_path)) == {"loader.workers=0", "loader.workers=1"}
    apart = [found["metrics"] for found in results(tmp_path).values()]
    assert apart[0] == apart[1]


@pytest.mark.slow
def test_directories_of_ones_own_are_kept_to(tmp_path):
    own = "hydra.sweep.subdir=job${hydra.job.num}"
    metabatch(*SWEEP, own, "seed=0", cwd=tmp_path)
    before = untouched(tmp_path)
    assert set(before) == {"job0"}
    done = metabatch(*SWEEP, own, "seed=0,1", "taskset=sine,sawtoth", cwd=tmp_path, code=1)
    after = untouched(tmp_path)
    assert set(after) == {"job0", "job2"}  # 1 and 3 are no task sets
    assert after["job0"] == before["job0"]
    assert done.stderr.count("there is no taskset of that name") == 2


@pytest.mark.slow
def test_two_ways_to_run_the_same_job_run_it_once(tmp_path):
    metabatch(*SWEEP, "logger=none,csv", cwd=tmp_path)
    assert len(results(tmp_path)) == 1
