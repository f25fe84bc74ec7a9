"""Tasks and batches: their fields, their trees, their digests."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from metabatch_cli.batching import Task, as_task, digest, slice_tasks
from metabatch_cli.batching.task import concatenate, to_device, tree_map

Pair = namedtuple("Pair", ["left", "right"])


def some_task(tasks: int = 4) -> Task:
    return Task(
        torch.arange(tasks * 6.0).reshape(tasks, 3, 2),
        torch.arange(tasks * 3).reshape(tasks, 3),
        torch.zeros(tasks, 5, 2),
        torch.ones(tasks, 5),
        aux={"height": torch.arange(tasks)},
    )


def some_tree(tasks: int) -> dict:
    return {
        "task": some_task(tasks),
        "list": [torch.arange(tasks), (torch.rand(tasks, 2),)],
        "pair": Pair(torch.arange(tasks) * 2, {"deep": torch.zeros(tasks, 0)}),
    }


# --- trees -------------------------------------------------------------------------------------


def test_a_mapped_tree_keeps_its_structure():
    tree = {"a": Pair(1, [2, (3,)]), "b": some_task(1)._replace(aux={})}
    mapped = tree_map(lambda leaf: (leaf, "seen"), tree)
    assert mapped["a"] == Pair((1, "seen"), [(2, "seen"), ((3, "seen"),)])
    assert isinstance(mapped["a"], Pair)
    assert isinstance(mapped["b"], Task)
    assert mapped["b"].context_x[1] == "seen"
    assert mapped["b"].aux == {}


@given(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=4))
def test_slices_joined_again_are_the_batch(tasks, cuts):
    torch.manual_seed(0)
    tree = some_tree(tasks)
    ends = [0, *sorted(min(cut, tasks) for cut in cuts), tasks]
    parts = [slice_tasks(tree, *ends[i : i + 2]) for i in range(len(ends) - 1)]
    joined = concatenate(parts)
    assert isinstance(joined["task"], Task)
    assert isinstance(joined["pair"], Pair)
    assert isinstance(joined["list"], list)
    assert digest(joined) == digest(tree)


def test_a_slice_has_the_tasks_asked_for():
    part = slice_tasks(some_task(4), 1, 3)
    assert part.aux["height"].tolist() == [1, 2]
    assert torch.equal(part.context_x, some_task(4).context_x[1:3])


def test_one_batch_alone_is_joined_as_it_is():
    batch = {"names": "anything", "x": torch.zeros(2)}
    assert concatenate([batch]) is batch


def test_joining_what_is_no_tensor_says_what_is_needed():
    with pytest.raises(TypeError, match=r"tensors \[tasks, …\], not str.*shards > 1"):
        concatenate([{"name": "a"}, {"name": "b"}])


def test_a_batch_moves_to_a_device_with_all_its_tensors():
    tree = {**some_tree(2), "name": "kept"}
    moved = to_device(tree, "meta")
    places = []
    tree_map(lambda leaf: places.append(getattr(leaf, "device", leaf)), moved)
    assert places.pop() == "kept"
    assert set(places) == {torch.device("meta")}
    assert len(places) == 9
    assert tree["task"].aux["height"].device.type == "cpu"


def test_tasks_without_aux_can_be_stacked():
    alone = [Task(*(torch.full((2, 1), float(i)) for _ in range(4))) for i in range(3)]
    batch = default_collate(alone)
    assert isinstance(batch, Task)
    assert batch.context_x.shape == (3, 2, 1)
    assert batch.aux == {}
    assert Task(*alone[0][:4]).aux == {}  # the shared default was not written into


# --- as_task -----------------------------------------------------------------------------------

FIELDS = dict(zip(Task._fields, some_task(), strict=True))
WITHOUT = {name: FIELDS[name] for name in Task._fields[:4]}


def test_a_task_is_taken_as_it_is():
    task = some_task()
    assert as_task(task) is task


@pytest.mark.parametrize(
    "batch",
    [
        FIELDS,
        OrderedDict(reversed(FIELDS.items())),
        tuple(FIELDS.values()),
        list(FIELDS.values()),
        namedtuple("Other", [*reversed(FIELDS), "more"])(*reversed(FIELDS.values()), "more"),
    ],
    ids=["mapping", "mapping in another order", "tuple", "list", "namedtuple"],
)
def test_the_five_fields_make_a_task_by_name_or_by_position(batch):
    task = as_task(batch)
    assert isinstance(task, Task)
    assert digest(task) == digest(some_task())
    assert set(task.aux) == {"height"}


@pytest.mark.parametrize("batch", [WITHOUT, tuple(WITHOUT.values()), list(WITHOUT.values())])
def test_four_fields_make_a_task_without_aux(batch):
    task = as_task(batch)
    assert task.aux == {}
    assert torch.equal(task.target_y, FIELDS["target_y"])


@pytest.mark.parametrize(
    ("batch", "outline"),
    [
        ({"context": 1, "target": 2}, "a dict with context, target"),
        (dict.fromkeys(Task._fields[:3], 0), "a dict with context_x, context_y, target_x"),
        ((1, 2, 3), "a tuple of 3"),
        ([1] * 6, "a list of 6"),
        (torch.zeros(3), "a Tensor"),
        (None, "a NoneType"),
    ],
)
def test_other_batches_are_described_beside_what_is_asked_for(batch, outline):
    with pytest.raises(TypeError) as error:
        as_task(batch)
    assert "context_x, context_y, target_x, target_y" in str(error.value)
    assert outline in str(error.value)


# --- digest ------------------------------------------------------------------------------------


@given(st.integers(0, 11), st.integers(0, 7))
def test_one_changed_bit_changes_the_digest(place, bit):
    tensor = torch.arange(12, dtype=torch.uint8)
    changed = tensor.clone()
    changed[place] ^= 1 << bit
    assert digest({"a": tensor}) != digest({"a": changed})


def test_the_digest_depends_on_order_shape_type_and_number():
    zeros = torch.zeros(4)
    batches = [
        [zeros],
        [zeros, zeros],
        [torch.zeros(2, 2)],
        [torch.zeros(1, 4)],
        [torch.zeros(4, dtype=torch.int32)],
        [torch.zeros(2, dtype=torch.float64)],
        [-zeros],
        [zeros, torch.ones(4)],
        [torch.ones(4), zeros],
        [zeros, 1],
        [zeros, 2],
        [],
    ]
    assert len({digest(*batch) for batch in batches}) == len(batches)


def test_the_digest_depends_on_values_not_on_memory():
    x = torch.rand(6, 4)
    assert digest(x.T) == digest(x.T.contiguous())
    assert digest(x[::2]) == digest(x[::2].clone())
    assert digest(x.clone().requires_grad_()) == digest(x)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=["number", "truths", "nothing", "bfloat16", "complex"],
)
def test_tensors_of_any_kind_have_a_digest(tensor):
    assert digest(tensor) == digest(tensor.clone())
    assert digest(tensor) != digest(torch.tensor([7, 7]))


def test_the_digest_reads_all_of_a_long_array():
    array = torch.zeros(5000).numpy()
    changed = array.copy()
    changed[2500] = 1
    assert digest(array) != digest(changed)


def test_arrays_of_words_have_a_digest():
    assert digest(np.array(["a", "b"])) == digest(np.array(["a", "b"]))
    assert digest(np.array(["a", "b"])) != digest(np.array(["a", "c"]))


@pytest.mark.parametrize(
    ("odd", "plain"),
    [
        (torch.zeros(4)[::4], torch.zeros(1)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
        (torch.arange(6.0).view(2, 3).t(), torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])),
    ],
)
def test_a_digest_is_of_the_numbers_however_they_lie_in_memory(odd, plain):
    assert digest(odd) == digest(plain)
