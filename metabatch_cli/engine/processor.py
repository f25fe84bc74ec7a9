"""How a process computes that trains or tests: its threads, its memory, its least numbers."""

from __future__ import annotations

import torch

from metabatch_cli.batching import denormals
from metabatch_cli.engine.memory import keep_freed_memory


def settle(threads: int) -> None:
    """Set threads, keep freed memory, flush denormal numbers (see batching/denormals.py).

    To be called before the first operation that has several threads: they flush as the one does
    that starts them, and go on so until the process ends. Where a program has computed on several
    before it trains, some of its threads do not flush: they round numbers below 1.2e-38 otherwise.

    Args:
        threads: of a CPU, for all that one operation can share among them.
    """
    denormals.flush()
    torch.set_num_threads(threads)
    keep_freed_memory()
