"""The seven promises of the loader, each as one property over everything that may not matter.

What is compared are SHA-256 over the bytes of the batches, in order.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import StateMismatch, TaskLoader, digest
from metabatch_cli.batching.task import concatenate
from metabatch_cli.batching.transport import WorkerDied
from tests.batching.examples import (
    KINDS,
    Draws,
    Waves,
    digests,
    first,
    global_draws,
    global_states,
    quietly,
)

both = pytest.mark.parametrize("kind", KINDS)
UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking would start many processes
few = settings(max_examples=8, phases=UNSHRUNK, suppress_health_check=[HealthCheck.too_slow])

workers = st.sampled_from([0, 1, 3])
prefetch = st.sampled_from([1, 4])
lengths = st.none() | st.integers(13, 40)
epochs = st.none() | st.integers(1, 6)
PATIENCE = 20.0  # seconds until something that must happen has failed to


def read(loader: TaskLoader, steps: int) -> list[str]:
    """Digests of the next steps, through all epochs."""
    return digests(islice(loader.stream(), steps))


def until(condition) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- 1. the same for any number of workers, prefetch, start method, pinned or not, as batch_at ----


@both
@few
@given(
    workers=workers,
    prefetch_factor=prefetch,
    pin_memory=st.booleans(),
    persistent_workers=st.booleans(),
    n_tasks=lengths,
    n_batches=epochs,
    seed=st.integers(-(2**64), 2**64),
)
def test_1_workers_and_prefetching_change_no_byte(kind, n_tasks, n_batches, seed, **free):
    fixed = {"batch_size": 4, "shuffle": True, "n_batches": n_batches, "seed": seed}
    expected = first(TaskLoader(kind(n_tasks), **fixed), 30)
    with TaskLoader(kind(n_tasks), **fixed, **free) as tested:
        assert read(tested, 30) == expected


@both
@pytest.mark.parametrize(
    "method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)]
)
def test_1_the_start_method_changes_no_byte(kind, method):
    fixed = {"batch_size": 4, "shuffle": True, "seed": 3}
    with TaskLoader(kind(), **fixed, workers=3, multiprocessing_context=method) as tested:
        assert read(tested, 30) == first(TaskLoader(kind(), **fixed), 30)


class Precise(Waves):
    """Draws in torch's default type of floats."""

    def __gettasks__(self, indices, n_context, n_target, generator):
        tasks = super().__gettasks__(indices, n_context, n_target, generator)
        return tasks._replace(target_x=torch.rand(len(indices), n_target, 1, generator=generator))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_1_the_default_type_of_floats_is_that_of_the_program(method):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        expected = first(TaskLoader(Precise(), batch_size=4), 3)
        with TaskLoader(
            Precise(), batch_size=4, workers=1, multiprocessing_context=method
        ) as tested:
            assert read(tested, 3) == expected
    finally:
        torch.set_default_dtype(before)


class Strided(Waves):
    def __gettasks__(self, indices, *sizes, **more):
        tasks = super().__gettasks__(indices, *sizes, **more)
        return tasks._replace(target_y=tasks.target_y.transpose(0, 1).contiguous().transpose(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_1_batches_lie_in_memory_alike_whoever_makes_them(workers):
    # sums over other strides may round otherwise
    with TaskLoader(Strided(), batch_size=4, workers=workers) as tested:
        for batch in (next(iter(tested)), tested.batch_at(3)):
            assert all(leaf.is_contiguous() for leaf in [*batch[:4], *batch.aux.values()])


# --- 2. the ranks' parts are one batch, the same for every legal world size -----------------------


@both
@few
@given(
    shards=st.sampled_from([2, 4, 6]),
    n_tasks=lengths,
    n_batches=epochs,
    workers=workers,
    seed=st.integers(0, 2**40),
)
def test_2_ranks_share_one_global_batch(kind, shards, n_tasks, n_batches, workers, seed):
    fixed = {"batch_size": 12, "shards": shards, "n_batches": n_batches, "seed": seed}
    fixed |= {"shuffle": True, "drop_last": True}
    alone = list(islice(TaskLoader(kind(n_tasks), **fixed).stream(), 5))
    for world_size in [size for size in range(1, shards + 1) if shards % size == 0]:
        ranks = [
            TaskLoader(
                kind(n_tasks),
                **fixed,
                rank=rank,
                world_size=world_size,
                workers=workers if rank == 0 else 0,
            )
            for rank in range(world_size)
        ]
        parts = list(zip(*(islice(rank.stream(), 5) for rank in ranks), strict=True))
        assert digests(map(concatenate, map(list, parts))) == digests(alone)
        for step in range(5):
            assert len({tuple(rank.plan.sizes(step).items()) for rank in ranks}) == 1


# --- 3. killed at any step, restarted with other workers and ranks: as if nothing had happened ----

KILLED = """
import json, os, sys
from metabatch_cli.batching import TaskLoader, digest
from tests.batching import examples

kind, arguments, state, steps, out = json.loads(sys.argv[1])
loader = TaskLoader(getattr(examples, kind)(), **arguments)
if state:
    loader.load_state_dict(state)
batches = loader.stream()
with open(out, "w") as file:
    for step in range(steps + 1):
        if step:
            found = digest(next(batches))
            print(json.dumps([found, loader.state_dict()]), file=file, flush=True)
        else:
            print(json.dumps(["", loader.state_dict()]), file=file, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", [Draws, pytest.param(Waves, marks=pytest.mark.slow)])
@settings(max_examples=2, phases=UNSHRUNK, deadline=None)
@given(
    legs=st.lists(st.tuples(st.sampled_from([0, 1, 5, 6, 7, 11]), workers), min_size=3, max_size=3)
)
def test_3_killed_and_restarted_it_goes_on_as_if_nothing_had_happened(kind, legs, tmp_path_factory):
    fixed = {"batch_size": 4, "shuffle": True, "seed": 9}  # 23 tasks: epochs of six batches
    found, state = [], None
    for steps, count in legs:
        out = tmp_path_factory.mktemp("killed") / "out"
        words = json.dumps([kind.__name__, {**fixed, "workers": count}, state, steps, str(out)])
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, words],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
        )
        assert ended.returncode == -signal.SIGKILL
        rows = [json.loads(row) for row in out.read_text().splitlines()]
        found += [row[0] for row in rows[1:]]
        state = rows[-1][1]
    assert found == first(TaskLoader(kind(), **fixed), len(found))
    assert state["step"] == len(found)


@few
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 6]), st.integers(0, 4)), min_size=2, max_size=4)
)
def test_3_another_number_of_ranks_goes_on(legs):
    fixed = {"batch_size": 6, "shuffle": True, "shards": 6, "drop_last": True}
    state, found = None, []
    for world_size, steps in legs:
        ranks = [
            TaskLoader(Draws(), **fixed, world_size=world_size, rank=rank)
            for rank in range(world_size)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(state))
        parts = zip(*(islice(rank.stream(), steps) for rank in ranks), strict=True)
        found += digests(map(concatenate, map(list, parts)))
        state = json.dumps(ranks[-1].state_dict())
    assert found == first(TaskLoader(Draws(), **fixed), len(found))


# --- 4. a dead worker is replaced and its batches made again, byte for byte -----------------------


@both
@few
@given(
    workers=st.sampled_from([1, 3]),
    prefetch_factor=prefetch,
    kills=st.lists(st.tuples(st.integers(0, 59), st.sampled_from(["KILL", "SEGV"])), max_size=3),
)
def test_4_dead_workers_are_replaced_and_their_batches_made_again(kind, kills, **free):
    expected = first(TaskLoader(kind(None), batch_size=4), 60)
    before = set(multiprocessing.active_children())
    found = []
    with TaskLoader(kind(None), batch_size=4, worker_init_fn=quietly, **free) as tested:
        for step, batch in enumerate(islice(tested, 60)):
            found.append(digest(batch))
            for _, how in [kill for kill in kills if kill[0] == step]:
                living = set(multiprocessing.active_children()) - before
                for victim in list(living)[:1]:  # none where the last one has just been killed
                    os.kill(victim.pid, getattr(signal, f"SIG{how}"))
    assert found == expected


class Deadly(Waves):
    def __gettasks__(self, indices, *sizes, **more):
        if 20 in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__gettasks__(indices, *sizes, **more)


def test_4_a_batch_that_kills_every_worker_is_named():
    found = []
    said = r"killed by SIGKILL.* MiB.*BatchSpec\(step=5, .*\[20, 21, 22, 23\]\) of Deadly"
    with TaskLoader(Deadly(None), batch_size=4, workers=2) as tested:
        batches = iter(tested)
        found += digests(islice(batches, 5))
        with pytest.raises(WorkerDied, match=said):
            next(batches)
    assert found == first(TaskLoader(Waves(None), batch_size=4), 5)


# --- 5. the program's own random numbers and the loader never touch each other --------------------


@both
@few
@given(workers=workers, seed=st.integers(0, 2**32 - 1))
def test_5_global_random_numbers_and_batches_do_not_touch_each_other(kind, workers, seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    alone = [global_draws() for _ in range(8)]
    states = global_states()
    expected = first(TaskLoader(kind(), batch_size=4, shuffle=True), 8)

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    found, beside = [], []
    with TaskLoader(kind(), batch_size=4, shuffle=True, workers=workers) as tested:
        for batch in islice(tested.stream(), 8):
            found.append(digest(batch))
            beside.append(global_draws())
    assert beside == alone
    assert global_states() == states
    assert found == expected


# --- 6. another law or configuration raises when a state is loaded --------------------------------


@given(
    st.sampled_from(["seed", "batch_size", "n_tasks", "shuffle", "n_batches", "split", "kind"]),
    st.integers(0, 20),
)
def test_6_a_state_of_another_configuration_is_refused(changed, steps):
    fixed = {"batch_size": 4, "shuffle": True, "seed": 1}
    saved = TaskLoader(Waves(), **fixed)
    read(saved, steps)
    other, taskset = dict(fixed), Waves()
    match changed:
        case "seed" | "batch_size":
            other[changed] += 1
        case "shuffle":
            other[changed] = False
        case "n_batches":
            other[changed] = 4
        case "n_tasks":
            taskset = Waves(24)
        case "split":
            taskset = Waves(split="test")
        case "kind":
            taskset, changed = Draws(), "taskset"
    tested = TaskLoader(taskset, **other)
    with pytest.raises(StateMismatch, match=rf"\b{changed} is .* in the state and"):
        tested.load_state_dict(saved.state_dict())
    assert tested.state_dict()["step"] == 0


@pytest.mark.parametrize("law", ["stream_version", "version"])
def test_6_a_state_of_another_law_is_refused(law):
    state = TaskLoader(Waves()).state_dict()
    with pytest.raises(StateMismatch, match=rf"\b{law} is"):
        TaskLoader(Waves()).load_state_dict(state | {law: state[law] + 1})


# --- 7. nothing is left behind --------------------------------------------------------------------

ENDED = """
import os, sys, time
from itertools import islice
from metabatch_cli.batching import TaskLoader
from tests.batching.examples import Draws

if __name__ == "__main__":
    loader = TaskLoader(
        Draws(None), batch_size=4, workers=2, multiprocessing_context=sys.argv[1]
    )
    batches = iter(loader)
    for _ in islice(batches, 40):
        pass
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "exit":
        sys.exit()
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
@pytest.mark.parametrize("end", ["exit", "SIGINT", "SIGKILL"])
def test_7_no_process_and_no_shared_memory_outlives_the_program(method, end, tmp_path):
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, str(script), method, end],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    if end == "SIGINT":  # as a terminal sends it: to the whole group
        os.killpg(process.pid, signal.SIGINT)
    elif end == "SIGKILL":
        process.kill()
    process.wait(PATIENCE)
    assert until(lambda: not any(map(alive, pids)))
    assert "Process metabatch-worker" not in process.stderr.read()  # no traceback of a worker
    assert until(lambda: set(os.listdir("/dev/shm")) <= shared)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")
@both
def test_7_descriptors_stay_flat_while_batches_are_kept(kind):
    kept = []
    with TaskLoader(kind(None), batch_size=4, workers=2) as tested:
        batches = iter(tested)
        kept += islice(batches, 200)
        before = len(os.listdir("/proc/self/fd"))
        kept += islice(batches, 2000)
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert digests(kept) == first(TaskLoader(kind(None), batch_size=4), 2200)
