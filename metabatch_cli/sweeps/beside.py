"""A job beside others on a machine: its share of cores and devices, and its end with theirs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from metabatch_cli.engine.run_directory import RunDirectory

SWEEP = "METABATCH_SWEEP"  # the process whose jobs these are
PATIENCE = 30.0  # seconds
_PR_SET_PDEATHSIG = 1  # of prctl(2): <sys/prctl.h>


def jobs_at_once() -> int:
    """How many jobs a machine carries: one for each of its CUDA devices, else for each core."""
    import torch

    from metabatch_cli.batching.auto import cores

    return torch.cuda.device_count() or cores()


def own_device(devices: int) -> str:
    """The CUDA device of this process: jobs beside each other take turns by their numbers."""
    from hydra.core.hydra_config import HydraConfig

    if not is_beside_others() or not HydraConfig.initialized() or devices < 2:
        return "cuda"
    return f"cuda:{HydraConfig.get().job.num % devices}"


@contextmanager
def ending_with_the_sweep() -> Iterator[None]:
    """While this process works for a sweep's: it is told by SIGTERM, which a training heeds, when
    that one ends, and then ends too."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        _end_if_alone()
        yield
    finally:
        _end_if_alone()


def _end_if_alone() -> None:
    if os.getppid() != int(os.environ.get(SWEEP, os.getppid())):
        os._exit(128 + signal.SIGTERM)  # no launcher is there to hear of it


def wait_for(run: RunDirectory) -> None:
    """Until nobody is at work on a run: the jobs of a sweep that was killed take leave."""
    until = time.monotonic() + PATIENCE
    while run.in_use and time.monotonic() < until:
        time.sleep(0.1)


def is_beside_others() -> bool:
    """Whether this process is one of several jobs that run at the same time."""
    return SWEEP in os.environ
