"""Sweeps on Ray: what `launcher=parallel` promises, and no process of Ray's is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from metabatch_cli.batching.auto import cores
from tests.cli.program import PATIENCE, TINY, metabatch, start, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: '.[ray]'"
    ),
]

WORDS = [word for word in TINY if not word.startswith("trainer.threads")]
SWEEP = ("train", "-m", *WORDS, "hydra.sweep.dir=sweep", "launcher=ray")


def results(folder: Path) -> dict[str, dict]:
    files = folder.glob("sweep/*/result.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def written(folder: Path) -> dict[str, int]:
    """When each completed job was last written to."""
    done = [name for name, found in results(folder).items() if found["status"] == "completed"]
    return {name: (folder / "sweep" / name / "result.json").stat().st_mtime_ns for name in done}


def in_session(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.getsid(int(entry.name)) == session
                and "\nState:\tZ" not in (entry / "status").read_text()
            ):
                found.append(int(entry.name))
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


def session_of_ray(sweep: subprocess.Popen[str]) -> int:
    """The session in which the Ray of a sweep is."""
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    (own,) = [int(pid) for pid in children if os.getsid(int(pid)) == int(pid)]
    return own


def by_and_by(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, what()
        time.sleep(0.1)


def test_a_job_that_fails_costs_no_other_one_and_what_is_completed_rests(tmp_path):
    done = metabatch(*SWEEP, "model.width=0,8", "seed=0", cwd=tmp_path, code=1)
    assert results(tmp_path)["model.width=0"]["status"] == "failed"
    assert "failed      sweep/model.width=0" in done.stdout
    assert done.stdout.startswith("completed   model.width=8\n")
    assert done.stderr.startswith("metabatch: model.width=0: model.width=0: is not allowed\n")
    assert len(done.stderr.splitlines()) == 2  # Ray says nothing
    config = yaml.safe_load((tmp_path / "sweep/model.width=8/config.yaml").read_text())
    given = int(os.environ.get("OMP_NUM_THREADS", cores()))
    assert config["trainer"]["threads"] == min(max(cores() // 2, 1), given)
    before = written(tmp_path)
    assert set(before) == {"model.width=8"}
    metabatch(*SWEEP, "model.width=8,16", "seed=0", cwd=tmp_path)
    after = written(tmp_path)
    assert set(after) == {"model.width=8", "model.width=16"}
    assert after["model.width=8"] == before["model.width=8"]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for temporary files that is short enough for Ray, and for nobody else."""
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks for processes in /proc")
@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGINT, 130),
        (signal.SIGTERM, 128 + signal.SIGTERM),
    ],
)
def test_a_sweep_that_is_killed_leaves_nothing_and_goes_on(tmp_path, short, signum, code):
    length = ["trainer.max_steps=600", "trainer.checkpoint_every=100"]
    words = [*SWEEP, "launcher.jobs=2", "seed=0,1,2,3", *length]
    process = start(*words, cwd=tmp_path, TMPDIR=str(short))
    running = lambda: [n for n, r in results(tmp_path).items() if r["status"] == "running"]  # noqa: E731
    # two in the middle, as Ray 2.60 itself aborts where a job is cancelled while it ends (a race
    # that its pull request 54798 was to end)
    wait_until(lambda: bool(written(tmp_path)) and len(running()) == 2, process, tmp_path)
    session = session_of_ray(process)
    assert len(in_session(session)) > 3
    assert list(short.glob("mb-*"))
    if signum == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, signum)
    assert process.wait(60) == code, (tmp_path / "said").read_text()
    by_and_by(lambda: not in_session(session), lambda: in_session(session))
    assert not list(short.glob("mb-*"))
    before = written(tmp_path)
    if signum != signal.SIGKILL:
        assert not running()
        saved = [n for n, r in results(tmp_path).items() if r["status"] == "interrupted"]
        assert all((tmp_path / "sweep" / name / "checkpoints/last.pt").exists() for name in saved)
        assert len(saved) + len(before) == len(results(tmp_path))
    done = metabatch(*words, cwd=tmp_path)
    after = written(tmp_path)
    assert set(after) == {"seed=0", "seed=1", "seed=2", "seed=3"}
    assert all(after[name] == before[name] for name in before)
    assert "4 runs of 1 configuration" in done.stdout


def test_a_job_whose_process_is_killed_costs_no_other_one(tmp_path):
    words = [*SWEEP, "seed=0,1", "trainer.max_steps=600", "trainer.checkpoint_every=100"]
    process = start(*words, cwd=tmp_path)
    lock = tmp_path / "sweep" / "seed=0" / ".lock"
    last = tmp_path / "sweep" / "seed=0" / "checkpoints" / "last.pt"
    wait_until(last.exists, process, tmp_path)
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    said = tmp_path / "said"
    assert process.wait(PATIENCE) == 1, said.read_text()
    found = results(tmp_path)
    assert found["seed=1"]["status"] == "completed"
    assert found["seed=0"]["status"] == "failed"
    assert found["seed=0"]["error"].startswith("its process is gone")
    assert "failed      sweep/seed=0" in said.read_text()
    metabatch(*words, cwd=tmp_path)
    assert set(written(tmp_path)) == {"seed=0", "seed=1"}
    assert "resumed from step" in (tmp_path / "sweep" / "seed=0" / "train.log").read_text()


@pytest.fixture
def cluster(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a Ray that runs already, which believes in two GPUs; how to speak to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tmp_path_factory.mktemp("ray")
    ray = Path(sys.executable).with_name("ray")
    words = [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=2"]
    words += ["--disable-usage-stats", "--include-dashboard=false", f"--temp-dir={folder}"]
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", *words],
        env={**os.environ, **secret},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert head.stdout is not None
    try:
        assert any("Ray runtime started" in line for line in head.stdout)
        yield f"127.0.0.1:{port}", secret
        assert head.poll() is None  # a sweep does not end what it did not begin
    finally:
        head.terminate()
        head.communicate(timeout=60)


TASKS = """
import os
from pathlib import Path
from tasksets.functions import Functions


class Telling(Functions):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        Path(f"devices-{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
"""


def test_jobs_on_a_cluster_have_a_device_each(tmp_path, cluster):
    address, secret = cluster
    (tmp_path / "own_tasks.py").write_text(TASKS)
    words = ["taskset._target_=own_tasks.Telling", "seed=0,1", f"launcher.address={address}"]
    metabatch(*SWEEP, *words, "trainer.max_steps=300", cwd=tmp_path, **secret)
    assert set(written(tmp_path)) == {"seed=0", "seed=1"}
    devices = {file.read_text() for file in tmp_path.glob("devices-*")}
    assert devices >= {"0", "1"}
    assert devices <= {"0", "1", os.environ.get("CUDA_VISIBLE_DEVICES", "")}


def test_where_nobody_listens_there_is_no_cluster(tmp_path):
    done = metabatch(*SWEEP, "seed=0", "launcher.address=127.0.0.1:1", cwd=tmp_path, code=1)
    assert done.stderr.startswith("metabatch: launcher.address=127.0.0.1:1: no Ray answers")
    assert len(done.stderr.splitlines()) == 1
