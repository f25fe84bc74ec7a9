"""Folders of images of one's own: splits, formats, and files that are no images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metabatch_cli.batching import TaskLoader, digest
from tasksets.episodes import Episodes
from tasksets.image_folder import ImageFolder
from tasksets.images import DataError, ImageCompletion

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def draw(path: Path, grey: int, size: tuple[int, int] = (6, 6), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).convert(mode).save(path)
    return path


def class_folders(root: Path, classes: int = 10, images: int = 4) -> Path:
    """Every image of a grey of its own: 10 × class + image."""
    for c in range(classes):
        for i in range(images):
            draw(root / f"class{c}" / ("deeper" if i % 2 else "") / f"{i}.png", 10 * c + i)
    return root


def greys(folder: ImageFolder, split: str) -> dict[str, set[int]]:
    """The greys of every class."""
    images = folder.select(split)
    return {
        name: set(images.take(np.arange(start, stop))[:, 0, 0, 0].tolist())
        for name, start, stop in zip(
            images.class_names, images.starts[:-1], images.starts[1:], strict=True
        )
    }


def test_a_class_is_a_folder_and_lies_in_one_split(tmp_path: Path) -> None:
    folder = ImageFolder(class_folders(tmp_path), 4, 1)
    splits = {split: greys(folder, split) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [7, 1, 2]
    together = {name: found for split in splits.values() for name, found in split.items()}
    assert together == {f"class{c}": {10 * c + i for i in range(4)} for c in range(10)}


def test_images_can_be_split_whatever_their_class(tmp_path: Path) -> None:
    draw(class_folders(tmp_path) / "loose.png", 200)
    folder = ImageFolder(tmp_path, 4, 1, split_by="image")
    splits = [set().union(*greys(folder, split).values()) for split in SPLITS]
    assert [len(found) for found in splits] == [29, 4, 8]
    assert len(set.union(*splits)) == 41


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    for i in range(10):
        draw(tmp_path / "album" / f"{i}.png", i)
    folder = ImageFolder(tmp_path / "album", 4, 1, split_by="image", val=0.2, test=0.3)
    assert [len(greys(folder, split)["album"]) for split in SPLITS] == [5, 2, 3]


def test_the_seed_chooses_what_is_held_out(tmp_path: Path) -> None:
    class_folders(tmp_path, classes=10, images=1)
    chosen = {frozenset(greys(ImageFolder(tmp_path, 4, 1, seed=s), "test")) for s in range(8)}
    assert len(chosen) > 4
    assert greys(ImageFolder(tmp_path, 4, 1, seed=3), "test") == greys(
        ImageFolder(tmp_path, 4, 1, seed=3), "test"
    )


def test_folders_of_splits_are_used_as_they_are(tmp_path: Path) -> None:
    for split, grey in (("train", 10), ("val", 20), ("test", 30)):
        draw(tmp_path / split / f"of_{split}" / "a.png", grey)
        draw(tmp_path / split / f"of_{split}" / "b.png", grey + 1)
    folder = ImageFolder(tmp_path, 4, 1)
    assert [greys(folder, split) for split in SPLITS] == [
        {"of_train": {10, 11}},
        {"of_val": {20, 21}},
        {"of_test": {30, 31}},
    ]


def test_a_class_in_two_folders_of_splits_is_refused_unless_images_are_split(
    tmp_path: Path,
) -> None:
    for split in SPLITS:
        draw(tmp_path / split / "cat" / "a.png", 1)
    with pytest.raises(DataError, match="'cat' is in test and in train"):
        ImageFolder(tmp_path, 4, 1).select("train")
    assert greys(ImageFolder(tmp_path, 4, 1, split_by="image"), "val") == {"cat": {1}}


def test_a_missing_folder_of_a_split_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "cat" / "a.png", 1)
    ImageFolder(tmp_path, 4, 1).select("train")
    with pytest.raises(DataError, match=f"{tmp_path / 'val'} does not exist"):
        ImageFolder(tmp_path, 4, 1).select("val")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "1"), ("a.PNG", "P"), ("a.jpg", "L"), ("a.gif", "P"), ("a.webp", "RGB"),
     ("a.png", "RGBA"), ("a.png", "LA"), ("a.bmp", "RGB"), ("a.tiff", "RGB")],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_every_usual_format_is_read(tmp_path: Path, name: str, mode: str, channels: int) -> None:
    draw(tmp_path / name, 255, mode=mode)
    taken = (
        ImageFolder(tmp_path, 5, channels, "image", val=0, test=0)
        .select("train")
        .take(np.array([0]))
    )
    assert taken.shape == (1, channels, 5, 5)
    assert (taken > 250).all()


def test_sixteen_bits_become_eight_and_transparency_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    folder = ImageFolder(tmp_path, 4, 1, "image", val=0, test=0)
    assert set().union(*greys(folder, "train").values()) == {128, 255}


def test_an_image_that_is_not_square_is_cropped_or_stretched(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12), np.uint8)
    pixels[:, :4] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = {"split_by": "image", "val": 0, "test": 0}
    crop, stretch = (
        ImageFolder(tmp_path, 4, 1, fit=fit, **arguments).select("train").take(np.array(0))
        for fit in ("crop", "stretch")
    )
    assert crop.max() == 0
    assert stretch[0, :, 0].min() > 150


def test_images_are_decoded_once_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = ImageFolder._decode_file

    def counted(self, file):
        decoded.append(file.path)
        return original(self, file)

    monkeypatch.setattr(ImageFolder, "_decode_file", counted)
    class_folders(tmp_path)
    for split in SPLITS:
        ImageFolder(tmp_path, 4, 1).select(split)
    assert len(decoded) == 40
    draw(tmp_path / "class3" / "0.png", 250)
    draw(tmp_path / "class3" / "another.png", 251)
    found = [greys(ImageFolder(tmp_path, 4, 1), split) for split in SPLITS]
    assert len(decoded) == 40 + 41
    assert next(f["class3"] for f in found if "class3" in f) == {250, 31, 32, 33, 251}


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    class_folders(tmp_path / "real", classes=4)
    (tmp_path / "root").mkdir()
    for c in range(4):
        (tmp_path / "root" / f"class{c}").symlink_to(tmp_path / "real" / f"class{c}")
    (tmp_path / "real" / "class0" / "again").symlink_to(tmp_path / "root")
    folder = ImageFolder(tmp_path / "root", 4, 1)
    assert sum(len(folder.select(split)) for split in SPLITS) == 16


def test_relative_roots_are_below_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "pictures", images=1)
    monkeypatch.chdir(tmp_path)
    folder = ImageFolder("pictures", 4, 1)
    monkeypatch.chdir("/")
    assert len(folder.select("train")) == 7


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no folder {tmp_path / 'nowhere'}"):
        ImageFolder(tmp_path / "nowhere").select("train")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    with pytest.raises(DataError, match=f"{tmp_path} has no images"):
        ImageFolder(tmp_path).select("train")
    class_folders(tmp_path)
    whole = (tmp_path / "class1" / "0.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (tmp_path / "class1" / "0.png").write_bytes(content)
        with pytest.raises(DataError, match=r"class1/0\.png cannot be read as an image"):
            ImageFolder(tmp_path).select("train")


def test_too_little_to_split_is_an_error_that_counts(tmp_path: Path) -> None:
    class_folders(tmp_path, classes=2)
    with pytest.raises(DataError, match="2 classes: too few"):
        ImageFolder(tmp_path).select("train")
    draw(tmp_path / "loose.png", 1)
    with pytest.raises(DataError, match=r"loose\.png lies outside .*split_by=image"):
        ImageFolder(tmp_path).select("train")
    with pytest.raises(ValueError, match="the split 'val' of ImageFolder has no images"):
        Episodes(ImageFolder(tmp_path, split_by="image", val=0), 2, 1, 1, split="val")


@pytest.mark.parametrize("folders", [False, True])
def test_classes_of_too_few_images_can_be_left_out(tmp_path: Path, folders: bool) -> None:
    for number, split in enumerate(SPLITS):
        root = tmp_path / split if folders else tmp_path
        for c in "ab":
            for i in range(3):
                draw(root / f"{split}_{c}" / f"{i}.png", 50 * number + 10 * (c == "b") + i)
    draw((tmp_path / "train" if folders else tmp_path) / "small" / "0.png", 255)
    everything = ImageFolder(tmp_path, 4, 1, val=0.3, test=0.3)
    home = next(split for split in SPLITS if "small" in greys(everything, split))
    with pytest.raises(ValueError, match=r"'small' .*has 1; dataset.min_images=3 leaves"):
        Episodes(everything, 2, 1, 2, split=home)
    large = ImageFolder(tmp_path, 4, 1, val=0.3, test=0.3, min_images=3)
    sizes = {name: len(found) for split in SPLITS for name, found in greys(large, split).items()}
    assert sizes == {f"{split}_{c}": 3 for split in SPLITS for c in "ab"}
    note = "1 of 7 classes left out: fewer than 3 images"
    assert note in Episodes(large, 2, 1, 2, split="train").note
    with pytest.raises(DataError, match=r"no class has min_images=4 images; the largest, .*has 3"):
        ImageFolder(tmp_path, min_images=4).select("train")


@pytest.mark.parametrize(
    "arguments",
    [{"min_images": 0}, {"min_images": 2, "split_by": "image"}, {"image_size": 0},
     {"channels": 4}, {"split_by": "author"}, {"fit": "pad"},
     {"val": 0.6, "test": 0.4}, {"val": -0.1}],
)  # fmt: skip
def test_impossible_arguments_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ImageFolder("anywhere", **arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    folder = ImageFolder(class_folders(tmp_path), 6, 3)
    for tasks in (
        Episodes(folder, 3, 1, 2),
        ImageCompletion(folder, 2, 6, 9, split="train"),
    ):
        with TaskLoader(tasks, 5, shuffle=True, n_batches=3, workers=workers) as loader:
            batches = list(loader)
            assert digest(*batches) == digest(*(loader.batch_at(step) for step in range(3)))
