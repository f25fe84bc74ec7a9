"""The processes that share a training: what they tell each other, and who of them is gone."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from metabatch_cli.batching.auto import RANKS_HERE
from metabatch_cli.config.errors import UserError, explain
from metabatch_cli.engine.shared_sums import FEW, Room, SharedSums, is_running

T = TypeVar("T")

_BEAT = 0.5  # seconds between two signs of life
_SILENCE = 5.0  # seconds without one after which a rank counts as gone
_GLANCE = timedelta(seconds=0.2)  # after which one who waits heeds the signals that came


class RankLost(UserError):
    """Another process of this training failed or is gone; says which one, and what it said."""


class Ranks:
    """The processes of one training, as one of them sees it. This one is alone.

    Attributes:
        rank: its number; rank zero, the leader, decides, writes and reports.
        size: how many there are. Each makes its part of every batch, and all hold the same weights.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank zero."""
        return self.rank == 0

    def from_leader(self, thing: T | None = None) -> T:
        """What rank zero gives, on every rank; there, `thing`."""
        return cast(T, thing)

    def gather(self, thing: T) -> list[T]:
        """What every rank gives, by rank, on every rank."""
        return [thing]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of what the ranks give, number by number, on every rank."""
        return list(numbers)

    def sum(self, numbers: Tensor) -> None:
        """Add up the numbers of all ranks, in place, on every rank to the same bits."""

    def mean(self, numbers: Tensor) -> None:
        """Make numbers the mean over the ranks, in place, on every rank to the same bits.

        Args:
            numbers: the last one is the weight of this rank's, and becomes the sum of weights.
        """
        values, weight = numbers[:-1], numbers[-1:]
        values.mul_(weight)
        self.sum(numbers)
        values.div_(weight.clamp(min=1))

    def own_device(self, device: str) -> str:
        """The device of this rank, where `device` is that of the first one on each machine."""
        return device

    def compute_on(self, device: torch.device) -> None:
        """Told where the numbers of `sum` will be."""


def refuse_other_group() -> None:
    """Raise UserError if the program has begun a process group: torch has room for one."""
    if dist.is_initialized():
        raise UserError(
            "this program has a torch.distributed process group of its own; a training over "
            "several processes needs to begin one: leave it to trainer.processes or torchrun"
        )


class Group(Ranks):
    """Several processes, over gloo.

    Sums on GPUs go over NCCL where each rank has its own; those on the CPU, where all are on one
    machine, through memory that they share.

    A rank that fails leaves its words for the others, and each gives a sign of life twice a second,
    so that those who wait in vain can say what happened. They meet when they first need each other.

    Args:
        store: reached by all; keeps the words and signs.
        rank, size: of this process, of the group.
        local_rank: of this process among those on its machine.
        timeout: seconds after which waiting for another rank is in vain.
        what_ended: tells of processes that this one started and that are gone, by rank.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        local_rank: int,
        timeout: float,
        what_ended: Callable[[], dict[int, str]] = dict,
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = dist.PrefixStore("metabatch", store)
        self._timeout = timedelta(seconds=timeout)
        self._what_ended = what_ended
        self._store.set(f"place/{rank}", f"process {os.getpid()} on {os.uname().nodename}")
        # another connection: one that waits would keep the signs back
        self._heart = _Heart(dist.PrefixStore("metabatch", cast(Any, store).clone()), rank)
        self._all = range(size)
        self._others = [other for other in self._all if other != rank]
        self._bulk: dist.ProcessGroup | None = None
        self._shared: SharedSums | None = None
        self._may_share = True  # as far as is known
        self._met = False

    def _meet(self) -> None:
        """Wait until all are ready; gloo would not notice that one died on its way."""
        until = time.monotonic() + self._timeout.total_seconds()
        self._store.set(f"ready/{self.rank}", "")
        missing = set(range(self.size))
        while missing := {rank for rank in missing if not self._store.check([f"ready/{rank}"])}:
            failed = any(self._store.check([f"failed/{rank}"]) for rank in missing)
            if failed or self._what_ended() or time.monotonic() > until:
                raise RuntimeError(f"{len(missing)} of {self.size} did not come")
            time.sleep(0.02)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=self._timeout,
        )

    # --- what they tell each other -----------------------------------------------------------

    def from_leader(self, thing: T | None = None) -> T:
        packed = _packed(thing if self.leads else None)
        (length,) = self.largest([len(packed)])
        box = packed if self.leads else packed.new_empty(length)
        with self._waiting():
            _finish(dist.broadcast(box, src=0, async_op=True))
        return cast(T, _unpacked(box))

    def gather(self, thing: T) -> list[T]:
        packed = _packed(thing)
        lengths = self.largest([len(packed) if rank == self.rank else 0 for rank in self._all])
        own = packed.new_empty(max(lengths))
        boxes = [torch.empty_like(own) for _ in self._all]
        own[: len(packed)] = packed
        with self._waiting():
            _finish(dist.all_gather(boxes, own, async_op=True))
        return [_unpacked(box[:length]) for box, length in zip(boxes, lengths, strict=True)]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        if self._shared is not None and len(numbers) <= FEW:
            with self._waiting():
                return self._shared.largest(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)
        with self._waiting():
            _finish(dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True))
        return found.tolist()

    def sum(self, numbers: Tensor) -> None:
        shared = self._sharing(numbers)
        with self._waiting():
            if shared is not None:
                shared.sum(numbers)
            elif self._bulk is not None:
                dist.all_reduce(numbers, group=self._bulk)  # queued on the GPU
            else:
                _finish(dist.all_reduce(numbers, async_op=True))

    def mean(self, numbers: Tensor) -> None:
        shared = self._sharing(numbers)
        if shared is None:
            super().mean(numbers)
            return
        with self._waiting():
            shared.mean(numbers)

    def own_device(self, device: str) -> str:
        kind, _, first = device.partition(":")
        if kind != "cuda":
            return device
        return f"cuda:{(int(first or 0) + self.local_rank) % torch.cuda.device_count()}"

    def compute_on(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        torch.cuda.set_device(device)
        here = int(os.environ.get(RANKS_HERE, self.local_rank + 1))
        alone_on_it = here <= torch.cuda.device_count()
        if all(self.gather(alone_on_it and dist.is_nccl_available())):
            with self._waiting():
                self._bulk = dist.new_group(backend="nccl", timeout=self._timeout)

    def _sharing(self, numbers: Tensor) -> SharedSums | None:
        """Memory with room for all ranks' numbers; None if they cannot share it.

        All of them ask for it at the same time.
        """
        if not self._may_share or numbers.device.type != "cpu":
            return None
        if self._shared is not None and numbers.nbytes <= self._shared.size:
            return self._shared
        made = Room.made(self.size, numbers.nbytes) if self.leads else None
        offer = self.from_leader(made and made[1])
        room = made[0] if made else None
        if offer is not None and not self.leads:
            room = Room.found(offer)
        processes = self.gather(None if room is None else os.getpid())
        if room is not None:
            room.close()
        if room is None or None in processes:
            self._shared, self._may_share = None, False
        else:
            check = partial(self._refuse_to_wait, cast(list[int], processes))
            self._shared = SharedSums(room, self.rank, self.size, check)
        return self._shared

    # --- who is gone -------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """Leave this rank's words for the others."""
        said = explain(error).removeprefix("failed: ").partition("\n  the same command")[0]
        words = {"said": said, "trace": "".join(traceback.format_exception(error))}
        with suppress(RuntimeError):  # nobody is there to read them
            self._store.set(f"failed/{self.rank}", json.dumps(words))
        if self._bulk is not None:
            self._bulk.abort()  # sums on the GPU that wait for ranks that do not come

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """While others are needed; they are met when they first are."""
        try:
            if not self._met:
                self._meet()
                self._met = True
            yield
        except RuntimeError as error:
            raise self._lost(str(error).splitlines()[0]) from error

    def _lost(self, cause: str) -> RankLost:
        try:
            return self._who_is_gone(cause)
        except RuntimeError:
            return RankLost("rank 0, which holds the processes together, is gone")

    def _refuse_to_wait(self, processes: Sequence[int], waited: float) -> None:
        """Raise RuntimeError if one of the ranks' processes on this machine will not come."""
        failed = any(self._store.check([f"failed/{rank}"]) for rank in self._others)
        if failed or not all(map(is_running, processes)):
            raise RuntimeError("a rank is gone")
        if waited > self._timeout.total_seconds():
            raise RuntimeError(f"a rank did not come within {waited:.0f} s")

    def _who_is_gone(self, cause: str) -> RankLost:
        beats: dict[int, tuple[bytes, float]] = {}
        until = time.monotonic() + 2 * _SILENCE
        while time.monotonic() < until:
            for rank in self._others:
                if self._store.check([f"failed/{rank}"]):
                    words = json.loads(self._store.get(f"failed/{rank}"))
                    lost = RankLost(f"{self._name(rank)} failed: {words['said']}")
                    lost.add_note(words["trace"])
                    return lost
            for rank, how in self._what_ended().items():
                return RankLost(f"{self._name(rank)} {how}")
            for rank in self._others:
                key = f"beat/{rank}"
                beat = self._store.get(key) if self._store.check([key]) else b""
                last, since = beats.get(rank, (None, time.monotonic()))
                if beat != last:
                    beats[rank] = beat, time.monotonic()
                elif time.monotonic() - since > _SILENCE:
                    return RankLost(f"{self._name(rank)} is gone")
            time.sleep(0.05)
        return RankLost(f"the processes lost each other: {cause}")

    def _name(self, rank: int) -> str:
        known = self._store.check([f"place/{rank}"])
        where = f" ({self._store.get(f'place/{rank}').decode()})" if known else ""
        return f"rank {rank} of {self.size}{where}"

    @property
    def leader_is_there(self) -> bool:
        """Whether rank zero can still be told, and will tell."""
        try:
            return self._store.check(["place/0"])
        except RuntimeError:
            return False

    def close(self) -> None:
        """Leave the group."""
        self._heart.stop()
        if self._met:
            dist.destroy_process_group()


def _packed(thing: object) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)


def _unpacked(box: Tensor) -> Any:
    return pickle.loads(box.numpy().data)


def _finish(work: dist.Work) -> None:
    """Wait until a collective is through; meanwhile Python's signal handlers run."""
    while True:
        try:
            work.wait(_GLANCE)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # its own error, or none: it ended at this very moment
                return


class _Heart(threading.Thread):
    """Signs of life, also while the process waits for others or computes."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        super().__init__(name="signs of life", daemon=True)
        self._store, self._key = store, f"beat/{rank}"
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        beats = 0
        with suppress(RuntimeError):  # the store is gone, and all is over
            while not self._stopped.wait(_BEAT):
                beats += 1
                self._store.set(self._key, str(beats))

    def stop(self) -> None:
        self._stopped.set()
        self.join()
