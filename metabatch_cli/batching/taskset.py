"""TaskSet: a distribution of tasks, indexable, whose sizes the loader decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.batching.sizes import SizeLaw, make_law
from metabatch_cli.batching.task import Task

Split = Literal["train", "val", "test"]
_KNOWN_TO_LAWS = (
    "min_pts",
    "max_ctx_pts",
    "max_tgt_pts",
    "total_tgt_pts",
    "eval",
    "predict_full_target",
    "predict_full_target_during_eval",
)
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class TaskSpec:
    """What a task set knows about the shapes and kinds of its tasks.

    Attributes:
        x_shape: the shape of one x, `(dim_x,)` or `(C, H, W)`.
        y_shape: the shape of one y, `(dim_y,)`; `()` for class labels.
        kind: what y is, which decides what figures show.
        ways: classes in a task (the most of them, if it varies); None for regression.
        image_shape: `(C, H, W)` of the image whose pixels a task completes, else None.
        units: of tasks in units of their own, what brings x and y to mean 0 and standard
            deviation 1: `x_mean`, `x_std`, `y_mean`, `y_std`, a number for each dimension,
            measured on the training tasks only, whatever the split. The tasks themselves are not
            normalised: this is for learners to do inside, with predictions and scores in the
            tasks' units. Empty where there is nothing to do.
        classes: how many classes the tasks of the split draw theirs from, where
            `aux["classes"]` of a task says which of them, from 0, each label stands for; else None.
    """

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    kind: Literal["regression", "image", "classification"] = "regression"
    ways: int | None = None
    image_shape: tuple[int, int, int] | None = None
    units: Mapping[str, Sequence[float]] = field(default_factory=dict)
    classes: int | None = None

    @property
    def dim_x(self) -> int:
        """Numbers in one x."""
        return math.prod(self.x_shape)

    @property
    def dim_y(self) -> int:
        """Numbers in one y; for class labels the number of classes."""
        return self.ways if self.ways is not None else math.prod(self.y_shape)


class TaskSet(Dataset):
    """A distribution of tasks: subclass it and implement `__len__` and one of two methods.

    `__gettask__(index, n_context, n_target)` returns one task: any tree of tensors, arrays and
    numbers. It may draw from the global generators of `random`, `numpy.random` and torch, which
    the loader seeds for every task.

    `__gettasks__(indices, n_context, n_target, generator)` returns a whole batch, tensors
    `[tasks, …]`, for `indices` int64 `[tasks]`. It draws from `generator` only. It is the fast
    way: one call a batch instead of one a task.

    An index names a task: the same index is the same function, class set or group every time,
    while its points are drawn anew. The law of the sizes is made once, here; bounds that are
    changed later count from the next `belong_to`. Further sizes that a law draws (ways, shots,
    queries) arrive as further keyword arguments. The first seven arguments are those of
    MetaBatch 0.9.1.

    Where tasks cannot share their sizes (a table with a group for each), the class says
    `ragged = True`.

    Attributes:
        classes: the class of each task where tasks have one, integers `[n_tasks]` from 0 to the
            number of classes − 1, as an array, a tensor or a list; else None. It is what
            `TaskLoader(…, balance=…)` balances.

    Args:
        min_pts: the fewest points in a context.
        max_ctx_pts: the most points in a context.
        max_tgt_pts: the most points in a target.
        total_tgt_pts: points that a task has in all, where the law of the sizes asks for it.
        eval: whether these are held-out tasks.
        predict_full_target: see the law `metabatch`.
        predict_full_target_during_eval: see the law `metabatch`.
        sizes: the law of the sizes: its name, its name and fields, or a `SizeLaw`.
        split: which tasks these are; `eval` follows from it where it is given.

    Raises:
        ValueError: sizes that contradict each other, a law or split that does not exist.
    """

    classes: Any = None

    note = ""
    """What else the table that opens a training should say of the set, such as what of the data
    was left out."""

    creates_anywhere = False
    """Whether `__gettasks__` computes on the device of its generator, whatever that is: what
    `TaskLoader(…, create_on="device")` needs."""

    ragged = False
    """Whether every task has sizes of its own; `n_context` and `n_target` are then the most that
    it should have. What `__gettask__` gives is padded to a batch, a `PaddedTask`; `__gettasks__`
    returns a `PaddedTask` itself."""

    def __init__(
        self,
        min_pts: int | None = None,
        max_ctx_pts: int | None = None,
        max_tgt_pts: int | None = None,
        total_tgt_pts: int | None = None,
        eval: bool = False,
        predict_full_target: bool = False,
        predict_full_target_during_eval: bool = False,
        *,
        sizes: str | Mapping[str, Any] | SizeLaw = "metabatch",
        split: Split | None = None,
    ) -> None:
        self.sizes = sizes
        self.min_pts = min_pts
        self.max_ctx_pts = max_ctx_pts
        self.max_tgt_pts = max_tgt_pts
        self.total_tgt_pts = total_tgt_pts
        self.predict_full_target = predict_full_target
        self.predict_full_target_during_eval = predict_full_target_during_eval
        self.belong_to(split or ("val" if eval else "train"))

    def belong_to(self, split: Split) -> None:
        """Be the tasks of a split: other random streams, and sizes as its law has them there.

        Sets `split`, `eval` and `law`. A set whose constructor knows nothing of splits is given
        its own by this.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: choose from {', '.join(SPLITS)}")
        self.split = split
        self.eval = split != "train"
        self.law = make_law(self.sizes, {name: getattr(self, name) for name in _KNOWN_TO_LAWS})

    def __len__(self) -> int:
        """How many tasks there are; a set for which this raises TypeError is infinite."""
        raise NotImplementedError(f"{type(self).__name__} must implement __len__")

    def __gettask__(self, index: int, n_context: int, n_target: int) -> Any:
        """One task; `[points, …]` in every field."""
        raise NotImplementedError

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Any:
        """A whole batch of tasks; `[tasks, points, …]` in every field."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        """Refuse to be read like a map-style dataset: a task has no size yet."""
        raise TypeError(
            f"{type(self).__name__} makes tasks of sizes that are drawn for a whole batch: read "
            "it through TaskLoader, not through indexing or torch's DataLoader"
        )

    @property
    def spec(self) -> TaskSpec | None:
        """Shapes and kinds of the tasks; None where the first task made has to tell."""
        return None

    def oracle(self, tasks: Task) -> dict[str, Tensor] | None:
        """The best possible score of each task, `[tasks]` by metric, where it is known.

        A set with `ragged = True` is given a `PaddedTask`.
        """
        return None

    def baselines(self, tasks: Tasks) -> dict[str, dict[str, Tensor]]:
        """What simple predictions score that any learner should beat: by name, then by metric.

        Each score is `[tasks]`, of the same meaning as the learners' metric of the same name.
        Evaluation asks for it on the very tasks that the learner is scored on.
        """
        return {}

    def truth(self, tasks: Task, x: Tensor) -> Tensor | None:
        """The noise-free y `[tasks, points, dim_y]` at x `[tasks, points, dim_x]`, if known."""
        return None

    def posterior(self, tasks: Task, x: Tensor, noisy: bool = True) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation `[tasks, points, dim_y]` of y at x, given the contexts, if known.

        It is the best possible prediction, which figures show beside the learner's.

        Args:
            x: `[tasks, points, dim_x]`.
            noisy: whether y is what is observed (as a learner predicts it) or the function.
        """
        return None


def makes_whole_batches(taskset: TaskSet) -> bool:
    """Whether a task set implements `__gettasks__` (preferred) rather than `__gettask__`.

    Raises:
        TypeError: it implements neither.
    """
    kind = type(taskset)
    if kind.__gettasks__ is not TaskSet.__gettasks__:
        return True
    if kind.__gettask__ is not TaskSet.__gettask__:
        return False
    raise TypeError(
        f"{kind.__name__} implements neither __gettasks__(indices, n_context, n_target, "
        "generator) nor __gettask__(index, n_context, n_target)"
    )


def n_tasks(taskset: TaskSet) -> int | None:
    """The length of a task set, None where it is infinite."""
    try:
        length = type(taskset).__len__(taskset)
    except TypeError:
        return None
    if not isinstance(length, Integral):  # what len() would say with a TypeError of its own
        raise TypeError(f"len({type(taskset).__name__})={length!r} is not a whole number")
    return int(length)
