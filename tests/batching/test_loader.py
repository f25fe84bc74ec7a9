"""TaskLoader: the same batches whoever makes them, exact through resumes, gone when closed."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metabatch_cli import mkl
from metabatch_cli.batching import StateMismatch, TaskLoader, digest
from metabatch_cli.batching import loader as loader_module
from metabatch_cli.batching.auto import cores
from metabatch_cli.batching.task import concatenate
from tests.batching.examples import (
    KINDS,
    Draws,
    Example,
    Fails,
    FailsAlone,
    Waves,
    digests,
    first,
    global_draws,
    global_states,
    read,
)

both = pytest.mark.parametrize("kind", KINDS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),  # nothing to pin for
]

UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking would start many processes
ARGUMENTS = {"batch_size": 4, "shuffle": True, "seed": 7}  # of 23 tasks: five batches and a rest


def loader(taskset, **more: Any) -> TaskLoader:
    return TaskLoader(taskset, **ARGUMENTS | more)


# --- the same for any number of workers --------------------------------------------------------


@both
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_do_not_depend_on_the_number_of_workers(kind, workers, prefetch, persistent):
    expected = first(loader(kind()), 12)
    with loader(
        kind(), workers=workers, prefetch_factor=prefetch, persistent_workers=persistent
    ) as tested:
        assert read(tested, 12) == expected


@both
@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_the_start_method(kind, method):
    with loader(kind(), workers=1, multiprocessing_context=method) as tested:
        assert read(tested, 6) == first(loader(kind()), 6)


def test_a_worker_that_computes_otherwise_than_this_process_makes_no_batch(monkeypatch):
    other = not mkl.avx512_enabled()
    monkeypatch.setattr(mkl, "avx512_enabled", lambda: other)
    monkeypatch.setattr(mkl, "same_in_children", nullcontext)
    tested = loader(Waves(), workers=1, multiprocessing_context="spawn")
    with tested, pytest.raises(RuntimeError, match="batches could differ in their last bits"):
        read(tested, 1)


def test_a_start_method_can_be_given_as_a_context():
    fork = multiprocessing.get_context("fork")
    with loader(Waves(), workers=1, multiprocessing_context=fork) as tested:
        assert read(tested, 3) == first(loader(Waves()), 3)


@pytest.mark.parametrize("method", [None, "spawn"])
def test_a_start_method_does_not_matter_without_workers(method):
    assert read(loader(Waves(), multiprocessing_context=method), 3) == first(loader(Waves()), 3)


@both
def test_batches_do_not_depend_on_pinning(kind):
    for workers in (0, 1):
        with loader(kind(), workers=workers, pin_memory=True) as tested:
            assert read(tested, 6) == first(loader(kind()), 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@both
def test_batches_on_a_gpu_are_those_on_the_cpu(kind):
    with loader(kind(), workers=1, pin_memory=True, device="cuda") as tested:
        assert read(tested, 12) == first(loader(kind()), 12)


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_an_infinite_set_is_the_same_for_any_number_of_workers(kind, workers):
    with loader(kind(None), workers=workers) as tested:
        assert read(tested, 15) == first(loader(kind(None)), 15)


@both
@settings(phases=UNSHRUNK)
@given(
    n_batches=st.none() | st.integers(1, 7),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    n_tasks=st.none() | st.integers(4, 30),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**64),
    workers=st.sampled_from([0, 0, 0, 2]),
)
def test_reading_gives_what_batch_at_gives(kind, n_batches, workers, **more):
    arguments = more | {"n_batches": n_batches, "shuffle": more["shuffle"] or n_batches is not None}
    taskset = kind(arguments.pop("n_tasks"))
    with TaskLoader(taskset, **arguments, workers=workers) as tested:
        assert read(tested, 9) == first(TaskLoader(taskset, **arguments), 9)


@both
def test_batch_at_can_be_asked_in_any_order_and_between_reads(kind):
    expected = first(loader(kind()), 6)
    tested, found = loader(kind()), []
    for step, batch in enumerate(tested):
        tested.batch_at(3 * step + 1)
        found.append(digest(batch))
    assert found == expected
    assert [digest(tested.batch_at(step)) for step in (5, 0, 3)] == [
        expected[step] for step in (5, 0, 3)
    ]
    assert tested.state_dict()["step"] == 6


@both
def test_batches_can_be_asked_for_by_several_threads_at_once(kind):
    tested = loader(kind())
    expected = first(tested, 40)
    found: dict[int, str] = {}

    def ask(steps: range) -> None:
        found.update((step, digest(tested.batch_at(step))) for step in steps)

    threads = [threading.Thread(target=ask, args=(range(n, 40, 4),)) for n in range(4)]
    for thread in threads:
        thread.start()
    assert read(tested, 40) == expected
    for thread in threads:
        thread.join()
    assert [found[step] for step in range(40)] == expected


def test_there_is_no_batch_before_the_first():
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        loader(Waves()).batch_at(-1)


# --- the same for any number of ranks ----------------------------------------------------------


@both
@given(
    shards=st.sampled_from([1, 2, 3, 4, 6]),
    each=st.integers(1, 2),
    n_batches=st.none() | st.integers(1, 5),
    n_tasks=st.none() | st.integers(12, 30),
)
def test_all_ranks_together_read_the_batch_of_one(kind, shards, each, n_batches, n_tasks):
    arguments = {
        "batch_size": shards * each,
        "shards": shards,
        "n_batches": n_batches,
        "shuffle": True,
        "drop_last": True,
    }
    taskset = kind(n_tasks)
    alone = list(islice(TaskLoader(taskset, **arguments).stream(), 4))
    for world_size in [size for size in range(1, shards + 1) if shards % size == 0]:
        ranks = [
            TaskLoader(taskset, **arguments, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        steps = zip(*(islice(rank.stream(), 4) for rank in ranks), strict=True)
        assert digests(map(concatenate, map(list, steps))) == digests(alone)
        assert len({str(rank.state_dict()) for rank in ranks}) == 1


def test_a_rank_reads_the_same_with_workers():
    arguments = {"shards": 2, "world_size": 2, "rank": 1, "drop_last": True}
    with loader(Draws(), **arguments, workers=2) as tested:
        assert read(tested, 10) == first(loader(Draws(), **arguments), 10)


def test_a_world_size_that_does_not_fit_names_those_that_do():
    with pytest.raises(ValueError, match=r"world_size=3.*legal world sizes: 1, 2, 4 "):
        TaskLoader(Waves(None), batch_size=8, shards=4, world_size=3)


# --- random numbers ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_loading_leaves_the_global_generators_alone(kind, workers, persistent):
    global_draws()
    before = global_states()
    with loader(kind(), workers=workers, persistent_workers=persistent) as tested:
        assert global_states() == before
        for _ in range(2):
            batches = iter(tested)
            assert global_states() == before
            for _ in batches:
                assert global_states() == before
        tested.batch_at(0)
        tested.load_state_dict(tested.state_dict())
        next(tested.stream())
    assert global_states() == before


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_caller_draws_does_not_reach_the_batches(kind, workers):
    expected = first(loader(kind()), 12)
    np.random.seed(3)
    torch.manual_seed(4)
    found = []
    with loader(kind(), workers=workers) as tested:
        for number in range(2):
            torch.manual_seed(number)
            for batch in tested:
                global_draws()
                np.random.seed(len(found))
                found.append(digest(batch))
    assert found == expected


def test_a_generator_gives_the_seed_by_one_draw():
    one, other, drawn = (torch.Generator().manual_seed(5) for _ in range(3))
    tested = TaskLoader(Waves(), generator=one)
    assert first(tested, 3) == first(TaskLoader(Waves(), generator=other), 3)
    assert first(tested, 3) == first(TaskLoader(Waves(), seed=tested.seed), 3)
    again = TaskLoader(Waves(), generator=one)
    assert first(again, 3) != first(tested, 3)
    for _ in range(2):
        torch.randint(2**62, (), generator=drawn)
    assert torch.equal(one.get_state(), drawn.get_state())


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_comes_before_a_generator(seed):
    generator = torch.Generator()
    before = generator.get_state()
    tested = TaskLoader(Waves(), generator=generator, seed=seed)
    assert first(tested, 3) == first(TaskLoader(Waves(), seed=seed), 3)
    assert torch.equal(generator.get_state(), before)


def test_without_a_seed_it_is_zero():
    assert first(TaskLoader(Waves()), 3) == first(TaskLoader(Waves(), seed=0), 3)


def test_seeds_that_share_their_lower_32_bits_give_other_batches():
    for kind in KINDS:
        assert first(loader(kind(), seed=7), 3) != first(loader(kind(), seed=7 + 2**32), 3)


# --- epochs ------------------------------------------------------------------------------------


@both
def test_every_epoch_has_its_own_order_and_its_own_draws(kind):
    once = kind(8, sizes="fixed")
    for shuffle in (False, True):
        tested = loader(once, shuffle=shuffle)
        epochs = [list(tested) for _ in range(3)]
        assert len(set(map(digest, epochs))) == 3
        if kind is Draws:
            orders = {str([batch["index"].tolist() for batch in batches]) for batches in epochs}
            assert len(orders) == (3 if shuffle else 1)


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ({}, 6),
        ({"drop_last": True}, 5),
        ({"n_batches": 50}, 50),
        ({"n_batches": 2}, 2),
        ({"batch_size": 30}, 1),
    ],
)
def test_an_epoch_is_as_long_as_it_says(arguments, length):
    tested = loader(Waves(), **arguments)
    assert len(tested) == len(list(tested)) == len(list(tested)) == length


@both
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_after_a_break_the_next_epoch_begins_and_steps_count_on(kind, workers, persistent):
    expected = first(loader(kind()), 18)
    with loader(kind(), workers=workers, persistent_workers=persistent) as tested:
        assert digests(islice(tested, 2)) == expected[:2]
        assert tested.state_dict()["step"] == 2
        assert digests(islice(tested, 1)) == expected[6:7]
        assert tested.state_dict()["step"] == 7
        assert digests(tested) == expected[12:18]
        assert tested.state_dict()["step"] == 18


def test_a_break_at_the_end_of_an_epoch_skips_nothing():
    tested = loader(Waves())
    assert len(digests(islice(tested, 6))) == 6
    assert digests(islice(tested, 1)) == first(loader(Waves()), 7)[6:]


def test_an_infinite_set_has_one_endless_epoch():
    tested = loader(Waves(None))
    with pytest.raises(TypeError, match=r"Waves is infinite.*n_batches"):
        len(tested)
    expected = first(tested, 30)
    assert digests(islice(tested, 20)) == expected[:20]
    assert digests(islice(tested, 10)) == expected[20:]


def test_n_batches_ends_the_epochs_of_an_infinite_set():
    tested = loader(Waves(None), n_batches=3)
    assert len(tested) == 3
    assert [len(list(tested)) for _ in range(3)] == [3, 3, 3]


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_runs_through_all_epochs(kind, workers):
    expected = first(loader(kind()), 20)
    with loader(kind(), workers=workers) as tested:
        assert digests(islice(tested.stream(), 15)) == expected[:15]
        assert digests(islice(tested.stream(), 5)) == expected[15:]
        assert tested.state_dict()["step"] == 20


def test_a_stream_goes_on_where_a_break_left_the_epoch():
    tested = loader(Waves())
    next(iter(tested))
    assert digests(islice(tested.stream(), 8)) == first(tested, 9)[1:]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_older_iterator_takes_nothing_from_a_newer_one(workers, persistent):
    expected = first(loader(Waves()), 12)
    with loader(Waves(), workers=workers, persistent_workers=persistent) as tested:
        older = iter(tested)
        next(older)
        newer = iter(tested)
        found = [digest(next(newer))]
        with pytest.raises(RuntimeError, match="read by a newer iterator"):
            next(older)
        found.append(digest(next(newer)))
        assert found == expected[6:8]
        assert tested.state_dict()["step"] == 8


# --- state -------------------------------------------------------------------------------------


@both
@settings(max_examples=12, phases=UNSHRUNK)
@given(
    n_tasks=st.none() | st.integers(8, 20),
    n_batches=st.none() | st.integers(1, 6),
    legs=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 1, 2])), min_size=2, max_size=4
    ),
)
def test_a_killed_and_resumed_reading_is_the_uninterrupted_one(kind, n_tasks, n_batches, legs):
    arguments = {"batch_size": 4, "shuffle": True, "n_batches": n_batches}
    expected = first(TaskLoader(kind(n_tasks), **arguments), sum(steps for steps, _ in legs))
    found, state = [], None
    for steps, workers in legs:
        # what is killed leaves its state behind, whatever it had prefetched
        with TaskLoader(kind(n_tasks), **arguments, workers=workers) as tested:
            if state is not None:
                tested.load_state_dict(json.loads(state))
            found += read(tested, steps)
            state = json.dumps(tested.state_dict())
    assert found == expected
    assert json.loads(state)["step"] == len(expected)


@both
@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 12])
def test_a_resumed_epoch_ends_where_it_would_have_ended(kind, done):
    expected = first(loader(kind()), 24)
    tested = loader(kind())
    read(tested, done)
    resumed = loader(kind())
    resumed.load_state_dict(tested.state_dict())
    end = 6 * (done // 6 + 1)
    assert digests(resumed) == expected[done:end]
    assert digests(resumed) == expected[end : end + 6]


def test_a_state_can_be_loaded_again_and_again():
    tested = loader(Waves())
    read(tested, 2)
    state = tested.state_dict()
    for _ in range(3):
        tested.load_state_dict(state)
        assert read(tested, 6) == first(tested, 8)[2:]


def test_another_number_of_ranks_takes_over():
    arguments = {"batch_size": 6, "shuffle": True, "shards": 6, "drop_last": True}
    expected = list(islice(TaskLoader(Draws(), **arguments).stream(), 12))
    state, found = None, []
    for world_size, steps in ((2, 2), (3, 3), (1, 2), (6, 5)):
        ranks = [
            TaskLoader(Draws(), **arguments, world_size=world_size, rank=rank)
            for rank in range(world_size)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        parts = zip(*(islice(rank.stream(), steps) for rank in ranks), strict=True)
        found += digests(map(concatenate, map(list, parts)))
        state = ranks[-1].state_dict()
    assert found == digests(expected)


KILLED = """
import json, os, pathlib, signal
from metabatch_cli.batching import TaskLoader
from tests.batching.examples import Draws

loader = TaskLoader(Draws(), batch_size=4, shuffle=True, seed=7, workers=2, prefetch_factor=3)
for _ in range(2):
    for batch in loader:
        state = loader.state_dict()
        if state["step"] == 9:
            pathlib.Path(os.environ["STATE"]).write_text(json.dumps(state))
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_was_really_killed_is_resumed_exactly(tmp_path):
    state = tmp_path / "state.json"
    root = Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"STATE": str(state), "PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    resumed = loader(Draws(), workers=1)
    resumed.load_state_dict(json.loads(state.read_text()))
    with resumed:
        assert read(resumed, 6) == first(loader(Draws()), 15)[9:]


@both
@given(
    seed=st.integers(0, 2**53 - 1),
    steps=st.integers(0, 8),
    n_batches=st.none() | st.integers(1, 4),
    split=st.sampled_from(["train", "val", "test"]),
    n_tasks=st.none() | st.integers(8, 30),
)
def test_the_state_is_flat_and_of_integers_that_any_json_reader_keeps(
    kind, seed, steps, n_batches, split, n_tasks
):
    tested = loader(kind(n_tasks, split=split), seed=seed, n_batches=n_batches)
    read(tested, steps)
    state = tested.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert all(type(name) is str for name in state)
    assert all(type(value) is int and abs(value) < 2**53 for value in state.values())
    assert state["step"] == steps


def test_a_seed_from_a_generator_is_one_that_any_json_reader_keeps():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        assert TaskLoader(Waves(), generator=generator).state_dict()["seed"] < 2**53


def test_numbers_from_numpy_make_a_state_for_json_too():
    tested = TaskLoader(Waves(), batch_size=np.int64(4), shuffle=True, n_batches=np.int64(3))
    assert json.loads(json.dumps(tested.state_dict()))["batch_size"] == 4


def test_shards_from_numpy_make_a_state_for_json_too():
    tested = TaskLoader(Waves(), batch_size=4, shards=np.int64(2))
    assert json.loads(json.dumps(tested.state_dict()))["shards"] == 2


def test_the_state_is_the_same_whoever_makes_the_batches():
    states = []
    for more in ({}, {"workers": 1, "prefetch_factor": 4}, {"workers": 1, "pin_memory": True}):
        with loader(Waves(), drop_last=True, shards=2, **more) as tested:
            read(tested, 3)
            states.append(tested.state_dict())
    states.append(states[0] | {"step": 3})
    for rank in (0, 1):
        tested = loader(Waves(), drop_last=True, shards=2, world_size=2, rank=rank)
        read(tested, 3)
        states.append(tested.state_dict())
    assert states == [states[0]] * 6


class OtherWaves(Waves):
    pass


@pytest.mark.parametrize(
    ("taskset", "arguments", "names"),
    [
        (Waves(), {"seed": 8}, {"seed"}),
        (Waves(), {"seed": 7 + 2**32}, {"seed"}),
        (Waves(), {"batch_size": 6}, {"batch_size"}),
        (Waves(), {"shuffle": False}, {"shuffle"}),
        (Waves(), {"drop_last": True}, {"drop_last"}),
        (Waves(), {"n_batches": 6}, {"n_batches"}),
        (Waves(), {"shards": 2}, {"shards"}),
        (Waves(24), {}, {"n_tasks"}),
        (Waves(None), {}, {"n_tasks"}),
        (Waves(split="test"), {}, {"split", "sizes"}),
        (Waves(max_tgt_pts=10), {}, {"sizes"}),
        (Waves(sizes="fixed"), {}, {"sizes"}),
        (Draws(), {}, {"taskset"}),
        (OtherWaves(), {}, {"taskset"}),
        (Draws(9), {"seed": 1, "batch_size": 3}, {"taskset", "n_tasks", "seed", "batch_size"}),
    ],
)
def test_a_state_of_another_configuration_is_refused_with_its_fields(taskset, arguments, names):
    saved = loader(Waves())
    read(saved, 2)
    tested = loader(taskset, **arguments)
    before = tested.state_dict()
    with pytest.raises(StateMismatch) as error:
        tested.load_state_dict(saved.state_dict())
    named = {part.split(" is ")[0] for part in str(error.value).split(": ", 1)[1].split("; ")}
    assert named == names
    assert tested.state_dict() == before


def test_a_refusal_gives_both_values():
    with pytest.raises(ValueError, match="seed is 7 in the state and 8 here"):
        loader(Waves(), seed=8).load_state_dict(loader(Waves()).state_dict())


@pytest.mark.parametrize(
    ("constant", "name"), [("STREAM_VERSION", "stream_version"), ("STATE_VERSION", "version")]
)
def test_a_state_of_another_law_of_the_streams_is_refused(constant, name, monkeypatch):
    state = loader(Waves()).state_dict()
    monkeypatch.setattr(loader_module, constant, state[name] + 1)
    with pytest.raises(StateMismatch, match=f": {name} is"):
        loader(Waves()).load_state_dict(state)


def test_a_state_with_a_field_too_few_or_too_many_is_refused():
    state = loader(Waves()).state_dict()
    for name in state:
        without = {key: value for key, value in state.items() if key != name}
        with pytest.raises(StateMismatch, match=rf": {name} is missing"):
            loader(Waves()).load_state_dict(without)
    with pytest.raises(StateMismatch, match="colour is unknown"):
        loader(Waves()).load_state_dict(state | {"colour": 3})


def test_a_state_before_the_first_step_is_refused():
    tested = loader(Waves())
    with pytest.raises(StateMismatch, match="step"):
        tested.load_state_dict(tested.state_dict() | {"step": -3})


@pytest.mark.parametrize("begun", [False, True])
def test_an_iterator_from_before_loading_gives_no_stale_batch(begun):
    state = loader(Waves()).state_dict() | {"step": 3}
    expected = first(loader(Waves()), 4)[3]
    tested = loader(Waves())
    batches = iter(tested)
    if begun:
        next(batches)
    tested.load_state_dict(state)
    try:
        found = digest(next(batches))
    except (RuntimeError, StopIteration):
        found = expected  # refusing is as good
    assert found == expected


def test_an_iterator_that_was_never_read_ends_no_resumed_epoch():
    resumed = loader(Waves())
    resumed.load_state_dict(resumed.state_dict() | {"step": 2})
    iter(resumed)
    assert digests(resumed) == first(resumed, 6)[2:]


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["workers", "num_workers"])
@pytest.mark.parametrize("wrong", ["abc", "2", "", -2, True, False, 1.0, 2.5, [2]])
def test_anything_but_a_number_of_workers_is_refused(name, wrong):
    with pytest.raises(ValueError, match="workers=") as error:
        TaskLoader(Waves(), **{name: wrong})
    assert repr(wrong) in str(error.value)
    assert "'auto'" in str(error.value)


def test_workers_is_another_name_for_num_workers():
    assert TaskLoader(Waves(), workers=2).num_workers == 2
    assert TaskLoader(Waves(), num_workers=2).num_workers == 2
    assert TaskLoader(Waves(), num_workers=2, workers=2).num_workers == 2
    with pytest.raises(ValueError, match="workers=0 and num_workers=2 contradict"):
        TaskLoader(Waves(), num_workers=2, workers=0)


def test_auto_measures_and_says_what_it_chose_and_why():
    tested = TaskLoader(Waves(), workers="auto", batch_size=4)
    before = global_states()
    assert tested.num_workers in range(cores() + 1)
    assert global_states() == before
    assert "to create" in tested.choice.reason
    assert read(tested, 3) == first(TaskLoader(Waves(), batch_size=4), 3)
    assert TaskLoader(Draws(), workers=3).choice is None


class Unsendable(Draws):
    def __init__(self):
        super().__init__()
        self.transform = lambda x: x


def test_auto_takes_no_workers_where_they_could_not_be_started():
    tested = TaskLoader(Unsendable(), batch_size=2, workers="auto", multiprocessing_context="spawn")
    tested.choose_workers(creation=1.0, step=0.5)
    assert tested.num_workers == 0
    assert "Unsendable.transform cannot be sent to a worker" in tested.choice.reason


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"timeout": -1}, "timeout=-1"),
        ({"prefetch_factor": -1}, "prefetch_factor=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4, "shards": 3}, "shards=3"),
        ({"n_batches": 4}, "needs shuffle=True"),
        ({"n_batches": 4, "shuffle": True, "batch_size": 24}, "batch_size=24"),
        ({"world_size": 2, "shards": 2, "batch_size": 2}, "drop_last=True or n_batches"),
        ({"rank": 2}, "rank=2"),
    ],
)
def test_arguments_that_cannot_be_are_named_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        TaskLoader(Waves(), **arguments)


def test_prefetching_nothing_is_refused():
    with pytest.raises(ValueError, match="prefetch_factor=0"):
        TaskLoader(Waves(), prefetch_factor=0)


def test_prefetching_can_be_left_to_the_default():
    assert read(TaskLoader(Waves(), prefetch_factor=None), 2) == first(TaskLoader(Waves()), 2)


def test_a_collate_function_does_not_go_with_whole_batches():
    with pytest.raises(TypeError, match=r"collate_fn.*Waves makes whole batches.*__gettasks__"):
        TaskLoader(Waves(), collate_fn=list)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_gets_the_list_of_tasks(workers):
    def columns(tasks: list[dict]) -> dict:
        return {"index": [task["index"] for task in tasks], "n": len(tasks)}

    with loader(Draws(), collate_fn=columns, workers=workers, shuffle=False) as tested:
        batches = list(tested)
    assert batches[0] == {"index": [0, 1, 2, 3], "n": 4}
    assert batches[-1] == {"index": [20, 21, 22], "n": 3}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_arrive_on_the_device_asked_for(workers):
    with loader(Waves(), device="meta", workers=workers) as tested:
        for batch in (next(iter(tested)), tested.batch_at(0)):
            assert {field.device.type for field in [*batch[:4], batch.aux["index"]]} == {"meta"}


STARTED: list[int] = []  # in a worker: whom `worker_init_fn` was called for


class Started(Example):
    def __gettask__(self, index, n_context, n_target):
        return torch.tensor(STARTED)


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_init_fn_is_called_in_each_worker_before_its_first_task(persistent):
    with TaskLoader(
        Started(),
        batch_size=1,
        workers=2,
        worker_init_fn=STARTED.append,
        persistent_workers=persistent,
    ) as tested:
        for _ in range(2):
            assert all(batch.tolist() in ([[0]], [[1]]) for batch in islice(tested, 4))
    assert STARTED == []


class Whose(Example):
    def __gettask__(self, index, n_context, n_target):
        return os.getpid()


@pytest.mark.parametrize("persistent", [False, True])
def test_only_persistent_workers_live_on_from_epoch_to_epoch(persistent):
    with TaskLoader(Whose(8), workers=2, persistent_workers=persistent) as tested:
        early, late = ({batch.item() for batch in tested} for _ in range(2))
    assert len(early) == len(late) == 2
    assert os.getpid() not in early | late
    assert (early == late) == persistent


# --- creation on the device --------------------------------------------------------------------


class Anywhere(Waves):
    creates_anywhere = True

    def __gettasks__(self, indices, n_context, n_target, generator):
        assert indices.device == generator.device
        return super().__gettasks__(indices, n_context, n_target, generator)


def test_creating_on_the_cpu_as_the_device_is_creating_on_the_cpu():
    here = loader(Anywhere(), create_on="device", device="cpu", workers=1)
    with here:
        assert read(here, 12) == first(loader(Anywhere()), 12)
    loader(Anywhere()).load_state_dict(here.state_dict())


def test_a_state_of_tasks_created_elsewhere_is_refused():
    there = loader(Anywhere(), create_on="device", device="meta")
    with pytest.raises(StateMismatch, match=r"stream_version is 1002 in the state.*created_on is"):
        loader(Anywhere()).load_state_dict(there.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tasks_created_on_a_gpu_are_there_and_the_same_again():
    there = loader(Anywhere(), create_on="device", device="cuda")
    assert next(iter(there)).context_x.is_cuda
    assert first(there, 6) == first(loader(Anywhere(), create_on="device", device="cuda"), 6)


@pytest.mark.parametrize("kind", [Waves, Draws])
def test_a_set_that_creates_on_the_cpu_only_says_so(kind):
    with pytest.raises(ValueError, match=rf"create_on='device': {kind.__name__} creates on the"):
        loader(kind(), create_on="device", device="meta")


def test_creation_on_the_device_needs_no_workers():
    there = {"create_on": "device", "device": "meta"}
    assert loader(Anywhere(), **there, workers="auto").num_workers == 0
    with pytest.raises(ValueError, match="workers=2 make tasks on the CPU"):
        loader(Anywhere(), **there, workers=2)
    with pytest.raises(ValueError, match="create_on='gpu': choose from cpu, device"):
        loader(Anywhere(), create_on="gpu")


# --- errors ------------------------------------------------------------------------------------

SPEC = r"while creating BatchSpec\(step=1, epoch=0, .*indices=\[4, 5, 6, 7\]\) of "


@pytest.mark.parametrize(("kind", "said"), [(Fails, "no such wave"), (FailsAlone, "no such draw")])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_task_keeps_its_type_and_names_the_spec(kind, said, workers):
    with loader(kind(), shuffle=False, workers=workers) as tested:
        batches = iter(tested)
        next(batches)
        with pytest.raises(ArithmeticError, match=said) as error:
            next(batches)
        text = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
        assert len(re.findall(SPEC + kind.__name__, text)) == 1
        assert tested.state_dict()["step"] == 1


class Blames(Example):
    def __gettask__(self, index, n_context, n_target):
        raise RuntimeError("the connection to the database timed out")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tasks_own_timeout_is_not_taken_for_the_loaders(workers):
    with loader(Blames(), workers=workers) as tested:
        batches = iter(tested)
        with pytest.raises(RuntimeError, match="the connection to the database timed out"):
            next(batches)


class Waits(Example):
    """The task of index 3 never comes to an end."""

    def __gettask__(self, index, n_context, n_target):
        if index == 3:
            threading.Event().wait()
        return index


def test_a_timeout_names_the_worker_and_the_spec():
    with TaskLoader(Waits(8), workers=2, timeout=0.5) as tested:
        batches = iter(tested)
        assert [next(batches).item() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RuntimeError) as error:
            next(batches)
    assert "timeout=0.5 s" in str(error.value)
    assert "worker 1" in str(error.value)
    assert "BatchSpec(step=3, " in str(error.value)
    assert "indices=[3])" in str(error.value)


def test_a_timeout_does_not_matter_without_workers():
    assert read(loader(Waves(), timeout=1), 2) == first(loader(Waves()), 2)


def a_function(tasks):
    return {"later": lambda: tasks}


def a_local_tuple(tasks):
    class Local(NamedTuple):
        index: torch.Tensor

    return Local(torch.zeros(2))


def a_local_default(tasks):
    return defaultdict(lambda: 0, index=torch.zeros(2))


def an_array_of_functions(tasks):
    return np.array([lambda: 0], dtype=object)


def a_graph(tasks):
    return torch.zeros(2, requires_grad=True) * 2


def a_local_error(tasks):
    class Local(Exception):
        pass

    raise Local("this one cannot be sent either")


@pytest.mark.parametrize(
    "collate",
    [
        a_function,
        a_local_tuple,
        a_local_default,
        an_array_of_functions,
        a_graph,
        a_local_error,
    ],
)
def test_what_cannot_be_sent_is_an_error_and_no_endless_wait(collate):
    with loader(Draws(), workers=1, collate_fn=collate, timeout=3) as tested:
        batches = iter(tested)
        with pytest.raises(Exception) as error:
            next(batches)
    said = "\n".join([str(error.value), *error.value.__notes__])
    assert "within timeout" not in said
    assert "step=0" in said


# --- the end -----------------------------------------------------------------------------------


def test_no_worker_outlives_its_loader():
    before = set(multiprocessing.active_children())

    def started() -> set:
        return set(multiprocessing.active_children()) - before

    for persistent in (False, True):
        arguments = {"workers": 2, "persistent_workers": persistent}
        tested = loader(Waves(), **arguments)
        batches = iter(tested)  # kept, as the frame of a training would
        next(batches)
        assert len(started()) == 2
        tested.close()
        assert not started()
        tested.close()  # twice does no harm

        with loader(Waves(), **arguments) as tested:
            next(iter(tested))
        assert not started()

        dropped = loader(Waves(), **arguments)
        batches = iter(dropped)
        next(batches)
        assert len(started()) == 2
        del dropped, batches
        gc.collect()
        assert not started()


def test_a_short_first_epoch_leaves_persistent_workers_all():
    before = set(multiprocessing.active_children())
    resumed = loader(Waves(), workers=2, persistent_workers=True)
    resumed.load_state_dict(resumed.state_dict() | {"step": 5})
    with resumed:
        assert len(list(resumed)) == 1  # the epoch's last batch
        next(iter(resumed))
        assert len(set(multiprocessing.active_children()) - before) == 2


def test_workers_end_with_their_epoch():
    before = set(multiprocessing.active_children())
    with loader(Waves(), workers=2) as tested:
        assert len(list(tested)) == 6
        assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_iterator_of_a_closed_loader_says_so(workers, persistent):
    tested = loader(Waves(), workers=workers, persistent_workers=persistent)
    batches = iter(tested)
    next(batches)
    tested.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_closed_loader_can_be_read_again(persistent):
    tested = loader(Waves(), workers=1, persistent_workers=persistent)
    found = read(tested, 6)
    tested.close()
    found += read(tested, 6)
    tested.close()
    assert found == first(tested, 12)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")
def test_closed_loaders_leave_no_file_open_and_no_shared_memory(workers):
    pids = {os.getpid()}

    def held() -> tuple[int, list[str]]:
        named = [
            name for name in os.listdir("/dev/shm") if pids & set(map(_number, name.split("_")))
        ]
        mapped = Path("/proc/self/maps").read_text().count("/dev/shm/")
        return len(os.listdir("/proc/self/fd")), [*named, f"{mapped} mapped"]

    def use() -> None:
        with loader(Draws(), workers=workers) as tested:
            batches = tested.stream()
            next(batches)
            pids.update(child.pid for child in multiprocessing.active_children())
            digests(islice(batches, 20))

    use()  # the first one may start what all share
    gc.collect()
    before = held()
    for _ in range(3):
        use()
    gc.collect()
    assert held() == before
    assert len(pids) >= 1 + 4 * workers


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def test_a_worker_that_hangs_in_a_task_does_not_outlive_its_loader():
    before = set(multiprocessing.active_children())
    with TaskLoader(Waits(8), workers=1, timeout=0.5) as tested:  # noqa: SIM117 (two things)
        with pytest.raises(RuntimeError, match="timeout"):
            list(tested)
    assert not set(multiprocessing.active_children()) - before
