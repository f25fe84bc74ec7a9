"""One training over several processes, from the command line: ended, gone on with, left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.program import PATIENCE, TINY, metabatch, start, wait_until

TWO = (
    *("train", *TINY, "loader.shards=2", "loader.workers=1", "hydra.run.dir=run"),
    *("scheduler=none", "trainer.checkpoint_every=50"),
)
LONG = ("trainer.max_steps=1000000",)
SHARED = (*TWO, *LONG, "trainer.processes=2")


def result(folder: Path) -> dict:
    file = folder / "run" / "result.json"
    return json.loads(file.read_text()) if file.exists() else {}


def own_children(process: int) -> set[int]:
    folder = Path(f"/proc/{process}/task")
    files = folder.glob("*/children") if folder.exists() else []
    return {int(word) for file in files for word in file.read_text().split()}


def children(process: int) -> set[int]:
    """Its child processes, and theirs."""
    found = own_children(process)
    return found.union(*map(children, found))


def second_rank(process: int) -> int:
    for child in own_children(process):
        if b"follow_parent" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise LookupError


def is_over(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def within_seconds(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def training(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A long training over two processes, after its first checkpoint."""
    process = start(*SHARED, cwd=tmp_path)
    try:
        wait_until(lambda: result(tmp_path).get("step", 0) > 0, process, tmp_path)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_ended_it_leaves_nobody_behind(tmp_path, training, signum):
    theirs = children(training.pid)
    assert len(theirs) >= 3  # the other rank, and a worker of each
    training.send_signal(signum)
    code = training.wait(PATIENCE)
    assert code == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[signum]
    assert within_seconds(lambda: all(map(is_over, theirs)))
    if signum == signal.SIGTERM:
        stopped = result(tmp_path)
        assert stopped["status"] == "interrupted"
        metabatch(*TWO, f"trainer.max_steps={stopped['step'] + 20}", cwd=tmp_path)
        assert result(tmp_path)["status"] == "completed"


def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_without_it(tmp_path, training):
    second = second_rank(training.pid)
    os.kill(second, signal.SIGKILL)
    assert training.wait(PATIENCE) == 1
    message = f"rank 1 of 2 (process {second} on {os.uname().nodename}) was killed by SIGKILL"
    said = (tmp_path / "said").read_text()
    assert f"metabatch: {message}" in said
    assert "Traceback" not in said
    failed = result(tmp_path)
    assert (failed["status"], failed["error"][: len(message)]) == ("failed", message)
    metabatch(*TWO, f"trainer.max_steps={failed['step'] + 20}", cwd=tmp_path)
    assert result(tmp_path)["status"] == "completed"


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_training_when_time_is_up(tmp_path):
    process = start(*SHARED, "trainer.timeout=15", cwd=tmp_path)
    wait_until(lambda: result(tmp_path).get("step", 0) > 0, process, tmp_path)
    second = second_rank(process.pid)
    os.kill(second, signal.SIGSTOP)
    assert process.wait(PATIENCE) == 1
    assert f"rank 1 of 2 (process {second}" in result(tmp_path)["error"]
    assert within_seconds(lambda: is_over(second))


@pytest.mark.slow
def test_whoever_does_not_want_to_wait_for_one_that_hangs_need_not(tmp_path, training):
    second = second_rank(training.pid)
    os.kill(second, signal.SIGSTOP)
    time.sleep(1)  # until rank zero waits for it, which by itself would take ten minutes
    training.send_signal(signal.SIGINT)
    time.sleep(1)
    assert training.poll() is None  # the first one asks for a step, which it may still take
    training.send_signal(signal.SIGINT)
    assert training.wait(10) == 130
    assert result(tmp_path)["status"] == "interrupted"
    assert within_seconds(lambda: is_over(second))


# --- torchrun ----------------------------------------------------------------------------------

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "-m", "metabatch_cli"]


def test_under_torchrun_a_sweep_is_refused(tmp_path):
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for words in (["train", "-m", *TINY, "seed=0,1"], ["tune", *TINY]):
        done = metabatch(*words, cwd=tmp_path, code=1, **ranks)
        assert "trainer.processes=N in a sweep" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_under_torchrun_ranks_share_one_directory_without_a_name(tmp_path):
    words = [*TORCHRUN, "train", *TINY, "loader.shards=2", "loader.workers=0"]
    words[1:1] = ["--standalone", "--nproc-per-node=2"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=PATIENCE)
    (run,) = (tmp_path / "outputs").glob("*/*")
    assert json.loads((run / "result.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_torchrun_starts_a_training_again_that_failed(tmp_path):
    learner = "+learner={_target_: tests.engine.examples.FailingOnce}"
    words = [*TORCHRUN, *TWO, "~learner", learner]
    words[1:1] = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ArithmeticError: no step 2" in done.stderr
    assert result(tmp_path)["status"] == "completed"


HOSTS = {"first": "10.96.0.1", "second": "10.96.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_hosts() -> Iterator[None]:
    """Two network namespaces with a cable between them, which is all that they share."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = {host: f"metabatch-{host}" for host in HOSTS}
    try:
        for name in names.values():
            ip("netns", "add", name)
        first, second = names.values()
        ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "wire", "netns", second)
        for host, name in names.items():
            ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        yield
    finally:
        for name in names.values():
            end_host(name)
            ip("netns", "del", name)


def end_host(name: str) -> None:
    """Kill all that runs on a host, at once."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=True)
    for pid in pids.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("two_hosts")
def test_two_hosts_train_together_and_one_may_be_killed_and_come_back(tmp_path):
    words = (*TWO, "trainer.max_steps=1000", "trainer.precision=64")

    def host(name: str) -> subprocess.Popen[bytes]:
        torchrun = [TORCHRUN[0], "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={HOSTS['first']}:29400"]
        torchrun += [f"--local-addr={HOSTS[name]}", f"--rdzv-conf=is_host={name == 'first'}"]
        with (tmp_path / name).open("ab") as said:
            return subprocess.Popen(
                ["ip", "netns", "exec", f"metabatch-{name}", *torchrun, *TORCHRUN[1:], *words],
                cwd=tmp_path,
                stdout=said,
                stderr=said,
                # by default torch 2.13 never tells a host that comes back where rank zero is
                env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )

    first, second = host("first"), host("second")
    until = time.monotonic() + PATIENCE
    while result(tmp_path).get("step", 0) == 0:
        assert time.monotonic() < until, (tmp_path / "first").read_text()
        time.sleep(0.05)
    end_host("metabatch-second")
    second.wait(PATIENCE)
    assert within_seconds(lambda: result(tmp_path)["status"] in ("failed", "interrupted"))
    step = result(tmp_path)["step"]
    second = host("second")
    assert first.wait(PATIENCE) == 0, (tmp_path / "first").read_text()
    assert second.wait(PATIENCE) == 0
    together = result(tmp_path)
    assert together["status"] == "completed"
    assert 0 < step < 1000
    shutil.move(tmp_path / "run", tmp_path / "together")
    metabatch(*words, cwd=tmp_path)
    for name, entry in result(tmp_path)["metrics"].items():
        assert entry["mean"] == pytest.approx(together["metrics"][name]["mean"], rel=1e-6), name
