"""A worker: the process that makes batches for a loader in another process."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch

from metabatch_cli import mkl
from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.packing import Packer
from metabatch_cli.batching.plan import Plan
from metabatch_cli.batching.shared import Segment, receive_descriptor
from metabatch_cli.batching.streams import borrowed_global_generators

_HELD_BACK = {signal.SIGINT, signal.SIGTERM}
_SIGTERM_GRACE = 20.0  # seconds that a worker outlives a SIGTERM, for the main process to finish


class Make(NamedTuple):
    """Make the batches of these steps, into the segment of this number.

    Attributes:
        size: of the segment where it is new to the worker: then its descriptor follows.
        gone: segments that are no longer used.
    """

    steps: range
    segment: int | None
    size: int = 0
    gone: tuple[int, ...] = ()


class Made(NamedTuple):
    """What came of a `Make`: the packed batches, or those before the first failure.

    Attributes:
        batches: of consecutive steps; fewer than asked for after a failure.
        failure: what went wrong at the step behind them.
        used: bytes of the segment that hold them.
        size: bytes that a segment needs to hold all of them.
        seconds: that making and packing took.
        peak: the most memory that the worker ever had, in MiB.
    """

    batches: list[bytes]
    failure: Failure | None
    used: int
    size: int
    seconds: float
    peak: int


class Failure(NamedTuple):
    """An exception on its way to the main process."""

    error: BaseException
    origin: str


def work(
    connection: Any,
    main: int,
    number: int,
    maker: BatchMaker,
    plan: Plan,
    first: Callable[[int], None] | None,
    dtype: torch.dtype,
    avx512: bool,
) -> None:
    """Make what the main process asks for until it says None.

    Args:
        connection: to the main process.
        main: the main process's number.
        number: of this worker.
        maker, plan: from a step to its batch.
        first: the user's `worker_init_fn`.
        dtype: torch's default type of floats in the main process.
        avx512: whether MKL was told to use it in the main process (see mkl.py).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
    _die_with(main)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    with suppress(AttributeError, OSError):  # only Linux has it
        # as much time as others, but a worker that wakes up does not take the core of the
        # training step: it waits for the next one that is free
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    gc.freeze()  # what came with the fork stays shared: collecting would touch every object

    packer = Packer()
    segments: dict[int | None, np.ndarray | None] = {None: None}
    spoiled = _begin(first, number, avx512)
    maker.preserves = False
    # a main process that is gone ends this one quietly
    with borrowed_global_generators(), suppress(EOFError, ConnectionError):
        while (order := connection.recv()) is not None:
            for gone in order.gone:
                del segments[gone]
            if order.size:
                segments[order.segment] = _mapped(order.size, receive_descriptor(connection))
            if spoiled is not None:
                connection.send(Made([], spoiled, 0, 0, 0.0, 0))
            else:
                segment = segments[order.segment]
                connection.send(_make(order, segment, packer, maker, plan, number))


def _begin(first: Callable[[int], None] | None, number: int, avx512: bool) -> Failure | None:
    """What goes wrong before the first batch."""
    try:
        mkl.require_same_as_main(avx512)
        if first is not None:
            try:
                first(number)
            except BaseException as error:
                error.add_note(f"in worker_init_fn({number})")
                raise
    except BaseException as error:
        return failure(error, number)
    return None


def _mapped(size: int, descriptor: int | None) -> np.ndarray | None:
    """The memory behind a descriptor; None where it cannot be had: then batches go by pipe."""
    if descriptor is None:
        return None
    try:
        segment = Segment(size, descriptor)
    except OSError:
        return None
    segment.close()
    return segment.array()


def _make(
    order: Make,
    segment: np.ndarray | None,
    packer: Packer,
    maker: BatchMaker,
    plan: Plan,
    number: int,
) -> Made:
    began = time.perf_counter()
    batches: list[bytes] = []
    wrong = None
    packer.fill(segment)
    for step in order.steps:
        try:
            spec = plan.spec(step)
            batch = maker(spec)
            try:
                batches.append(packer.pack(batch))
            except TypeError as error:
                error.add_note(maker.note(spec))
                raise
        except BaseException as error:
            wrong = failure(error, number)
            break
    used = packer.outgoing.used
    seconds = time.perf_counter() - began
    peak = peak_mib(resource.RUSAGE_SELF)
    return Made(batches, wrong, used, used + sum(map(len, batches)), seconds, peak)


def peak_mib(who: int) -> int:
    """The most memory that this process, or one of its children that ended, ever had."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(who).ru_maxrss // unit


def failure(error: BaseException, number: int) -> Failure:
    """An error as something that the main process can raise again."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    try:
        arrives = str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        arrives = False
    if not arrives:  # a local class, or one whose constructor wants other than it keeps
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", []):
            plain.add_note(note)
        error = plain
    return Failure(error, f"in worker {number}:\n{frames}")


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Keep SIGINT and SIGTERM waiting, also in a process started now, until it is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_later(signum: int, frame: FrameType | None) -> None:
    # a scheduler sends SIGTERM to the whole process group, while the main process still wants
    # the batches of the step that it finishes and saves
    deadline = threading.Timer(_SIGTERM_GRACE, os._exit, (128 + signum,))
    deadline.daemon = True
    deadline.start()


def _die_with(main: int) -> None:
    """End with the main process even where it is killed in the middle of a long task."""

    def watch() -> None:
        if hasattr(os, "pidfd_open"):
            try:
                watched = os.pidfd_open(main)
            except ProcessLookupError:
                os._exit(1)
            except OSError:  # an old kernel, no descriptor left
                pass
            else:
                ended = select.poll()
                ended.register(watched, select.POLLIN)
                ended.poll()
                os._exit(1)
        while True:
            time.sleep(1)
            try:
                os.kill(main, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, name="metabatch-main-watch", daemon=True).start()
