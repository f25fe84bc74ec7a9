"""Episodes: distinct classes, disjoint support and query, labels that say nothing."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import PaddedTask, Task, TaskLoader, digest
from metabatch_cli.batching.sizes import WORDS
from metabatch_cli.batching.taskset import n_tasks
from tasksets.episodes import Episodes, distinct
from tasksets.images import LabelledImages

SIZES = (6, 9, 7, 6, 20, 8, 6, 11)


class Numbered:
    """Images that show two numbers, their class and their place in it; classes of other sizes."""

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        self.sizes = sizes

    def select(self, split: str) -> LabelledImages:
        labels = np.repeat(np.arange(len(self.sizes)), self.sizes)
        places = np.concatenate([np.arange(size) for size in self.sizes])
        images = np.stack([labels, places], axis=1).astype(np.uint8)[:, None, None, :]
        order = np.random.default_rng(0).permutation(len(labels))
        names = [f"class{number}" for number in range(len(self.sizes))]
        return LabelledImages.from_labels(images[order], labels[order], names)


class Square(Numbered):
    """The same images with the place of class in one corner and that of the image in the next."""

    def select(self, split: str) -> LabelledImages:
        plain = super().select(split)
        pixels = np.zeros((len(plain.pixels), 1, 2, 2), np.uint8)
        pixels[:, :, :1] = plain.pixels
        pixels[:, :, 1] = 99
        return LabelledImages(pixels, plain.rows, plain.starts, plain.turns, plain.class_names)


def episodes(batch: Any) -> Any:
    """Class and place of every support and query image: `[tasks, ways, images, 2]` each."""
    ways = batch.aux["classes"].shape[1]
    return tuple(x[:, :, 0, 0].unflatten(1, (ways, -1)) for x in (batch.context_x, batch.target_x))


@settings(max_examples=40, deadline=None)
@given(
    ways=st.integers(2, len(SIZES)),
    shots=st.integers(1, 3),
    queries=st.integers(1, 3),
    finite=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_an_episode_is_what_its_name_says(ways, shots, queries, finite, seed) -> None:
    tasks = Episodes(Numbered(), ways, shots, queries, n_tasks=50 if finite else None)
    batch = TaskLoader(tasks, batch_size=7, seed=seed).batch_at(0)
    assert batch.context_x.shape == (7, ways * shots, 1, 1, 2)
    assert batch.target_x.shape == (7, ways * queries, 1, 1, 2)
    assert batch.context_x.dtype == torch.uint8
    assert batch.context_y.dtype == torch.int64
    assert torch.equal(batch.context_y, torch.arange(ways).repeat_interleave(shots).expand(7, -1))
    assert torch.equal(batch.target_y, torch.arange(ways).repeat_interleave(queries).expand(7, -1))
    classes = batch.aux["classes"]
    assert all(len(row.unique()) == ways for row in classes)
    for part in episodes(batch):
        assert torch.equal(part[..., 0].long(), classes[:, :, None].expand_as(part[..., 0]))
    places = torch.cat(episodes(batch), dim=2)[..., 1]
    for of_class in places.flatten(0, 1):
        assert len(of_class.unique()) == shots + queries


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    data=st.data(),
    seed=st.integers(0, 2**32),
)
def test_distinct_numbers_are_distinct_and_in_range(sizes, data, seed) -> None:
    count = data.draw(st.integers(1, min(sizes)))
    numbers = np.random.default_rng(seed).random((len(sizes), 2 * count))
    for size, chosen in zip(sizes, distinct(np.array(sizes), count, numbers), strict=True):
        assert len(set(chosen.tolist())) == count
        assert chosen.min() >= 0
        assert chosen.max() < size


@pytest.mark.parametrize(("size", "count"), [(4, 2), (4, 3), (4, 4), (5, 2)])
def test_distinct_numbers_come_in_every_order_equally_often(size: int, count: int) -> None:
    orders = list(itertools.permutations(range(size), count))
    draws = 1000 * len(orders)
    numbers = np.random.default_rng(3).random((draws, 2 * count))
    chosen = distinct(np.full(draws, size), count, numbers)
    _, seen = np.unique(chosen, axis=0, return_counts=True)
    assert len(seen) == len(orders)
    assert np.abs(seen - 1000).max() < 4.5 * 1000**0.5  # one fixed seed: cannot flake


def test_classes_and_labels_are_drawn_without_bias() -> None:
    batch = TaskLoader(Episodes(Numbered(), 3, 1, 1), batch_size=4000).batch_at(0)
    for label in range(3):
        counts = torch.bincount(batch.aux["classes"][:, label], minlength=8)
        assert (counts - 500).abs().max() < 4.5 * 500**0.5  # one fixed seed: cannot flake


def test_large_classes_give_each_of_their_images_equally_often() -> None:
    tasks = Episodes(Numbered((5, 50)), 2, 2, 3)
    places = torch.cat(episodes(TaskLoader(tasks, batch_size=4000).batch_at(0)), dim=2)
    of_large = places[places[..., 0] == 1][:, 1].long()
    counts = torch.bincount(of_large, minlength=50)
    assert (counts - 400).abs().max() < 4.5 * 400**0.5


def test_the_index_of_a_finite_set_fixes_its_classes_and_nothing_else() -> None:
    tasks = Episodes(Numbered(), 4, 1, 2, n_tasks=10)
    first, second = (TaskLoader(tasks, batch_size=10).batch_at(step) for step in (0, 1))
    sets = [batch.aux["classes"].sort(dim=1).values for batch in (first, second)]
    assert torch.equal(*sets)
    assert not torch.equal(first.aux["classes"], second.aux["classes"])
    assert not torch.equal(first.context_x, second.context_x)
    assert len(sets[0].unique(dim=0)) > 5


def test_fewer_ways_are_a_part_of_the_same_classes() -> None:
    tasks = Episodes(Numbered(), [2, 6], 1, 1, n_tasks=10)
    seen: dict[int, set[int]] = {}
    batches = [TaskLoader(tasks, batch_size=10).batch_at(step) for step in range(12)]
    assert len({batch.aux["classes"].shape[1] for batch in batches}) > 2
    for batch in sorted(batches, key=lambda batch: batch.aux["classes"].shape[1]):
        for index, row in enumerate(batch.aux["classes"].tolist()):
            assert seen.get(index, set()) <= set(row)
            seen[index] = set(row)


def test_splits_have_other_finite_tasks() -> None:
    chosen = [
        TaskLoader(Episodes(Numbered(), 4, n_tasks=20, queries=1, split=split), 20).batch_at(0)
        for split in ("train", "val")
    ]
    sets = [batch.aux["classes"].sort(dim=1).values for batch in chosen]
    assert not torch.equal(*sets)


def test_a_set_without_n_tasks_is_infinite() -> None:
    tasks = Episodes(Numbered(), 3, 1, 2)
    assert n_tasks(tasks) is None
    with pytest.raises(TypeError, match="infinite"):
        len(tasks)
    assert len(Episodes(Numbered(), 3, 1, 2, n_tasks=9)) == 9


def test_ranges_of_ways_shots_and_queries_are_drawn_for_each_batch() -> None:
    tasks = Episodes(Numbered(), [2, 8], [1, 3], [1, 3])
    assert tasks.spec.ways == 8
    assert tasks.spec.kind == "classification"
    assert tasks.spec.x_shape == (1, 1, 2)
    assert tasks.spec.y_shape == ()
    shapes = {
        TaskLoader(tasks, batch_size=2).batch_at(step).context_x.shape[1] for step in range(20)
    }
    assert len(shapes) > 5


# --- sizes of each task's own ------------------------------------------------------------------

own_sizes = pytest.mark.parametrize("vary", ["task", "class"])
any_sizes = pytest.mark.parametrize("vary", ["batch", "task", "class"])
finite_or_not = pytest.mark.parametrize("finite", [False, True])


@settings(max_examples=40, deadline=None)
@given(
    ways=st.lists(st.integers(2, len(SIZES)), min_size=2, max_size=2).map(sorted),
    shots=st.lists(st.integers(1, 3), min_size=2, max_size=2).map(sorted),
    queries=st.lists(st.integers(1, 3), min_size=2, max_size=2).map(sorted),
    vary=st.sampled_from(["task", "class"]),
    finite=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_a_ragged_episode_is_what_its_name_says(ways, shots, queries, vary, finite, seed) -> None:
    tasks = Episodes(Numbered(), ways, shots, queries, vary=vary, n_tasks=50 if finite else None)
    batch = TaskLoader(tasks, batch_size=7, seed=seed).batch_at(0)
    if ways[0] == ways[1] and shots[0] == shots[1] and queries[0] == queries[1]:
        assert isinstance(batch, Task)
        return
    assert isinstance(batch, PaddedTask)
    assert batch.context_x.dtype == torch.uint8
    assert batch.context_y.dtype == batch.target_y.dtype == torch.int64
    assert batch.aux["classes"].shape == (7, ways[1])
    for task in batch.unpad():
        classes = task.aux["classes"][task.aux["classes"] >= 0]
        number = len(classes)
        assert ways[0] <= number == len(classes.unique()) <= ways[1]
        assert (task.aux["classes"][number:] == -1).all()
        of_support, of_query = (
            torch.bincount(labels, minlength=number) for labels in (task.context_y, task.target_y)
        )
        assert len(of_support) == len(of_query) == number
        assert shots[0] <= of_support.min() <= of_support.max() <= shots[1]
        assert queries[0] <= of_query.min() == of_query.max() <= queries[1]  # balanced
        if vary == "task":
            assert of_support.min() == of_support.max()
        for x, y in ((task.context_x, task.context_y), (task.target_x, task.target_y)):
            assert torch.equal(y, y.sort().values)
            assert torch.equal(x[:, 0, 0, 0].long(), classes[y])
        shown = torch.cat([task.context_x, task.target_x])[:, 0, 0]
        assert len(shown.unique(dim=0)) == len(shown)


@own_sizes
def test_sizes_of_their_own_are_drawn_evenly(vary: str) -> None:
    tasks = Episodes(Numbered(), [2, 5], [1, 3], [1, 2], vary=vary)
    batch = TaskLoader(tasks, batch_size=2400).batch_at(0)
    ways = (batch.aux["classes"] >= 0).sum(dim=1)
    shots = torch.stack([((batch.context_y == 0) & batch.context_mask).sum(dim=1),
                         ((batch.context_y == 1) & batch.context_mask).sum(dim=1)])  # fmt: skip
    queries = batch.target_mask.sum(dim=1) // ways
    for drawn, low, high in ((ways, 2, 5), (shots[0], 1, 3), (queries, 1, 2)):
        counts = torch.bincount(drawn, minlength=high + 1)[low:]
        expected = 2400 / (high - low + 1)
        assert (counts - expected).abs().max() < 4.5 * expected**0.5  # one fixed seed
    # all nine pairs where classes draw for themselves, else three
    pairs = torch.bincount(3 * shots[0] + shots[1] - 4, minlength=9)
    assert (pairs > 0).sum() == (9 if vary == "class" else 3)


@own_sizes
def test_without_ranges_there_is_nothing_to_vary(vary: str) -> None:
    plain, varied = (Episodes(Numbered(), 4, 2, 3, vary=v) for v in ("batch", vary))
    assert not varied.ragged
    batches = [TaskLoader(tasks, 6, seed=2).batch_at(1) for tasks in (plain, varied)]
    assert digest(batches[0]) == digest(batches[1])
    assert Episodes(Numbered(), 4, [2, 3], 3, vary=vary).ragged


@any_sizes
@finite_or_not
@pytest.mark.parametrize("turn", [None, "class"])
def test_a_class_has_each_label_equally_often_in_every_case(vary, finite, turn) -> None:
    tasks = Episodes(
        Square(), [2, 4], [1, 2], 1, vary=vary, turn=turn, n_tasks=1 if finite else None
    )
    count = 4000
    indices = torch.zeros(count, dtype=torch.int64) if finite else torch.arange(count)
    sizes = tasks.law.draw([2**63] * WORDS)
    batch = tasks.__gettasks__(indices, *sizes.values(), generator=torch.Generator())
    classes = batch.aux["classes"]
    ways = (classes >= 0).sum(dim=1)
    for number in ways.unique().tolist():
        rows = classes[ways == number, :number]
        shown = [torch.bincount(column, minlength=len(SIZES)) for column in rows.T]
        counts = torch.stack(shown)[:, torch.stack(shown).any(dim=0)].double()  # label by class
        assert counts.shape[1] == (number if finite else len(SIZES))
        expected = counts.mean(dim=0)
        assert ((counts - expected).abs() < 4.5 * expected**0.5).all()  # one fixed seed


@own_sizes
def test_the_index_of_a_finite_ragged_set_fixes_its_classes(vary: str) -> None:
    tasks = Episodes(Numbered(), [2, 6], [1, 2], [1, 2], vary=vary, n_tasks=10)
    first, second = (TaskLoader(tasks, batch_size=10).batch_at(step) for step in (0, 1))
    sets = [batch.aux["classes"].sort(dim=1).values for batch in (first, second)]
    assert torch.equal(*sets)
    assert not torch.equal(first.aux["classes"], second.aux["classes"])
    assert len((sets[0] >= 0).sum(dim=1).unique()) > 2
    assert digest(first) != digest(second)


def test_a_ragged_set_says_what_is_drawn_for_whom() -> None:
    tasks = Episodes(Numbered(), [2, 6], [1, 3], 2, vary="class", turn=None)
    assert tasks.note == "2–6 ways for each task, 1–3 shots for each class"
    assert tasks.law.describe() == "6 ways, 3 shots, 2 queries"
    assert tasks.spec.ways == 6
    assert Episodes(Numbered(), [2, 6], 1, 2, vary="batch").note == ""


# --- turned images -----------------------------------------------------------------------------


def turned(images: torch.Tensor, labels: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Images `[points, C, H, W]` of one task, rotated as their classes are."""
    return torch.stack(
        [torch.rot90(x, int(turns[y]), (-2, -1)) for x, y in zip(images, labels, strict=True)]
    )


@any_sizes
@finite_or_not
@pytest.mark.parametrize("turn", ["class", "task"])
def test_turning_rotates_the_same_images_and_all_of_a_class_alike(vary, finite, turn) -> None:
    more = {"vary": vary, "n_tasks": 40 if finite else None}
    sets = [Episodes(Square(), [2, 5], [1, 2], 2, turn=t, **more) for t in (None, turn)]
    still, moved = (TaskLoader(tasks, batch_size=20, seed=4).batch_at(3) for tasks in sets)
    assert "turns" not in still.aux
    assert torch.equal(still.aux["classes"], moved.aux["classes"])
    turns = moved.aux["turns"]
    assert turns.shape == moved.aux["classes"].shape
    assert set(turns.unique().tolist()) == {0, 1, 2, 3}
    alike = (turns == turns[:, :1]).all(dim=1)
    assert alike.all() if turn == "task" else not alike.all()
    for part in ("context", "target"):
        for task in range(20):
            x, y, wanted = (
                getattr(batch, f"{part}_{of}")[task]
                for batch, of in ((still, "x"), (still, "y"), (moved, "x"))
            )
            mask = getattr(still, f"{part}_mask")
            real = slice(None) if mask is None else mask[task]
            assert torch.equal(wanted[real], turned(x[real], y[real], turns[task]))


def test_every_turn_comes_equally_often() -> None:
    batch = TaskLoader(Episodes(Square(), 4, 1, 1, turn="class"), batch_size=1000).batch_at(0)
    counts = torch.bincount(batch.aux["turns"].flatten(), minlength=4)
    assert (counts - 1000).abs().max() < 4.5 * 1000**0.5


def test_held_out_tasks_are_turned_only_if_asked_for() -> None:
    for split, asked, expected in (
        ("train", False, True),
        ("val", False, False),
        ("test", False, False),
        ("test", True, True),
    ):
        tasks = Episodes(Square(), 3, turn="class", turn_held_out=asked, split=split, queries=1)
        batch = TaskLoader(tasks, batch_size=9).batch_at(0)
        assert ("turns" in batch.aux) == expected
        assert (tasks.note == "every class turned by a random multiple of 90°") == expected
    plain, held_out = (
        TaskLoader(Episodes(Square(), 3, 1, 1, turn=turn, split="test"), 9).batch_at(0)
        for turn in (None, "task")
    )
    assert digest(plain) == digest(held_out)


def test_classes_that_are_turned_images_of_each_other_are_not_turned_again() -> None:
    class Turned(Square):
        def select(self, split: str) -> LabelledImages:
            plain = super().select(split)
            turns = np.arange(len(plain.turns)) % 4
            return LabelledImages(plain.pixels, plain.rows, plain.starts, turns, plain.class_names)

    with pytest.raises(ValueError, match=r"turn='class' .*rotations=false"):
        Episodes(Turned(), 3, 1, 1, turn="class")
    Episodes(Turned(), 3, 1, 1, turn="task")  # all of them alike: they stay apart


def test_what_travels_to_a_worker_are_the_images_not_their_dataset() -> None:
    class Held(Numbered):
        note = "numbers"

        def __reduce__(self) -> Any:
            raise TypeError("an open file")

    tasks = Episodes(Held(), 3, 1, 2)
    assert tasks.note == "numbers"
    copy = pickle.loads(pickle.dumps(tasks))
    batches = [TaskLoader(each, batch_size=4).batch_at(0) for each in (tasks, copy)]
    assert digest(batches[0]) == digest(batches[1])


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ways": 9}, ["ways=9", "8 classes", "'train'"]),
        ({"ways": [2, 9]}, ["ways=9", "8 classes"]),
        ({"shots": 2, "queries": 5}, ["shots=2", "queries=5", "'class0'", "has 6"]),
        ({"shots": [1, 4], "queries": 3}, ["shots=4", "'class0'"]),
        ({"ways": 1}, ["ways=1", "at least 2"]),
        ({"queries": 0}, ["queries=0"]),
        ({"n_tasks": 0}, ["n_tasks=0"]),
        ({"split": "dev"}, ["dev", "val"]),
        ({"vary": "tasks"}, ["vary='tasks'", "did you mean 'task'"]),
        ({"vary": "class", "shots": [1, 4], "queries": 3}, ["shots=4", "'class0'"]),
        ({"vary": "task", "ways": [3, 9]}, ["ways=9", "8 classes"]),
        ({"turn": "image"}, ["turn='image'", "class, task"]),
        ({"turn": "class"}, ["turn='class'", "square", "1 × 2"]),
    ],
)
def test_episodes_that_cannot_be_are_refused_at_once(arguments, words) -> None:
    with pytest.raises(ValueError) as caught:
        Episodes(Numbered(), **{"ways": 5, "shots": 1, "queries": 1, **arguments})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("workers", [0, 2])
@finite_or_not
@pytest.mark.parametrize("vary", ["batch", "class"])
def test_batches_do_not_depend_on_the_number_of_workers(workers, finite, vary) -> None:
    tasks = Episodes(Numbered(), [2, 5], [1, 2], 3, n_tasks=40 if finite else None, vary=vary)
    with TaskLoader(tasks, 4, shuffle=True, n_batches=4, workers=workers, shards=2) as loader:
        batches = list(loader)
        assert digest(*batches) == digest(*(loader.batch_at(step) for step in range(4)))
