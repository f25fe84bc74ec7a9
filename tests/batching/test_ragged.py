"""Tasks of unequal sizes: padded, packed, as a list, and back again without a loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching import (
    PackedTask,
    PaddedTask,
    Task,
    TaskLoader,
    as_task,
    digest,
    pack,
    pad,
    slice_tasks,
)
from metabatch_cli.batching.collate import padded, stacked
from metabatch_cli.batching.task import concatenate, to_device
from tests.batching.examples import Example, Ragged, RaggedWhole, digests, first

seeds = st.integers(0, 2**31)
sizes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=5)


def functions(points: list[tuple[int, int]], seed: int, dtype: torch.dtype) -> list[Task]:
    """Points of the plane and two numbers for each, none of them 0."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype) + 0.5

    return [
        Task(numbers(c, 3), numbers(c, 2), numbers(t, 3), numbers(t, 2), {"height": numbers(1)[0]})
        for c, t in points
    ]


def episodes(points: list[tuple[int, int]], seed: int) -> list[Task]:
    """Images [C, H, W] of bytes and labels, none of them 0."""
    generator = torch.Generator().manual_seed(seed)

    def bytes_(count: int) -> torch.Tensor:
        return torch.randint(1, 256, (count, 3, 4, 2), generator=generator, dtype=torch.uint8)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(1, 5, (count,), generator=generator)

    return [
        Task(bytes_(c), labels(c), bytes_(t), labels(t), {"classes": labels(3)}) for c, t in points
    ]


@st.composite
def lists(draw: st.DrawFn) -> list[Task]:
    points, seed = draw(sizes), draw(seeds)
    kind = draw(st.sampled_from([torch.float32, torch.float64, torch.uint8]))
    return episodes(points, seed) if kind is torch.uint8 else functions(points, seed, kind)


# --- conversions -------------------------------------------------------------------------------


@given(lists())
def test_a_list_padded_and_unpadded_is_the_list(tasks):
    assert digest(pad(tasks).unpad()) == digest(tasks)


@given(lists())
def test_a_list_packed_and_unpacked_is_the_list(tasks):
    assert digest(pack(tasks).unpad()) == digest(tasks)


@given(lists())
def test_packed_and_padded_are_two_forms_of_the_same(tasks):
    packed, batch = pack(tasks), pad(tasks)
    assert isinstance(packed, PackedTask)
    assert isinstance(batch, PaddedTask)
    assert digest(packed.padded()) == digest(batch)
    assert digest(batch.packed()) == digest(packed)


@given(lists(), st.integers(0, 3), st.integers(0, 3))
def test_longer_padding_holds_the_same_tasks(tasks, more_context, more_target):
    packed = pack(tasks)
    n_context = max(len(task.context_x) for task in tasks) + more_context
    n_target = max(len(task.target_x) for task in tasks) + more_target
    batch = packed.padded(n_context, n_target)
    assert batch.context_x.shape[:2] == batch.context_mask.shape == (len(tasks), n_context)
    assert batch.target_y.shape[:2] == batch.target_mask.shape == (len(tasks), n_target)
    assert digest(batch.packed()) == digest(packed)


@given(lists())
def test_padding_is_zero_and_a_mask_says_where_it_is(tasks):
    batch = pad(tasks)
    for part in ("context", "target"):
        mask = getattr(batch, f"{part}_mask")
        assert mask.dtype == torch.bool
        assert mask.sum(dim=1).tolist() == [len(getattr(task, f"{part}_x")) for task in tasks]
        for name in (f"{part}_x", f"{part}_y"):
            values = getattr(batch, name)
            assert values.dtype == getattr(tasks[0], name).dtype
            assert not values[~mask].any()
            assert values[mask].all()  # of points, which are not 0 in these examples


@given(lists(), seeds)
def test_points_may_stand_anywhere_between_the_padding(tasks, seed):
    packed = pack(tasks)
    batch = packed.padded()
    order = torch.randperm(batch.context_x.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = batch._replace(
        context_x=batch.context_x[:, order],
        context_y=batch.context_y[:, order],
        context_mask=batch.context_mask[:, order],
    )
    places = [order[mask] for mask in moved.context_mask]
    for task, original, place in zip(moved.unpad(), tasks, places, strict=True):
        assert torch.equal(task.context_x, original.context_x[place])


@given(lists())
def test_offsets_say_where_each_task_begins(tasks):
    packed = pack(tasks)
    assert packed.context_offsets.dtype == packed.target_offsets.dtype == torch.int64
    for i, task in enumerate(tasks):
        begin, end = packed.target_offsets[i : i + 2].tolist()
        assert torch.equal(packed.target_y[begin:end], task.target_y)
    assert packed.context_offsets[-1] == len(packed.context_x)


@given(lists())
def test_what_all_tasks_have_in_common_are_their_first_points(tasks):
    batch = pad(tasks).common()
    assert isinstance(batch, Task)
    n_context = min(len(task.context_x) for task in tasks)
    n_target = min(len(task.target_x) for task in tasks)
    for i, task in enumerate(tasks):
        assert torch.equal(batch.context_y[i], task.context_y[:n_context])
        assert torch.equal(batch.target_x[i], task.target_x[:n_target])


def test_conversions_stay_on_the_device():
    batch = pad(functions([(2, 3), (1, 4)], 0, torch.float32))
    packed = batch.packed()
    moved = to_device(batch, "meta")
    assert isinstance(moved, PaddedTask)
    assert moved.context_mask.device.type == "meta"
    assert {part.device for part in packed[:6]} == {torch.device("cpu")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_conversions_on_a_gpu_are_those_on_the_cpu():
    tasks = functions([(2, 3), (0, 4), (5, 0)], 0, torch.float32)
    moved = [to_device(task, "cuda") for task in tasks]
    assert pad(moved).context_mask.device.type == "cuda"
    assert digest(pad(moved)) == digest(pad(tasks))
    assert digest(pad(moved).packed()) == digest(pack(tasks))
    assert digest(pad(moved).unpad()) == digest(tasks)


def test_padding_to_less_than_a_task_has_is_refused():
    with pytest.raises(ValueError, match=r"n_target=3 is too small: a task of the batch has 4"):
        pack(functions([(2, 3), (1, 4)], 0, torch.float32)).padded(2, 3)


def test_no_tasks_are_no_batch():
    with pytest.raises(ValueError, match="at least one"):
        pad([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_y": torch.zeros(2, 2)}, "task 1 of the batch has 1 points in context_x and 2"),
        ({"target_y": torch.zeros(4, 5)}, r"target_y is \[3, 2\] in task 0 .* \[4, 5\] in task 1"),
        ({"aux": {}}, "aux has height in task 0 of the batch and nothing in task 1"),
    ],
)
def test_tasks_that_do_not_fit_together_are_named(change, message):
    one, other = functions([(2, 3), (1, 4)], 0, torch.float32)
    with pytest.raises(ValueError, match=message):
        pad([one, other._replace(**change)])


# --- as a batch --------------------------------------------------------------------------------


def some_batch() -> PaddedTask:
    return pad(functions([(2, 3), (0, 4), (4, 0), (1, 1)], 0, torch.float32))


def test_a_padded_batch_is_taken_as_it_is_or_by_its_names():
    batch = some_batch()
    assert as_task(batch) is batch
    by_name = as_task(dict(reversed(batch._asdict().items())))
    assert isinstance(by_name, PaddedTask)
    assert digest(by_name) == digest(batch)


def test_one_mask_alone_is_refused():
    fields = some_batch()._asdict()
    del fields["target_mask"]
    with pytest.raises(TypeError, match=r"both masks .*without target_mask"):
        as_task(fields)


def test_a_packed_batch_is_refused_and_the_remedy_named():
    with pytest.raises(TypeError, match=r"\.padded\(\)"):
        as_task(some_batch().packed())


def test_a_task_and_a_padded_batch_are_asked_for_masks_alike():
    task, batch = functions([(2, 3)], 0, torch.float32)[0], some_batch()
    assert task.context_mask is task.target_mask is None
    assert task.masks == {}
    assert batch.masks == {"context_mask": batch.context_mask, "target_mask": batch.target_mask}


@given(lists(), lists())
def test_batches_of_other_lengths_are_joined_by_padding_to_the_longest(one, other):
    if digest(one[0].context_x[:0]) != digest(other[0].context_x[:0]):
        other = one[::-1]
    joined = concatenate([pad(one), pad(other)])
    assert isinstance(joined, PaddedTask)
    assert digest(joined) == digest(pad([*one, *other]))


def test_slices_joined_again_are_the_batch():
    batch = some_batch()
    joined = concatenate([slice_tasks(batch, 0, 1), slice_tasks(batch, 1, 4)])
    assert digest(joined) == digest(batch)


# --- from single tasks to batches --------------------------------------------------------------


def test_arrays_and_tuples_are_padded_too():
    tasks = [
        (np.ones((c, 1)), np.ones((c, 1)), np.ones((t, 1)), np.ones((t, 1)), {"index": i})
        for i, (c, t) in enumerate([(1, 2), (3, 0)])
    ]
    batch = padded(tasks)
    assert batch.context_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.target_x.shape == (2, 2, 1)
    assert batch.target_x.dtype == torch.float64
    assert batch.aux["index"].tolist() == [0, 1]


def test_a_single_task_with_padding_is_refused():
    with pytest.raises(TypeError, match=r"PaddedTask.*a single task has no padding"):
        padded([some_batch()])


@pytest.mark.parametrize(
    "form", [Task._asdict, tuple, list, lambda task: task], ids=["dict", "tuple", "list", "Task"]
)
def test_unequal_sizes_are_named_with_the_field_the_task_and_the_remedy(form):
    tasks = functions([(2, 3), (2, 3), (2, 4)], 0, torch.float32)
    with pytest.raises(ValueError) as error:
        stacked([form(task) for task in tasks])
    text = str(error.value)
    assert "target_x is [3, 3] in task 0 and [4, 3] in task 2" in text
    assert "target_y is [3, 2] in task 0 and [4, 2] in task 2" in text
    assert "context" not in text.partition("Either")[0]
    assert "ragged = True" in text


def test_what_cannot_be_stacked_for_another_reason_says_its_own():
    with pytest.raises(TypeError, match="default_collate"):
        stacked([object(), object()])


class Forgetful(Example):
    """Sizes of its own, and not a word about it."""

    def __gettask__(self, index, n_context, n_target):
        return torch.zeros(index + 1, 1), torch.zeros(index + 1, 1), torch.zeros(2), torch.zeros(2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_set_that_does_not_say_that_it_is_ragged_is_told_to(workers):
    with (
        TaskLoader(Forgetful(), 3, workers=workers) as loader,
        pytest.raises(Exception, match=r"context_x is \[1, 1\] in task 0 and \[2, 1\] in task 1"),
    ):
        next(iter(loader))


# --- through the loader ------------------------------------------------------------------------


def test_a_ragged_set_makes_padded_batches_even_where_sizes_agree():
    loader = TaskLoader(Ragged(n_tasks=3), 1)
    assert all(isinstance(batch, PaddedTask) for batch in loader)


@pytest.mark.parametrize("kind", [Ragged, RaggedWhole])
def test_ragged_batches_do_not_depend_on_the_workers(kind):
    alone = TaskLoader(kind(), 6, seed=3)
    expected = first(alone, 4)
    for workers in (0, 1):
        with TaskLoader(kind(), 6, seed=3, workers=workers) as loader:
            assert digests(loader)[:3] == expected[:3]


@pytest.mark.parametrize("kind", [Ragged, RaggedWhole])
def test_the_parts_of_all_ranks_are_the_ragged_batch(kind):
    whole = TaskLoader(kind(), 6, shuffle=True, drop_last=True, shards=2)
    ranks = [
        TaskLoader(kind(), 6, shuffle=True, drop_last=True, shards=2, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    for step in range(4):
        joined = concatenate([rank.batch_at(step) for rank in ranks])
        assert digest(joined) == digest(whole.batch_at(step))
