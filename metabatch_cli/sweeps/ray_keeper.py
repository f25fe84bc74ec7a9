"""A Ray of a sweep's own, and the process that keeps it: both end with the sweep's, however that
one ends.

    python -P -m metabatch_cli.sweeps.ray_keeper CORES

It says Ray's address and waits until its standard input is closed. What signals reach the sweep's
process group do not reach Ray, so that its jobs are told by the sweep, and save.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metabatch_cli.config.beside import PATIENCE

_STORE = 80 * 2**20  # bytes for objects, of which there are none: about the least that Ray takes
_LONGEST = 20  # characters of a folder for Ray: the path of a socket may have about a hundred
_PR_SET_CHILD_SUBREAPER = 36  # of prctl(2): <sys/prctl.h>


@contextmanager
def a_ray_of_ones_own(cores: int) -> Iterator[str]:
    """While there is one, with this environment; gives its address, empty if it did not begin."""
    # it and the jobs find what this process finds
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(cores)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            yield keeper.stdout.readline().strip()
        finally:
            keeper.stdin.close()
            keeper.wait()


def keep(cores: int) -> None:
    """Begin a Ray, and end it when nobody wants it any more."""
    linux = sys.platform.startswith("linux")
    if linux:  # what Ray leaves behind becomes a child of this process
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    import ray

    # of a folder of its own, since it opens that to everybody
    usual = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="mb-", dir=usual if len(usual) <= _LONGEST else "/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=_STORE,
            _temp_dir=f"{folder}/ray",
        )
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.read()
        until = time.monotonic() + PATIENCE
        # of a sweep that was killed Ray ends the jobs, which take leave
        while ray.available_resources().get("CPU", 0) < cores and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        ray.shutdown()
        if linux:
            _end_children()
        shutil.rmtree(folder, ignore_errors=True)


def _end_children() -> None:
    """Kill whatever is left, until nothing is."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


if __name__ == "__main__":
    keep(int(sys.argv[1]))
