"""A folder of images of one's own: a folder for each class, or simply images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Lt
from PIL import Image, ImageOps

from metabatch_cli.batching.arguments import at_least, one_of
from metabatch_cli.batching.streams import Stream, permutation
from metabatch_cli.batching.taskset import SPLITS, Split
from tasksets.image_cache import Decoded, cached_images, open_image
from tasksets.images import DataError, LabelledImages

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")

_VERSION = 1  # of the decoding: raised when the same files would give other pixels
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class _File:
    path: str  # below the root, with "/"
    size: int
    modified: int  # nanoseconds

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[:-1])


class ImageFolder:
    """Images below a folder, decoded once to one size.

    A class is a folder in the root, with all images below it; images in the root itself are one
    class, which has the root's name. Where the root has the folders `train`, `val` and `test`
    (and no others), they are the splits, and `val`, `test` and `seed` say nothing.

    Args:
        root: the folder; a relative one is below the current directory.
        image_size: pixels in height and width.
        channels: 1 for grey, 3 for colour.
        split_by: "class" gives every class to one split, which `Episodes` needs; "image" gives
            every image to one split, whatever its class, for `ImageCompletion`.
        val, test: fractions of the classes or images that are held out; at least one where the
            fraction is not 0.
        seed: which they are.
        fit: an image that is not square is cropped around its centre ("crop") or loses its
            proportions ("stretch").
        min_images: classes of fewer images are left out, of all splits; for split_by "class".

    Attributes:
        note: how many classes were left out; "" for none.

    Raises:
        ValueError: an argument that is none of those.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: Annotated[int, Ge(1)] = 32,
        channels: Literal[1, 3] = 3,
        split_by: Literal["class", "image"] = "class",
        val: Annotated[float, Ge(0), Lt(1)] = 0.1,
        test: Annotated[float, Ge(0), Lt(1)] = 0.2,
        seed: int = 0,
        fit: Literal["crop", "stretch"] = "crop",
        min_images: Annotated[int, Ge(1)] = 1,
    ) -> None:
        at_least("image_size", image_size, 1)
        at_least("min_images", min_images, 1)
        one_of("channels", channels, tuple(_MODES))
        one_of("split_by", split_by, ("class", "image"))
        one_of("fit", fit, ("crop", "stretch"))
        if split_by == "image" and min_images > 1:
            raise ValueError(
                f"min_images={min_images} leaves out classes, but split_by=image has no regard "
                "to classes"
            )
        if val < 0 or test < 0 or val + test >= 1:
            raise ValueError(f"val={val} and test={test} must be fractions that sum to less than 1")
        self.root = Path(root).expanduser().absolute()
        self.image_size = image_size
        self.channels = channels
        self.split_by = split_by
        self.val = val
        self.test = test
        self.seed = seed
        self.fit = fit
        self.min_images = min_images
        self.note = ""

    def select(self, split: Split) -> LabelledImages:
        """The images of a split, by class.

        Raises:
            DataError: no such folder, no images, one that cannot be read, or classes that
                cannot be split.
        """
        one_of("split", split, SPLITS)
        files = self._list()
        names, chosen = self._split(files, split)
        pixels, _ = cached_images(
            "image_folder",
            [_VERSION, str(self.root), self.image_size, self.channels, self.fit]
            + [[file.path, file.size, file.modified] for file in files],
            lambda: self._decode(files),
        )
        class_names = sorted({names[number] for number in chosen})
        label = {name: place for place, name in enumerate(class_names)}
        labels = np.array([label[names[number]] for number in chosen], dtype=np.int64)
        order = np.argsort(labels, kind="stable")
        return LabelledImages(
            pixels=pixels,
            rows=np.array(chosen, dtype=np.int64)[order],
            starts=np.concatenate([[0], np.cumsum(np.bincount(labels))]),
            turns=np.zeros(len(class_names), dtype=np.int64),
            class_names=tuple(class_names),
        )

    # --- which images -----------------------------------------------------------------------

    def _list(self) -> list[_File]:
        """All images below the root, in the order of their paths."""
        if not self.root.is_dir():
            raise DataError(
                f"there is no folder {self.root} (a relative root is below the current directory)"
            )
        files = sorted(_walk(self.root), key=lambda file: file.path)
        if not files:
            raise DataError(f"{self.root} has no images ({' '.join(SUFFIXES)})")
        return files

    def _split(self, files: Sequence[_File], split: Split) -> tuple[list[str], list[int]]:
        """The class of every file, and the numbers of those that belong to the split."""
        top = {file.folders[0] if file.folders else "" for file in files}
        if "train" in top and top <= set(SPLITS):
            return self._split_by_folder(files, split)
        names = [file.folders[0] if file.folders else self.root.name for file in files]
        if self.split_by == "image":
            part = self._held_out(len(files), "images")[split]
            return names, sorted(part.tolist())
        loose = next((file.path for file in files if not file.folders), None)
        if loose is not None:
            raise DataError(
                f"{self.root / loose} lies outside of the class folders, so it belongs to no "
                "class: split_by=image splits images without regard to classes"
            )
        classes = sorted(self._large(names))
        mine = {classes[number] for number in self._held_out(len(classes), "classes")[split]}
        return names, [number for number, name in enumerate(names) if name in mine]

    def _split_by_folder(self, files: Sequence[_File], split: Split) -> tuple[list[str], list[int]]:
        names = [file.folders[1] if len(file.folders) > 1 else self.root.name for file in files]
        if self.split_by == "class":
            home: dict[str, str] = {}
            for name, file in zip(names, files, strict=True):
                nested = len(file.folders) > 1
                if nested and home.setdefault(name, file.folders[0]) != file.folders[0]:
                    raise DataError(
                        f"{self.root}: class {name!r} is in {home[name]} and in "
                        f"{file.folders[0]}, but split_by=class keeps classes apart"
                    )
        chosen = [number for number, file in enumerate(files) if file.folders[0] == split]
        if not chosen:
            raise DataError(f"{self.root / split} does not exist or has no images")
        large = self._large(names)
        chosen = [number for number in chosen if names[number] in large]
        if not chosen:
            raise DataError(f"{self.root / split} has no class of {self.min_images} images")
        return names, chosen

    def _large(self, names: Sequence[str]) -> set[str]:
        """The classes that have enough images, by the class of every image."""
        counts = Counter(names)
        large = {name for name, count in counts.items() if count >= self.min_images}
        if not large:
            largest, most = counts.most_common(1)[0]
            raise DataError(
                f"{self.root}: no class has min_images={self.min_images} images; the largest, "
                f"{largest!r}, has {most}"
            )
        small = len(counts) - len(large)
        few = f"fewer than {self.min_images} images"
        self.note = f"{small} of {len(counts)} classes left out: {few}" if small else ""
        return large

    def _held_out(self, total: int, what: str) -> dict[str, np.ndarray]:
        """Numbers 0 … total − 1, each in one split."""
        parts = (self.val, self.test)
        n_val, n_test = (max(1, round(part * total)) if part else 0 for part in parts)
        if n_val + n_test >= total:
            raise DataError(
                f"{self.root} has {total} {what}: too few for val={self.val} and "
                f"test={self.test} ({n_val} and {n_test}) and any to train on"
            )
        order = permutation(Stream(self.seed, "image_folder", what).words(total, 0))
        return {
            "val": order[:n_val],
            "test": order[n_val : n_val + n_test],
            "train": order[n_val + n_test :],
        }

    # --- their pixels -----------------------------------------------------------------------

    def _decode(self, files: Sequence[_File]) -> Decoded:
        def images() -> Iterator[np.ndarray]:
            # Pillow decodes without holding the interpreter's lock; a few at a time, so that
            # the memory does not grow where the disk is slow
            with ThreadPoolExecutor() as pool:
                for start in range(0, len(files), 256):
                    yield from pool.map(self._decode_file, files[start : start + 256])

        size = self.image_size
        return Decoded((len(files), self.channels, size, size), None, images())

    def _decode_file(self, file: _File) -> np.ndarray:
        """An image, uint8 `[C, S, S]`."""
        path = self.root / file.path
        image = ImageOps.exif_transpose(open_image(path, str(path)))
        if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:  # what lies under transparent pixels is any colour
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(_MODES[self.channels])
        size = (self.image_size, self.image_size)
        if self.fit == "crop":
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        else:
            image = image.resize(size, Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)


def _walk(root: Path) -> Iterator[_File]:
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link that leads back up
            below.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = Path(folder, name)
            try:
                stat = path.stat()
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error})") from error
            yield _File(path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)
