"""TaskSet: what it takes, what it refuses, what it knows."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils.data import DataLoader

from metabatch_cli.batching import TaskLoader, TaskSet, TaskSpec
from metabatch_cli.batching.sizes import Fixed, Metabatch, Rest
from metabatch_cli.batching.taskset import makes_whole_batches, n_tasks
from tests.batching.examples import Draws, Waves, first


def test_the_first_seven_parameters_are_the_originals():
    parameters = inspect.signature(TaskSet).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional[3:]] == [
        ("total_tgt_pts", None),
        ("eval", False),
        ("predict_full_target", False),
        ("predict_full_target_during_eval", False),
    ]
    assert [p.name for p in positional[:3]] == ["min_pts", "max_ctx_pts", "max_tgt_pts"]


def test_the_sizes_reach_the_law_by_position_and_by_name():
    by_position = TaskSet(1, 5, 10, 20, True, False, True)
    assert by_position.law == Metabatch(1, 5, 10, 20, True, False, True)
    by_name = TaskSet(
        min_pts=1,
        max_ctx_pts=5,
        max_tgt_pts=10,
        total_tgt_pts=20,
        eval=True,
        predict_full_target_during_eval=True,
    )
    assert by_name.law == by_position.law
    for name in ("min_pts", "max_ctx_pts", "max_tgt_pts", "total_tgt_pts", "eval"):
        assert getattr(by_name, name) == getattr(by_position.law, name)


def test_sizes_names_the_law_or_is_one():
    assert TaskSet(1, 5, total_tgt_pts=20, sizes="rest").law == Rest(1, 5, 20)
    assert TaskSet(1, 5, 10, sizes={"law": "fixed", "max_tgt_pts": 7}).law == Fixed(5, 7)
    assert TaskSet(sizes=Fixed(2, 3)).law == Fixed(2, 3)


def test_impossible_sizes_are_refused_when_the_set_is_made():
    with pytest.raises(ValueError, match="max_ctx_pts=3 is smaller than min_pts=5"):
        TaskSet(5, 3, 10)
    with pytest.raises(ValueError, match="min_pts is missing"):
        TaskSet()


@pytest.mark.parametrize(
    ("arguments", "split", "held_out"),
    [
        ({}, "train", False),
        ({"eval": True}, "val", True),
        ({"split": "train"}, "train", False),
        ({"split": "val"}, "val", True),
        ({"split": "test"}, "test", True),
        ({"split": "test", "eval": True}, "test", True),
    ],
)
def test_eval_is_every_split_but_train(arguments, split, held_out):
    taskset = TaskSet(1, 5, 10, **arguments)
    assert (taskset.split, taskset.eval) == (split, held_out)
    assert taskset.law.eval == held_out


def test_a_set_can_be_given_its_split_later():
    arguments = (1, 5, 10, 20, False, False, True)
    for split in ("val", "test", "train"):
        moved = Waves(None, 1, 5, 10, total_tgt_pts=20, predict_full_target_during_eval=True)
        moved.belong_to(split)
        made = TaskSet(*arguments, split=split)
        assert (moved.split, moved.eval, moved.law) == (made.split, made.eval, made.law)
        there = Waves(
            None, 1, 5, 10, total_tgt_pts=20, predict_full_target_during_eval=True, split=split
        )
        assert first(TaskLoader(moved), 3) == first(TaskLoader(there), 3)


def test_an_unknown_split_given_later_is_refused_too():
    with pytest.raises(ValueError, match=r"split='valid'.*train, val, test"):
        Waves().belong_to("valid")


def test_an_unknown_split_is_answered_with_the_choices():
    with pytest.raises(ValueError, match=r"split='valid'.*train, val, test"):
        TaskSet(1, 5, 10, split="valid")


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Waves, Draws])
def test_a_task_set_read_without_task_loader_names_task_loader(kind):
    with pytest.raises(TypeError, match=rf"{kind.__name__} .*TaskLoader"):
        kind()[0]
    with pytest.raises(TypeError, match="TaskLoader"):
        next(iter(DataLoader(kind(), batch_size=2)))
    with pytest.raises(TypeError, match="TaskLoader"):
        list(kind())


class Neither(TaskSet):
    def __len__(self):
        return 3


class Both(Waves):
    def __gettask__(self, index, n_context, n_target):
        raise AssertionError("the slow way was taken")


class Heir(Draws):
    pass


def test_a_set_that_makes_no_tasks_is_told_what_to_implement():
    with pytest.raises(TypeError) as error:
        TaskLoader(Neither(1, 5, 10))
    assert "Neither implements neither" in str(error.value)
    assert "__gettask__(index, n_context, n_target)" in str(error.value)
    assert "__gettasks__(indices, n_context, n_target, generator)" in str(error.value)


def test_whole_batches_are_preferred_where_a_set_can_do_both():
    assert makes_whole_batches(Both())
    assert len(TaskLoader(Both(), batch_size=3).batch_at(0).context_x) == 3


def test_methods_are_found_where_they_are_inherited():
    assert makes_whole_batches(Waves())
    assert not makes_whole_batches(Heir())


def test_a_set_without_a_length_is_told_to_have_one():
    class Lengthless(TaskSet):
        def __gettask__(self, index, n_context, n_target):
            return torch.zeros(n_context)

    with pytest.raises(NotImplementedError, match="Lengthless must implement __len__"):
        TaskLoader(Lengthless(1, 5, 10))


def test_a_set_whose_length_raises_type_error_is_infinite():
    assert n_tasks(Waves(7)) == 7
    assert n_tasks(Waves(None)) is None


def test_a_length_that_is_no_integer_is_no_infinity():
    with pytest.raises((TypeError, ValueError)):
        TaskLoader(Waves(7.5))


def test_something_else_than_a_task_set_is_refused():
    with pytest.raises(TypeError, match="reads a TaskSet, not a list"):
        TaskLoader([1, 2, 3])


# --- what it knows -----------------------------------------------------------------------------


def test_a_set_knows_nothing_unless_it_says_so():
    taskset = Waves()
    assert taskset.spec is None
    assert taskset.oracle(None) is None
    assert taskset.truth(None, None) is None


def test_a_spec_counts_the_numbers_in_x_and_y():
    regression = TaskSpec(x_shape=(2,), y_shape=(3,))
    assert (regression.dim_x, regression.dim_y, regression.kind) == (2, 3, "regression")
    classes = TaskSpec((3, 28, 28), (), kind="classification", ways=5)
    assert (classes.dim_x, classes.dim_y) == (3 * 28 * 28, 5)
