"""Augmentation: as much as is said and no more, of training images only, the same every time."""

from __future__ import annotations

import pytest
import torch

from metabatch_cli.batching import TaskLoader, digest
from tasksets.augment import Affine
from tasksets.episodes import Episodes
from tests.engine.test_normalisation import Noise

NOTHING = {"rotate": 0, "scale": 0, "shear": 0, "shift": 0}


def images(n_images: int = 6, height: int = 8, width: int = 11, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (n_images, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("beyond", ["zeros", "border"])
def test_no_change_is_no_change(beyond):
    assert torch.equal(Affine(**NOTHING, beyond=beyond)(images(), generator()), images())


@pytest.mark.parametrize("key", NOTHING)
def test_every_number_changes_images_by_itself_each_in_a_way_of_its_own(key):
    one = images(1).repeat(5, 1, 1, 1)
    changed = Affine(**{**NOTHING, key: 0.3 if key != "rotate" else 20})(one, generator())
    assert changed.dtype == torch.uint8
    assert len({digest(image) for image in changed}) == 5
    assert torch.equal(Affine(**{**NOTHING, key: 0})(one, generator()), one)


def test_an_image_is_moved_by_at_most_so_many_pixels():
    point = torch.zeros(200, 1, 9, 15, dtype=torch.uint8)
    point[:, :, 4, 7] = 255
    changed = Affine(**{**NOTHING, "shift": 2.0})(point, generator()).float()
    total = changed.sum(dim=(1, 2, 3))
    rows = (changed.sum(dim=(1, 3)) @ torch.arange(9.0)) / total - 4
    columns = (changed.sum(dim=(1, 2)) @ torch.arange(15.0)) / total - 7
    for moved in (rows, columns):
        assert moved.abs().max() < 2.05
        assert moved.abs().max() > 1.7
        assert moved.mean().abs() < 0.4


def test_a_turned_bar_is_as_long_and_as_wide_in_an_image_of_any_shape():
    bar = torch.zeros(1, 1, 40, 80, dtype=torch.uint8)
    bar[:, :, 10:30, 38:42] = 255  # 20 high, 4 wide
    for draw in range(5):
        turned = Affine(**{**NOTHING, "rotate": 80})(bar, generator(draw)).float() / 255
        assert turned.sum() == pytest.approx(80, rel=0.05)
        rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(80.0), indexing="ij")
        places = torch.stack([rows - 19.5, columns - 39.5]).flatten(1)
        spread = (places * turned.flatten()) @ places.T / turned.sum()
        long, wide = torch.linalg.eigvalsh(spread).sqrt().flip(0)
        assert long == pytest.approx(20 / 12**0.5, rel=0.05)
        assert wide == pytest.approx(4 / 12**0.5, rel=0.15)


def test_a_constant_image_stays_one_where_the_border_goes_on():
    white = torch.full((9, 1, 8, 8), 200, dtype=torch.uint8)
    big = Affine(45, 0.3, 0.3, 3, beyond="border")
    assert torch.equal(big(white, generator()), white)
    assert not torch.equal(Affine(45, 0.3, 0.3, 3)(white, generator()), white)


def test_the_generator_alone_decides():
    one, again, other = (Affine()(images(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_training_images_are_changed_and_those_of_held_out_tasks_are_not():
    for split, changes in (("train", True), ("val", False), ("test", False)):
        plain, augmented = (
            Episodes(Noise(), 3, 1, 2, split=split, augment=augment) for augment in (None, Affine())
        )
        batches = [TaskLoader(tasks, batch_size=4).batch_at(3) for tasks in (plain, augmented)]
        assert torch.equal(batches[0].aux["classes"], batches[1].aux["classes"])
        assert torch.equal(batches[0].context_x, batches[1].context_x) != changes
        assert torch.equal(batches[0].target_x, batches[1].target_x) != changes


@pytest.mark.parametrize(("key", "value"), [("rotate", -1), ("scale", 1.5), ("shift", -0.1)])
def test_numbers_that_cannot_be_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"{key}={value}"):
        Affine(**{key: value})
    with pytest.raises(ValueError, match=r"beyond='zero'.*did you mean 'zeros'"):
        Affine(beyond="zero")
