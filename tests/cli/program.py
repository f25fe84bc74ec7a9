"""The console script in a process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tests.cli import forker

SCRIPT = str(Path(sys.executable).with_name("metabatch"))
PATIENCE = 120.0  # seconds until something that must happen has failed to

TINY = (
    "+experiment=cnp_sine",
    "debug=short",
    "model.width=8",
    "model.encoder_depth=2",
    "model.decoder_depth=2",
    "loader.batch_size=4",
    "loader.device=cpu",
    "trainer.threads=1",
    "evaluation.figures=false",
)


def metabatch(
    *words: str, cwd: Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code.

    In a fork that has torch already; with an environment of its own, the script itself.
    """
    if environment:
        done = subprocess.run(
            [SCRIPT, *words],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    else:
        done = forked([SCRIPT, *words], cwd)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def forked(argv: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives of the script, without the seconds of its imports."""
    with tempfile.TemporaryDirectory() as folder:
        said = {name: str(Path(folder, name)) for name in ("out", "err")}
        request = {"argv": argv, "cwd": str(cwd), "env": dict(os.environ), **said}
        lines = _forker()
        print(json.dumps(request), file=lines, flush=True)
        process = int(lines.readline())
        try:
            code = int(lines.readline())
        except TimeoutError:
            os.killpg(process, signal.SIGKILL)
            _forker.cache_clear()
            raise
        out, err = (Path(path).read_text() for path in said.values())
    return subprocess.CompletedProcess(argv, code, out, err)


@functools.cache
def _forker() -> IO[str]:
    """The lines to and from a forker, which lives as long as this process does."""
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    words = [sys.executable, forker.__file__, str(theirs.fileno())]
    process = subprocess.Popen(words, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(process.kill)
    return ours.makefile("rw")


def start(*words: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own; what it says goes to `said`."""
    with (cwd / "said").open("w") as said:
        return subprocess.Popen(
            [SCRIPT, *words],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], cwd: Path) -> None:
    """Wait for something that a process does while it lives."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        said = (cwd / "said").read_text()
        assert process.poll() is None, f"ended with {process.returncode}\n{said}"
        assert time.monotonic() < deadline, said
        time.sleep(0.01)


def only_message(done: subprocess.CompletedProcess[str]) -> str:
    """What a mistake is answered with: a few lines, no traceback, nothing else."""
    said = done.stderr
    assert "Traceback" not in said + done.stdout
    assert done.stdout == ""
    assert said.startswith("metabatch: ")
    assert len(said.splitlines()) <= 6, said
    return said
