"""Balance: how many tasks of each class a batch has, and which ones."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import accumulate
from numbers import Real
from typing import Any, Literal

import numpy as np
from torch import Tensor

from metabatch_cli.batching.arguments import choose_from
from metabatch_cli.batching.streams import StepStream, distinct

KINDS = ("fixed", "random")


@dataclass(frozen=True)
class Balance:
    """The shares of the classes in a batch: `w_c = alpha / C + (1 − alpha) · n_c / N`.

    C classes, n_c tasks in class c, N tasks in all.

    `kind="fixed"`: every batch has the same number of tasks of class c: `w_c · batch_size`,
    rounded by largest remainders (Hamilton's method), so that the batch is full. Where
    remainders are equal, chance decides in every batch anew. A class that would never get a
    place is an error.

    `kind="random"`: every place of a batch draws its class by itself, with probability w_c. A
    class all of whose tasks are in the batch already is left out of the further draws, so that
    no batch has a task twice; classes that are nearly used up in one batch come a little less
    often than w_c says.

    Args:
        alpha: 1 makes all classes equally likely, 0 leaves them as often as their tasks are.
        kind: `fixed` or `random`.

    Raises:
        ValueError: an `alpha` outside of [0, 1], a kind that does not exist.
    """

    alpha: float = 1.0
    kind: Literal["fixed", "random"] = "fixed"

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, Real) and not isinstance(self.alpha, bool)
        if not number or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"balance.alpha={self.alpha!r} must be a number of 0 (classes as often as their "
                "tasks are) … 1 (all classes equally often)"
            )
        if self.kind not in KINDS:
            raise ValueError(f"balance.kind={self.kind!r}: no such kind; "
                             f"{choose_from(self.kind, KINDS)}")  # fmt: skip
        object.__setattr__(self, "alpha", float(self.alpha))


def as_balance(balance: Balance | Mapping[str, Any] | None) -> Balance | None:
    """A `Balance` from what a person may write for it.

    Raises:
        ValueError: an unknown field.
        TypeError: neither a mapping nor a `Balance`.
    """
    if balance is None or isinstance(balance, Balance):
        return balance
    if not isinstance(balance, Mapping):
        raise TypeError(f"balance={balance!r} must be a mapping of alpha and kind, or a Balance")
    known = [field.name for field in fields(Balance)]
    for name in balance:
        if name not in known:
            raise ValueError(f"balance.{name}: there is no such field; "
                             f"{choose_from(name, known)}")  # fmt: skip
    return Balance(**balance)


class BalancedDraws:
    """The tasks of any step, drawn by class: a pure function of (seed, split, step).

    Every step draws for itself, without replacement inside the batch: over many steps all tasks
    of a class come equally often. The classes are mixed over the places of the batch, so that
    any part of it that a rank takes is a part of one balanced batch.

    Args:
        balance: the shares.
        classes: the class of each task, integers from 0 to C − 1, each of them used.
        n_tasks: tasks in the set, None for an infinite one.
        batch_size: tasks of a step.
        seed, split: choose the streams.

    Raises:
        ValueError: no classes; classes that are not one for each task, or have gaps; a batch
            that is too small for all classes, or asks for more tasks of a class than it has.
    """

    def __init__(
        self,
        balance: Balance,
        classes: Any,
        *,
        n_tasks: int | None,
        batch_size: int,
        seed: int,
        split: str,
    ) -> None:
        labels = _check_classes(classes, n_tasks)
        self.balance = balance
        self.batch_size = batch_size
        self._members = np.argsort(labels, kind="stable")
        self._sizes: list[int] = np.bincount(labels).tolist()
        self._starts = list(accumulate(self._sizes, initial=0))
        self._labels = hashlib.blake2b(labels.tobytes(), digest_size=16).hexdigest()

        # whole numbers all the way: shares are the same to the last task on every machine.
        # alpha is what was typed (0.1 is one tenth), not the nearest sum of powers of two
        alpha, total = Fraction(repr(balance.alpha)), len(labels)
        count, scale = len(self._sizes), alpha.denominator
        self._whole = count * total * scale  # the sum of all shares
        natural = (scale - alpha.numerator) * count
        self._shares = [alpha.numerator * total + natural * size for size in self._sizes]
        self._check_sizes()

        quotas = [divmod(batch_size * share, self._whole) for share in self._shares]
        self._surely, self._tied, self._left = self._round(quotas)
        self._check_places()
        self._upper = [edge * 2**64 // self._whole for edge in accumulate(self._shares)]

        self._words = StepStream(seed, split, "balance", width=4 * batch_size)

    @property
    def outline(self) -> str:
        """The balance and the classes in a few characters: others give others."""
        return f"{self.balance!r} of {self._labels}"

    def indices(self, step: int) -> np.ndarray:
        """The tasks of a step, int64 `[batch_size]`, none of them twice."""
        words = self._words.at(step)
        size = self.batch_size
        if self.balance.kind == "fixed":
            places = self._fixed_places(words[:size], words[2 * size : 2 * size + self._left])
        else:
            places = self._random_places(words[:size])
        drawn = distinct(words[size : 2 * size], places, self._starts, self._sizes)
        return self._members[drawn]

    def _round(self, quotas: list[tuple[int, int]]) -> tuple[list[int], list[int], int]:
        """The classes of the places that are always the same, and of how many tied ones more.

        Args:
            quotas: whole part and remainder of each class's share of a batch.
        """
        surely = [c for c, (below, _) in enumerate(quotas) for _ in range(below)]
        left = self.batch_size - len(surely)
        if not left:
            return surely, [], 0
        least = sorted((rest for _, rest in quotas), reverse=True)[left - 1]
        above = [c for c, (_, rest) in enumerate(quotas) if rest > least]
        tied = [c for c, (_, rest) in enumerate(quotas) if rest == least]
        return surely + above, tied, left - len(above)

    def _fixed_places(self, words: Sequence[int], more: Sequence[int]) -> list[int]:
        """The class of each place, `w_c · batch_size` of each class, up to rounding."""
        places = list(self._surely)
        if self._left:
            drawn = distinct(more, [0] * self._left, [0], [len(self._tied)])
            places += [self._tied[number] for number in drawn]
        for last in range(len(places) - 1, 0, -1):  # Fisher and Yates
            other = words[last] * (last + 1) >> 64
            places[last], places[other] = places[other], places[last]
        return places

    def _random_places(self, words: Sequence[int]) -> list[int]:
        """The class of each place, each drawn by itself among the classes not used up."""
        places, taken = [], [0] * len(self._sizes)
        for word in words:
            chosen = bisect_right(self._upper, word)
            if taken[chosen] == self._sizes[chosen]:
                chosen = self._among_the_rest(word, chosen, taken)
            taken[chosen] += 1
            places.append(chosen)
        return places

    def _among_the_rest(self, word: int, full: int, taken: list[int]) -> int:
        """Another class for a word that fell on one without tasks left."""
        # where it fell inside the share of that class is as random as the word itself
        low = self._upper[full - 1] if full else 0
        rest = [c for c, size in enumerate(self._sizes) if taken[c] < size]
        edges = list(accumulate(self._shares[c] for c in rest))
        return rest[bisect_right(edges, (word - low) * edges[-1] // (self._upper[full] - low))]

    def _check_places(self) -> None:
        seen = {*self._surely, *self._tied}
        never = [c for c in range(len(self._sizes)) if c not in seen]
        if never and self.balance.kind == "fixed":
            share = self.batch_size * self._shares[never[0]] / self._whole
            raise ValueError(
                f"batch_size={self.batch_size} with balance.alpha={self.balance.alpha:g} has no "
                f"place for {len(never)} of {len(self._sizes)} classes, the first of them class "
                f"{never[0]} with {share:.3g} tasks a batch: a larger batch_size, a larger "
                "balance.alpha, or balance.kind=random"
            )

    def _check_sizes(self) -> None:
        count, size, alpha = len(self._sizes), self.batch_size, self.balance.alpha
        if self.balance.kind == "fixed" and alpha == 1 and size < count:
            raise ValueError(
                f"batch_size={size} is smaller than the number of classes, {count}: "
                "balance.kind=fixed with balance.alpha=1 puts every class into every batch; "
                f"at least batch_size={count}, or balance.kind=random"
            )
        for number, (share, tasks) in enumerate(zip(self._shares, self._sizes, strict=True)):
            if size * share > tasks * self._whole:
                asked = size * share / self._whole
                most = min(
                    tasks * self._whole // share
                    for tasks, share in zip(self._sizes, self._shares, strict=True)
                )
                fixed = self.balance.kind == "fixed"
                times = f"up to {math.ceil(asked)}" if fixed else f"{asked:.3g} on average"
                raise ValueError(
                    f"batch_size={size} with balance.alpha={alpha:g} asks for {times} different "
                    f"tasks of class {number}, which has {tasks}: at most batch_size={most}, or "
                    "a smaller balance.alpha"
                )


def _check_classes(classes: Any, n_tasks: int | None) -> np.ndarray:
    if n_tasks is None:
        raise ValueError("balance needs a finite task set: this one has no end (n_tasks=None)")
    if classes is None:
        raise ValueError(
            "balance needs to know the class of each task: let the task set have `classes`, "
            f"int64 [{n_tasks}]"
        )
    labels = np.asarray(classes.cpu() if isinstance(classes, Tensor) else classes)
    if labels.shape != (n_tasks,):
        raise ValueError(
            f"classes of shape {list(labels.shape)} must be [{n_tasks}]: one for each task"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"classes of type {labels.dtype} must be integers from 0 on")
    if labels.min() < 0:
        raise ValueError(f"classes: {labels.min()} is negative; classes count from 0")
    labels = labels.astype(np.int64)
    used = np.unique(labels)
    if len(used) <= used[-1]:
        empty = int(np.flatnonzero(used != np.arange(len(used)))[0])
        raise ValueError(
            f"classes: class {empty} has no tasks, but {used[-1]} is the last one; number those "
            "that have tasks from 0 on (numpy.unique(…, return_inverse=True) does)"
        )
    return labels
