"""Creation: a batch depends on its spec and on nothing else."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching import BatchSpec, Plan, denormals, digest, slice_tasks
from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.task import concatenate
from tests.batching.examples import (
    KINDS,
    Draws,
    Episodes,
    Example,
    Fails,
    FailsAlone,
    Waves,
    digests,
    global_draws,
    global_states,
)

both = pytest.mark.parametrize("kind", KINDS)


def specs(taskset, steps: int, batch_size: int = 4, **more) -> list[BatchSpec]:
    of = Plan(n_tasks=taskset.n_tasks, law=taskset.law, batch_size=batch_size, **more)
    return [of.spec(step) for step in range(steps)]


def maker(taskset, seed: int = 0, **more) -> BatchMaker:
    return BatchMaker(taskset, seed, taskset.split, **more)


# --- what a batch depends on -------------------------------------------------------------------


@both
@given(st.lists(st.integers(0, 11), max_size=8), st.integers(0, 11))
def test_a_batch_does_not_depend_on_those_made_before_it(kind, before, step):
    taskset = kind(None)
    asked = specs(taskset, 12)
    expected = digest(maker(taskset)(asked[step]))
    used = maker(taskset)
    for other in before:
        used(asked[other])
    assert digest(used(asked[step])) == expected


@both
def test_a_batch_does_not_depend_on_the_global_generators(kind):
    taskset = kind(None)
    (spec,) = specs(taskset, 1)
    expected = digest(maker(taskset)(spec))
    global_draws()
    np.random.seed(1)
    torch.manual_seed(5)
    assert digest(maker(taskset)(spec)) == expected


def of_one_task(spec: BatchSpec) -> BatchSpec:
    """The same batch with task 0 in every place, so that only the draws can differ."""
    return spec._replace(indices=np.zeros_like(spec.indices))


@both
@pytest.mark.parametrize("n_tasks", [None, 8])  # one endless epoch; two batches an epoch
def test_every_step_seed_and_split_draws_anew(kind, n_tasks):
    found = []
    for split in ("train", "val", "test"):
        taskset = kind(n_tasks, split=split, sizes="fixed")
        for seed in (0, 1, 2**32, -1):
            made = [maker(taskset, seed)(of_one_task(spec)) for spec in specs(taskset, 5)]
            found += digests(slice_tasks(batch, i, i + 1) for batch in made for i in range(4))
    assert len(set(found)) == len(found) == 3 * 4 * 5 * 4


@both
@pytest.mark.parametrize("shards", [1, 4, 64])
def test_no_two_tasks_of_a_batch_share_their_draws(kind, shards):
    taskset = kind(None, sizes="fixed")
    batch = maker(taskset)(of_one_task(specs(taskset, 1, 64, shards=shards)[0]))
    assert len(set(digests(slice_tasks(batch, i, i + 1) for i in range(64)))) == 64


def test_an_index_names_its_task_and_only_its_points_are_drawn_anew():
    taskset = Waves(3)
    early, late = (maker(taskset)(spec) for spec in (specs(taskset, 9, 3)[i] for i in (0, 8)))
    assert early.aux["index"].tolist() == late.aux["index"].tolist() == [0, 1, 2]
    assert not torch.equal(early.context_x[:, :1], late.context_x[:, :1])


@both
@given(
    shards=st.sampled_from([1, 2, 3, 6]),
    world_size=st.sampled_from([1, 2, 3, 6]),
    each=st.integers(1, 3),
    step=st.integers(0, 9),
)
def test_parts_made_apart_are_the_parts_of_the_batch(kind, shards, world_size, each, step):
    taskset, batch_size = kind(None), each * 6
    whole = specs(taskset, step + 1, batch_size, shards=shards)[step]
    batch = maker(taskset)(whole)
    if shards % world_size == 0:
        parts = [
            maker(taskset)(
                specs(
                    taskset, step + 1, batch_size, shards=shards, world_size=world_size, rank=rank
                )[step]
            )
            for rank in range(world_size)
        ]
        assert digest(concatenate(parts)) == digest(batch)
    shorter = slice_tasks(batch, 0, batch_size // shards)
    alone = specs(taskset, step + 1, batch_size, shards=shards, world_size=shards)[step]
    assert digest(maker(taskset)(alone)) == digest(shorter)


@both
def test_a_pickled_maker_makes_the_same_batches(kind):
    taskset = kind(None)
    original = maker(taskset, 3)
    copy = pickle.loads(pickle.dumps(original))
    for spec in specs(taskset, 3):
        assert digest(copy(pickle.loads(pickle.dumps(spec)))) == digest(original(spec))


# --- what it leaves alone ----------------------------------------------------------------------


@both
def test_making_a_batch_leaves_the_global_generators_alone(kind):
    taskset = kind(None)
    global_draws()
    before = global_states()
    for spec in specs(taskset, 3):
        maker(taskset)(spec)
    assert global_states() == before


@pytest.mark.parametrize("kind", [Fails, FailsAlone])
def test_a_task_that_fails_leaves_generators_and_threads_alone(kind):
    taskset = kind(8)
    threads, before = torch.get_num_threads(), global_states()
    with pytest.raises(ArithmeticError):
        maker(taskset)(specs(taskset, 2)[1])
    assert global_states() == before
    assert torch.get_num_threads() == threads


class Rewrites(Waves):
    def __gettasks__(self, indices, *sizes, **more):
        batch = super().__gettasks__(indices, *sizes, **more)
        indices.fill_(-1)
        return batch


@pytest.mark.parametrize("n_batches", [None, 5])
def test_what_a_task_set_does_to_its_indices_does_not_reach_the_plan(n_batches):
    taskset = Rewrites(20)
    of = Plan(n_tasks=20, law=taskset.law, batch_size=4, shuffle=True, n_batches=n_batches)
    expected = of.indices(1).tolist()
    maker(taskset)(of.spec(1))
    assert of.indices(1).tolist() == expected


# --- how it calls the task set -----------------------------------------------------------------


class Arguments(Example):
    def __gettasks__(self, indices, n_context, n_target, generator, **more):
        self.seen = (indices, n_context, n_target, generator, more)
        return torch.zeros(len(indices))


class ArgumentsAlone(Example):
    def __gettask__(self, index, n_context, n_target, **more):
        self.seen = (index, n_context, n_target, more)
        return 0


def test_a_whole_batch_gets_int64_indices_sizes_and_a_generator():
    taskset = Arguments()
    spec = specs(taskset, 2)[1]
    maker(taskset)(spec)
    indices, n_context, n_target, generator, more = taskset.seen
    assert indices.dtype == torch.int64
    assert indices.tolist() == [4, 5, 6, 7]
    assert (n_context, n_target, more) == (spec.n_context, spec.n_target, {})
    assert isinstance(generator, torch.Generator)
    assert generator.device.type == "cpu"


def test_a_single_task_gets_a_plain_index_and_sizes():
    taskset = ArgumentsAlone()
    spec = specs(taskset, 2)[1]
    maker(taskset)(spec)
    assert taskset.seen == (7, spec.n_context, spec.n_target, {})
    assert type(taskset.seen[0]) is int


@pytest.mark.parametrize("kind", [Arguments, ArgumentsAlone])
def test_further_sizes_arrive_as_keyword_arguments(kind):
    taskset = kind(sizes={"law": "way_shot", "ways": 5, "shots": 1, "queries": 2})
    maker(taskset)(specs(taskset, 1)[0])
    assert taskset.seen[-1] == {"ways": 5, "shots": 1, "queries": 2}


def test_episodes_of_changing_ways_and_shots_can_be_stacked():
    taskset = Episodes(n_tasks=None)
    for spec in specs(taskset, 20, shards=2):
        batch = maker(taskset)(spec)
        assert batch.context_y.shape == (4, spec.sizes["ways"] * spec.sizes["shots"])
        assert batch.target_y.shape == (4, spec.sizes["ways"] * 2)


def test_collate_gets_the_list_of_tasks_in_order():
    taskset = Draws()
    tasks = maker(taskset, collate=lambda tasks: tasks)(specs(taskset, 1)[0])
    assert isinstance(tasks, list)
    assert [task["index"] for task in tasks] == [0, 1, 2, 3]
    stacked = maker(taskset)(specs(taskset, 1)[0])
    assert torch.equal(stacked["torch"], torch.stack([task["torch"] for task in tasks]))


def test_a_collate_function_that_draws_draws_the_same_and_leaves_the_program_its_numbers():
    taskset = Draws()
    spec = specs(taskset, 1)[0]
    before = torch.get_rng_state()
    drawn = [maker(taskset, collate=lambda tasks: torch.rand(3))(spec) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)


class Threads(Example):
    def __gettask__(self, index, n_context, n_target):
        return torch.get_num_threads()


def test_tasks_are_made_on_one_thread_and_the_others_come_back():
    taskset, threads = Threads(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert maker(taskset)(specs(taskset, 1)[0]).tolist() == [1, 1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


class Tiny(Example):
    def __gettask__(self, index, n_context, n_target):
        return torch.tensor([2.0]).pow(-140 - index)  # the least normal float32 is 2⁻¹²⁶


def test_tasks_of_denormal_numbers_are_what_they_are_where_these_are_flushed():
    taskset = Tiny()
    expected = maker(taskset)(specs(taskset, 1)[0])
    assert expected.ne(0).all()
    with denormals.as_before():
        denormals.flush()
        made = maker(taskset)(specs(taskset, 1)[0])
        assert denormals.are_flushed()
    assert torch.equal(made, expected)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "said"), [(Fails, "no such wave"), (FailsAlone, "no such draw")])
def test_an_error_in_a_task_carries_the_spec(kind, said):
    taskset = kind(8)
    spec = specs(taskset, 2)[1]
    with pytest.raises(ArithmeticError, match=said) as error:
        maker(taskset)(spec)
    (note,) = error.value.__notes__
    assert note == f"while creating {spec!r} of {kind.__name__}"
    assert "indices=[4, 5, 6, 7]" in note


def test_an_error_in_joining_tasks_carries_the_spec_too():
    def refuse(tasks):
        raise ArithmeticError("cannot join")

    taskset = Draws()
    with pytest.raises(ArithmeticError) as error:
        maker(taskset, collate=refuse)(specs(taskset, 1)[0])
    assert "step=0" in error.value.__notes__[0]
