"""Shared memory without a name: nothing in /dev/shm, gone with the last process that maps it."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable

import numpy as np

_PAGE = 1 << 16  # sizes are rounded up to this


class Segment:
    """A piece of memory that the main process and its workers see.

    It has no name that could outlive a killed process, and it does not count against the size
    of /dev/shm, which containers keep small.

    Args:
        size: bytes wanted; rounded up.
        descriptor: of a segment that another process made; None makes a new one.

    Raises:
        OSError: there is not that much memory, or no free file descriptor.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        if descriptor is None:
            size = -(-size // _PAGE) * _PAGE
            descriptor = _anonymous_file()
            try:
                # reserved now: where memory runs out later, writing would be a bus error
                os.posix_fallocate(descriptor, 0, size)
            except BaseException:
                os.close(descriptor)
                raise
        self.size = size
        self.descriptor = descriptor
        self._mapped = mmap.mmap(descriptor, size)
        self._close = weakref.finalize(self, os.close, descriptor)

    def array(self) -> np.ndarray:
        """The whole of it as a new uint8 array, which every array and tensor in it keeps alive."""
        # of a class of its own: numpy skips a plain array and keeps what lies below it
        return _Whole(self.size, np.uint8, self._mapped)

    def lend(self, done: Callable[[], object]) -> np.ndarray:
        """The same, with a word when neither it nor anything in it is in use any more."""
        array = self.array()
        weakref.finalize(array, done).atexit = False
        return array

    def close(self) -> None:
        """Close the descriptor; the memory stays as long as something in it is in use."""
        self._close()


class _Whole(np.ndarray):
    pass


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("metabatch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS: a file without a name
        return os.dup(file.fileno())
