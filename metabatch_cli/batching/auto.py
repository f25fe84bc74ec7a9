"""How many workers: from what creating a batch and taking a step cost, as measured."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

JOBS = "METABATCH_JOBS"  # how many jobs share the machine
CORES = "METABATCH_CORES"  # how many of its cores a launcher gave to a job
RANKS_HERE = "LOCAL_WORLD_SIZE"  # how many processes of a job share them, as torchrun says

_ENOUGH = 0.2  # seconds of measuring
_FEWEST, _MOST = 3, 20  # measurements
_WAITING = 0.03  # part of a step that waiting for tasks may take before workers pay
_WORKING = 0.9  # part that further threads of a step work; else they wait, and seem busy
_GAIN = 0.99  # part of the time that a step with workers may take to be worth their memory
_MOVING = 4e-5  # seconds that a batch of a worker costs the main process at the least
_STEP = 2e-3  # seconds that a step takes where nobody knows


class Choice(NamedTuple):
    """How many workers, and why."""

    workers: int
    reason: str


def choose_workers(
    creation: float, step: float | None, cores: int, busy_cores: float = 1.0
) -> Choice:
    """The fewest workers with which training is about as fast as it can be.

    Without workers a step costs `creation + step`. With k of them the slowest of three things
    decides: the step itself, the workers (`creation / k`), and the cores, which all share.

    Args:
        creation: seconds that creating a batch takes, between two steps: caches are cold then.
        step: seconds of a training step without its data; None where that is unknown.
        cores: CPU cores that the process may use.
        busy_cores: how many of them a step keeps busy on its own.
    """
    known = step is not None
    step = _STEP if step is None else step
    alone = creation + step
    facts = (
        f"a batch takes {_ms(creation)} to create, a step {'' if known else 'perhaps '}{_ms(step)}"
    )
    if creation <= _WAITING * alone:
        return Choice(0, f"{facts}: no need of workers")

    def with_workers(count: int) -> float:
        work = creation + step * (1 + _WORKING * (busy_cores - 1)) + _MOVING
        return max(step + _MOVING, creation / count, work / cores)

    times = {count: with_workers(count) for count in range(1, max(cores, 1) + 1)}
    best = min(times.values())
    fewest = min(count for count, seconds in times.items() if seconds <= 1.02 * best)
    if times[fewest] > _GAIN * alone:
        return Choice(0, f"{facts}: {cores} cores have no room for workers")
    expected = f"about {_ms(times[fewest])} a step instead of {_ms(alone)}"
    return Choice(fewest, f"{facts}: {expected}")


def cores() -> int:
    """CPU cores that this process may use: of a Slurm job its own, so of one that has
    `$METABATCH_CORES`; of `$METABATCH_JOBS` jobs at a time, and of several processes of one, each
    its share."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    here = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    for name in ("SLURM_CPUS_PER_TASK", CORES):  # nobody may have bound it to them
        here = min(here, _number(name) or here)
    for name in (JOBS, RANKS_HERE):
        here = max(here // (_number(name) or 1), 1)
    return here


def _number(name: str) -> int | None:
    """What an environment variable says, if that is a number."""
    said = os.environ.get(name, "")
    return int(said) if said.isdigit() else None


def measure(action: Callable[[], object]) -> float:
    """The median of the seconds that something takes, after a first time that does not count."""
    action()
    seconds: list[float] = []
    while len(seconds) < _FEWEST or (sum(seconds) < _ENOUGH and len(seconds) < _MOST):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _ms(seconds: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(max(seconds, 1e-6) * 1000)))
    return f"{seconds * 1000:.{min(digits, 2)}f} ms"
