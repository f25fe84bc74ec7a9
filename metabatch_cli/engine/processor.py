"""How a process computes that trains or tests: its threads, its memory, its least numbers."""

from __future__ import annotations

import torch

from metabatch_cli.batching import denormals
from metabatch_cli.engine.memory import keep_freed_memory


def settle(threads: int) -> None:
    """What is to be set before the first operation that has threads: they take it over.

    Args:
        threads: of a CPU, for all that one operation can share among them.
    """
    denormals.flush()
    torch.set_num_threads(threads)
    keep_freed_memory()
