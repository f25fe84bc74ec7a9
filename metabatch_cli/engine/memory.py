"""Freed memory is kept: training asks for the same sizes again in the next step."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# of mallopt(3): <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let the C library keep memory that tensors give back, instead of returning it to Linux.

    A step allocates and frees the same few megabytes again and again; every time they come back
    from the system, each page of them costs a fault (1.4 of 20 ms for a small attentive network).
    Of allocations beyond a gigabyte nothing changes, nor where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(_MMAP_THRESHOLD, _KEPT)
        glibc.mallopt(_TRIM_THRESHOLD, _KEPT)
