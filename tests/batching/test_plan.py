"""The plan: from (seed, step) to what a batch is made of, by arithmetic alone."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import BatchSpec, Plan
from metabatch_cli.batching.sizes import Metabatch, WayShot

LAW = Metabatch(1, 5, 9)

seeds = st.integers(-(2**65), 2**65)
many = st.integers(1, 40)


def plan(n_tasks: int | None, batch_size: int, **more: Any) -> Plan:
    return Plan(n_tasks=n_tasks, law=LAW, batch_size=batch_size, **more)


def epoch(of: Plan, number: int) -> list[list[int]]:
    assert of.epoch_length is not None
    steps = range(number * of.epoch_length, (number + 1) * of.epoch_length)
    return [of.indices(step).tolist() for step in steps]


@st.composite
def plans(draw) -> dict[str, Any]:
    """Any legal plan of one rank, as its arguments."""
    n_tasks = draw(st.none() | many)
    shuffle, drop_last = draw(st.booleans()), draw(st.booleans())
    n_batches = draw(st.none() | st.integers(1, 7)) if shuffle or n_tasks is None else None
    most = 12 if n_tasks is None or (n_batches is None and not drop_last) else min(12, n_tasks)
    batch_size = draw(st.integers(1, most))
    shards = draw(st.sampled_from([k for k in range(1, batch_size + 1) if batch_size % k == 0]))
    return {
        "n_tasks": n_tasks,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "n_batches": n_batches,
        "drop_last": drop_last,
        "shards": shards,
        "seed": draw(seeds),
    }


def outline(spec: BatchSpec) -> tuple:
    return (spec.step, spec.epoch, spec.sizes, spec.indices.tolist(), spec.first, spec.shard_size)


# --- one pass an epoch -------------------------------------------------------------------------


@given(many, st.integers(1, 50), st.booleans(), seeds, st.integers(0, 5))
def test_an_epoch_covers_every_task_once(n_tasks, batch_size, shuffle, seed, number):
    batches = epoch(plan(n_tasks, batch_size, shuffle=shuffle, seed=seed), number)
    assert sorted(chain.from_iterable(batches)) == list(range(n_tasks))
    *full, last = map(len, batches)
    assert full == [batch_size] * len(full)
    assert 1 <= last <= batch_size


@given(many, st.integers(1, 40), st.booleans(), seeds, st.integers(0, 5))
def test_drop_last_leaves_out_only_what_is_not_full(n_tasks, batch_size, shuffle, seed, number):
    batch_size = min(batch_size, n_tasks)
    arguments = {"shuffle": shuffle, "seed": seed}
    dropped = epoch(plan(n_tasks, batch_size, drop_last=True, **arguments), number)
    assert all(len(batch) == batch_size for batch in dropped)
    whole = epoch(plan(n_tasks, batch_size, **arguments), number)
    assert dropped == [batch for batch in whole if len(batch) == batch_size]


def test_without_shuffling_the_order_is_that_of_the_set():
    assert epoch(plan(7, 3), 0) == [[0, 1, 2], [3, 4, 5], [6]]
    assert epoch(plan(7, 3), 5) == epoch(plan(7, 3), 0)


def test_every_epoch_seed_and_split_has_an_order_of_its_own():
    orders = [
        tuple(chain.from_iterable(epoch(plan(40, 7, shuffle=True, seed=seed, split=split), number)))
        for seed in (0, 1, 2**32)
        for split in ("train", "val")
        for number in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_shuffling_puts_every_task_in_every_place_equally_often():
    of = plan(6, 6, shuffle=True)
    counts = np.zeros((6, 6))
    for step in range(1800):
        counts[np.arange(6), of.indices(step)] += 1
    assert counts.min() > 220
    assert counts.max() < 380


# --- repeated passes ---------------------------------------------------------------------------


@st.composite
def repeated(draw) -> dict[str, Any]:
    n_tasks = draw(many)
    batch_size = draw(st.integers(1, n_tasks))
    n_batches = draw(st.integers(1, 9))
    return {
        "n_tasks": n_tasks,
        "batch_size": batch_size,
        "n_batches": n_batches,
        "shuffle": True,
        "seed": draw(seeds),
    }


@given(repeated())
@settings(max_examples=60)
def test_repeated_passes_repeat_no_task_within_a_batch_and_stay_balanced(arguments):
    of, counts = plan(**arguments), Counter(range(arguments["n_tasks"]))
    for step in range(3 * arguments["n_tasks"]):
        indices = of.indices(step).tolist()
        assert len(indices) == len(set(indices)) == arguments["batch_size"]
        counts.update(indices)
        # a task comes again only when all others have come as often
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(range(arguments["n_tasks"]))


@given(repeated())
def test_over_whole_cycles_every_task_comes_equally_often(arguments):
    of, total, size = plan(**arguments), arguments["n_tasks"], arguments["batch_size"]
    cycle = math.lcm(total, size) // size
    for start in (0, 4 * cycle):
        counts = Counter()
        for step in range(start, start + cycle):
            counts.update(of.indices(step).tolist())
        assert counts == dict.fromkeys(range(total), cycle * size // total)


@given(repeated())
def test_an_epoch_of_n_batches_has_so_many_and_the_next_goes_on(arguments):
    of = plan(**arguments)
    assert of.epoch_length == arguments["n_batches"]
    longer = plan(**arguments | {"n_batches": 1000})
    joined = epoch(of, 0) + epoch(of, 1)
    assert joined == [longer.indices(step).tolist() for step in range(len(joined))]


def test_n_batches_reaches_beyond_one_pass_and_stops_before_its_end():
    assert len(epoch(plan(5, 2, shuffle=True, n_batches=40), 0)) == 40
    assert len(epoch(plan(500, 2, shuffle=True, n_batches=3), 0)) == 3


# --- random access -----------------------------------------------------------------------------


@given(plans(), st.lists(st.integers(0, 60), min_size=1, max_size=12))
@settings(max_examples=60)
def test_any_step_is_planned_without_the_ones_before_it(arguments, steps):
    sequential = plan(**arguments)
    expected = [outline(sequential.spec(step)) for step in range(61)]
    jumping = plan(**arguments)
    for step in steps:
        assert outline(plan(**arguments).spec(step)) == expected[step]
        assert outline(jumping.spec(step)) == expected[step]


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_tasks": None, "batch_size": 16},
        {"n_tasks": 96, "batch_size": 16, "shuffle": True},
        {"n_tasks": 20, "batch_size": 16, "shuffle": True, "n_batches": 50},
        {"n_tasks": 1000, "batch_size": 16, "shuffle": True, "n_batches": 50},
    ],
)
def test_a_step_far_ahead_is_planned_too(arguments):
    far = [plan(**arguments).spec(10**9 + later) for later in range(3)]
    assert all(len(set(spec.indices.tolist())) == 16 for spec in far)
    walking = plan(**arguments)
    assert [outline(walking.spec(spec.step)) for spec in far] == [outline(spec) for spec in far]


@given(plans(), st.integers(0, 60))
def test_a_spec_holds_what_the_plan_says(arguments, step):
    of = plan(**arguments)
    spec = of.spec(step)
    assert spec.step == step
    assert spec.epoch == of.spec(step).epoch == step // (of.epoch_length or 10**9)
    assert spec.indices.tolist() == of.indices(step).tolist()
    assert spec.indices.dtype == np.int64
    assert (spec.n_context, spec.n_target) == (spec.sizes["n_context"], spec.sizes["n_target"])
    assert spec.first == 0
    assert spec.shard_size * arguments["shards"] == arguments["batch_size"]


def test_the_order_and_the_sizes_of_a_seed_never_change():
    # these pin the law: whoever changes them must raise STREAM_VERSION
    once = plan(10, 4, shuffle=True, seed=7)
    assert epoch(once, 0) == [[8, 7, 9, 0], [4, 3, 1, 6], [5, 2]]
    passes = plan(5, 3, shuffle=True, seed=7, n_batches=5)
    assert epoch(passes, 0) == [[0, 4, 3], [1, 2, 3], [1, 2, 0], [4, 3, 0], [2, 4, 1]]
    sizes = [tuple(once.sizes(step).values()) for step in range(6)]
    assert sizes == [(1, 3), (3, 9), (2, 6), (2, 8), (1, 8), (5, 8)]


# --- sizes -------------------------------------------------------------------------------------


@given(plans(), plans(), seeds, st.integers(0, 10**12))
def test_sizes_depend_on_seed_split_and_step_alone(one, other, seed, step):
    left, right = plan(**one | {"seed": seed}), plan(**other | {"seed": seed})
    assert left.sizes(step) == right.sizes(step)


def test_sizes_differ_from_step_to_step_seed_to_seed_and_split_to_split():
    def drawn(steps: range, **more: Any) -> list:
        of = plan(None, 4, **more)
        return [tuple(of.sizes(step).values()) for step in steps]

    rows = [
        drawn(range(50)),
        drawn(range(50, 100)),
        drawn(range(50), seed=1),
        drawn(range(50), split="val"),
    ]
    assert len(set(map(tuple, rows))) == 4
    assert {n_context for n_context, _ in rows[0]} == {1, 2, 3, 4, 5}


def test_further_sizes_of_a_law_are_in_the_spec():
    spec = Plan(n_tasks=None, law=WayShot(5, 1, 3), batch_size=2).spec(0)
    assert spec.sizes == {"n_context": 5, "n_target": 15, "ways": 5, "shots": 1, "queries": 3}


# --- infinite sets -----------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(0, 10**12), st.booleans(), seeds)
def test_every_index_of_an_infinite_set_comes_once(batch_size, step, shuffle, seed):
    of = plan(None, batch_size, shuffle=shuffle, seed=seed)
    start = step * batch_size
    assert of.epoch_length is None
    assert of.spec(step).epoch == 0
    assert of.indices(step).tolist() == list(range(start, start + batch_size))


def test_n_batches_divides_an_infinite_set_into_epochs():
    of = plan(None, 2, n_batches=3)
    assert epoch(of, 0) == [[0, 1], [2, 3], [4, 5]]
    assert epoch(of, 1) == [[6, 7], [8, 9], [10, 11]]
    assert [of.spec(step).epoch for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]


# --- ranks -------------------------------------------------------------------------------------


@given(plans(), st.integers(0, 60))
@settings(max_examples=60)
def test_the_ranks_parts_joined_are_the_batch_for_every_legal_world_size(arguments, step):
    if arguments["n_tasks"] is not None and arguments["n_batches"] is None:
        arguments["drop_last"] = True
        arguments["n_tasks"] += arguments["batch_size"]
    alone, shards = plan(**arguments).spec(step), arguments["shards"]
    for world_size in [size for size in range(1, shards + 1) if shards % size == 0]:
        specs = [
            plan(**arguments, world_size=world_size, rank=rank).spec(step)
            for rank in range(world_size)
        ]
        assert np.concatenate([spec.indices for spec in specs]).tolist() == alone.indices.tolist()
        assert len({len(spec.indices) for spec in specs}) == 1
        first = 0
        for spec in specs:
            assert spec.sizes == alone.sizes
            assert (spec.step, spec.epoch) == (alone.step, alone.epoch)
            assert spec.first == first
            assert spec.first % spec.shard_size == 0
            assert spec.shard_size == alone.shard_size
            first += len(spec.indices)


@given(st.integers(1, 24), st.integers(1, 30))
def test_a_world_size_that_does_not_fit_is_answered_with_those_that_do(shards, world_size):
    legal = [size for size in range(1, shards + 1) if shards % size == 0]
    if world_size in legal:
        plan(None, 2 * shards, shards=shards, world_size=world_size)
        return
    with pytest.raises(ValueError) as error:
        plan(None, 2 * shards, shards=shards, world_size=world_size)
    assert f"world_size={world_size}" in str(error.value)
    assert f"shards={shards}" in str(error.value)
    assert f"legal world sizes: {', '.join(map(str, legal))} " in str(error.value)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"batch_size": -4}, ["batch_size=-4", "at least 1"]),
        ({"shards": 0}, ["shards=0", "at least 1"]),
        ({"world_size": 0}, ["world_size=0", "at least 1"]),
        ({"n_tasks": 0}, ["len(dataset)=0", "at least 1"]),
        ({"shards": 3}, ["batch_size=4", "shards=3", "1, 2, 4"]),
        ({"rank": 1}, ["rank=1", "0 … 0"]),
        ({"rank": -1}, ["rank=-1", "0 … 0"]),
        ({"n_batches": 0, "shuffle": True}, ["n_batches=0", "at least 1"]),
        ({"n_batches": 5}, ["n_batches=5", "shuffle=True"]),
        (
            {"n_batches": 5, "shuffle": True, "batch_size": 11},
            ["batch_size=11", "10 tasks", "without a task twice"],
        ),
        ({"drop_last": True, "batch_size": 11}, ["batch_size=11", "10 tasks", "no batch is left"]),
        (
            {"shards": 2, "world_size": 2},
            ["world_size=2", "drop_last=True or n_batches"],
        ),
    ],
)
def test_numbers_that_do_not_fit_together_are_named(arguments, said):
    with pytest.raises(ValueError) as error:
        plan(**{"n_tasks": 10, "batch_size": 4} | arguments)
    for words in said:
        assert words in str(error.value)


# --- specs -------------------------------------------------------------------------------------


def test_a_spec_shows_what_it_asks_for_and_stays_short():
    short = repr(plan(None, 3).spec(2))
    assert "step=2" in short
    assert "epoch=0" in short
    assert "n_context=" in short
    assert "n_target=" in short
    assert "indices=[6, 7, 8]" in short
    long = repr(plan(None, 1000).spec(0))
    assert "[0, 1, 2, 3, 4, 5, 6, 7, … 1000 in all]" in long
