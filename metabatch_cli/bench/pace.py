"""How many steps a second, without a word about what a step is: needs neither torch nor JAX."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

LEAST = 3  # steps that count at least, however slow they are


def pace(step: Callable[[], object], seconds: float, wait: Callable[[], None]) -> float:
    """Steps a second, taken for so long and at least so many; one goes before that.

    Args:
        step: takes one.
        wait: until all that was asked of a device is done.
    """
    step()
    wait()
    gc.collect()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or count < LEAST:
        step()
        count += 1
    wait()
    return count / (time.perf_counter() - began)
