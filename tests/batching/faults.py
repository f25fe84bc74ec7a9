"""What the tests of a failing machine share: task sets that fail, and looks at processes."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metabatch_cli.batching import TaskLoader
from tests.batching.examples import Example

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds that a shared machine may take for what happens at once on a free one


class Rows(Example):
    """Single tasks whose batches are as large as the task set says, and recognisable."""

    def __init__(self, n_tasks: int | None = None, width: int = 4, **more: Any) -> None:
        super().__init__(n_tasks, **more)
        self.width = width

    def __gettask__(self, index, n_context, n_target):
        return {"index": index, "row": torch.full((self.width,), float(index)) + torch.rand(1)}


class Dies(Rows):
    """The worker that is to make one task ends: always, or only the first time."""

    def __init__(self, how: str, at: int, marker: Path | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.how, self.at, self.marker = how, at, marker

    def __gettask__(self, index, n_context, n_target):
        if index == self.at and (self.marker is None or not self.marker.exists()):
            if self.marker is not None:
                self.marker.touch()
            if self.how == "exit":
                os._exit(77)
            faulthandler.disable()  # pytest's would print the stack of what is meant to happen
            os.kill(os.getpid(), getattr(signal, self.how))
        return super().__gettask__(index, n_context, n_target)


class Grows(Rows):
    """Batches that are a thousand times larger, or empty, from some task on."""

    def __gettask__(self, index, n_context, n_target):
        task = super().__gettask__(index, n_context, n_target)
        if index >= 200:
            task["more"] = torch.full((1000 * self.width,), float(index))
        if index % 7 == 0:
            task = {"nothing": torch.zeros(0, 3), "none": np.zeros((2, 0))}
        return task


class Endless(Rows):
    """One task never comes to an end; a file tells that it has begun."""

    def __init__(self, at: int, marker: Path, **more: Any) -> None:
        super().__init__(**more)
        self.at, self.marker = at, marker

    def __gettask__(self, index, n_context, n_target):
        if index == self.at:
            self.marker.touch()
            while True:
                sum(range(1000))
        return super().__gettask__(index, n_context, n_target)


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What the condition gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
    return found


def pids(loader: TaskLoader) -> list[int]:
    """The worker processes of a loader."""
    return [worker.process.pid for open in loader._open_transports for worker in open._workers]


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def session(leader: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def mappings(pid: int | str = "self") -> int:
    """How many segments a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:metabatch")


def memory(pid: int | str) -> int:
    """KiB of a process that are its own; what a fork shares with its parent is not counted."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE)))


def script(code: str, *arguments: Any, **more: Any) -> subprocess.Popen:
    """A Python process in a session of its own that runs some code."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


def ended(process: subprocess.Popen) -> tuple[str, str]:
    """The output of a process that shall end by itself, which leaves no other behind."""
    try:
        output = process.communicate(timeout=PATIENCE)
        until(lambda: not session(process.pid))
        return output
    finally:
        if session(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
