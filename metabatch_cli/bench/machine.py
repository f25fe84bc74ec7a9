"""What was measured on, and whether it had anything else to do."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metabatch_cli
from metabatch_cli import mkl
from metabatch_cli.batching.auto import cores

BUSY = 0.5  # of a core: starting this program makes up less
UNSTEADY = 1.2  # how much slower than the fastest the same work is, in the median


def facts() -> dict[str, Any]:
    """Processor, versions, threads, date and load."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "mkl_avx512": mkl.avx512_enabled(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "metabatch_cli": metabatch_cli.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def disturbance() -> str | None:
    """What else the machine does, in words; None where it is idle."""
    load = os.getloadavg()[0]
    if load > BUSY:
        return f"a load of {load:.1f} on {cores()} cores in the last minute"
    slower = unsteadiness()
    if slower > UNSTEADY:
        return f"the same work takes {slower - 1:.0%} longer in the median than at best"
    return None


def unsteadiness(rounds: int = 25) -> float:
    """How many times as long as at best the same two milliseconds take in the median."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        sum(math.sqrt(number) for number in range(30_000))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) / min(taken)
