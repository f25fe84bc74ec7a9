"""What was written for MetaBatch 0.9.1 runs with one changed import."""

from __future__ import annotations

import inspect
import random
from collections import Counter

import pytest
import torch

import metabatch_cli
from metabatch_cli import TaskLoader, TaskSet

ORIGINAL = """
import random
from typing import List, Tuple

import numpy as np
import torch
from metabatch import TaskLoader, TaskSet


class SineTasks(TaskSet):
    def __init__(self, task_data: List[Tuple[float, float]], **kwargs):
        super().__init__(
            kwargs["min_pts"],
            kwargs["max_ctx_pts"],
            kwargs["max_tgt_pts"],
            kwargs.get("total_tgt_pts", 20),
            kwargs.get("eval", False),
            kwargs.get("predict_full_target", False),
            kwargs.get("predict_full_target_during_eval", False),
        )
        self.task_data = task_data

    def __len__(self) -> int:
        return len(self.task_data)

    def __gettask__(self, index, n_context, n_target):
        amplitude, phase = self.task_data[index]
        x = np.random.uniform(-5, 5, (n_context + n_target, 1))
        y = amplitude * np.sin(x + phase) + random.gauss(0, 0.1)
        points = torch.from_numpy(np.concatenate([x, y], axis=1)).float()
        return {"context": points[:n_context], "target": points[n_context:], "index": index}


class Briefly(SineTasks):
    def __gettask__(self, idx, n_ctx, n_tgt):
        return torch.randn(n_ctx, 1), torch.randn(n_tgt, 1)
"""

DATA = [(1 + i / 10, i / 5) for i in range(30)]
SIZES = {"min_pts": 1, "max_ctx_pts": 5, "max_tgt_pts": 10}


@pytest.fixture(scope="module")
def user() -> dict:
    """The user's module, with its one changed import."""
    source = ORIGINAL.replace("from metabatch import", "from metabatch_cli import")
    assert source != ORIGINAL
    names: dict = {"__name__": "users_module"}
    exec(source, names)
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_task_set_of_the_originals_runs_with_one_changed_import(user, workers):
    tasks = user["SineTasks"](DATA, **SIZES)
    with user["TaskLoader"](tasks, 8, True, 12, num_workers=workers) as loader:
        batches = list(loader)
    assert len(loader) == len(batches) == 12
    for batch in batches:
        n_context, n_target = batch["context"].shape[1], batch["target"].shape[1]
        assert batch["context"].shape == (8, n_context, 2)
        assert batch["target"].shape == (8, n_target, 2)
        assert 1 <= n_context <= 5
        assert n_context <= n_target <= 10
        assert len(set(batch["index"].tolist())) == 8
    assert len({batch["context"].shape for batch in batches}) > 1


def test_the_readmes_call_runs_with_workers_and_three_sizes(user):
    tasks = user["SineTasks"](DATA, min_pts=1, max_ctx_pts=5, max_tgt_pts=10)
    with TaskLoader(tasks, batch_size=16, workers=2) as loader:
        assert [len(batch["index"]) for batch in loader] == [16, 14]


def test_the_users_own_names_for_the_sizes_do_not_matter(user):
    context, target = next(iter(TaskLoader(user["Briefly"](DATA, **SIZES), 4)))
    assert context.shape[0] == target.shape[0] == 4
    assert context.shape[1] <= target.shape[1]


def test_the_originals_seven_arguments_are_taken_by_position():
    class Tasks(TaskSet):
        def __len__(self):
            return 5

        def __gettask__(self, index, n_context, n_target):
            return torch.zeros(n_context), torch.zeros(n_target)

    tasks = Tasks(1, 5, 10, 40, True, False, True)
    kept = (tasks.min_pts, tasks.max_ctx_pts, tasks.max_tgt_pts, tasks.total_tgt_pts)
    assert kept == (1, 5, 10, 40)
    assert (tasks.eval, tasks.predict_full_target) == (True, False)
    assert tasks.predict_full_target_during_eval is True
    for context, target in TaskLoader(tasks, 2):
        assert context.shape[1] + target.shape[1] == 40


def original_sizes(tasks, chance: random.Random) -> tuple[int, int]:
    """The original's law, after its description."""
    n_context = chance.randint(tasks.min_pts, tasks.max_ctx_pts)
    if tasks.predict_full_target:
        return n_context, tasks.total_tgt_pts
    if tasks.eval and tasks.predict_full_target_during_eval:
        return n_context, tasks.total_tgt_pts - n_context
    return n_context, chance.randint(n_context, tasks.max_tgt_pts)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("full_during_eval", [False, True])
def test_sizes_follow_the_originals_law(held_out, full, full_during_eval):
    tasks = TaskSet(2, 4, 6, 9, held_out, full, full_during_eval)
    stream = metabatch_cli.batching.Plan(n_tasks=None, law=tasks.law, batch_size=1)
    chance = random.Random(0)
    drawn = Counter(tuple(stream.sizes(step).values()) for step in range(3000))
    expected = Counter(original_sizes(tasks, chance) for _ in range(3000))
    assert set(drawn) == set(expected)
    for pair, count in expected.items():
        assert abs(drawn[pair] - count) < 7 * count**0.5


def test_the_loaders_parameters_are_the_originals_in_their_order():
    parameters = inspect.signature(TaskLoader).parameters
    positional = {
        name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    }
    assert list(positional.items())[1:] == [
        ("batch_size", 1),
        ("shuffle", False),
        ("n_batches", None),
        ("num_workers", 0),
        ("collate_fn", None),
        ("pin_memory", False),
        ("drop_last", False),
        ("timeout", 0),
        ("worker_init_fn", None),
        ("multiprocessing_context", None),
        ("generator", None),
    ]
    assert next(iter(positional)) == "dataset"
    named = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert named["prefetch_factor"] == 2
    assert named["persistent_workers"] is False
    assert named["pin_memory_device"] == ""


def test_all_twelve_arguments_are_taken_by_position(user):
    tasks = user["SineTasks"](DATA, **SIZES)
    generator = torch.Generator().manual_seed(3)
    loader = TaskLoader(tasks, 8, True, 4, 0, None, False, False, 0, None, None, generator)
    assert [len(batch["index"]) for batch in loader] == [8] * 4


def test_the_defaults_run(user):
    batches = list(TaskLoader(user["SineTasks"](DATA, **SIZES)))
    assert [batch["index"].tolist() for batch in batches] == [[i] for i in range(30)]


def test_without_n_batches_an_epoch_is_one_pass(user):
    tasks = user["SineTasks"](DATA, **SIZES)
    for shuffle in (False, True):
        whole = [b["index"].tolist() for b in TaskLoader(tasks, batch_size=8, shuffle=shuffle)]
        assert [len(indices) for indices in whole] == [8, 8, 8, 6]
        seen = [index for indices in whole for index in indices]
        assert sorted(seen) == list(range(30))
        assert (seen == list(range(30))) == (not shuffle)
    dropped = TaskLoader(tasks, batch_size=8, drop_last=True)
    assert len(dropped) == len(list(dropped)) == 3


def test_n_batches_gives_full_batches_over_repeated_passes_and_needs_shuffle(user):
    tasks = user["SineTasks"](DATA, **SIZES)
    loader = TaskLoader(tasks, batch_size=20, shuffle=True, n_batches=9, drop_last=True)
    batches = [batch["index"].tolist() for batch in loader]
    assert len(loader) == len(batches) == 9
    assert all(len(set(indices)) == len(indices) == 20 for indices in batches)
    with pytest.raises(ValueError, match="shuffle=True"):
        TaskLoader(tasks, batch_size=20, n_batches=9)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_of_the_users_is_honoured(user, workers):
    tasks = user["SineTasks"](DATA, **SIZES)

    def only_contexts(batch):
        return torch.stack([task["context"] for task in batch])

    with TaskLoader(tasks, batch_size=3, num_workers=workers, collate_fn=only_contexts) as loader:
        batch = next(iter(loader))
    assert isinstance(batch, torch.Tensor)
    assert batch.shape[0] == 3


def test_impossible_sizes_are_refused_as_the_original_did():
    with pytest.raises(ValueError, match="max_ctx_pts"):
        TaskSet(5, 4, 10, None, False, False, False)
    with pytest.raises(ValueError, match="max_tgt_pts"):
        TaskSet(1, 10, 10, None, False, False, False)


def test_a_task_set_in_a_plain_data_loader_names_task_loader(user):
    plain = torch.utils.data.DataLoader(user["SineTasks"](DATA, **SIZES), batch_size=4)
    with pytest.raises(TypeError, match="TaskLoader"):
        next(iter(plain))
