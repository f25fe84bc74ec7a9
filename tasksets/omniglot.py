"""Omniglot: 1623 handwritten characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import platformdirs
from annotated_types import Ge
from PIL import Image

from metabatch_cli.batching.arguments import at_least, one_of
from metabatch_cli.batching.streams import Stream, permutation
from metabatch_cli.batching.taskset import SPLITS, Split
from tasksets.image_cache import Decoded, cached_images, open_image
from tasksets.images import DataError, LabelledImages

DRAWINGS = 20  # of every character
TURNS = 4
VAL_ALPHABETS = 5  # of the background's 30, the last in the order of their names

_VERSION = 1  # of the decoding: raised when the same archive would give other pixels
_TIMEOUT = 10.0  # seconds without an answer until a download is given up
_OFFICIAL = "https://github.com/brendenlake/omniglot/raw/master/python/"
_SPLITS = (
    "https://raw.githubusercontent.com/jakesnell/prototypical-networks/master/"
    "data/omniglot/splits/vinyals/"
)
_ARCHIVES = {  # characters in it, and the official MD5
    "images_background.zip": (964, "68d2efa1b9178cc56df9314c21c6e718"),
    "images_evaluation.zip": (659, "6b91aef0f799c5bb55b94e3f2daec811"),
}
_CHARACTERS = sum(count for count, _ in _ARCHIVES.values())
_VINYALS = {"train": 1028, "val": 172, "test": 423}  # characters
_NAMED = 3  # alphabets that `note` names, of those that splits share
_MEMBER = re.compile(r"(?:.*/)?([^/]+/character\d+)/[^/.][^/]*\.png")
_SPLIT_LINE = re.compile(r"([^/]+/character\d+)/rot(000|090|180|270)")


class Omniglot:
    """The characters of Lake et al. 2015 ("Human-level concept learning through probabilistic
    program induction"), strokes white on black.

    Three ways to split them, of which only the second keeps alphabets apart:

    - "vinyals": the split of Vinyals et al. 2016 (arXiv:1606.04080) in the version of
      prototypical networks (Snell et al. 2017, arXiv:1703.05175): 1028, 172 and 423 characters.
    - "alphabets": Lake's own border. The 30 alphabets of the background set are to learn from
      (the last 5 of them in the order of their names for validation), the 20 of the evaluation
      set to be tested on.
    - "random": characters at random, whatever their alphabet: `train` of them, `val`, and the
      rest. The defaults, 1100 and 100, are the numbers of MAML (Finn et al. 2017,
      arXiv:1703.03400: 1200 characters to train on, of which its code takes 100 for validation);
      1150 and 50 those of MAML++ (Antoniou et al. 2019, arXiv:1810.09502); both leave 423. The
      papers do not list their characters, so which they are here is our own draw, by `seed`.

    `shared_alphabets` says which alphabets are on both sides, `note` too.

    Reads `DATA_DIR/omniglot/images_background.zip` and `images_evaluation.zip`, and for Vinyals'
    split `DATA_DIR/omniglot/splits/vinyals_{train,val,test}.txt`. An archive is recognised by
    its characters, not by its hash.

    Args:
        data_dir: by default `$METABATCH_DATA`, else `data` in the user's cache folder.
        split_by: "vinyals", "alphabets" or "random".
        rotations: whether every character turned by 90°, 180° and 270° makes three further
            classes (in every split: 4112, 688 and 1692 classes with Vinyals').
        image_size: pixels in height and width; the originals have 105.
        download: whether what is missing is downloaded.
        train_on: "trainval" adds the validation classes to the training classes, for a last
            training once everything is chosen.
        train, val: characters to train on and to validate with, for "random".
        seed: which characters they are, for "random".

    Raises:
        ValueError: an argument that is none of those, or no character left to test on.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        split_by: Literal["vinyals", "alphabets", "random"] = "vinyals",
        rotations: bool = True,
        image_size: Annotated[int, Ge(1)] = 28,
        download: bool = True,
        train_on: Literal["train", "trainval"] = "train",
        train: Annotated[int, Ge(1)] = 1100,
        val: Annotated[int, Ge(1)] = 100,
        seed: int = 0,
    ) -> None:
        one_of("split_by", split_by, ("vinyals", "alphabets", "random"))
        one_of("train_on", train_on, ("train", "trainval"))
        at_least("image_size", image_size, 1)
        at_least("train", train, 1)
        at_least("val", val, 1)
        if train + val >= _CHARACTERS:
            raise ValueError(
                f"train={train} and val={val} leave none of the {_CHARACTERS} characters to test on"
            )
        self.folder = data_folder(data_dir) / "omniglot"
        self.split_by = split_by
        self.rotations = rotations
        self.image_size = image_size
        self.download = download
        self.train_on = train_on
        self.train = train
        self.val = val
        self.seed = seed

    def select(self, split: Split) -> LabelledImages:
        """The classes of a split, named `ALPHABET/characterNN/rotDDD`.

        Raises:
            DataError: a file that is missing and cannot be downloaded, or is not what it
                should be.
        """
        parts = self._parts(split)
        if self.split_by == "vinyals":
            classes = self._read_splits(parts)
            if not self.rotations:
                classes = [(character, turn) for character, turn in classes if turn == 0]
            images, characters = self._open()
            unknown = {character for character, _ in classes}.difference(characters)
            if unknown:
                raise DataError(
                    f"{self.folder}: the splits name {min(unknown)}, which no archive holds"
                )
        else:
            images, characters = self._open()
            turns = range(TURNS if self.rotations else 1)
            classes = [(c, turn) for c in self._draw(parts, characters) for turn in turns]
        return _labelled(images, characters, classes)

    def shared_alphabets(self, split: Split = "test", other: Split = "train") -> tuple[str, ...]:
        """The alphabets that have characters in both of two splits, in the order of their names.

        Raises:
            DataError: as `select`.
        """
        return tuple(sorted(self._alphabets(split) & self._alphabets(other)))

    @property
    def note(self) -> str:
        """Whether what is tested is of alphabets that were trained on, and of which."""
        shared = self.shared_alphabets()
        if not shared:
            return "test shares no alphabet with train"
        count = f"{len(shared)} alphabet{'s' * (len(shared) > 1)}"
        names = ", ".join([*shared[:_NAMED], *["…"] * (len(shared) > _NAMED)])
        return f"test shares {count} with train: {names}"

    # --- which characters ---------------------------------------------------------------------

    def _parts(self, split: Split) -> tuple[Split, ...]:
        """The parts of the published split that a split of ours is."""
        one_of("split", split, SPLITS)
        both = split == "train" and self.train_on == "trainval"
        return ("train", "val") if both else (split,)

    def _alphabets(self, split: Split) -> set[str]:
        parts = self._parts(split)
        if self.split_by == "vinyals":
            return {_alphabet(character) for character, _ in self._read_splits(parts)}
        return {_alphabet(character) for character in self._draw(parts, self._open()[1])}

    def _draw(self, parts: Sequence[Split], characters: Sequence[str]) -> list[str]:
        """Those of all characters that are in some parts of "alphabets" or "random"."""
        divide = self._by_alphabet if self.split_by == "alphabets" else self._at_random
        divided = divide(characters)
        return [character for part in parts for character in divided[part]]

    def _by_alphabet(self, characters: Sequence[str]) -> dict[Split, list[str]]:
        border = _ARCHIVES["images_background.zip"][0]
        background = characters[:border]
        held_out = sorted({_alphabet(character) for character in background})[-VAL_ALPHABETS:]
        return {
            "train": [c for c in background if _alphabet(c) not in held_out],
            "val": [c for c in background if _alphabet(c) in held_out],
            "test": list(characters[border:]),
        }

    def _at_random(self, characters: Sequence[str]) -> dict[Split, list[str]]:
        words = Stream(self.seed, "omniglot", "characters").words(len(characters), 0)
        parts = np.split(permutation(words), [self.train, self.train + self.val])
        return {
            split: [characters[number] for number in np.sort(part)]
            for split, part in zip(SPLITS, parts, strict=True)
        }

    # --- their drawings -----------------------------------------------------------------------

    def _open(self) -> tuple[np.ndarray, list[str]]:
        """All drawings, `[20 * characters, 1, S, S]`, and the names of the characters."""
        paths = [
            self._find(name, _OFFICIAL + name, f"md5:{md5}") for name, (_, md5) in _ARCHIVES.items()
        ]
        hashes = [_sha256(path) for path in paths]
        return cached_images(
            "omniglot",
            [_VERSION, self.image_size, *hashes],
            lambda: _decode(paths, self.image_size),
        )

    def _read_splits(self, parts: Sequence[Split]) -> list[tuple[str, int]]:
        """The classes of some parts of Vinyals' split: character and quarter turns."""
        return [entry for part in parts for entry in self._read_split(part)]

    def _read_split(self, part: Split) -> list[tuple[str, int]]:
        """The classes of a part of Vinyals' split: character and quarter turns."""
        name = f"splits/vinyals_{part}.txt"
        existed = (self.folder / name).exists()
        path = self._find(name, f"{_SPLITS}{part}.txt", None)
        try:
            return _parse_split(path, _VINYALS[part])
        except DataError:
            if not existed:  # what was downloaded is something else: try again next time
                path.unlink()
            raise

    def _find(self, name: str, url: str, known_hash: str | None) -> Path:
        path = self.folder / name
        if path.exists():
            return path
        advice = (
            "put the file there, or let data_dir (or $METABATCH_DATA) name the folder that has "
            f"omniglot/{name}"
        )
        if not self.download:
            raise DataError(f"{path} does not exist, and download is off: {advice}")
        import pooch  # here, because it imports all of requests

        pooch.get_logger().setLevel("WARNING")  # it tells of every download on stderr
        try:
            pooch.retrieve(
                url,
                known_hash,
                fname=path.name,
                path=path.parent,
                downloader=pooch.HTTPDownloader(timeout=_TIMEOUT),
            )
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash
            raise DataError(
                f"{path} does not exist, and downloading it from {url} failed "
                f"({_first_cause(error)}): {advice}"
            ) from error
        return path


def data_folder(data_dir: str | Path | None) -> Path:
    """The folder with a folder for each dataset.

    Args:
        data_dir: where it is; None means `$METABATCH_DATA`, else the user's cache folder.
    """
    given = data_dir or os.environ.get("METABATCH_DATA")
    if given:
        return Path(given).expanduser().absolute()
    return platformdirs.user_cache_path("metabatch") / "data"


def _labelled(
    images: np.ndarray, characters: Sequence[str], classes: Sequence[tuple[str, int]]
) -> LabelledImages:
    place = {character: number for number, character in enumerate(characters)}
    first = DRAWINGS * np.array([place[character] for character, _ in classes], dtype=np.int64)
    return LabelledImages(
        pixels=images,
        rows=(first[:, None] + np.arange(DRAWINGS)).reshape(-1),
        starts=DRAWINGS * np.arange(len(classes) + 1),
        turns=np.array([turn for _, turn in classes], dtype=np.int64),
        class_names=tuple(f"{character}/rot{90 * turn:03d}" for character, turn in classes),
    )


def _parse_split(path: Path, expected: int) -> list[tuple[str, int]]:
    classes = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _SPLIT_LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(
                f"{path}, line {number}: {line[:80]!r} is no class of the form "
                "ALPHABET/characterNN/rotDDD"
            )
        classes.append((match[1], int(match[2]) // 90))
    characters = {character for character, _ in classes}
    if not len(characters) == expected == len(classes) / TURNS == len(set(classes)) / TURNS:
        raise DataError(
            f"{path} has {len(classes)} classes of {len(characters)} characters, but Vinyals' "
            f"split has {TURNS * expected} of {expected} here"
        )
    return classes


def _decode(paths: Sequence[Path], size: int) -> Decoded:
    members = {path: _list_members(path) for path in paths}
    characters = [character for path in paths for character in members[path]]

    def images() -> Iterator[np.ndarray]:
        for path in paths:
            with zipfile.ZipFile(path) as archive:
                for names in members[path].values():
                    for name in names:
                        yield _decode_member(archive, path, name, size)

    return Decoded((DRAWINGS * len(characters), 1, size, size), characters, images())


def _list_members(path: Path) -> dict[str, list[str]]:
    """The drawings of each character of an archive, both in the order of their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no readable zip archive ({error}): delete it, and it is downloaded anew"
        ) from error
    drawings: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _MEMBER.fullmatch(name)
        if match is not None and not name.startswith("__MACOSX/"):
            drawings.setdefault(match[1], []).append(name)
    expected, _ = _ARCHIVES[path.name]
    if len(drawings) != expected:
        raise DataError(
            f"{path} holds {len(drawings)} characters, but Omniglot's {path.name} has {expected}"
        )
    for character, of_it in drawings.items():
        if len(of_it) != DRAWINGS:
            raise DataError(
                f"{path} holds {len(of_it)} drawings of {character}, but Omniglot has {DRAWINGS} "
                "of each character"
            )
    return drawings


def _decode_member(archive: zipfile.ZipFile, path: Path, name: str, size: int) -> np.ndarray:
    """A drawing, uint8 `[1, S, S]`, strokes 255."""
    try:
        data = archive.read(name)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: {name} cannot be unpacked ({error})") from error
    # paper is white in the files; the shrinking averages, so that thin strokes turn grey
    # instead of falling between the pixels
    drawing = open_image(io.BytesIO(data), f"{path}: {name}").convert("L")
    if drawing.size != (size, size):
        drawing = drawing.resize((size, size), Image.Resampling.LANCZOS)
    return (255 - np.asarray(drawing))[None]


def _first_cause(error: BaseException) -> str:
    # requests wraps what went wrong three times, and every layer tells the URL again
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _alphabet(character: str) -> str:
    return character.split("/")[0]


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
