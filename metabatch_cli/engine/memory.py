"""Freed memory is kept: training asks for the same sizes again in the next step."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# of mallopt(3): <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _KEPT_BEFORE_2_35 = 1 << 30, 32 << 20  # bytes


def keep_freed_memory() -> None:
    """Let the C library keep memory that tensors give back, instead of returning it to Linux.

    A step allocates and frees the same few megabytes again and again; every time they come back
    from the system, each page of them costs a fault (1.4 of 20 ms for a small attentive network).
    Of allocations beyond a gigabyte (32 MB in old versions of glibc) nothing changes, nor where
    the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        # before 2.35 it refuses more than 32 MB; setting nothing but the other threshold would
        # freeze this one at its least, and be worse than doing nothing
        if any(glibc.mallopt(_MMAP_THRESHOLD, most) for most in (_KEPT, _KEPT_BEFORE_2_35)):
            glibc.mallopt(_TRIM_THRESHOLD, _KEPT)
