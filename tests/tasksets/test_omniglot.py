"""Omniglot: the published splits, true rotations, and archives that are not what they should be."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from PIL import Image

from metabatch_cli.batching import TaskLoader, digest
from tasksets.episodes import Episodes
from tasksets.images import DataError, ImageCompletion
from tasksets.omniglot import Omniglot, data_folder

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own, so that the archives are really decoded, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield platformdirs.user_cache_path("metabatch")


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("METABATCH_DATA")
    if not folder or not Path(folder, "omniglot", "images_background.zip").exists():
        pytest.skip("METABATCH_DATA names no folder with omniglot/images_background.zip")
    return Path(folder)


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    """The real data, to be damaged."""
    shutil.copytree(data / "omniglot", tmp_path / "omniglot", copy_function=shutil.copyfile)
    for path in (tmp_path / "omniglot").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "omniglot").chmod(0o755)
    return tmp_path


def small_archives(folder: Path, change: Callable[[str], bytes | None] = lambda name: b"") -> Path:
    """Archives of the official layout with drawings of 3 × 3 pixels.

    Args:
        change: other bytes for a member, None to leave it out, b"" to leave it as it is.
    """
    image = io.BytesIO()
    Image.new("1", (3, 3), 1).save(image, "PNG")
    for kind, characters in (("background", 964), ("evaluation", 659)):
        path = folder / "omniglot" / f"images_{kind}.zip"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/A/character01/._0001_01.png", b"not a drawing")
            for number in range(characters):
                of_it = f"images_{kind}/{kind}{number // 40:02d}/character{number % 40:02d}"
                for drawing in range(20):
                    name = f"{of_it}/0001_{drawing:02d}.png"
                    content = change(name)
                    if content is not None:
                        archive.writestr(name, content or image.getvalue())
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such archives, with no split files; decoded once."""
    return small_archives(tmp_path_factory.mktemp("small"))


def characters(names: tuple[str, ...]) -> set[str]:
    return {name.rsplit("/", 1)[0] for name in names}


@pytest.mark.slow
def test_vinyals_split_has_the_published_numbers_of_classes(data: Path) -> None:
    splits = {split: Omniglot(data).select(split) for split in SPLITS}
    for split, count in (("train", 1028), ("val", 172), ("test", 423)):
        assert len(splits[split].class_names) == 4 * count
        assert len(characters(splits[split].class_names)) == count
        assert set(splits[split].sizes) == {20}
    assert len(set.union(*(characters(found.class_names) for found in splits.values()))) == 1623
    plain = Omniglot(data, rotations=False).select("train")
    assert len(plain.class_names) == 1028
    assert not plain.turns.any()
    trainval = Omniglot(data, train_on="trainval").select("train")
    both = set(splits["train"].class_names) | set(splits["val"].class_names)
    assert set(trainval.class_names) == both
    assert len(trainval.class_names) == 4800


@pytest.mark.slow
def test_split_by_alphabets_shares_no_alphabet(data: Path) -> None:
    dataset = Omniglot(data, split_by="alphabets", rotations=False)
    splits = {split: dataset.select(split) for split in SPLITS}
    alphabets = {
        split: {name.split("/")[0] for name in found.class_names} for split, found in splits.items()
    }
    assert [len(alphabets[split]) for split in SPLITS] == [25, 5, 20]
    assert len(set.union(*alphabets.values())) == 50
    assert max(alphabets["train"]) < min(alphabets["val"])
    assert len(splits["train"].class_names) + len(splits["val"].class_names) == 964
    assert len(splits["test"].class_names) == 659
    trainval = Omniglot(data, split_by="alphabets", train_on="trainval").select("train")
    assert len(trainval.class_names) == 4 * 964


@pytest.mark.parametrize(("train", "val"), [(1100, 100), (1150, 50)])
def test_random_characters_are_as_many_as_asked_for(data: Path, train: int, val: int) -> None:
    dataset = Omniglot(data, "random", rotations=False, train=train, val=val)
    parts = [characters(dataset.select(split).class_names) for split in SPLITS]
    assert [len(part) for part in parts] == [train, val, 423]
    assert len(set.union(*parts)) == 1623
    assert parts[2] == characters(Omniglot(data, "random").select("test").class_names)
    assert len(Omniglot(data, "random", train=train, val=val).select("val").class_names) == 4 * val
    both = Omniglot(data, "random", train_on="trainval", train=train, val=val).select("train")
    assert characters(both.class_names) == parts[0] | parts[1]
    other = Omniglot(data, "random", seed=1, train=train, val=val).select("test")
    assert characters(other.class_names) != parts[2]


def test_gurmukhi_is_the_one_alphabet_on_both_sides_of_vinyals_split(data: Path) -> None:
    dataset = Omniglot(data)
    assert dataset.shared_alphabets() == dataset.shared_alphabets("train", "test") == ("Gurmukhi",)
    assert dataset.shared_alphabets("val", "train") == dataset.shared_alphabets("test", "val") == ()
    assert dataset.note == "test shares 1 alphabet with train: Gurmukhi"
    tasks = Episodes(dataset, vary="task", ways=[5, 20], shots=1)
    assert tasks.note == f"5–20 ways for each task; {dataset.note}"


def test_random_characters_leave_no_alphabet_for_the_test_alone(data: Path) -> None:
    dataset = Omniglot(data, "random")
    assert len(dataset.shared_alphabets()) == 50
    first = "Alphabet_of_the_Magi, Angelic, Anglo-Saxon_Futhorc, …"
    assert dataset.note == f"test shares 50 alphabets with train: {first}"
    assert Omniglot(data, "alphabets").note == "test shares no alphabet with train"


def test_shared_alphabets_are_counted_from_the_archives(small: Path) -> None:
    assert Omniglot(small, "alphabets", image_size=3).shared_alphabets() == ()
    everywhere = Omniglot(small, "random", image_size=3, train=1600, val=20)
    assert len(everywhere.select("test").class_names) == 4 * 3
    tested = {name.split("/")[0] for name in everywhere.select("test").class_names}
    assert everywhere.shared_alphabets() == tuple(sorted(tested))


def test_shared_alphabets_are_counted_from_the_lists_of_a_split(tmp_path: Path) -> None:
    lists = tmp_path / "omniglot" / "splits"
    lists.mkdir(parents=True)
    for split, count, first in (("train", 1028, 0), ("val", 172, 1100), ("test", 423, 1020)):
        lines = [
            f"letters{number // 40:02d}/character{number}/rot{turn:03d}"
            for number in range(first, first + count)
            for turn in range(0, 360, 90)
        ]
        (lists / f"vinyals_{split}.txt").write_text("\n".join(lines))
    dataset = Omniglot(tmp_path, download=False)  # the lists will do: there are no archives
    assert dataset.shared_alphabets() == ("letters25",)
    assert dataset.shared_alphabets("val") == ()
    assert dataset.shared_alphabets("test", "val") == tuple(f"letters{n}" for n in range(27, 32))
    assert Omniglot(tmp_path, train_on="trainval", download=False).note.startswith(
        "test shares 6 alphabets with train: letters25, letters27, letters28, …"
    )


@pytest.mark.parametrize("split_by", ["vinyals", "alphabets", "random"])
def test_drawings_of_a_class_are_those_of_its_folder_turned(data: Path, split_by: str) -> None:
    images = Omniglot(data, split_by=split_by).select("train")
    for number in (0, 1, 2, 3, 1234, len(images.class_names) - 1):
        name, turn = images.class_names[number].rsplit("/rot", 1)
        with zipfile.ZipFile(data / "omniglot" / "images_background.zip") as archive:
            members = sorted(n for n in archive.namelist() if f"/{name}/" in n)
            if not members:
                continue  # a character of the evaluation set
            file = Image.open(io.BytesIO(archive.read(members[7]))).convert("L")
        drawing = 255 - np.asarray(file.resize((28, 28), Image.Resampling.LANCZOS))
        taken = images.take(images.starts[number] + np.array([7]))[0, 0]
        assert np.array_equal(taken, np.rot90(drawing, int(turn) // 90))
        assert images.labels[images.starts[number]] == number
        assert taken[0].mean() < 64 < taken.max()  # white strokes on black


def test_image_size_of_the_originals_keeps_them_as_they_are(small: Path) -> None:
    images = Omniglot(small, "alphabets", False, image_size=3).select("test")
    assert images.shape == (1, 3, 3)
    assert len(images) == 659 * 20
    assert not images.take(np.arange(len(images))).any()  # all paper


def test_the_second_opening_decodes_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Omniglot(data).select("val")
    monkeypatch.setattr("tasksets.omniglot._decode", lambda *_: pytest.fail("decoded again"))
    again = Omniglot(data).select("val")
    assert isinstance(again.pixels, np.memmap)
    assert not again.pixels.flags.writeable
    assert np.array_equal(first.take(np.arange(99)), again.take(np.arange(99)))


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_batches_do_not_depend_on_workers(data: Path, start_method: str) -> None:
    tasks = Episodes(Omniglot(data), 5, 1, 15, split="train")
    context = {"multiprocessing_context": start_method}
    with TaskLoader(tasks, 4, n_batches=3, shuffle=True, workers=2, **context) as loader:
        batches = list(loader)
        assert digest(*batches) == digest(*(loader.batch_at(step) for step in range(3)))


def test_an_episode_shows_drawings_of_its_classes(data: Path) -> None:
    tasks = Episodes(Omniglot(data), 20, 1, 5, split="test")
    batch = TaskLoader(tasks, 3).batch_at(0)
    for task in range(3):
        for label, number in enumerate(batch.aux["classes"][task].tolist()):
            drawings = tasks.images.take(tasks.images.starts[number] + np.arange(20)).tolist()
            shown = [
                *batch.context_x[task][batch.context_y[task] == label].tolist(),
                *batch.target_x[task][batch.target_y[task] == label].tolist(),
            ]
            assert len(shown) == 6
            assert all(drawing in drawings for drawing in shown)


def test_completion_reads_every_drawing_of_the_split(data: Path) -> None:
    dataset = Omniglot(data, split_by="alphabets", rotations=False)
    tasks = ImageCompletion(dataset, 3, 196, 200, 199, sizes="rest", split="val")
    assert len(tasks) == 20 * len(tasks.images.class_names)
    assert tasks.spec.image_shape == (1, 28, 28)
    batch = TaskLoader(tasks, 8, shuffle=True).batch_at(2)
    assert batch.context_y.min() >= 0
    assert batch.target_y.max() <= 1


# --- what can be wrong --------------------------------------------------------------------------


def test_a_truncated_archive_is_refused_although_the_good_one_was_cached(copied: Path) -> None:
    Omniglot(copied).select("train")
    path = copied / "omniglot" / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-1000])
    for _ in range(2):
        with pytest.raises(DataError, match=r"images_evaluation\.zip is no readable zip"):
            Omniglot(copied).select("train")


def test_a_damaged_drawing_is_named(copied: Path, cache: Path) -> None:
    path = copied / "omniglot" / "images_background.zip"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.infolist()[123]
    start = member.header_offset + 30 + len(member.filename)
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"images_background.zip: {member.filename} cannot be"):
        Omniglot(copied).select("train")
    assert not list((cache / "omniglot").glob(".partial-*"))


def test_a_file_that_is_no_png_is_named(tmp_path: Path) -> None:
    odd = "images_background/background00/character00/0001_03.png"
    folder = small_archives(tmp_path, lambda name: b"no image" if name == odd else b"")
    with pytest.raises(DataError, match=rf"images_background\.zip: {odd} cannot be read as an"):
        Omniglot(folder, "alphabets").select("train")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("background00/character07/", r"images_background\.zip holds 963 characters.* has 964"),
        ("character03/0001_11", "holds 19 drawings of background00/character03"),
    ],
)
def test_missing_drawings_are_counted(tmp_path: Path, lost: str, words: str) -> None:
    folder = small_archives(tmp_path, lambda name: None if lost in name else b"")
    with pytest.raises(DataError, match=words):
        Omniglot(folder, "alphabets").select("train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:-1], "4111 classes of 1028 characters.*4112 of 1028"),
        (lambda lines: [*lines[:-1], lines[0]], "4112 classes of 1028 characters"),
        (lambda lines: [*lines[:4], "<html>", *lines[5:]], "line 5: '<html>'"),
        (lambda lines: [line.replace("Angelic", "Klingon") for line in lines], "Klingon"),
    ],
)
def test_a_split_file_with_other_classes_is_refused(copied: Path, change, words: str) -> None:
    path = copied / "omniglot" / "splits" / "vinyals_train.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(DataError, match=words):
        Omniglot(copied).select("train")


def test_missing_files_are_named_where_they_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    def fail(url: str, **_: object) -> None:
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", fail)
    for split_by, name in (("vinyals", "vinyals_val.txt"), ("alphabets", "images_background.zip")):
        for download, words in ((True, ["https://", "no route"]), (False, ["download is off"])):
            with pytest.raises(DataError) as caught:
                Omniglot(tmp_path, split_by, download=download).select("val")
            said = str(caught.value)
            assert all(word in said for word in (name, str(tmp_path), "METABATCH_DATA", *words))


def test_what_was_downloaded_is_checked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import pooch

    lines = [f"A/character{n:04d}/rot{turn:03d}" for n in range(172) for turn in range(0, 360, 90)]
    answers = ["<html>sign in first</html>", "\n".join(lines)]

    class Downloader:
        def __init__(self, **_: object) -> None: ...

        def __call__(self, url: str, output: str, pooch: object) -> None:
            Path(output).write_text(answers.pop(0))

    monkeypatch.setattr(pooch, "HTTPDownloader", Downloader)
    path = tmp_path / "omniglot" / "splits" / "vinyals_val.txt"
    with pytest.raises(DataError, match="sign in"):
        Omniglot(tmp_path)._read_split("val")
    assert not path.exists()
    assert len(Omniglot(tmp_path)._read_split("val")) == 688
    assert len(Omniglot(tmp_path)._read_split("val")) == 688
    assert path.read_text().splitlines() == lines
    assert capfd.readouterr() == ("", "")


def test_data_dir_is_given_or_the_environments_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("METABATCH_DATA", str(tmp_path))
    assert data_folder("/elsewhere") == Path("/elsewhere")
    assert data_folder(None) == tmp_path
    monkeypatch.delenv("METABATCH_DATA")
    assert data_folder(None) == cache / "data"


@pytest.mark.parametrize(
    "arguments",
    [
        {"split_by": "author"},
        {"train_on": "test"},
        {"image_size": 0},
        {"train": 0},
        {"val": 0},
        {"train": 1600, "val": 23},
    ],
)
def test_impossible_arguments_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Omniglot("/nowhere", **arguments)
