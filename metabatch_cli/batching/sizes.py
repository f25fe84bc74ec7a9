"""The laws of the sizes: how many context and target points the tasks of a batch have.

A law draws once per step, from its own stream, so that all tasks of a batch, all workers and
all ranks agree without a word between them. Every law checks its own bounds when it is made.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from metabatch_cli.batching.arguments import at_least, choose_from
from metabatch_cli.batching.streams import integer, unit

WORDS = 8  # random words of a step; a law may use all but the last, which a mixture needs

Range = int | Sequence[int]


@dataclass(frozen=True)
class SizeLaw:
    """What all laws have in common."""

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        """The sizes of one step from `WORDS` random 64-bit words.

        Returns:
            `n_context` and `n_target`, and whatever else the law has to tell the task set:
            the entries become keyword arguments of `__gettask__` and `__gettasks__`.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """The law in a few words, for the table that opens a training."""
        raise NotImplementedError

    @property
    def parts(self) -> Sequence[range | None] | None:
        """The indices that batches are drawn from, where one batch may not have any of them.

        The size `component` that the law draws says which of the parts it is; a part that is
        None has no end. None, for all laws that know nothing of components: any index.
        """
        return None


@dataclass(frozen=True)
class Metabatch(SizeLaw):
    """The law of the original MetaBatch 0.9.1.

    `n_context ~ U{min_pts … max_ctx_pts}`; `n_target` is `total_tgt_pts` with
    `predict_full_target`, `total_tgt_pts − n_context` with `eval` and
    `predict_full_target_during_eval`, else `~ U{n_context … max_tgt_pts}`, and 1 for 0 (in the
    original a task of no context may have no target either).
    """

    min_pts: int
    max_ctx_pts: int
    max_tgt_pts: int
    total_tgt_pts: int | None = None
    eval: bool = False
    predict_full_target: bool = False
    predict_full_target_during_eval: bool = False

    def __post_init__(self) -> None:
        _check_context(self)
        if self.max_ctx_pts >= self.max_tgt_pts:
            raise ValueError(
                f"max_tgt_pts={self.max_tgt_pts} must be larger than "
                f"max_ctx_pts={self.max_ctx_pts} (the law draws n_target from "
                "{n_context … max_tgt_pts})"
            )
        full = self.predict_full_target or self.predict_full_target_during_eval
        if full and self.total_tgt_pts is None:
            raise ValueError(
                "total_tgt_pts=None: predicting the full target needs the number of points "
                "that it has"
            )
        if full and self.total_tgt_pts is not None:
            at_least("total_tgt_pts", self.total_tgt_pts, 1)
        if self.predict_full_target_during_eval and self.total_tgt_pts is not None:
            at_least("total_tgt_pts", self.total_tgt_pts, self.max_ctx_pts + 1)

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        n_context = integer(words[0], self.min_pts, self.max_ctx_pts)
        if self.predict_full_target:
            n_target = self.total_tgt_pts
        elif self.eval and self.predict_full_target_during_eval:
            n_target = self.total_tgt_pts - n_context  # type: ignore[operator]
        else:
            n_target = max(1, integer(words[1], n_context, self.max_tgt_pts))
        return {"n_context": n_context, "n_target": n_target}  # type: ignore[dict-item]

    def describe(self) -> str:
        if self.predict_full_target:
            target = f"{self.total_tgt_pts}"
        elif self.eval and self.predict_full_target_during_eval:
            target = f"{self.total_tgt_pts} − n_context"
        else:
            least = "n_context" if self.min_pts else "n_context (or 1)"
            target = f"from {least} to {self.max_tgt_pts}"
        return f"context {self.min_pts} to {self.max_ctx_pts} points, target {target}"


@dataclass(frozen=True)
class Rest(SizeLaw):
    """`n_c ~ U{min_pts … max_ctx_pts}`, `n_t ~ U{min_tgt_pts … total_tgt_pts − n_c}`.

    The set-up of transformer neural processes (Nguyen & Grover 2022, arXiv:2207.04179).
    """

    min_pts: int
    max_ctx_pts: int
    total_tgt_pts: int
    min_tgt_pts: int | None = None

    def __post_init__(self) -> None:
        _check_context(self)
        if self.total_tgt_pts is None:
            raise ValueError("total_tgt_pts=None: the law 'rest' needs the total of points")
        least = self.min_pts if self.min_tgt_pts is None else self.min_tgt_pts
        object.__setattr__(self, "min_tgt_pts", least)
        at_least("min_tgt_pts", least, 1)
        at_least("total_tgt_pts", self.total_tgt_pts, self.max_ctx_pts + least)

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        n_context = self._draw_context(words[0])
        least, most = self.min_tgt_pts, self.total_tgt_pts - n_context
        n_target = integer(words[1], least, most)  # type: ignore[arg-type]
        return {"n_context": n_context, "n_target": n_target}

    def _draw_context(self, word: int) -> int:
        return integer(word, self.min_pts, self.max_ctx_pts)

    def describe(self) -> str:
        return (
            f"context {self.min_pts} to {self.max_ctx_pts} points, "
            f"target {self.min_tgt_pts} to {self.total_tgt_pts} − n_context"
        )


@dataclass(frozen=True)
class LogUniform(Rest):
    """As `rest`, but log-uniform in `n_c`: small contexts come as often as large ones."""

    def _draw_context(self, word: int) -> int:
        # offset by one half on both sides, so that every integer has its share, and zero too
        low, high = math.log(self.min_pts + 0.5), math.log(self.max_ctx_pts + 1.5)
        drawn = math.floor(math.exp(low + (high - low) * unit(word)) - 0.5)
        return min(max(drawn, self.min_pts), self.max_ctx_pts)

    def describe(self) -> str:
        return "log-uniform " + super().describe()


@dataclass(frozen=True)
class Fixed(SizeLaw):
    """Always `n_c = max_ctx_pts`, `n_t = max_tgt_pts` (MAML's sine waves: 10 and 10)."""

    max_ctx_pts: int
    max_tgt_pts: int

    def __post_init__(self) -> None:
        at_least("max_ctx_pts", self.max_ctx_pts, 0)
        at_least("max_tgt_pts", self.max_tgt_pts, 1)

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        return {"n_context": self.max_ctx_pts, "n_target": self.max_tgt_pts}

    def describe(self) -> str:
        return f"context {self.max_ctx_pts} points, target {self.max_tgt_pts}"


@dataclass(frozen=True)
class WayShot(SizeLaw):
    """Episodes: `ways × shots` in the context and `ways × queries` in the target.

    Each of the three is a number or a range `[low, high]`, drawn anew for every batch.
    """

    ways: Range
    shots: Range
    queries: Range

    def __post_init__(self) -> None:
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1)):
            value = getattr(self, name)
            bounds = tuple(value) if isinstance(value, Sequence) else (value, value)
            if len(bounds) != 2 or not all(isinstance(bound, int) for bound in bounds):
                raise ValueError(f"{name}={value!r} must be a number or a range [low, high]")
            at_least(name, bounds[0], least)
            if bounds[1] < bounds[0]:
                raise ValueError(f"{name}={list(bounds)}: a range begins with its smaller end")
            object.__setattr__(self, name, bounds)

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        names = ("ways", "shots", "queries")
        drawn = {n: integer(word, *getattr(self, n)) for n, word in zip(names, words, strict=False)}
        return {
            "n_context": drawn["ways"] * drawn["shots"],
            "n_target": drawn["ways"] * drawn["queries"],
            **drawn,
        }

    def describe(self) -> str:
        words = []
        for name in ("ways", "shots", "queries"):
            low, high = getattr(self, name)
            words.append(f"{low if low == high else f'{low}–{high}'} {name}")
        return ", ".join(words)


def extremes(law: SizeLaw) -> Iterator[dict[str, int]]:
    """What a law draws from the smallest and the largest random words, in every combination.

    These are its bounds, as laws draw more from more.
    """
    for words in itertools.product((0, 2**64 - 1), repeat=WORDS):
        yield dict(law.draw(words))


LAWS: dict[str, type[SizeLaw]] = {
    "metabatch": Metabatch,
    "rest": Rest,
    "fixed": Fixed,
    "way_shot": WayShot,
    "log_uniform": LogUniform,
}


def make_law(sizes: str | Mapping[str, Any] | SizeLaw, arguments: Mapping[str, Any]) -> SizeLaw:
    """The law that `sizes` names, its fields taken from `sizes` first, then from `arguments`.

    Args:
        sizes: a name of `LAWS`; a mapping of `law` and further fields, such as
            `{"law": "rest", "min_tgt_pts": 3}`; or a law of one's own, which is left as it is.
        arguments: what the task set knows about its sizes.

    Raises:
        ValueError: no law of that name, an unknown field, or sizes that contradict each other.
        TypeError: a law of one's own that is no dataclass.
    """
    if isinstance(sizes, SizeLaw):
        if "__dataclass_fields__" not in vars(type(sizes)):
            raise TypeError(
                f"{type(sizes).__name__} must be a dataclass: its fields are a part of what a "
                "resumed run is compared by"
            )
        return sizes
    fields = {"law": sizes} if isinstance(sizes, str) else dict(sizes)
    name = fields.pop("law", "metabatch")
    if name not in LAWS:
        raise ValueError(f"sizes={name!r}: no such law; {choose_from(name, LAWS)}")
    law = LAWS[name]
    known = [field.name for field in dataclasses.fields(law)]
    for field in fields:
        if field not in known:
            raise ValueError(f"sizes.{field}: the law {name!r} has no such field; "
                             f"{choose_from(field, known)}")  # fmt: skip
    fields = {key: arguments[key] for key in known if key in arguments} | fields
    required = [
        field.name for field in dataclasses.fields(law) if field.default is dataclasses.MISSING
    ]
    for key in required:
        if fields.get(key) is None:
            raise ValueError(f"{key} is missing: the law {name!r} needs it")
    for entry in dataclasses.fields(law):
        value = fields.get(entry.name)
        whole = entry.type in ("int", "int | None") and value is not None
        if whole and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{entry.name}={value!r} must be a whole number")
    return law(**fields)


def _check_context(law: Any) -> None:
    at_least("min_pts", law.min_pts, 0)
    if law.max_ctx_pts < law.min_pts:
        raise ValueError(
            f"max_ctx_pts={law.max_ctx_pts} is smaller than min_pts={law.min_pts}: "
            "a context has min_pts … max_ctx_pts points"
        )
