"""Sums over the processes of one machine, in memory that they share."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metabatch_cli.batching.shared import Segment

FEW = 16  # numbers that `largest` has room for
_LINE = 64  # bytes that processors hand each other at a time
_TOKEN = 16  # bytes
_EAGER = 2e-3  # seconds of looking again at once, before some are slept
_NAP = 1e-4  # seconds
_LONGEST_NAP = 5e-3
_GLANCE = 0.2  # seconds between two looks at who is still there, to begin with
_LONGEST_GLANCE = 2.0
_MOST = 256 << 20  # bytes in all; what is larger had better travel part by part


class Offer(NamedTuple):
    """Where memory is that another process has made."""

    machine: str
    process: int
    descriptor: int
    size: int
    token: bytes
    """What stands at its beginning: in another container the same place is another one."""


class Room:
    """Memory that processes share, as long as it takes them to find it.

    Args:
        segment: that memory; its first bytes tell it apart.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment

    @classmethod
    def made(cls, ranks: int, size: int) -> tuple[Room, Offer] | None:
        """Room for sums of `size` bytes over so many ranks; None where it cannot be made."""
        total = _beginning_of_sums(ranks) + 2 * ranks * _whole_lines(size)
        if not _stores_are_seen_in_order() or total > _MOST:
            return None
        try:
            segment = Segment(total)
        except OSError:
            return None
        token = os.urandom(_TOKEN)
        segment.array()[:_TOKEN] = np.frombuffer(token, np.uint8)
        offer = Offer(_machine(), os.getpid(), segment.descriptor, segment.size, token)
        return cls(segment), offer

    @classmethod
    def found(cls, offer: Offer) -> Room | None:
        """That of another process; None where this one cannot reach it."""
        if offer.machine != _machine():
            return None
        with suppress(OSError, ValueError):
            path = f"/proc/{offer.process}/fd/{offer.descriptor}"
            room = cls(Segment(offer.size, os.open(path, os.O_RDWR | os.O_CLOEXEC)))
            if room.segment.array()[:_TOKEN].tobytes() == offer.token:
                return room
            room.close()
        return None

    def close(self) -> None:
        """Keep the memory, without the way to it."""
        self.segment.close()


class SharedSums:
    """What all ranks have, added up or compared by each of them.

    Each writes its own beside those of the others, waits until all have written, and reads them
    all: one meeting, where messages through sockets take many (1.3 MB of two ranks: 0.3 ms; with it
    a step of CANP takes 9.8 ms, over gloo 15.3). Two places are used in turn, so that nobody need
    wait until all have read: whoever writes into the first one again has met them all at the
    second.

    It relies on processors that show each other what they store in the order in which they do, as
    those of the x86 kind; there is no `Room` on others.

    Args:
        room: found by all ranks.
        rank, ranks: of this process, and how many there are.
        check: called with the seconds waited so far, now and then; it raises RuntimeError where
            waiting is in vain.
    """

    def __init__(self, room: Room, rank: int, ranks: int, check: Callable[[float], None]) -> None:
        memory = room.segment.array()
        self.rank = rank
        self._others = [other for other in range(ranks) if other != rank]
        self._check = check
        self._meetings = 0
        begin, end = _LINE, _LINE * (1 + ranks)
        self._arrived = memory[begin:end].view(np.int64)[:: _LINE // 8]
        begin, end = end, end + 2 * ranks * FEW * 8
        self._few = memory[begin:end].view(np.int64).reshape(2, ranks, FEW)
        begin = _beginning_of_sums(ranks)
        self.size = (len(memory) - begin) // (2 * ranks) // _LINE * _LINE
        end = begin + 2 * ranks * self.size
        self._sums = torch.from_numpy(memory[begin:end]).view(2, ranks, self.size)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of what the ranks give, number by number; not more than `FEW`."""
        places = self._few[self._meetings % 2, :, : len(numbers)]
        places[self.rank] = numbers
        self._meet()
        return places.max(axis=0).tolist()

    def sum(self, numbers: Tensor) -> None:
        """Add up the numbers of all ranks, in place, in the order of the ranks.

        Args:
            numbers: contiguous, of at most `size` bytes, on the CPU.
        """
        first, second, *more = self._of_all(numbers)
        torch.add(first, second, out=numbers.view(-1))
        for place in more:
            numbers.view(-1).add_(place)

    def mean(self, numbers: Tensor) -> None:
        """Make numbers the mean over the ranks, in place, in the order of the ranks.

        Args:
            numbers: as of `sum`; the last one is the weight of this rank's, and becomes the sum.
        """
        first, *more = self._of_all(numbers)
        weights = [place[-1].item() for place in (first, *more)]
        total, flat = sum(weights), numbers.view(-1)
        torch.mul(first, weights[0] / max(total, 1), out=flat)
        for place, weight in zip(more, weights[1:], strict=True):
            flat.add_(place, alpha=weight / max(total, 1))
        flat[-1] = total

    def _of_all(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """The numbers of every rank, by rank, to be read before the next but one is asked for."""
        flat = numbers.view(-1)
        places = self._sums[self._meetings % 2, :, : numbers.nbytes].view(flat.dtype)
        places[self.rank].copy_(flat)
        self._meet()
        return places.unbind()

    def _meet(self) -> None:
        self._meetings += 1
        self._arrived[self.rank] = self._meetings
        for other in self._others:
            if self._arrived[other] < self._meetings:
                self._wait_for(other)

    def _wait_for(self, other: int) -> None:
        arrived, begun = self._arrived, time.monotonic()
        next_glance = _GLANCE
        while arrived[other] < self._meetings:
            os.sched_yield()
            waited = time.monotonic() - begun
            if waited > _EAGER:
                time.sleep(min(_NAP + waited / 100, _LONGEST_NAP))
            if waited > next_glance:
                next_glance = waited + min(max(waited, _GLANCE), _LONGEST_GLANCE)
                try:
                    self._check(waited)
                except RuntimeError:
                    if arrived[other] < self._meetings:  # it may have come, and gone since
                        raise


def is_running(process: int) -> bool:
    """Whether a process of this machine has not ended; one that is stopped has not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # nobody knows
        return True
    return state not in "ZX"


def _machine() -> str:
    """What tells this machine from others, until it is started again; nothing where unknown."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def _beginning_of_sums(ranks: int) -> int:
    return _whole_lines(_LINE * (1 + ranks) + 2 * ranks * FEW * 8)


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _stores_are_seen_in_order() -> bool:
    return sys.platform.startswith("linux") and platform.machine() == "x86_64"
