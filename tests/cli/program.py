"""The real console script in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
    """Run a command to its end and check its exit code."""
    done = subprocess.run(
        [SCRIPT, *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


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
