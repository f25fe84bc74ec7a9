"""Shared memory: a batch that is kept never changes, and nothing grows while it is kept."""

from __future__ import annotations

import errno
import gc
import mmap
import multiprocessing
import os
import socket
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import TaskLoader, digest
from metabatch_cli.batching.packing import HostMemory
from metabatch_cli.batching.shared import Segment, receive_descriptor, send_descriptor
from tests.batching.examples import Waves, digests, first
from tests.batching.faults import Rows, descriptors, mappings, memory, pids, until

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")

SEVERAL = {"batch_size": 4, "shuffle": True, "seed": 7, "workers": 2}


# --- one segment -------------------------------------------------------------------------------


def test_a_segment_is_memory_without_a_name():
    before = set(os.listdir("/dev/shm"))
    segment = Segment(1000)
    array = segment.array()
    array[:3] = [1, 2, 3]
    assert len(array) >= 1000
    assert segment.array()[:3].tolist() == [1, 2, 3]
    assert set(os.listdir("/dev/shm")) == before


KEEPERS = {
    "tensor": lambda tensor, array: tensor,
    "view": lambda tensor, array: tensor[1:],
    "view of a view": lambda tensor, array: tensor.t()[1:].view(torch.int32)[:, 2],
    "array": lambda tensor, array: array.view("u1")[::2][1:],
    "storage": lambda tensor, array: tensor.untyped_storage(),
    "numpy": lambda tensor, array: tensor[1].numpy()[1:],
}


@pytest.mark.parametrize("keep", KEEPERS)
@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_a_segment_comes_back_when_nothing_in_it_lives_and_not_before(keep, where):
    returned: list[int] = []
    segment = Segment(1 << 16)
    memory = HostMemory(segment.lend(lambda: returned.append(1)))
    tensor = memory.tensor(64, (4, 4), "<f4")
    array = memory.array(128, (3,), "<i8")
    held: list[Any] = [KEEPERS[keep](tensor, array)]
    del tensor, array, memory
    gc.collect()
    assert not returned
    if where == "here":
        held.clear()
    else:
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
    gc.collect()
    assert returned == [1]


def test_what_autograd_saved_keeps_the_segment():
    returned: list[int] = []
    x = HostMemory(Segment(1 << 16).lend(lambda: returned.append(1))).tensor(0, (4,), "<f4")
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * x).sum()
    del x
    gc.collect()
    assert not returned
    loss.backward()
    del loss
    gc.collect()
    assert returned == [1]


def test_the_memory_of_a_closed_segment_stays_as_long_as_it_is_in_use():
    before = descriptors(), mappings()
    segment = Segment(1 << 16)
    tensor = HostMemory(segment.array()).tensor(0, (4,), "<f4").fill_(3)
    held = descriptors()
    segment.close()
    segment.close()  # twice does no harm
    assert descriptors() == held - 1  # the mapping has one of its own
    del segment
    gc.collect()
    assert tensor.tolist() == [3.0] * 4
    assert mappings() == before[1] + 1
    del tensor
    gc.collect()
    assert (descriptors(), mappings()) == before


@pytest.mark.parametrize("failing", ["reserve", "map"])
def test_a_segment_that_cannot_be_had_leaves_no_descriptor(failing, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    if failing == "reserve":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    else:
        monkeypatch.setattr(mmap, "mmap", refuse)
    before = descriptors()
    for _ in range(3):
        with pytest.raises(OSError, match="no memory"):
            Segment(1000)
    gc.collect()
    assert descriptors() == before


def test_a_system_without_anonymous_files_and_reservation_has_segments_too(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    segment = Segment(1000)
    segment.array()[:3] = [1, 2, 3]
    assert segment.array()[:4].tolist() == [1, 2, 3, 0]
    assert os.fstat(segment.descriptor).st_size == segment.size


# --- descriptors on their way ------------------------------------------------------------------


def test_a_descriptor_reaches_the_other_end_and_the_line_stays_usable():
    one, other = multiprocessing.Pipe()
    segment = Segment(1000)
    for default in (None, 5.0):  # a user's, which new sockets take over
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(default)
        try:
            one.send("before")
            send_descriptor(one, segment.descriptor)
            one.send("behind")
            assert other.recv() == "before"
            received = receive_descriptor(other)
            assert other.recv() == "behind"
        finally:
            socket.setdefaulttimeout(before)
        assert os.path.sameopenfile(received, segment.descriptor)
        assert os.get_blocking(one.fileno())
        assert os.get_blocking(other.fileno())
        os.close(received)


def test_a_users_timeout_for_sockets_does_not_reach_the_workers():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.001)
    try:
        with TaskLoader(Waves(), **SEVERAL) as tested:
            batches = tested.stream()
            found = digests(islice(batches, 40))
            assert mappings() > 0
    finally:
        socket.setdefaulttimeout(before)
    assert found == first(TaskLoader(Waves(), **SEVERAL | {"workers": 0}), 40)


def test_a_line_without_another_end_says_so():
    one, other = multiprocessing.Pipe()
    one.close()
    with pytest.raises(EOFError):
        receive_descriptor(other)


# --- batches that are kept ---------------------------------------------------------------------


def drop_elsewhere(things: list[Any]) -> None:
    thread = threading.Thread(target=things.clear)
    thread.start()
    thread.join()


@settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    choices=st.lists(st.sampled_from(["drop", "drop", "keep", "view", "list"]), min_size=4),
    dropped=st.sampled_from([3, 10, 50]),
    elsewhere=st.booleans(),
    size=st.sampled_from([4, 5000]),
)
def test_a_batch_that_is_kept_never_changes(choices, dropped, elsewhere, size):
    kept: list[tuple[Any, str]] = []
    with TaskLoader(Rows(width=size), batch_size=3, workers=2) as tested:
        for step, batch in enumerate(islice(tested.stream(), 150)):
            choice = choices[step % len(choices)]
            thing = {
                "drop": None,
                "keep": batch,
                "view": batch["row"][1:].t()[::2],
                "list": [batch["index"][:1]],
            }[choice]
            del batch
            if thing is not None:
                kept.append((thing, digest(thing)))
            del thing
            if len(kept) >= dropped:
                early, kept = kept[: dropped // 2], kept[dropped // 2 :]
                if elsewhere:
                    drop_elsewhere(early)
                del early
            assert all(digest(thing) == value for thing, value in kept)


def test_two_thousand_kept_batches_leave_descriptors_mappings_and_segments_flat():
    expected = first(TaskLoader(Waves(), **SEVERAL | {"workers": 0}), 2000)
    kept, seen = [], []
    with TaskLoader(Waves(), **SEVERAL) as tested:
        batches = tested.stream()
        for step, batch in enumerate(islice(batches, 2000)):
            kept.append(batch)
            if step in (500, 1999):
                seen.append((descriptors(), mappings()))
                assert len(tested._open_transports[0]._lent) <= 3
        assert seen[0][1] > 0
        assert seen[1][0] <= seen[0][0]
        assert seen[1][1] <= seen[0][1]
        transport = tested._open_transports[0]
        assert len(transport._segments) <= transport.ahead * 2 + 4
    assert digests(kept) == expected


def test_keeping_a_small_tensor_of_each_batch_keeps_no_large_one():
    small, seen = [], []
    with TaskLoader(Rows(width=50_000), batch_size=2, workers=2) as tested:
        batches = tested.stream()
        for step, batch in enumerate(islice(batches, 300)):
            small.append(batch["index"])
            if step in (50, 299):
                seen.append(memory("self"))
        transport = tested._open_transports[0]
        assert len(transport._lent) <= 3
        assert transport._shared
    assert [tensor.tolist() for tensor in small] == [[2 * n, 2 * n + 1] for n in range(300)]
    assert seen[1] < seen[0] + 30 * 1024  # of 100 MB


def reread(batch: Any, expected: str, go: Any, result: Any) -> None:
    go.wait()
    result.send(digest(batch) == expected)


def test_a_batch_never_changes_in_a_process_forked_with_it_either():
    fork = multiprocessing.get_context("fork")
    go = fork.Event()
    ours, theirs = fork.Pipe()
    with TaskLoader(Waves(), **SEVERAL) as tested:
        batches = tested.stream()
        for _ in range(40):
            batch = next(batches)
        child = fork.Process(target=reread, args=(batch, digest(batch), go, theirs))
        child.start()
        del batch
        for _ in range(200):  # enough to write every segment again
            next(batches)
        go.set()
        assert ours.poll(60)
        assert ours.recv()
        child.join()


def test_dev_shm_is_never_touched():
    before = set(os.listdir("/dev/shm"))
    with TaskLoader(Waves(), **SEVERAL) as tested:
        batches = tested.stream()
        for _ in range(100):
            batch = next(batches)
        for pid in (os.getpid(), *pids(tested)):
            links = []
            for link in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    links.append(os.readlink(link))
                except OSError:
                    continue
            assert mappings(pid) > 0
            assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()
            assert not [link for link in links if "/dev/shm" in link]
        del batch
    mine = {str(os.getpid())}
    new = set(os.listdir("/dev/shm")) - before
    assert not [name for name in new if mine & set(name.split("_"))]


def test_a_worker_forgets_segments_that_are_gone():
    before = mappings()
    with TaskLoader(Rows(width=4), batch_size=2, workers=1) as tested:
        batches = tested.stream()
        for step in range(600):
            batch = next(batches)
            if step in (200, 400):  # much larger ones from now on
                transport = tested._open_transports[0]
                transport._batch_bytes *= 100
        (worker,) = pids(tested)
        assert mappings() - before == len(transport._segments)
        until(lambda: mappings(worker) <= before + len(transport._segments) + 1)
        del batch


def test_pages_are_reserved_and_not_only_promised():
    segment = Segment(1 << 20)
    assert os.fstat(segment.descriptor).st_blocks * 512 >= 1 << 20
