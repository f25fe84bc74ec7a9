"""Sums in shared memory: what each rank reads, and when it waits in vain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from threading import Thread

import numpy as np
import pytest
import torch

from metabatch_cli.engine import shared_sums
from metabatch_cli.engine.shared_sums import Room, SharedSums, is_running

pytestmark = pytest.mark.skipif(
    not shared_sums._stores_are_seen_in_order(), reason="ranks share memory on Linux, x86 only"
)
NUMBERS = 1000


def nobody_is_gone(waited: float) -> None:
    assert waited < 60


def on_all(ranks: int, ask: Callable[[SharedSums, int], object], size: int = 8 * NUMBERS) -> list:
    """What `ask(sums, rank)` gives on each rank, a thread with memory mapped by itself."""
    room, offer = Room.made(ranks, size)
    found: list = [None] * ranks

    def run(rank: int) -> None:
        own = room if rank == 0 else Room.found(offer)
        found[rank] = ask(SharedSums(own, rank, ranks, nobody_is_gone), rank)

    threads = [Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def numbers_of(rank: int, turn: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    count = NUMBERS - 7 * turn  # not always a whole number of lines
    return torch.randn(count, dtype=dtype, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_same_sum_turn_after_turn(ranks, dtype):
    def sums(shared: SharedSums, rank: int) -> list[torch.Tensor]:
        given = [numbers_of(rank, turn, dtype) for turn in range(20)]
        for turn, numbers in enumerate(given):
            shared.sum(numbers)
            assert shared.largest([turn, rank, -rank]) == [turn, ranks - 1, 0]
        return given

    found = on_all(ranks, sums)
    for turn in range(20):
        expected = sum(numbers_of(rank, turn, dtype) for rank in range(ranks))
        for of_rank in found:
            assert torch.equal(of_rank[turn], found[0][turn])
            torch.testing.assert_close(of_rank[turn], expected)


@pytest.mark.parametrize("weights", [(2, 2), (1, 5), (3, 0), (0, 0), (1, 2, 3)], ids=str)
def test_a_mean_is_weighted(weights):
    def mean(shared: SharedSums, rank: int) -> torch.Tensor:
        numbers = numbers_of(rank, 0, torch.float64)
        numbers[-1] = weights[rank]
        shared.mean(numbers)
        return numbers

    found = on_all(len(weights), mean)
    given = torch.stack([numbers_of(rank, 0, torch.float64) for rank in range(len(weights))])
    shares = torch.tensor(weights, dtype=torch.float64) / max(sum(weights), 1)
    for numbers in found:
        assert torch.equal(numbers, found[0])
        torch.testing.assert_close(numbers[:-1], (shares @ given)[:-1])
        assert numbers[-1] == sum(weights)


def test_memory_of_somebody_else_is_not_taken_for_ours():
    room, offer = Room.made(2, 64)
    assert Room.found(offer) is not None
    assert Room.found(offer._replace(token=bytes(16))) is None
    assert Room.found(offer._replace(machine="another")) is None
    assert Room.found(offer._replace(descriptor=10**6)) is None
    room.close()
    assert Room.found(offer) is None


def test_where_memory_is_short_there_is_no_room(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no space")

    _, offer = Room.made(2, 64)
    assert Room.made(2, 1 << 30) is None
    monkeypatch.setattr(shared_sums, "Segment", refuse)
    assert Room.made(2, 64) is None
    assert Room.found(offer) is None


def test_who_waits_is_told_now_and_then_that_it_is_in_vain():
    room, _ = Room.made(2, 64)
    told = []

    def give_up(waited: float) -> None:
        told.append(waited)
        if len(told) == 2:
            raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        SharedSums(room, 0, 2, give_up).largest([1])
    assert np.all(np.diff([0, *told]) > 0.15)


def test_who_has_come_is_not_gone_even_if_it_ends_at_once():
    room, offer = Room.made(2, 64)
    other = SharedSums(Room.found(offer), 1, 2, nobody_is_gone)

    def come_and_go(waited: float) -> None:
        other._arrived[1] = 1
        raise RuntimeError("a rank is gone")

    assert SharedSums(room, 0, 2, come_and_go).largest([1]) == [1]


def test_a_process_runs_until_it_ends_even_if_nobody_has_asked_how():
    assert is_running(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_running(child.pid)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(child.pid)
    child.wait()
    assert not is_running(child.pid)
