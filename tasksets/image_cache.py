"""Decoded images, kept once in the user's cache folder and read as memory maps."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import platformdirs
from PIL import Image

from tasksets.images import DataError

_log = logging.getLogger("metabatch")
_STALE = 86_400  # seconds after which an unfinished entry belongs to a process that died


class Decoded(NamedTuple):
    """Images on their way into the cache.

    Attributes:
        shape: `(images, C, H, W)` of them all.
        about: what else to keep, as JSON has it.
        images: uint8 `[C, H, W]` each, in order; read once.
    """

    shape: tuple[int, int, int, int]
    about: Any
    images: Iterable[np.ndarray]


def cached_images(
    dataset: str, key: list[Any], decode: Callable[[], Decoded]
) -> tuple[np.ndarray, Any]:
    """The images that `decode` gives, decoded the first time only.

    Any number of processes may ask at once: one decodes, the others wait for it. An entry
    appears whole or not at all.

    Args:
        dataset: a folder in the cache.
        key: all that the images depend on, as JSON has it.
        decode: opens the source, and may raise a `DataError`.

    Returns:
        The images, uint8 `[images, C, H, W]`, as a read-only memory map, and what `decode` told
        about them.

    Raises:
        DataError: the cache folder cannot be written.
    """
    folder = platformdirs.user_cache_path("metabatch") / dataset
    entry = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    found = _read(entry)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if _read(entry) is None:  # while waiting, another process may have made it
                _make(entry, decode())
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be written ({error}): make room, or set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    found = _read(entry)
    if found is None:
        raise DataError(f"{entry} was written, but cannot be read: is the disk full?")
    return found


def open_image(source: Path | IO[bytes], name: str) -> Image.Image:
    """An image, read to its end.

    Raises:
        DataError: it cannot be read; says `name`.
    """
    try:
        with Image.open(source) as image:
            image.load()
    except Exception as error:  # what Pillow raises on a broken file depends on where it breaks
        raise DataError(f"{name} cannot be read as an image ({error})") from error
    return image


def _read(entry: Path) -> tuple[np.ndarray, Any] | None:
    try:
        about = json.loads((entry / "about.json").read_text())
        return np.load(entry / "images.npy", mmap_mode="r"), about
    except (OSError, ValueError, EOFError):  # none yet, or one that was damaged
        return None


def _make(entry: Path, decoded: Decoded) -> None:
    started = time.monotonic()
    _sweep(entry.parent)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
    try:
        # written from front to back: a full disk is an error here, but would be a crash
        # (SIGBUS) behind a writable memory map
        header = {"descr": "|u1", "fortran_order": False, "shape": decoded.shape}
        with open(partial / "images.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image in decoded.images:
                file.write(image.tobytes())
        (partial / "about.json").write_text(json.dumps(decoded.about))
        shutil.rmtree(entry, ignore_errors=True)  # only ever a damaged one
        try:
            os.rename(partial, entry)
        except OSError as error:  # where there are no locks, another one may be first
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.monotonic() - started
    _log.info("decoded %d images into %s in %.1f s", decoded.shape[0], entry, seconds)


def _sweep(folder: Path) -> None:
    for partial in folder.glob(".partial-*"):
        if time.time() - partial.stat().st_mtime > _STALE:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as lock:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
