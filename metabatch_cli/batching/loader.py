"""TaskLoader: batches of tasks, the same for any number of workers, exact through resumes."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.util import Finalize
from typing import Any, Literal

import torch

from metabatch_cli.batching.arguments import at_least
from metabatch_cli.batching.auto import Choice, choose_workers, cores, measure
from metabatch_cli.batching.balance import Balance, as_balance
from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.landing import Landing
from metabatch_cli.batching.plan import Plan
from metabatch_cli.batching.preflight import on_a_gpu, unsendable
from metabatch_cli.batching.streams import DEVICE_STREAM_VERSION, STREAM_VERSION
from metabatch_cli.batching.taskset import TaskSet, n_tasks
from metabatch_cli.batching.transport import Transport, start_context

STATE_VERSION = 2
_FOREVER = 2**62  # steps


class StateMismatch(ValueError):
    """A loader's state was saved under another configuration or another law of the streams."""


class _DefaultSeed(int):
    """Zero, but recognisable as not given."""


_NO_SEED = _DefaultSeed(0)


class TaskLoader:
    """Batches of tasks from a `TaskSet`; all tasks of a batch have the same sizes.

    The batch of a step depends on the task set, `seed`, `batch_size`, `shuffle`, `n_batches`,
    `drop_last` and `shards` only: not on workers, prefetching, start method, ranks, on what was
    read before, or on any global random state, which it leaves untouched.

    Iterating gives one epoch; iterating again, also after `break`, gives the next one, with
    another order and other draws, while steps count on. An infinite task set has one endless
    epoch unless `n_batches` ends it.

    Args:
        dataset: the task set.
        batch_size: tasks of one optimisation step over all ranks; divisible by `shards`.
        shuffle: whether every epoch has an order of its own.
        n_batches: exactly so many full batches an epoch, drawn over repeated passes, no task
            twice in a batch. Needs `shuffle` where the set is finite.
        num_workers: processes that create batches; 0 creates them here. `"auto"`: as
            many as pay, from what creating a batch takes and, if told, a step; see
            `choose_workers`.
        collate_fn: joins the list of tasks of a `__gettask__` set (default: torch's).
        pin_memory: whether batches go to page-locked memory, for a fast copy to a GPU.
        drop_last: whether a last batch that is not full is left out.
        timeout: seconds to wait for a batch of a worker; 0 waits for ever.
        worker_init_fn: called as `worker_init_fn(worker_id)` in each worker before its first
            task.
        multiprocessing_context: start method of the workers, or a context.
        generator: gives the seed, by one draw now, where no `seed` is given.
        prefetch_factor: messages, of one heavy batch or up to 64 tiny ones, that each worker is
            ahead; no more than 32 of them.
        persistent_workers: whether workers live on from one epoch to the next.
        pin_memory_device: only for compatibility; torch chooses the device itself.
        workers: another name for `num_workers`.
        device: where batches are moved to; None leaves them on the CPU.
        seed: any integer; other seeds, other tasks.
        rank: which part of the global batch this loader makes.
        world_size: in how many parts ranks share it; must divide `shards`.
        shards: equal parts of the global batch with a random stream each.
        balance: the shares of the task set's `classes` in a batch, a `Balance` or a mapping of
            its `alpha` and `kind`; batches are then drawn one by one and always full. Needs
            `shuffle`.
        create_on: `"device"` creates whole batches on `device`, for a task set that
            `creates_anywhere`: nothing has to be moved. A GPU's generator gives other numbers
            than the CPU's, and other ones on other kinds of devices.

    Raises:
        ValueError, TypeError: arguments that cannot be or do not fit together, by name.
    """

    def __init__(
        self,
        dataset: TaskSet,
        batch_size: int = 1,
        shuffle: bool = False,
        n_batches: int | None = None,
        num_workers: int | str = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = 2,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        workers: int | str | None = None,
        device: torch.device | str | None = None,
        seed: int = _NO_SEED,
        rank: int = 0,
        world_size: int = 1,
        shards: int = 1,
        balance: Balance | Mapping[str, Any] | None = None,
        create_on: Literal["cpu", "device"] = "cpu",
    ) -> None:
        if not isinstance(dataset, TaskSet):
            raise TypeError(f"TaskLoader reads a TaskSet, not a {type(dataset).__name__}")
        if generator is not None and seed is _NO_SEED:
            seed = int(torch.randint(2**53, (), generator=generator))  # as JSON readers keep it
        if workers is not None and num_workers != 0 and workers != num_workers:
            raise ValueError(f"workers={workers!r} and num_workers={num_workers!r} contradict")
        self.dataset = dataset
        self.batch_size = batch_size = operator.index(batch_size)
        n_batches = None if n_batches is None else operator.index(n_batches)
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self.timeout = at_least("timeout", timeout, 0)
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.prefetch_factor = at_least(
            "prefetch_factor", 2 if prefetch_factor is None else prefetch_factor, 1
        )
        self.persistent_workers = persistent_workers
        self.device = None if device is None else torch.device(device)
        self.seed = int(seed)
        self.plan = Plan(
            n_tasks=n_tasks(dataset),
            law=dataset.law,
            batch_size=batch_size,
            shuffle=shuffle,
            n_batches=n_batches,
            drop_last=drop_last,
            seed=self.seed,
            split=dataset.split,
            rank=operator.index(rank),
            world_size=operator.index(world_size),
            shards=operator.index(shards),
            balance=as_balance(balance),
            classes=None if balance is None else dataset.classes,
        )
        if create_on not in ("cpu", "device"):
            raise ValueError(f"create_on={create_on!r}: choose from cpu, device")
        elsewhere = self.device is not None and self.device.type != "cpu"
        there = self.device if create_on == "device" and elsewhere else None
        self._maker = BatchMaker(dataset, self.seed, dataset.split, collate_fn, there)
        if self._maker.whole and collate_fn is not None:
            raise TypeError(
                f"collate_fn joins single tasks, but {type(dataset).__name__} makes whole batches "
                "(__gettasks__): leave collate_fn out"
            )
        self._workers = _check_workers(num_workers if workers is None else workers)
        if there is not None:
            if self._workers:
                raise ValueError(
                    f"workers={self._workers} make tasks on the CPU: with create_on='device' "
                    "leave them out, or 0"
                )
            self._workers = 0
        self.choice: Choice | None = None
        """Why there are so many workers, where that was left to the loader."""
        self._step = 0  # batches that were handed out, over all epochs
        self._mid_epoch = False  # whether a batch was handed out since the state was set
        self._loads = 0  # how often it was set, or the loader closed: older iterators are stale
        self._reads = 0  # how often an iterator began: older ones are no longer valid
        self._landing = Landing(self.device, pin_memory)
        self._open_transports: list[Transport] = []  # none or one
        # also at garbage collection, and at exit before multiprocessing ends daemons its own way
        self._finalizer = Finalize(self, _close_all, (self._open_transports,), exitpriority=10)

    @property
    def stream_version(self) -> int:
        """The law of the random streams; the same seed gives the same tasks under the same law."""
        return STREAM_VERSION if self.created_on is None else DEVICE_STREAM_VERSION

    @property
    def created_on(self) -> torch.device | None:
        """The device that creates batches; None for the CPU."""
        return self._maker.device

    @property
    def makes_whole_batches(self) -> bool:
        """Whether the task set implements `__gettasks__`."""
        return self._maker.whole

    # --- workers ---------------------------------------------------------------------------

    @property
    def num_workers(self) -> int:
        """Processes that create batches; with `"auto"` decided when it is first asked for."""
        if self._workers is None:
            self.choose_workers()
        assert self._workers is not None
        return self._workers

    def choose_workers(
        self,
        creation: float | None = None,
        step: float | None = None,
        busy_cores: float = 1.0,
    ) -> None:
        """Decide about `"auto"`; without `creation` by creating some batches here.

        Args:
            creation: seconds that creating a batch takes in training.
            step: seconds of a training step without its data; None where that is unknown.
            busy_cores: CPU cores that a step keeps busy.
        """
        if self._workers is None:
            if creation is None:
                steps = itertools.count(self._step)
                creation = measure(lambda: self.batch_at(next(steps)))
            self.choice = choose_workers(creation, step, cores(), busy_cores)
            obstacle = self._obstacle() if self.choice.workers else None
            if obstacle is not None:
                self.choice = Choice(0, f"{obstacle} cannot be sent to a worker")
            self._workers = self.choice.workers

    def _obstacle(self) -> str | None:
        if start_context(self.multiprocessing_context).get_start_method() != "fork":
            return on_a_gpu(self.dataset) or unsendable(self._maker, self.worker_init_fn)
        return on_a_gpu(self.dataset)

    # --- reading ---------------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps in an epoch; TypeError where an epoch never ends."""
        length = self.plan.epoch_length
        if length is None:
            raise TypeError(
                f"{type(self.dataset).__name__} is infinite: an epoch has no end without n_batches"
            )
        return length

    def __iter__(self) -> Iterator[Any]:
        # a generator: where it begins is decided when its first batch is asked for
        length = self.plan.epoch_length
        if length is None:
            yield from self.stream()
            return
        epoch, done = divmod(self._step, length)
        if done and self._mid_epoch:  # left by `break`: the next epoch
            epoch, done = epoch + 1, 0
        yield from self._read(range(epoch * length + done, (epoch + 1) * length))

    def stream(self) -> Iterator[Any]:
        """Batches from the current step on, through all epochs, without an end."""
        yield from self._read(range(self._step, _FOREVER))

    def batch_at(self, step: int) -> Any:
        """The batch of any step, made here and now, without the ones before it.

        Args:
            step: counted from 0 over all epochs.
        """
        return self._landing.finish(self._maker(self.plan.spec(at_least("step", step, 0))))

    def _read(self, steps: range) -> Iterator[Any]:
        self._reads += 1
        loads, reads = self._loads, self._reads
        transport = self._open(steps) if self.num_workers else None
        spec, maker, landing = self.plan.spec, self._maker, self._landing
        batches = transport.read(steps) if transport is not None else None
        try:
            for step in steps:
                if loads != self._loads or reads != self._reads:
                    raise RuntimeError(
                        "this iterator is no longer valid: the loader was closed, was given "
                        "another state, or is read by a newer iterator"
                    )
                if batches is not None:
                    batch = next(batches)
                else:
                    batch = maker(spec(step))
                    if landing.moves:
                        batch = landing.finish(batch)
                self._step = step + 1
                self._mid_epoch = True
                yield batch
        finally:
            if transport is not None and reads == self._reads and not self.persistent_workers:
                self._stop_workers()

    def _open(self, steps: range) -> Transport:
        if self.persistent_workers:
            for transport in self._open_transports:
                if transport.belongs_here:  # in a fork the workers are somebody else's
                    return transport
        self._stop_workers()
        transport = Transport(
            self._maker,
            self.plan,
            self.num_workers if self.persistent_workers else min(self.num_workers, len(steps)),
            ahead=self.prefetch_factor,
            context=self.multiprocessing_context,
            first=self.worker_init_fn,
            timeout=self.timeout,
            landing=self._landing,
        )
        self._open_transports.append(transport)
        return transport

    # --- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Where reading stands, as integers that JSON holds: the next step, and what must fit.

        Taken in the middle of an epoch, it continues that epoch, also where the epoch was left by
        `break`.
        """
        return {"step": self._step, **self._fingerprint()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken; other workers and ranks are welcome.

        Raises:
            StateMismatch: the state belongs to another configuration; names every field.
        """
        expected = self._fingerprint()
        differing = [
            f"{name} is {state.get(name, 'missing')} in the state and {value} here"
            for name, value in expected.items()
            if state.get(name) != value
        ]
        unknown = [f"{name} is unknown" for name in state if name not in {"step", *expected}]
        if state.get("step", -1) < 0:
            differing.append(f"step is {state.get('step', 'missing')} and must be at least 0")
        if differing or unknown:
            raise StateMismatch(
                "the loader's state does not fit: " + "; ".join(differing + unknown)
            )
        self._step = int(state["step"])
        self._mid_epoch = False
        self._loads += 1

    def _fingerprint(self) -> dict[str, int]:
        plan, kind = self.plan, type(self.dataset)
        return {
            "version": STATE_VERSION,
            "stream_version": self.stream_version,
            "created_on": -1 if self.created_on is None else _number_of(self.created_on.type),
            "seed": self.seed,
            "split": _number_of(plan.split),
            "taskset": _number_of(f"{kind.__module__}.{kind.__qualname__}"),
            "n_tasks": -1 if plan.n_tasks is None else plan.n_tasks,
            "sizes": _number_of(repr(plan.law)),
            "batch_size": plan.batch_size,
            "shards": plan.shards,
            "shuffle": int(plan.shuffle),
            "drop_last": int(plan.drop_last),
            "n_batches": -1 if plan.n_batches is None else plan.n_batches,
            "balance": -1 if plan.balance is None else _number_of(plan.balance.outline),
        }

    # --- the end ---------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the workers and free what they shared."""
        self._loads += 1
        self._stop_workers()

    def _stop_workers(self) -> None:
        _close_all(self._open_transports)

    def __enter__(self) -> TaskLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(transports: list[Transport]) -> None:
    while transports:
        transports.pop().close()


def _number_of(text: str) -> int:
    # 48 bits: an integer that JSON readers keep exactly
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def _check_workers(workers: int | str) -> int | None:
    if workers == "auto":
        return None
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers={workers!r} must be 0, a positive number or 'auto'")
    return workers
