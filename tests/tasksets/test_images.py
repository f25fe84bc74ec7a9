"""Completing images: pixels drawn without bias, targets disjoint from contexts, sizes checked."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import TaskLoader, digest
from metabatch_cli.batching.sizes import SizeLaw
from tasksets.images import ImageCompletion, ImageDataset, LabelledImages, pixel_centres


class Gradients:
    """Images whose every intensity is another one, so that a pixel shows where it is from."""

    def __init__(self, channels: int = 1, height: int = 8, width: int = 8, total: int = 6) -> None:
        self.shape = (total, channels, height, width)

    def select(self, split: str) -> LabelledImages:
        images = np.random.default_rng(0).permutation(np.prod(self.shape)) % 251
        labels = np.arange(self.shape[0]) % 2
        return LabelledImages.from_labels(images.astype(np.uint8).reshape(self.shape), labels)


def completion(dataset: Any = None, **changes: Any) -> ImageCompletion:
    sizes: dict[str, Any] = {"min_pts": 3, "max_ctx_pts": 20, "max_tgt_pts": 30}
    return ImageCompletion(dataset or Gradients(), **{**sizes, **changes})


def make(tasks: ImageCompletion, n_context: int, n_target: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return tasks.__gettasks__(torch.arange(len(tasks)), n_context, n_target, generator)


def place_of(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The raster number of each pixel, from its coordinates."""
    row = ((x[..., 0] + 1) * height - 1) / 2
    column = ((x[..., 1] + 1) * width - 1) / 2
    assert torch.allclose(row, row.round(), atol=1e-4)
    assert torch.allclose(column, column.round(), atol=1e-4)
    return (row.round() * width + column.round()).long()


@settings(max_examples=30, deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    data=st.data(),
)
def test_every_point_is_a_pixel_of_its_image(channels, height, width, data) -> None:
    pixels = height * width
    n_context = data.draw(st.integers(0, pixels - 1), label="n_context")
    n_target = data.draw(st.integers(1, pixels - n_context), label="n_target")
    tasks = ImageCompletion(
        Gradients(channels, height, width), 0, 0, 1, sizes={"law": "rest", "min_tgt_pts": 1}
    )
    batch = make(tasks, n_context, n_target)
    images = tasks.full_image(batch.aux["index"])
    assert images.shape == (6, channels, height, width)
    context = place_of(batch.context_x, height, width)
    target = place_of(batch.target_x, height, width)
    for places, y, n_points in (
        (context, batch.context_y, n_context),
        (target, batch.target_y, n_target),
    ):
        assert y.shape == (6, n_points, channels)
        assert y.dtype == torch.float32
        expected = images.flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
        assert torch.equal(y, expected.transpose(1, 2))
    if n_target < pixels:
        for task in torch.cat([context, target], dim=1):
            assert len(task.unique()) == n_context + n_target


def test_coordinates_are_pixel_centres_between_the_edges() -> None:
    grid = pixel_centres(2, 4)
    assert grid[:, 0].tolist() == [-0.5] * 4 + [0.5] * 4
    assert grid[:, 1].tolist() == [-0.75, -0.25, 0.25, 0.75] * 2


def test_full_target_is_the_whole_image_row_by_row() -> None:
    tasks = completion(Gradients(3, 4, 6), max_ctx_pts=10, predict_full_target=True, max_tgt_pts=12)
    assert tasks.total_tgt_pts == 24
    batch = TaskLoader(tasks, batch_size=4).batch_at(0)
    assert torch.equal(place_of(batch.target_x, 4, 6), torch.arange(24).expand(4, -1))
    images = tasks.full_image(batch.aux["index"])
    assert torch.equal(batch.target_y.transpose(1, 2).reshape(4, 3, 4, 6), images)


def test_full_target_during_evaluation_is_all_that_the_context_lacks() -> None:
    tasks = completion(predict_full_target_during_eval=True, eval=True)
    batch = TaskLoader(tasks, batch_size=6).batch_at(0)
    both = torch.cat([batch.context_x, batch.target_x], dim=1)
    assert torch.equal(place_of(both, 8, 8).sort(dim=1).values, torch.arange(64).expand(6, -1))


def test_context_and_target_take_every_pixel_equally_often() -> None:
    tasks = completion(Gradients(total=500, height=5, width=4), max_ctx_pts=5, max_tgt_pts=10)
    batch = make(tasks, 5, 10)
    for x, n_points in ((batch.context_x, 5), (batch.target_x, 10)):
        places = place_of(x, 5, 4)
        share = n_points / 20
        spread = (500 * share * (1 - share)) ** 0.5
        counts = torch.bincount(places.flatten(), minlength=20)
        assert (counts - 500 * share).abs().max() < 4 * spread  # one fixed seed: cannot flake
        first = torch.bincount(places[:, 0], minlength=20)  # order is random as well
        assert (first - 25).abs().max() < 4 * 25**0.5


def test_spec_and_length_come_from_the_images() -> None:
    tasks = completion(Gradients(3, 8, 9, total=7))
    assert len(tasks) == 7
    assert tasks.spec.kind == "image"
    assert tasks.spec.x_shape == (2,)
    assert tasks.spec.y_shape == (3,)
    assert tasks.spec.image_shape == (3, 8, 9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tgt_pts": 45}, ["20 context and 45 target", "64 pixels", "8 × 8"]),
        ({"total_tgt_pts": 65, "sizes": "rest"}, ["total_tgt_pts=65", "64 pixels"]),
        ({"max_ctx_pts": 70, "max_tgt_pts": 71}, ["64 pixels"]),
        ({"max_ctx_pts": 5, "max_tgt_pts": 64}, ["context and 63 target"]),
        ({"sizes": "fixed", "max_ctx_pts": 1, "max_tgt_pts": 65}, ["65 target"]),
        ({"sizes": {"law": "way_shot", "ways": 2, "shots": 1, "queries": 1}}, ["ways"]),
        ({"split": "dev"}, ["dev", "train"]),
    ],
)
def test_sizes_that_no_image_has_are_refused_at_once(changes, words) -> None:
    with pytest.raises(ValueError) as caught:
        completion(**changes)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": "rest", "total_tgt_pts": 64},
        {"sizes": "rest"},
        {"sizes": {"law": "log_uniform", "min_tgt_pts": 1}, "min_pts": 0},
        {"sizes": "fixed", "max_ctx_pts": 64, "max_tgt_pts": 64},
        {"max_tgt_pts": 44},
        {"max_ctx_pts": 63, "max_tgt_pts": 64, "predict_full_target": True},
    ],
)
def test_sizes_that_just_fit_are_accepted(changes) -> None:
    for step in range(5):
        TaskLoader(completion(**changes), batch_size=2, shuffle=True).batch_at(step)


def test_a_law_of_ones_own_that_goes_too_far_is_refused_when_it_does() -> None:
    @dataclass(frozen=True)
    class Sometimes(SizeLaw):
        def draw(self, words) -> Mapping[str, int]:
            return {"n_context": 1, "n_target": 70 if words[0] % 2**64 not in (0, 2**64 - 1) else 1}

    tasks = completion(sizes=Sometimes())
    with pytest.raises(ValueError, match="70 target points"):
        TaskLoader(tasks, batch_size=2).batch_at(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    with TaskLoader(completion(), 3, shuffle=True, n_batches=4, workers=workers) as loader:
        batches = list(loader)
        assert digest(*batches) == digest(*(loader.batch_at(step) for step in range(4)))


def test_labelled_images_are_counted_class_by_class() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(4, 2).repeat(4, 3)
    found = LabelledImages.from_labels(images, np.array([1, 0, 1, 0, 1]), ("a", "b"))
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert found.sizes.tolist() == [2, 3]
    assert found.take(np.arange(5))[:, 0, 0, 0].tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("turn", range(4))
def test_classes_may_share_images_and_turn_them(turn: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, 5, 5), dtype=np.uint8)
    images = LabelledImages(
        pixels=pixels,
        rows=np.tile(np.arange(3), 4),
        starts=3 * np.arange(5),
        turns=np.arange(4),
        class_names=("0", "90", "180", "270"),
    )
    taken = images.take(3 * turn + np.array([[0, 1], [2, 0]]))
    assert np.array_equal(taken, np.rot90(pixels[[[0, 1], [2, 0]]], turn, axes=(-2, -1)))
    further = images.take(3 * turn + np.arange(3), np.array([0, 1, 3]))
    for image, more in enumerate((0, 1, 3)):
        assert np.array_equal(further[image], np.rot90(pixels[image], turn + more, axes=(-2, -1)))


def test_memory_maps_travel_as_their_path(tmp_path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2000, 1, 10, 10), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    sent = pickle.dumps(LabelledImages.from_labels(mapped, np.arange(2000) % 10))
    assert len(sent) < 50_000
    again = pickle.loads(sent)
    assert isinstance(again.pixels, np.memmap)
    assert np.array_equal(again.pixels, pixels)
    part = pickle.loads(pickle.dumps(LabelledImages.from_labels(mapped[7:9], np.zeros(2, int))))
    assert np.array_equal(part.pixels, pixels[7:9])


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((2, 1, 4, 4)), [0, 1], "uint8"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], "uint8"),
        (np.zeros((2, 2, 4, 4), np.uint8), [0, 1], "channels"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0, 2], "class '1' has no images"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0], "2 images"),
    ],
)
def test_images_of_another_kind_are_refused(images, labels, words) -> None:
    with pytest.raises(ValueError, match=words):
        LabelledImages.from_labels(images, np.array(labels))


def test_a_dataset_that_gives_something_else_is_refused() -> None:
    class Wrong:
        def select(self, split):
            return np.zeros((3, 1, 4, 4))

    assert isinstance(Gradients(), ImageDataset)
    with pytest.raises(TypeError, match="LabelledImages"):
        completion(Wrong())


def test_the_classes_of_images_can_be_balanced() -> None:
    tasks = completion(Gradients(total=9))  # five images of one class, four of the other
    assert tasks.classes.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    loader = TaskLoader(tasks, 6, shuffle=True, balance={"alpha": 1, "kind": "fixed"})
    for step in range(20):
        indices = loader.batch_at(step).aux["index"]
        assert (indices < 5).sum() == 3
        assert len(indices.unique()) == 6
