"""Transport: batches from worker processes, many a message, in order, whoever dies on the way.

The main process orders runs of steps; a worker makes each run into a segment of shared memory
and answers with a few bytes. Tensors are used where they lie: a segment is written again only
when nothing in it is in use any more. How many batches make a message follows from what they
weigh and how long they take, as measured.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch

from metabatch_cli import mkl
from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.landing import Landing
from metabatch_cli.batching.packing import Incoming
from metabatch_cli.batching.plan import Plan
from metabatch_cli.batching.preflight import on_a_gpu, unsendable
from metabatch_cli.batching.shared import Segment, send_descriptor
from metabatch_cli.batching.worker import Failure, Made, Make, peak_mib, signals_held_back, work

_MESSAGE_BYTES = 1 << 20  # of tensors: fits a second-level cache
_MESSAGE_SECONDS = 0.01  # of making: so long the first batch of a run waits for the last
_MESSAGE_BATCHES = 64
_DEATHS = 3  # in a row over one and the same step, until that is an error
_IDLE_CHECK = 1.0  # seconds between two looks at whether all workers live
_CLOSE_WITHIN = 1.0  # seconds until a worker that does not end is killed
_KEPT = 2  # segments in use by the reader beyond which tensors are copied out
_AHEAD = 32  # messages a worker is ahead at most: their orders fit into the pipe of a busy one


class WorkerDied(RuntimeError):
    """Workers died again and again over the same batch."""


class _Run:
    """Consecutive steps that one message brings.

    Attributes:
        start, count: which steps.
        deaths: of workers that were to make it.
        made: what came of it; None until it has come.
        segment: the memory lent for it.
        worker: who makes it.
        wanted: whether anybody still reads it.
    """

    def __init__(self, start: int, count: int, deaths: int = 0) -> None:
        self.start = start
        self.count = count
        self.deaths = deaths
        self.made: Made | None = None
        self.segment: int | None = None
        self.worker: _Worker | None = None
        self.wanted = True


class _Worker:
    """A process, the line to it, and the runs that it is to make, oldest first."""

    def __init__(self, number: int, process: Any, connection: Any) -> None:
        self.number = number
        self.process = process
        self.connection = connection
        self.runs: deque[_Run] = deque()
        self.mapped: set[int] = set()
        self.gone: list[int] = []  # mapped, but no longer used
        self.peak = 0


class Transport:
    """Workers of one loader, and the batches that they send.

    Args:
        maker, plan: from a step to its batch; sent to the workers once.
        workers: how many.
        ahead: messages that each worker is ahead.
        context: start method of processes, by name, as a context, or None for the default.
        first: called as `first(worker)` in each worker to begin with.
        timeout: seconds to wait for a batch; 0 waits for ever.
        landing: where batches go from shared memory.
    """

    def __init__(
        self,
        maker: BatchMaker,
        plan: Plan,
        workers: int,
        *,
        ahead: int,
        context: Any,
        first: Callable[[int], None] | None,
        timeout: float,
        landing: Landing,
    ) -> None:
        self.maker = maker
        self.plan = plan
        self.ahead = min(ahead, _AHEAD)
        self.timeout = timeout
        self.landing = landing
        self._context = start_context(context)
        self._first = first
        self._owner = os.getpid()
        self._number = workers
        self._whole = True  # whether nobody was interrupted in the middle of a message
        self._workers: list[_Worker] = []
        self._segments: dict[int, Segment] = {}
        self._next_segment = 0
        self._shared = True  # whether there is memory to share
        self._runs: deque[_Run] = deque()  # ordered and not yet read, in the order of their steps
        self._batch_bytes = 0  # the largest seen
        self._batch_seconds: float | None = None  # the latest
        self._run_length = 1
        held = on_a_gpu(maker.taskset)
        if held:
            raise ValueError(
                f"{held} lies on a GPU: workers make tasks on the CPU; keep it there (the loader "
                "moves batches to its device), or set workers=0"
            )
        self._open()

    # --- reading ---------------------------------------------------------------------------

    def read(self, steps: range) -> Iterator[Any]:
        """The batches of consecutive steps. A later call ends what an earlier one gives."""
        self._refuse_a_fork()
        if not self._whole:
            self.close()
            self._open()
        try:
            yield from self._read(steps)
        except GeneratorExit:
            raise
        except BaseException:  # in the middle of a message, perhaps: later ones need new workers
            self._whole = False
            raise

    def _read(self, steps: range) -> Iterator[Any]:
        self._forget()
        runs, unordered = self._runs, steps.start
        while unordered < steps.stop or runs:
            self._refuse_a_fork()
            while unordered < steps.stop and len(runs) < self.ahead * len(self._workers):
                run = _Run(unordered, self._choose_length(steps.stop - unordered))
                unordered += run.count
                runs.append(run)
                self._order(run)
            run = runs[0]
            made = self._wait_for(run)
            runs = self._runs  # a death splits runs
            if runs[0] is not run:
                continue
            runs.popleft()
            memory = self._memory_of(run, made)
            batches = made.batches
            for step, packed in enumerate(batches, start=run.start):
                yield self._land(packed, memory, step)
            if made.failure is not None:
                error, origin = made.failure
                error.add_note(origin)
                raise error
            del run, memory, made, batches

    @property
    def belongs_here(self) -> bool:
        """Whether the workers are this process's, and not those of one that it was forked from."""
        return os.getpid() == self._owner

    def _refuse_a_fork(self) -> None:
        if not self.belongs_here:  # two readers of one pipe get half a message each
            raise RuntimeError(
                "these workers belong to the process that this one was forked from: read a "
                "TaskLoader of its own here"
            )

    def _land(self, packed: bytes, memory: Incoming | None, step: int) -> Any:
        try:
            return self.landing.land(packed, memory)
        except Exception as error:
            error.add_note(self.maker.note(self.plan.spec(step)))
            raise

    def _choose_length(self, remaining: int) -> int:
        if self._batch_seconds is None:
            return 1
        length = min(
            _MESSAGE_SECONDS / max(self._batch_seconds, 1e-9),
            _MESSAGE_BYTES / max(self._batch_bytes, 1),
            _MESSAGE_BATCHES,
            2 * self._run_length,
            -(-remaining // len(self._workers)),
        )
        self._run_length = max(1, int(length))
        return self._run_length

    def _order(self, run: _Run) -> None:
        worker = min(self._workers, key=lambda worker: len(worker.runs))
        run.worker = worker
        run.segment = self._choose_segment(run)
        worker.runs.append(run)
        with suppress(OSError):  # it has died: whoever waits for the run will see
            gone, worker.gone = tuple(worker.gone), []
            steps = range(run.start, run.start + run.count)
            if run.segment is None or run.segment in worker.mapped:
                worker.connection.send(Make(steps, run.segment, 0, gone))
            else:
                segment = self._segments[run.segment]
                worker.connection.send(Make(steps, run.segment, segment.size, gone))
                send_descriptor(worker.connection, segment.descriptor)
                worker.mapped.add(run.segment)

    def _wait_for(self, run: _Run) -> Made:
        deadline = time.monotonic() + self.timeout if self.timeout else None
        while run.made is None:
            patience = _IDLE_CHECK
            if deadline is not None:
                patience = min(patience, deadline - time.monotonic())
                if patience <= 0:
                    assert run.worker is not None
                    raise RuntimeError(
                        f"no batch within timeout={self.timeout:g} s from worker "
                        f"{run.worker.number}, which creates {self.plan.spec(run.start)}"
                    )
            ready = self._selector.select(patience)
            for key, _ in ready:
                self._receive(key.data)
            if not ready:
                for worker in list(self._workers):
                    if not worker.process.is_alive():
                        self._replace(worker)
            if run.made is None and run is not self._runs[0]:
                run = self._runs[0]  # it was split after a death
        return run.made

    def _receive(self, worker: _Worker) -> None:
        try:
            made: Made = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._replace(worker)
            return
        self._take(worker, made)

    def _take(self, worker: _Worker, made: Made) -> None:
        run = worker.runs.popleft()
        run.made, run.worker = made, None
        worker.peak = made.peak
        if made.batches:
            latest = made.seconds / len(made.batches)
            before = latest if self._batch_seconds is None else self._batch_seconds
            self._batch_seconds = 0.7 * before + 0.3 * latest
            self._batch_bytes = max(self._batch_bytes, made.size // len(made.batches))
        if not run.wanted:
            self._give_back(run)

    def _forget(self) -> None:
        """Leave what is on its way to nobody: its segments come back as it arrives."""
        for run in self._runs:
            run.wanted = False
            if run.made is not None:
                self._give_back(run)
        self._runs = deque()

    # --- memory ----------------------------------------------------------------------------

    def _choose_segment(self, run: _Run) -> int | None:
        if not self._batch_bytes or not self._shared:
            return None  # the first ones tell how large batches are
        while self._foreign:
            self._drop_segment(self._foreign.popleft())
        wanted = run.count * (self._batch_bytes + self._batch_bytes // 4)
        if self._free:
            number = self._free.popleft()
            if self._segments[number].size >= wanted:
                return number
            self._drop_segment(number)
        elif len(self._segments) >= self.ahead * len(self._workers) + _KEPT + 1:
            return None
        try:
            segment = Segment(wanted)
        except OSError:
            self._shared = False  # then everything goes through pipes: slower, and it works
            return None
        number = self._next_segment
        self._next_segment += 1
        self._segments[number] = segment
        return number

    def _drop_segment(self, number: int) -> None:
        self._segments.pop(number).close()
        for worker in self._workers:
            if number in worker.mapped:
                worker.mapped.discard(number)
                worker.gone.append(number)

    def _memory_of(self, run: _Run, made: Made) -> Incoming | None:
        """The memory of a message that is about to be read."""
        if run.segment is None or not made.used:
            self._give_back(run)
            return None
        segment = self._segments[run.segment]
        if self.landing.copies:
            memory = self.landing.copy(segment.array()[: made.used])
            self._give_back(run)
            return memory
        # whoever keeps batches shall keep neither the segments nor whole messages
        alone = len(self._lent) >= _KEPT
        self._lent.add(run.segment)
        back = partial(_returned, self._lent, self._free, self._foreign, run.segment, forks.count)
        return self.landing.share(segment.lend(back), alone)

    def _give_back(self, run: _Run) -> None:
        if run.segment is not None:
            self._free.append(run.segment)

    # --- workers ---------------------------------------------------------------------------

    def _open(self) -> None:
        self._whole = True
        self._free: deque[int] = deque()  # segments; appended to by who drops the last tensor
        self._foreign: deque[int] = deque()  # the same, of what a fork may still read
        self._lent: set[int] = set()  # segments in which the reader still holds something
        with _descriptors_left():
            self._selector = selectors.DefaultSelector()
        try:
            for number in range(self._number):
                self._workers.append(self._start(number))
        except BaseException:
            self.close()
            raise

    def _start(self, number: int) -> _Worker:
        method = self._context.get_start_method()
        with _descriptors_left(), mkl.same_in_children():
            ours, theirs = self._context.Pipe(duplex=True)
            if method != "fork":  # what these start lives on: not with our signals held back
                resource_tracker.ensure_running()
            if method == "forkserver":
                forkserver.ensure_running()
            own = self._first, torch.get_default_dtype(), mkl.avx512_enabled()
            process: Any = self._context.Process(
                target=work,
                args=(theirs, os.getpid(), number, self.maker, self.plan, *own),
                name=f"metabatch-worker-{number}",
                daemon=True,
            )
            try:
                with signals_held_back():
                    process.start()
            except Exception as error:
                culprit = unsendable(self.maker, self._first) if method != "fork" else None
                if culprit is None:
                    raise
                raise TypeError(
                    f"{culprit} cannot be sent to a worker that is started by {method}: {error}; "
                    "use a function or class at the top of a module, or "
                    "multiprocessing_context='fork'"
                ) from error
        theirs.close()
        worker = _Worker(number, process, ours)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, dead: _Worker) -> None:
        """A new worker in the place of a dead one, for what that one still had to make."""
        while dead.connection.poll():  # what it had sent in full counts
            try:
                self._take(dead, pickle.loads(dead.connection.recv_bytes()))
            except (EOFError, OSError):
                break
        place = self._workers.index(dead)
        del self._workers[place]
        self._selector.unregister(dead.connection)
        dead.connection.close()
        dead.process.join(_CLOSE_WITHIN)
        dead.process.kill()
        dead.process.join()
        code = dead.process.exitcode
        dead.process.close()
        unmade = list(dead.runs)
        for run in unmade:
            self._give_back(run)
            run.segment = None
        if unmade:
            culprit = unmade[0]
            culprit.deaths += 1
            if culprit.deaths >= _DEATHS:  # an error when its turn comes: not before
                error = WorkerDied(self._obituary(dead, culprit, code))
                failure = Failure(error, f"in worker {dead.number}")
                culprit.made = Made([], failure, 0, 0, 0.0, dead.peak)
                del unmade[0]
        self._workers.insert(place, self._start(dead.number))
        for run in unmade:
            if run.wanted:
                self._order_again(run)

    def _order_again(self, run: _Run) -> None:
        if run.deaths and run.count > 1:
            # one step at a time, so that it shows which of them kills
            place = self._runs.index(run)
            del self._runs[place]
            for step in reversed(range(run.start, run.start + run.count)):
                part = _Run(step, 1, run.deaths if step == run.start else 0)
                self._runs.insert(place, part)
            for part in list(self._runs)[place : place + run.count]:
                self._order(part)
        else:
            self._order(run)

    def _obituary(self, dead: _Worker, run: _Run, code: int | None) -> str:
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"killed by {_name_of_signal(-code)}"
        hint = ""
        if code == -signal.SIGKILL:
            hint = " (as by the kernel where memory runs out: fewer workers, a smaller batch)"
        # also what died before it could say how much it used, where it is a child of this process
        peak = max(dead.peak, peak_mib(resource.RUSAGE_CHILDREN))
        return (
            f"{run.deaths} workers in a row died, the last one {how}{hint}; they had used up to "
            f"{peak:,} MiB each, and were to create {self.plan.spec(run.start)} of "
            f"{type(self.maker.taskset).__name__}"
        )

    # --- the end ---------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers and give their memory back."""
        workers, self._workers = self._workers, []
        if os.getpid() != self._owner:  # a fork's copy: the workers are not its children
            return
        self._forget()
        self._selector.close()
        for worker in workers:
            with suppress(OSError):
                worker.connection.send(None)
            worker.connection.close()
        deadline = time.monotonic() + _CLOSE_WITHIN
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.process.close()
        for segment in self._segments.values():
            segment.close()
        self._segments = {}


def start_context(given: Any) -> Any:
    """How to start processes: as `given`, a method or a context, else as Python does by default.

    A job of joblib's has a default of joblib's own, whose processes can't be killed or closed.
    """
    if given is not None:
        return multiprocessing.get_context(given) if isinstance(given, str) else given
    context = multiprocessing.get_context()
    methods = multiprocessing.get_all_start_methods()  # the first is the system's default
    known = context.get_start_method() in methods
    return context if known else multiprocessing.get_context(methods[0])


class _Forks:
    """Counts the forks of this process: what was lent before one is no longer only its reader's."""

    def __init__(self) -> None:
        self.count = 0
        os.register_at_fork(before=self._add)

    def _add(self) -> None:
        self.count += 1


forks = _Forks()


def _returned(
    lent: set[int], free: deque[int], foreign: deque[int], number: int, count: int
) -> None:
    # called by whoever drops the last tensor, in any thread
    lent.discard(number)
    (free if count == forks.count else foreign).append(number)


@contextmanager
def _descriptors_left() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise OSError(
            error.errno,
            f"no file descriptor is left for workers: this process may have {limit} (ulimit -n); "
            "raise that, close files, or use fewer workers",
        ) from error


def _name_of_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
