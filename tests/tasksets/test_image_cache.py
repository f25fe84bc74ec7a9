"""The cache of decoded images: made once, by one of many, whole or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tasksets.image_cache import Decoded, cached_images
from tasksets.images import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 7, 7), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "metabatch" / "things"


def decode() -> Decoded:
    return Decoded((50, 3, 7, 7), ["a", "b"], iter(IMAGES))


def fail() -> Decoded:
    raise AssertionError("decoded again")


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def test_images_come_back_as_they_were(cache: Path) -> None:
    for source in (decode, fail):
        images, about = cached_images("things", ["key"], source)
        assert np.array_equal(images, IMAGES)
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable
        assert about == ["a", "b"]


def test_many_that_ask_at_once_decode_once(cache: Path) -> None:
    decoded = []

    def counted() -> Decoded:
        decoded.append(1)
        return decode()

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cached_images, "things", ["key"], counted) for _ in range(8)]
        assert all(np.array_equal(one.result()[0], IMAGES) for one in asked)
    assert decoded == [1]
    assert len(entries(cache)) == 1


def test_two_without_a_lock_do_not_harm_each_other(cache: Path) -> None:
    def overtaken() -> Decoded:
        with pytest.MonkeyPatch.context() as patch:  # as on a file system without locks
            patch.setattr("fcntl.flock", lambda *_: None)
            cached_images("things", ["key"], decode)
        return decode()

    images, _ = cached_images("things", ["key"], overtaken)
    assert np.array_equal(images, IMAGES)
    assert len(entries(cache)) == 1


def test_another_key_is_another_entry(cache: Path) -> None:
    cached_images("things", ["key", 1], decode)
    with pytest.raises(AssertionError, match="decoded again"):
        cached_images("things", ["key", 2], fail)


def test_what_fails_leaves_nothing_behind(cache: Path) -> None:
    def broken():
        yield IMAGES[0]
        raise DataError("image 2 is broken")

    with pytest.raises(DataError, match="image 2"):
        cached_images("things", ["key"], lambda: Decoded((50, 3, 7, 7), None, broken()))
    assert entries(cache) == []


@pytest.mark.parametrize("size", [0, 60, 500])
def test_a_damaged_entry_is_made_again(cache: Path, size: int) -> None:
    cached_images("things", ["key"], decode)
    path = next(cache.glob("*/images.npy"))
    os.truncate(path, size)
    images, _ = cached_images("things", ["key"], decode)
    assert np.array_equal(images, IMAGES)


def test_what_a_killed_process_left_is_cleared_away(cache: Path) -> None:
    for name, age in ((".partial-old", 200_000), (".partial-new", 0)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (os.stat(cache).st_mtime - age,) * 2)
    cached_images("things", ["key"], decode)
    assert [name for name in entries(cache) if name.startswith(".partial")] == [".partial-new"]


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the way")
    with pytest.raises(DataError, match=f"{cache} cannot be written.*XDG_CACHE_HOME"):
        cached_images("things", ["key"], decode)
