"""A job beside others on a machine: its share of cores and devices, and its end with theirs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from metabatch_cli.engine.run_directory import RunDirectory

SWEEP = "METABATCH_SWEEP"  # the process whose jobs these are
PATIENCE = 30.0  # seconds
_PR_SET_PDEATHSIG = 1  # of prctl(2): <sys/prctl.h>


def jobs_at_once(processes: int = 1) -> int:
    """How many jobs of so many processes a machine carries: one process for each of its CUDA
    devices, else for each core."""
    import torch

    from metabatch_cli.batching.auto import JOBS, cores

    if JOBS in os.environ:  # in one of them
        return int(os.environ[JOBS])
    known = isinstance(processes, int) and processes > 0  # what is not is refused elsewhere
    return max((torch.cuda.device_count() or cores()) // (processes if known else 1), 1)


@contextmanager
def sharing(launcher: Any, config: DictConfig, waiting: int) -> Iterator[None]:
    """While jobs of this process's sweep run beside each other, if its launcher has any do so.

    No more at a time than there are, and each with its share of the cores.
    """
    from metabatch_cli.batching.auto import JOBS, cores

    wanted = OmegaConf.select(config, "launcher.jobs")
    if wanted is None or not hasattr(launcher, "joblib"):
        yield
        return
    jobs = max(min(int(wanted), waiting), 1)
    threads = threads_of(max(cores() // jobs, 1))
    own = {JOBS: jobs, SWEEP: os.getpid(), "OMP_NUM_THREADS": threads}
    before = {name: os.environ.get(name) for name in own}
    os.environ |= {name: str(value) for name, value in own.items()}
    launcher.joblib["n_jobs"] = jobs
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def threads_of(share: int) -> int:
    """A job's `$OMP_NUM_THREADS`: its share of the cores, unless that is set to less."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdigit() and int(given) else share


_claims: dict[int, tuple[int, IO[str]]] = {}  # by the sweep's process: a place, a locked file


def own_device(devices: int, processes: int = 1) -> str:
    """The CUDA device of this process: of those beside each other each has another one, as far as
    there are enough, and keeps it for all its jobs.

    Args:
        devices: how many there are.
        processes: of a job; each has a device, this one the first of them.
    """
    if not is_beside_others() or devices < 2:
        return "cuda"
    sweep = int(os.environ[SWEEP])
    if sweep not in _claims:
        folder = Path(tempfile.gettempdir()) / f"metabatch-{os.getuid()}-{sweep}"
        folder.mkdir(exist_ok=True)
        _claims[sweep] = next(filter(None, map(partial(_claimed, folder), count())))
    return f"cuda:{_claims[sweep][0] * processes % devices}"


def _claimed(folder: Path, place: int) -> tuple[int, IO[str]] | None:
    """The place-th of the places on all devices, if it is free; free again when this process
    ends."""
    file = (folder / str(place)).open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return place, file


@contextmanager
def ending_with_the_sweep() -> Iterator[None]:
    """While this process works for a sweep's: it is told by SIGTERM, which a training heeds, when
    that one ends, and then ends too."""
    heed_end_of_parent(signal.SIGTERM)
    try:
        _end_if_alone()
        yield
    finally:
        _end_if_alone()


def heed_end_of_parent(signum: int) -> None:
    """Ask for a signal when the parent process ends; on Linux one can."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def _end_if_alone() -> None:
    if os.getppid() != int(os.environ.get(SWEEP, os.getppid())):
        os._exit(128 + signal.SIGTERM)  # no launcher is there to hear of it


def wait_for(run: RunDirectory) -> None:
    """Until nobody is at work on a run: the jobs of a sweep that was killed take leave."""
    until = time.monotonic() + PATIENCE
    while run.in_use and time.monotonic() < until:
        time.sleep(0.1)


def is_under_torchrun() -> bool:
    """Whether this process was started as one of several that share a training."""
    known = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    size = os.environ.get("WORLD_SIZE", "")
    return known and size.isdigit() and int(size) > 1


def refuse_under_torchrun(what: str) -> None:
    """Raise UserError if this process is one of several: each would run all the trainings."""
    from metabatch_cli.config.errors import UserError

    if is_under_torchrun():
        raise UserError(
            f"{what}: every process that torchrun starts would run all trainings\n"
            "  allowed: trainer.processes=N in a sweep, or torchrun for one training"
        )


def is_beside_others() -> bool:
    """Whether this process is one of several jobs that run at the same time."""
    return os.environ.get(SWEEP, str(os.getpid())) != str(os.getpid())
