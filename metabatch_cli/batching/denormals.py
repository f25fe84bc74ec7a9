"""Denormal numbers, too small for a float's full precision: taken for 0, or computed with exactly.

A processor takes a hundred times as long over them (float32: below 1.2e-38), and a long training
fills Adam's memory with them. Of a unit that is dead for good all gradients are 0, their running
means shrink by a tenth in every step, and never get to 0: nine tenths of the least of all floats
are rounded to itself. What `torch.set_flush_denormal` says holds for one thread and those that it
starts later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def are_flushed() -> bool:
    """Whether this thread takes denormal numbers for 0."""
    return sys.float_info.min / 2 == 0


def flush() -> None:
    """Take denormal numbers for 0, from now on; before the first operation that has threads."""
    torch.set_flush_denormal(True)


@contextmanager
def as_before() -> Iterator[None]:
    """What is done within about them is undone at the end, in this thread."""
    before = are_flushed()
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def kept() -> Iterator[None]:
    """Compute with them exactly in this thread, whatever is set: as a process of its own would."""
    with as_before():
        torch.set_flush_denormal(False)
        yield
