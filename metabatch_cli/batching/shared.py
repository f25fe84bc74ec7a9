"""Shared memory without a name: nothing in /dev/shm, gone with the last process that maps it."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
        made_here = descriptor is None
        if descriptor is None:
            size = -(-size // _PAGE) * _PAGE
            descriptor = _anonymous_file()
        self._close = weakref.finalize(self, os.close, descriptor)
        self.size = size
        self.descriptor = descriptor
        try:
            if made_here:
                _reserve(descriptor, size)
            self._mapped = mmap.mmap(descriptor, size)
        except BaseException:
            self.close()
            raise

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


def send_descriptor(connection: Any, descriptor: int) -> None:
    """Give the process at the other end of a connection a descriptor of this one's."""
    with _socket_of(connection) as line:
        socket.send_fds(line, [b"d"], [descriptor])


def receive_descriptor(connection: Any) -> int | None:
    """The descriptor that was sent; None where this process may have no more of them."""
    with _socket_of(connection) as line:
        message, descriptors, _, _ = socket.recv_fds(line, 1, 1)
    if not message:
        raise EOFError
    return descriptors[0] if descriptors else None


@contextmanager
def _socket_of(connection: Any) -> Iterator[socket.socket]:
    # not by multiprocessing's send_handle: that needs a free descriptor for itself, and fails
    # between two parts of a message where there is none
    line = socket.socket(fileno=connection.fileno())
    line.settimeout(None)  # else socket.setdefaulttimeout would reach the connection through it
    try:
        yield line
    finally:
        line.detach()


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        # where memory runs out only later, writing would be a bus error
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("metabatch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS: a file without a name
        return os.dup(file.fileno())
