"""Images as tasks: what a dataset of images offers, and completing one from a few pixels."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.sizes import Metabatch, SizeLaw, extremes
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import SPLITS, Split, TaskSet, TaskSpec


class DataError(ValueError):
    """Data that is missing or broken; the message names the file and says what to do."""


@runtime_checkable
class ImageDataset(Protocol):
    """What `ImageCompletion` and `Episodes` ask of a dataset: a split of it, opened on demand.

    Making one is free of charge; `select` may read, decode or download.
    """

    def select(self, split: Split) -> LabelledImages:
        """The images of one split."""
        ...


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images by class, over an array that several classes may share.

    A class has rows of the array and a number of quarter turns, so that "character c turned by
    90°" is a class of its own without a copy of its drawings. Images are counted class by
    class: image i shows row `rows[i]`, and class c has the images `starts[c] … starts[c+1] − 1`.

    It pickles cheaply: an array that is a memory-mapped file travels as its path.

    Attributes:
        pixels: uint8 `[rows, C, H, W]`, in memory or memory-mapped; C is 1 or 3.
        rows: int64 `[images]`.
        starts: int64 `[classes + 1]`.
        turns: int64 `[classes]`, counter-clockwise quarter turns, as in `numpy.rot90`.
        class_names: a name for each class.

    Raises:
        ValueError: arrays of another type or shape, a class without images, or odd quarter
            turns of images that are not square.
    """

    pixels: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    turns: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4:
            raise ValueError(
                "images must be uint8 [images, C, H, W], not "
                f"{self.pixels.dtype} {list(self.pixels.shape)}"
            )
        if self.pixels.shape[1] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, not {self.pixels.shape[1]}")
        if not len(self.starts) - 1 == len(self.turns) == len(self.class_names):
            raise ValueError(
                f"{len(self.starts) - 1} classes, {len(self.turns)} turns and "
                f"{len(self.class_names)} names: they must be as many"
            )
        if self.starts[0] != 0 or self.starts[-1] != len(self.rows):
            raise ValueError(f"starts must run from 0 to the number of images, {len(self.rows)}")
        if self.sizes.size and self.sizes.min() < 1:
            raise ValueError(f"class {self.class_names[self.sizes.argmin()]!r} has no images")
        if self.pixels.shape[2] != self.pixels.shape[3] and (self.turns % 2).any():
            raise ValueError(f"images of {list(self.pixels.shape[2:])} pixels cannot be turned")

    @classmethod
    def from_labels(
        cls, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None
    ) -> LabelledImages:
        """Images with a label each: the simple way for a dataset of one's own.

        Args:
            images: uint8 `[images, C, H, W]`.
            labels: integers `[images]`, from 0 to classes − 1, each of them used.
            class_names: a name for each class; by default its number.
        """
        labels = np.asarray(labels)
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images, but labels {list(labels.shape)}")
        counts = np.bincount(labels, minlength=len(class_names or ()))
        return cls(
            pixels=images,
            rows=np.argsort(labels, kind="stable"),
            starts=np.concatenate([[0], np.cumsum(counts)]),
            turns=np.zeros(len(counts), dtype=np.int64),
            class_names=tuple(class_names or map(str, range(len(counts)))),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of every image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    @property
    def sizes(self) -> np.ndarray:
        """Images of each class, int64 `[classes]`."""
        return np.diff(self.starts)

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, int64 `[images]`."""
        return np.repeat(np.arange(len(self.turns)), self.sizes)

    def take(self, images: np.ndarray, turns: np.ndarray | None = None) -> np.ndarray:
        """Some images, turned as their classes are: uint8 `[…, C, H, W]`.

        Args:
            images: their numbers, int64 `[…]`.
            turns: further quarter turns of each, int64 `[…]`; of square images only.
        """
        # a plain view: a memmap would make every result a memmap, at a price
        taken = self.pixels.view(np.ndarray).take(self.rows[images], axis=0)
        if self.turns.any():
            own = self.turns[np.searchsorted(self.starts, images, side="right") - 1]
            turns = own if turns is None else own + turns
        if turns is not None:
            for turn in (1, 2, 3):
                chosen = np.nonzero(turns % 4 == turn)
                taken[chosen] = np.rot90(taken[chosen], turn, axes=(-2, -1))
        return taken

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        pixels = self.pixels
        # only the map of a whole file knows its place in it; a slice of one is copied
        if isinstance(pixels, np.memmap) and isinstance(pixels.base, mmap.mmap):
            state["pixels"] = (pixels.filename, pixels.dtype, pixels.offset, pixels.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["pixels"], tuple):
            path, dtype, offset, shape = state["pixels"]
            state["pixels"] = np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
        self.__dict__.update(state)


def open_split(dataset: ImageDataset, split: Split | None, eval: bool) -> LabelledImages:
    """The images of the split that a task set stands for: `split`, or what `eval` says.

    Raises:
        ValueError: no such split, or a split without images.
        TypeError: what the dataset gives are no `LabelledImages`.
    """
    chosen = split or ("val" if eval else "train")
    one_of("split", chosen, SPLITS)
    images = dataset.select(chosen)
    if not isinstance(images, LabelledImages):
        raise TypeError(
            f"{type(dataset).__name__}.select must return LabelledImages, not "
            f"{type(images).__name__} (LabelledImages.from_labels makes them)"
        )
    if not len(images):
        raise ValueError(f"the split {chosen!r} of {type(dataset).__name__} has no images")
    return images


def check_same_split(taskset: TaskSet, split: Split) -> None:
    """Refuse another split for a task set that has opened the images of one."""
    before = getattr(taskset, "split", split)
    if split != before:
        raise ValueError(
            f"split={split!r}: the images of this {type(taskset).__name__} are those of the split "
            f"{before!r}; make another one for {split!r}"
        )


class ImageCompletion(TaskSet):
    """Complete an image from some of its pixels: a task is a function from place to intensity.

    The images of the neural process papers (Garnelo et al. 2018, arXiv:1807.01613, §4.2). The
    index of a task is an image of the split. x is the centre of a pixel, (row, column), each
    from −1 (top, left) to 1 (bottom, right) over the image's edges; y its intensities in
    [0, 1], one per channel.

    The context is a uniformly random set of pixels. The target is another one, disjoint from
    it; only where it has as many points as the image pixels, it is the whole image, row by row.

    Args:
        dataset: whose images.
        min_pts, max_ctx_pts, max_tgt_pts: bounds of the sizes, see `TaskSet`.
        total_tgt_pts: points in all, for laws that ask for it; by default all pixels.
        eval: whether these are held-out tasks, where `split` is not given.
        predict_full_target: whether the target is always the whole image.
        predict_full_target_during_eval: whether it is all but the context in held-out tasks.
        sizes: the law of the sizes.
        split: whose images.

    Raises:
        ValueError: sizes that ask for more pixels than the image has, or contradict each other.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        min_pts: Annotated[int, Ge(0)],
        max_ctx_pts: Annotated[int, Ge(0)],
        max_tgt_pts: Annotated[int, Ge(1)],
        total_tgt_pts: Annotated[int, Ge(1)] | None = None,
        eval: bool = False,
        predict_full_target: bool = False,
        predict_full_target_during_eval: bool = False,
        *,
        sizes: str | Mapping[str, Any] | SizeLaw = "metabatch",
        split: Split | None = None,
    ) -> None:
        self.images = open_split(dataset, split, eval)
        _, height, width = self.images.shape
        n_pixels = height * width
        if total_tgt_pts is not None and total_tgt_pts > n_pixels:
            raise ValueError(
                f"total_tgt_pts={total_tgt_pts} is more than the {n_pixels} pixels of an image "
                f"of {height} × {width}"
            )
        super().__init__(
            min_pts,
            max_ctx_pts,
            max_tgt_pts,
            n_pixels if total_tgt_pts is None else total_tgt_pts,
            eval,
            predict_full_target,
            predict_full_target_during_eval,
            sizes=sizes,
            split=split,
        )
        self._grid = pixel_centres(height, width)
        self._check_law()

    @property
    def classes(self) -> np.ndarray:
        """The class of each image, int64 `[images]`."""
        return self.images.labels

    def belong_to(self, split: Split) -> None:
        check_same_split(self, split)
        super().belong_to(split)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def spec(self) -> TaskSpec:
        """Pixels of an image: two coordinates to one or three intensities."""
        shape = self.images.shape
        return TaskSpec(x_shape=(2,), y_shape=shape[:1], kind="image", image_shape=shape)

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Task:
        self._check_sizes(n_context, n_target)
        n_pixels = len(self._grid)
        intensities = self.full_image(indices).flatten(2).transpose(1, 2)
        whole = n_target == n_pixels
        drawn = n_context if whole else n_context + n_target
        pixels = _random_pixels(len(indices), n_pixels, drawn, generator)
        context, target = pixels[:, :n_context], pixels[:, n_context:]
        return Task(
            context_x=self._grid[context],
            context_y=_at(intensities, context),
            target_x=self._grid.repeat(len(indices), 1, 1) if whole else self._grid[target],
            target_y=intensities.contiguous() if whole else _at(intensities, target),
            aux={"index": indices.clone()},
        )

    def full_image(self, indices: Tensor) -> Tensor:
        """The images that tasks are about: float32 `[tasks, C, H, W]` in [0, 1].

        Args:
            indices: int64 `[tasks]`, as in `aux["index"]`.
        """
        return torch.from_numpy(self.images.take(indices.numpy())).float().div_(255)

    def _check_law(self) -> None:
        n_pixels, targets = len(self._grid), set()
        for drawn in extremes(self.law):
            n_context, n_target = drawn.pop("n_context"), drawn.pop("n_target")
            self._check_sizes(n_context, n_target)
            targets.add(n_target)
            if isinstance(self.law, Metabatch) and n_target == n_pixels and len(targets) > 1:
                self._check_sizes(n_context, n_pixels - 1)  # which is drawn as often
            if drawn:
                raise ValueError(
                    f"sizes: {type(self.law).__name__} draws {', '.join(drawn)}, which completing "
                    "images has no use for"
                )

    def _check_sizes(self, n_context: int, n_target: int) -> None:
        n_pixels = len(self._grid)
        if n_context > n_pixels or (n_context + n_target > n_pixels and n_target != n_pixels):
            _, height, width = self.images.shape
            raise ValueError(
                f"{n_context} context and {n_target} target points are more than the {n_pixels} "
                f"pixels of an image of {height} × {width} (only a target of all {n_pixels} may "
                "overlap the context): lower max_ctx_pts, max_tgt_pts or total_tgt_pts"
            )


def pixel_centres(height: int, width: int) -> Tensor:
    """The centres (row, column) of an image's pixels, row by row, as float32 `[pixels, 2]`.

    The image's edges are at −1 and 1, so that a coarser or finer image of the same scene has
    the same coordinates.
    """
    rows = (2 * torch.arange(height) + 1) / height - 1
    columns = (2 * torch.arange(width) + 1) / width - 1
    return torch.cartesian_prod(rows, columns)


def _random_pixels(tasks: int, n_pixels: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct pixels per task, in random order: int64 `[tasks, count]`.

    The pixels with the smallest of random keys. A key carries the number of its pixel in its
    lowest bits: no two are equal, so every machine sorts them alike, and sorting numbers is
    faster than sorting places.
    """
    keys = torch.empty(tasks, n_pixels, dtype=torch.int64).random_(generator=generator).numpy()
    bits = max(1, (n_pixels - 1).bit_length())
    keys >>= bits
    keys <<= bits
    keys |= np.arange(n_pixels)
    if count < n_pixels:
        keys.partition(count, axis=1)
    smallest = np.sort(keys[:, :count], axis=1)
    return torch.from_numpy(smallest & ((1 << bits) - 1))


def _at(intensities: Tensor, pixels: Tensor) -> Tensor:
    """`[tasks, points, C]` from `[tasks, pixels, C]` at `[tasks, points]`."""
    return intensities.gather(1, pixels[:, :, None].expand(-1, -1, intensities.shape[2]))
