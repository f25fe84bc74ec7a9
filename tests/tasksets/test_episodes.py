"""Episodes: distinct classes, disjoint support and query, labels that say nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import TaskLoader, digest
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
    ],
)
def test_episodes_that_cannot_be_are_refused_at_once(arguments, words) -> None:
    with pytest.raises(ValueError) as caught:
        Episodes(Numbered(), **{"ways": 5, "shots": 1, "queries": 1, **arguments})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("finite", [False, True])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int, finite: bool) -> None:
    tasks = Episodes(Numbered(), [2, 5], [1, 2], 3, n_tasks=40 if finite else None)
    with TaskLoader(tasks, 3, shuffle=True, n_batches=4, workers=workers) as loader:
        batches = list(loader)
        assert digest(*batches) == digest(*(loader.batch_at(step) for step in range(4)))
