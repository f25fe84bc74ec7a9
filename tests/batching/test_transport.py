"""Transport: the same batches whatever dies or runs out on the way, and nothing left over."""

from __future__ import annotations

import errno
import gc
import hashlib
import itertools
import multiprocessing
import os
import random
import re
import signal
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import TaskLoader, digest
from metabatch_cli.batching import transport as transport_module
from metabatch_cli.batching import worker as worker_module
from metabatch_cli.batching.shared import receive_descriptor
from metabatch_cli.batching.transport import Transport, WorkerDied
from tasksets.functions import Functions, Sine
from tests.batching.examples import Draws, Waves, digests, first, quietly
from tests.batching.faults import (
    Dies,
    Grows,
    Rows,
    descriptors,
    ended,
    lives,
    mappings,
    memory,
    pids,
    script,
    session,
    until,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")

# of the others, test_promises.py has the essence; here, every process of theirs imports torch
METHODS = ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
every_method = pytest.mark.parametrize("method", METHODS)


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


def killed(pid: int, number: int = signal.SIGKILL) -> None:
    """Kill a process and wait until it is dead, but leave it to its parent to bury."""
    os.kill(pid, number)
    until(lambda: not lives(pid))


@pytest.fixture
def no_shared_memory(monkeypatch):
    """A system that has no memory to share: everything travels through pipes."""

    def refuse(size: int) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(transport_module, "Segment", refuse)


# --- who dies ----------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_killed_at_any_moment_change_no_batch(method, persistent):
    chance = random.Random(f"{method}{persistent}")
    steps, kills = 400, 6 if method == "fork" else 2
    # far enough apart for the next batch to come in between: three deaths without one are refused
    when = {1 + 10 * number + chance.randrange(3) for number in range(kills)}
    found, dead, due = [], set(), 0
    with TaskLoader(
        Draws(23),
        batch_size=4,
        shuffle=True,
        n_batches=steps,
        workers=2,
        multiprocessing_context=method,
        persistent_workers=persistent,
        worker_init_fn=quietly,
    ) as tested:
        for step, batch in enumerate(tested):
            found.append(digest(batch))
            due += step in when
            living = [pid for pid in pids(tested) if pid not in dead]
            if due and living:  # else they are not replaced yet: a later one has to die
                victim = chance.choice(living)
                dead.add(victim)
                due -= 1
                # without waiting: it is in the middle of whatever it does
                os.kill(victim, chance.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]))
        again = first(tested, steps)
    assert found == again
    assert len(dead) >= 2


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGKILL, signal.SIGSEGV]])
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_all_workers_killed_at_once_are_all_replaced(signals, steps):
    with TaskLoader(
        Waves(None),
        batch_size=4,
        workers=len(signals) + 1,
        prefetch_factor=3,
        worker_init_fn=quietly,
    ) as tested:
        batches = tested.stream()
        found = digests(islice(batches, steps))
        early = pids(tested)
        for pid, number in zip(early, itertools.cycle(signals), strict=False):
            killed(pid, number)
        found += digests(islice(batches, 200))
        assert not set(early) & set(pids(tested))
        assert not any(map(lives, early))
    assert found == first(tested, steps + 200)


def test_an_idle_worker_that_was_killed_is_replaced():
    with TaskLoader(Waves(), batch_size=4, workers=2, persistent_workers=True) as tested:
        expected = first(tested, 12)
        assert digests(tested) == expected[:6]
        idle = pids(tested)
        until(lambda: all(not w.runs for w in tested._open_transports[0]._workers))
        killed(idle[0])
        assert digests(tested) == expected[6:]
        assert idle[0] not in pids(tested)
        assert idle[1] in pids(tested)


@pytest.mark.usefixtures("no_shared_memory")
@pytest.mark.parametrize("steps", [0, 5])
def test_a_worker_killed_in_the_middle_of_a_large_message_sends_it_again(steps):
    with TaskLoader(Rows(width=1 << 21), batch_size=1, workers=1, prefetch_factor=1) as tested:
        batches = tested.stream()
        found = digests(islice(batches, steps))
        if not steps:
            found.append(digest(next(batches)))
        transport = tested._open_transports[0]
        run = transport_module._Run(len(found), 1)
        transport._runs.append(run)
        transport._order(run)
        (worker,) = transport._workers
        assert until(lambda: worker.connection.poll(0))  # it has begun, and 8 MB fit into no pipe
        killed(worker.process.pid)
        assert transport._wait_for(run).batches
        transport._runs.popleft()
        found.append(digest(transport._land(run.made.batches[0], None, run.start)))
        assert worker not in transport._workers
    assert found == first(tested, len(found))


@pytest.mark.parametrize("how", ["exit", "SIGKILL", "SIGSEGV", "SIGUSR1"])
@pytest.mark.parametrize("at", [0, 1, 40])
def test_a_task_that_kills_its_worker_once_is_made_by_another(how, at, tmp_path):
    marker = tmp_path / "killed"
    with TaskLoader(Dies(how, at, marker), workers=2) as tested:
        found = digests(islice(tested.stream(), 90))
    assert marker.exists()
    assert found == first(tested, 90)


@pytest.mark.parametrize(
    ("method", "how", "said"),
    [
        *(("fork", *case) for case in [("exit", "exit code 77"), ("SIGKILL", "killed by SIGKILL")]),
        ("fork", "SIGSEGV", "killed by SIGSEGV"),
        ("fork", "SIGRTMAX", f"killed by (SIGRTMAX|signal {int(signal.SIGRTMAX)})"),
        pytest.param("spawn", "exit", "exit code 77", marks=pytest.mark.slow),
        pytest.param("forkserver", "SIGKILL", "killed by SIGKILL", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("at", [0, 40])
def test_a_task_that_always_kills_its_worker_is_named_after_the_batches_before_it(
    method, how, said, at
):
    if at == 0 and method != "fork":
        pytest.skip("slow to start, and no other than with fork")
    gc.collect()
    before, alive, found = descriptors(), children(), []
    with TaskLoader(Dies(how, at), workers=2, multiprocessing_context=method) as tested:
        with pytest.raises(WorkerDied, match=said) as error:
            found += map(digest, tested.stream())
        assert children() == alive
        assert found == first(TaskLoader(Rows()), at)
    message = str(error.value)
    assert message.startswith("3 workers in a row died")
    assert ("memory runs out" in message) == (how == "SIGKILL")
    assert f"step={at}, " in message
    assert f"indices=[{at}])" in message
    assert message.count("BatchSpec") == 1
    used = int(re.search(r"up to ([\d,]+) MiB", message)[1].replace(",", ""))
    assert used > 10 or method == "forkserver"
    del error
    gc.collect()
    if method == "fork":
        assert descriptors() == before


class DiesLater(Rows):
    """The third task kills; the first takes its time, until the third was killed thrice."""

    def __init__(self, folder: Path) -> None:
        super().__init__(8)
        self.folder = folder

    def __gettask__(self, index, n_context, n_target):
        if index == 3:
            (self.folder / str(os.getpid())).touch()
            os._exit(1)
        if index == 0:
            until(lambda: len(list(self.folder.iterdir())) >= 3)
            for file in self.folder.iterdir():  # until the main process has seen each death
                until(lambda pid=file.name: not Path("/proc", pid).exists())
        return super().__gettask__(index, n_context, n_target)


def test_a_death_over_a_later_step_takes_nothing_from_the_ones_before(tmp_path):
    found: list[int] = []
    with TaskLoader(DiesLater(tmp_path), workers=2, prefetch_factor=4) as tested:
        with pytest.raises(WorkerDied, match=r"step=3, "):
            found += (batch["index"].item() for batch in tested)
        assert found == [0, 1, 2]
        assert tested.state_dict()["step"] == 3


def test_a_loader_can_be_read_on_after_its_workers_died():
    tested = TaskLoader(Dies("exit", 3), workers=2, persistent_workers=True)
    with tested:
        with pytest.raises(WorkerDied):
            list(tested.stream())
        tested.load_state_dict(tested.state_dict() | {"step": 4})
        assert digests(islice(tested.stream(), 20)) == [
            digest(TaskLoader(Rows()).batch_at(step)) for step in range(4, 24)
        ]


def test_persistent_workers_are_new_after_an_interruption(monkeypatch):
    take = Transport._take
    interrupted = []

    def interrupt(*arguments: Any) -> None:
        if len(interrupted) == 7:
            interrupted.append(8)
            raise KeyboardInterrupt  # the message was read, and is lost
        interrupted.append(1)
        take(*arguments)

    monkeypatch.setattr(Transport, "_take", interrupt)
    with TaskLoader(Rows(40), workers=2, persistent_workers=True) as tested:
        found = []
        with pytest.raises(KeyboardInterrupt):
            found += map(digest, tested)
        early = pids(tested)
        state = tested.state_dict()
        tested.load_state_dict(state)
        found = digests(tested)
        assert found == first(tested, 40)[state["step"] :]
        assert not set(early) & set(pids(tested))
        assert not any(map(lives, early))


# --- what runs out -----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_shared_memory")
@pytest.mark.parametrize("kind", [Waves, Draws, Grows])
def test_without_memory_to_share_everything_goes_through_pipes(kind):
    with TaskLoader(kind(None), batch_size=1, workers=2) as tested:
        batches = tested.stream()
        assert digests(islice(batches, 220)) == first(tested, 220)
        assert mappings() == 0
        assert not tested._open_transports[0]._shared


NO_FILES = """
import resource
from itertools import islice
from metabatch_cli.batching import TaskLoader
from tests.batching.examples import Waves, digests, first

tested = TaskLoader(Waves(None), batch_size=4, workers=2)
expected = first(tested, 60)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
with tested:
    batches = tested.stream()
    assert digests(islice(batches, 60)) == expected
    assert not tested._open_transports[0]._shared
print("done")
"""


def test_memory_that_really_runs_out_changes_no_batch():
    output, errors = ended(script(NO_FILES))
    assert output == "done\n", errors


FEW_DESCRIPTORS = """
import os, resource
from itertools import islice
from metabatch_cli.batching import TaskLoader
from tests.batching.examples import Waves, digests, first

expected = first(TaskLoader(Waves(None), batch_size=4), 40)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
before = len(os.listdir("/proc/self/fd"))
for more in range(40):
    if pid := os.fork():  # multiprocessing itself leaves descriptors open where it has too few
        assert os.waitpid(pid, 0)[1] == 0
        continue
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + more, hard))
    tested = TaskLoader(Waves(None), batch_size=4, workers=2)
    try:
        batches = tested.stream()
        assert digests(islice(batches, 40)) == expected
        said = "shared" if tested._open_transports[0]._shared else "piped"
    except OSError as error:
        said = "refused"
        assert f"this process may have {before + more} (ulimit -n)" in str(error), str(error)
    tested.close()
    os.write(1, f"{said} ".encode())
    os._exit(0)
"""


@pytest.mark.slow
def test_few_descriptors_are_enough_or_named():
    output, errors = ended(script(FEW_DESCRIPTORS))
    found = output.split()
    assert "Traceback" not in errors
    assert len(found) == 40
    assert set(found) == {"refused", "piped", "shared"}
    assert found == sorted(found, key=["refused", "piped", "shared"].index)


@pytest.mark.parametrize("missing", ["descriptor", "memory"])
def test_a_worker_that_cannot_map_a_segment_sends_by_pipe(missing, monkeypatch):
    def lose(connection: Any) -> None:
        os.close(receive_descriptor(connection))

    def refuse(size: int, descriptor: int) -> None:
        os.close(descriptor)
        raise OSError(errno.ENOMEM, "no memory")

    # in a worker, which inherits it by the fork; the main process has its own names for them
    if missing == "descriptor":
        monkeypatch.setattr(worker_module, "receive_descriptor", lose)
    else:
        monkeypatch.setattr(worker_module, "Segment", refuse)
    with TaskLoader(Rows(), workers=2, multiprocessing_context="fork") as tested:
        batches, early = tested.stream(), None
        for step in range(100):
            assert digest(next(batches)) == digest(tested.batch_at(step))
            early = early or pids(tested)
        assert pids(tested) == early
        assert tested._open_transports[0]._segments


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_may_become_a_thousand_times_larger_or_empty(workers):
    with TaskLoader(Grows(None, width=500), batch_size=1, workers=workers) as tested:
        assert digests(islice(tested.stream(), 260)) == first(tested, 260)


def test_batches_of_nothing_at_all_arrive():
    def nothing(tasks: list[Any]) -> dict[str, Any]:
        return {"tensor": torch.zeros(0, 3), "array": np.zeros((0, 2)), "none": None}

    with TaskLoader(Rows(), batch_size=2, workers=2, collate_fn=nothing) as tested:
        assert digests(islice(tested.stream(), 100)) == [digest(nothing([]))] * 100


@pytest.mark.parametrize("shared", [True, False])
def test_workers_may_be_further_ahead_than_a_pipe_holds_orders(shared, monkeypatch):
    monkeypatch.setattr(Transport, "_shared", shared, raising=False)
    with TaskLoader(Rows(width=1 << 18), workers=1, prefetch_factor=10_000) as tested:
        batches = tested.stream()
        with ended_within():
            assert digests(islice(batches, 3)) == first(tested, 3)


class ended_within:
    """An error instead of an endless wait."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._too_late)
        signal.alarm(60)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)

    def _too_late(self, *_: object) -> None:
        raise TimeoutError("this never ends")


# --- what cannot be sent -----------------------------------------------------------------------


class Holds(Waves):
    """A task set with a thing that is hard to send."""

    def __init__(self, **things: Any) -> None:
        super().__init__()
        vars(self).update(things)


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("things", "more", "named"),
    [
        ({"good": 3, "transform": lambda x: x}, {}, "Holds.transform"),
        ({"lock": threading.Lock(), "good": 3}, {}, "Holds.lock"),
        ({}, {"worker_init_fn": lambda number: None}, "worker_init_fn"),
    ],
)
def test_what_cannot_be_sent_to_a_new_process_is_named(method, things, more, named):
    before = children()
    with (
        TaskLoader(Holds(**things), workers=2, multiprocessing_context=method, **more) as tested,
        pytest.raises(TypeError, match=f"^{named} cannot be sent .* started by {method}"),
    ):
        next(tested.stream())
    assert children() == before


def test_a_local_class_is_named():
    class Local(Waves):
        pass

    tested = TaskLoader(Local(), workers=1, multiprocessing_context="spawn")
    with pytest.raises(TypeError, match=r"^Local cannot be sent .*multiprocessing_context='fork'"):
        next(tested.stream())


@pytest.mark.slow
def test_tensors_and_locks_of_a_task_set_are_sent_and_nothing_of_them_stays():
    spawn = multiprocessing.get_context("spawn")
    taskset = Holds(table=torch.arange(5), more=torch.ones(3), lock=spawn.Lock())
    seen = []
    for _ in range(3):
        with TaskLoader(taskset, workers=1, multiprocessing_context="spawn") as tested:
            assert digests(islice(tested.stream(), 3)) == first(tested, 3)
        gc.collect()
        seen.append(descriptors())
    assert seen[2] == seen[1]


class OnGpu(torch.Tensor):
    is_cuda = True


@every_method
def test_a_task_set_that_lies_on_a_gpu_is_refused(method):
    taskset = Holds(table=torch.ones(2).as_subclass(OnGpu))
    tested = TaskLoader(taskset, workers=1, multiprocessing_context=method)
    with pytest.raises(ValueError, match=r"Holds\.table lies on a GPU.*workers=0"):
        next(tested.stream())


# --- errors ------------------------------------------------------------------------------------


class TwoNames(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Decorated(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(f"decorated {text}")


class KeepsThings(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.held = lambda: text


class Raises(Rows):
    def __init__(self, error: str) -> None:
        super().__init__()
        self.error = error

    def __gettask__(self, index, n_context, n_target):
        if index == 3:
            self.fail_here()
        return super().__gettask__(index, n_context, n_target)

    def fail_here(self) -> None:
        raise {
            "value": lambda: ValueError("wrong", 3),
            "key": lambda: KeyError("who"),
            "stop": lambda: StopIteration(5),
            "two": lambda: TwoNames("this", "that"),
            "decorated": lambda: Decorated("text"),
            "keeps": lambda: KeepsThings("text"),
            "file": lambda: FileNotFoundError(2, "No such file", "/nowhere"),
        }[self.error]()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        ("value", ValueError, "('wrong', 3)"),
        ("key", KeyError, "'who'"),
        ("file", FileNotFoundError, "[Errno 2] No such file: '/nowhere'"),
        ("two", RuntimeError, "TwoNames: this and that"),
        ("decorated", RuntimeError, "Decorated: decorated text"),
        ("keeps", RuntimeError, "KeepsThings: text"),
    ],
)
def test_an_error_keeps_its_type_or_at_least_its_text(error, kind, text):
    with TaskLoader(Raises(error), workers=2) as tested:
        batches = tested.stream()
        assert digests(islice(batches, 3)) == first(TaskLoader(Rows()), 3)
        with pytest.raises(kind) as raised:
            next(batches)
    assert type(raised.value) is kind
    assert str(raised.value) == text
    notes = "\n".join(raised.value.__notes__)
    assert notes.count("while creating BatchSpec(step=3, ") == 1
    assert "in fail_here" in notes  # the worker's traceback
    assert re.search(r"in worker \d:", notes)


def fails(number: int) -> None:
    raise LookupError(f"no seat for worker {number}")


@every_method
def test_an_error_in_worker_init_fn_is_raised_here(method):
    tested = TaskLoader(
        Rows(), workers=2, worker_init_fn=fails, multiprocessing_context=method, timeout=60
    )
    with tested, pytest.raises(LookupError, match="no seat for worker 0") as error:
        next(tested.stream())
    notes = "\n".join(error.value.__notes__)
    assert notes.count("in worker_init_fn(0)") == 1
    assert "in fails" in notes


class Choosy:
    """Can be sent, but not received."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("not here")


def test_what_cannot_be_received_names_the_spec():
    def collate(tasks: list[Any]) -> Any:
        return Choosy() if tasks[0]["index"] == 3 else len(tasks)

    with TaskLoader(Rows(), workers=2, collate_fn=collate) as tested:
        batches = tested.stream()
        assert list(islice(batches, 3)) == [1, 1, 1]
        with pytest.raises(LookupError, match="not here") as error:
            next(batches)
    assert "BatchSpec(step=3, " in "\n".join(error.value.__notes__)


# --- how many batches make a message -----------------------------------------------------------


@pytest.fixture
def messages(monkeypatch):
    """What arrives while a test runs: (worker, first step, batches)."""
    found: list[tuple[int, int, int]] = []
    take = Transport._take

    def note(self: Transport, worker: Any, made: Any) -> None:
        found.append((worker.number, worker.runs[0].start, len(made.batches)))
        take(self, worker, made)

    monkeypatch.setattr(Transport, "_take", note)
    return found


def test_tiny_batches_travel_many_a_message(messages, monkeypatch):
    monkeypatch.setattr(transport_module, "_MESSAGE_SECONDS", 100.0)  # however slow this machine
    with TaskLoader(Waves(None), batch_size=4, workers=2) as tested:
        assert digests(islice(tested.stream(), 500)) == first(tested, 500)
    assert max(count for _, _, count in messages) == transport_module._MESSAGE_BATCHES
    assert messages[0][2] == 1  # nobody waits for the first one longer than it takes


def test_slow_batches_travel_alone(messages, monkeypatch):
    monkeypatch.setattr(transport_module, "_MESSAGE_SECONDS", 0.0)
    with TaskLoader(Waves(None), batch_size=4, workers=2) as tested:
        assert digests(islice(tested.stream(), 50)) == first(tested, 50)
    assert {count for _, _, count in messages} == {1}


def test_heavy_batches_travel_alone(messages):
    with TaskLoader(Rows(width=1 << 18), batch_size=1, workers=2) as tested:
        assert digests(islice(tested.stream(), 30)) == first(tested, 30)
    assert {count for _, _, count in messages} == {1}


def test_a_short_epoch_is_shared_between_the_workers(messages, monkeypatch):
    monkeypatch.setattr(transport_module, "_MESSAGE_SECONDS", 100.0)
    with TaskLoader(Waves(), batch_size=4, workers=2, persistent_workers=True) as tested:
        for epoch in range(4):
            messages.clear()
            assert digests(tested) == first(tested, 6 * (epoch + 1))[6 * epoch :]
            assert {number for number, _, _ in messages} == {0, 1}
            assert sum(count for _, _, count in messages) == 6
            assert max(count for _, _, count in messages) <= 3


@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    workers=st.integers(1, 3),
    prefetch=st.integers(1, 4),
)
def test_batches_do_not_depend_on_how_many_make_a_message(lengths, workers, prefetch):
    cycle = itertools.cycle(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "_choose_length", lambda self, left: min(next(cycle), left))
        with TaskLoader(
            Grows(None, width=20), batch_size=1, workers=workers, prefetch_factor=prefetch
        ) as tested:
            assert digests(islice(tested.stream(), 250)) == first(tested, 250)


# --- the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "collect", "error", "break", "exhaust", "died"])
@pytest.mark.parametrize("persistent", [False, True])
def test_nothing_is_left_but_what_is_held(how, persistent):
    gc.collect()
    before = children(), descriptors(), mappings()

    def read() -> Any:
        kind = {"error": Raises("value"), "died": Dies("exit", 3)}.get(how, Rows(400))
        tested = TaskLoader(kind, workers=2, persistent_workers=persistent)
        kept = None
        try:
            for step, batch in enumerate(tested):
                if step == 200:
                    kept = batch
                    if how in ("break", "collect"):
                        break
        except (ValueError, WorkerDied):
            pass
        if how != "collect":
            tested.close()
        return kept

    kept = read()
    gc.collect()
    assert children() == before[0]
    if kept is not None:
        assert mappings() <= before[2] + 1
        assert kept["index"].item() == 200
    del kept
    gc.collect()
    assert (children(), descriptors(), mappings()) == before


def reads_on(batches: Any, result: Any) -> None:
    found = 0
    try:
        for _ in batches:  # of the message that the parent is reading, no other
            found += 1
    except RuntimeError as error:
        result.send((found, str(error)))
    gc.collect()


def in_a_fork(function: Any, *arguments: Any) -> Any:
    """What a function sends when it is called in a process forked from this one."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=function, args=(*arguments, theirs))
    child.start()
    assert ours.poll(60)
    answer = ours.recv()
    child.join()
    assert child.exitcode == 0
    return answer


def closes(loader: TaskLoader, result: Any) -> None:
    loader.close()
    gc.collect()
    result.send("closed")


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("how", ["reads on", "closes", "ends"])
def test_a_process_forked_in_the_middle_disturbs_nothing(how, persistent):
    with TaskLoader(Waves(None), batch_size=4, workers=2, persistent_workers=persistent) as tested:
        batches = tested.stream()
        found = digests(islice(batches, 10))
        workers = pids(tested)
        if how == "reads on":
            read, said = in_a_fork(reads_on, batches)
            assert read <= transport_module._MESSAGE_BATCHES
            assert "forked from" in said
        elif how == "closes":
            assert in_a_fork(closes, tested) == "closed"
        else:
            pid = os.fork()
            if pid == 0:
                del batches, tested
                gc.collect()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        found += digests(islice(batches, 100))
        assert pids(tested) == workers
        assert found == first(tested, 110)


def reads(loader: TaskLoader, result: Any) -> None:
    found = digests(loader)
    loader.close()
    result.send(found)


def test_persistent_workers_serve_no_fork_which_starts_its_own():
    with TaskLoader(Waves(), batch_size=4, workers=2, persistent_workers=True) as tested:
        assert len(list(tested)) == 6
        assert in_a_fork(reads, tested) == first(tested, 12)[6:]
        assert digests(tested) == first(tested, 12)[6:]


ENDLESS = """
import sys
from pathlib import Path
from metabatch_cli.batching import TaskLoader
from tests.batching.faults import Endless

if __name__ == "__main__":
    taskset = Endless(3, Path(sys.argv[2]))
    tested = TaskLoader(taskset, workers=2, multiprocessing_context=sys.argv[1])
    for batch in tested.stream():
        pass
"""


@every_method
def test_workers_do_not_outlive_a_killed_main_process_even_in_an_endless_task(method, tmp_path):
    marker = tmp_path / "begun"
    process = script(ENDLESS, method, marker)
    try:
        until(marker.exists)
        assert len(session(process.pid)) >= 3
        process.kill()
        until(lambda: not session(process.pid), seconds=10)
    finally:
        ended(process)


INTERRUPTED = """
import sys
from itertools import islice
from pathlib import Path
from metabatch_cli.batching import TaskLoader
from tests.batching.faults import Endless

if __name__ == "__main__":
    taskset = Endless(int(sys.argv[3]), Path(sys.argv[2]))
    tested = TaskLoader(taskset, workers=2, multiprocessing_context=sys.argv[1])
    try:
        with tested:
            batches = tested.stream()
            next(batches)
            Path(sys.argv[2]).touch()
            for _ in batches:
                pass
    except KeyboardInterrupt:
        print("interrupted")
"""


@every_method
@pytest.mark.parametrize("at", [3, 10**9], ids=["in a task", "while reading"])
def test_ctrl_c_prints_nothing_from_workers(method, at, tmp_path):
    marker = tmp_path / "begun"
    process = script(INTERRUPTED, method, marker, at)
    until(marker.exists)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process) == ("interrupted\n", "")


TERMINATED = """
import os, signal, sys
from itertools import islice
from metabatch_cli.batching import TaskLoader
from metabatch_cli.batching.transport import Transport
from tests.batching.examples import Waves, digests, first

if __name__ == "__main__":
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    tested = TaskLoader(Waves(), batch_size=4, workers=2, multiprocessing_context=sys.argv[1])
    start, replace = Transport._start, Transport._replace

    def start_and_stop(*arguments):
        worker = start(*arguments)
        os.killpg(0, signal.SIGTERM)  # as a scheduler does, at the worst moment
        return worker

    def replaced(*arguments):
        print("a worker died")
        replace(*arguments)

    Transport._start, Transport._replace = start_and_stop, replaced
    with tested:
        assert digests(islice(tested.stream(), 20)) == first(tested, 20)
    print("finished", len(stops) > 0)
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_sigterm_to_all_at_start_up_lets_the_main_process_finish_its_step(method):
    assert ended(script(TERMINATED, method)) == ("finished True\n", "")


# --- for hours ---------------------------------------------------------------------------------


def rolling(batches: Any, steps: int) -> Any:
    """The SHA-256 of all batches in order, as it grows."""
    sha = hashlib.sha256()
    for batch in islice(batches, steps):
        sha.update(digest(batch).encode())
        yield sha.hexdigest()


@pytest.mark.slow
def test_soak():
    """`METABATCH_SOAK=5000 pytest -m slow -k soak` for as many batches."""
    steps = int(os.environ.get("METABATCH_SOAK", "200000"))
    taskset = Functions(Sine((0.1, 5.0), (0.0, 3.14), 1.0, 0.0), 3, 20, 40)
    arguments = {"batch_size": 16, "seed": 11}
    chance = random.Random(steps)
    kills = set(chance.sample(range(1, steps), 10))
    named, seen = set(os.listdir("/dev/shm")), []
    with TaskLoader(taskset, **arguments, workers=2) as tested:
        undisturbed = rolling(TaskLoader(taskset, **arguments).stream(), steps)
        expected = None
        disturbed = rolling(tested.stream(), steps)
        for step, (found, expected) in enumerate(zip(disturbed, undisturbed, strict=True)):
            if step % 1000 == 0:
                assert found == expected, f"at step {step} the latest"
            if step in kills:
                living = [pid for pid in pids(tested) if lives(pid)]
                for victim in chance.sample(living, min(len(living), 1)):
                    os.kill(victim, signal.SIGKILL)
            if step in (steps // 4, steps - 1):
                own = [os.getpid(), *(pid for pid in pids(tested) if lives(pid))]
                seen.append((descriptors(), mappings(), memory(own[0]), max(map(memory, own[1:]))))
        assert found == expected
    early, late = seen
    assert late[0] <= early[0] + 2  # a segment on its way in or out
    assert late[1] <= early[1] + 1
    assert late[2] <= early[2] + 16_384
    assert late[3] <= early[3] + 16_384
    mine = {str(os.getpid())}
    assert not [n for n in set(os.listdir("/dev/shm")) - named if mine & set(n.split("_"))]
