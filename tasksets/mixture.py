"""Mixtures of task sets: every batch from one of them, or every task of a batch from one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from metabatch_cli.batching.arguments import choose_from
from metabatch_cli.batching.collate import stacked
from metabatch_cli.batching.sizes import WORDS, SizeLaw
from metabatch_cli.batching.streams import (
    Stream,
    borrowed_global_generators,
    seed_global_generators,
    uniforms,
)
from metabatch_cli.batching.task import Task, as_task, tree_map
from metabatch_cli.batching.taskset import (
    Split,
    TaskSet,
    TaskSpec,
    makes_whole_batches,
    n_tasks,
)

Weight = Annotated[float, Ge(0)]

_MOST_TASKS = 20_000_000  # whose components are kept in tables, ten bytes a task
_EXAMPLES = 256  # single tasks that are remembered for what their fields look like
_FIELDS = Task._fields[:4]


@dataclass(frozen=True)
class MixtureLaw(SizeLaw):
    """What the laws of both kinds of mixture know: all that tells one mixture from another.

    Attributes:
        names: of the components.
        kinds: their classes.
        weights: their shares, which sum to one.
        tasks: how many tasks each of them has, None for one without an end.
        laws: of the sizes of each.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    weights: tuple[Fraction, ...]
    tasks: tuple[int | None, ...]
    laws: tuple[SizeLaw, ...]


@dataclass(frozen=True)
class OneComponent(MixtureLaw):
    """Draws the component that a whole batch is of, then sizes from that component's own law."""

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        component = bisect_right(self._edges, words[0])
        return {**self.laws[component].draw(words[1:]), "component": component}

    def describe(self) -> str:
        described = zip(self.names, self.weights, self.laws, strict=True)
        return "; ".join(f"{name} ({weight}): {law.describe()}" for name, weight, law in described)

    @cached_property
    def parts(self) -> Sequence[range | None] | None:
        """Where a batch of each component finds its tasks."""
        if all(count is None for count in self.tasks):
            return None
        shares = zip(self.tasks, self.weights, strict=True)
        endless = any(count is None for count, weight in shares if weight)
        parts: list[range | None] = []
        start = 0
        for count, weight in zip(self.tasks, self.weights, strict=True):
            drawn = count is not None and weight > 0
            parts.append(range(start, start + (count or 0)) if drawn else None)
            start += 0 if endless else count or 0
        return parts

    @cached_property
    def _edges(self) -> list[int]:
        # whole numbers: every machine draws the same component
        return [edge.numerator * 2**64 // edge.denominator for edge in accumulate(self.weights)]


@dataclass(frozen=True)
class OneLaw(MixtureLaw):
    """Draws sizes from the law that all components have in common."""

    def draw(self, words: Sequence[int]) -> dict[str, int]:
        return self.laws[0].draw(words)

    def describe(self) -> str:
        shares = ", ".join(f"{n} ({w})" for n, w in zip(self.names, self.weights, strict=True))
        return f"{self.laws[0].describe()}, tasks of {shares}"


class Mixture(TaskSet):
    """Tasks of several task sets, its components, each as often as its weight says.

    `mixed="batch"`: every batch is of one component, chosen for each step together with its
    sizes, and so the same on all workers, ranks and shards. Each component keeps its own law of
    the sizes, unless the mixture has one of its own.

    `mixed="tasks"`: every task is of a component of its own, all of common sizes: from the
    mixture's own law or, without one, from the law that all components agree on.

    **Which task an index names.** The mixture is infinite where one of its components is.

    - `batch`, all finite: the tasks of the first component, then those of the second, and so on.
    - `batch`, one infinite: in a batch of a component, that component's task of the same index.
      The tasks of a finite component are drawn for each batch, in both cases, without
      repetition inside it; a finite mixture therefore needs `shuffle`.
    - `tasks`, all finite: there are as many indices as it takes for every component to show all
      of its tasks and to have its share of them, spread evenly. A component whose share is
      larger than it is repeats itself from its first task on (so that an epoch, and sometimes a
      batch, has one of its tasks twice). The `classes` of such a mixture are the components:
      `balance` makes the shares exact in every batch.
    - `tasks`, one infinite: a hash of the index decides on the component; in an infinite one it
      is the task of the same index, in a finite one the hash decides on the task too.

    `aux["component"]`, int64 `[tasks]`, says the component of each task, counted in the order of
    `tasksets`. Of the components' own `aux`, a batch of one component has all. A batch of mixed
    tasks has what all components have in the same shape and type under its name; anything else
    as `NAME.FIELD` of the component that it belongs to, with NaN (−1 for integers, False for
    truth values) for the other tasks.

    Args:
        tasksets: the components by name; no mixtures themselves.
        weights: how often each comes, by name or in the same order, in any unit; equal by
            default.
        mixed: `batch` or `tasks`.
        min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts, predict_full_target,
            predict_full_target_during_eval, sizes: one law for all components, as in `TaskSet`;
            where none of them is given, the components' own count.
        split: which tasks these are, handed to all components; by default theirs.
        eval: whether they are held out, where `split` is not given.

    Raises:
        ValueError: weights that do not fit the components, or are all zero; components of
            different splits, shapes, kinds or (for `tasks`) laws; the message names which.
        TypeError: a component that is no task set.
    """

    def __init__(
        self,
        tasksets: Mapping[str, TaskSet],
        weights: Mapping[str, Weight] | Sequence[Weight] | None = None,
        mixed: Literal["batch", "tasks"] = "batch",
        min_pts: int | None = None,
        max_ctx_pts: int | None = None,
        max_tgt_pts: int | None = None,
        total_tgt_pts: int | None = None,
        eval: bool = False,
        predict_full_target: bool = False,
        predict_full_target_during_eval: bool = False,
        *,
        sizes: str | Mapping[str, Any] | SizeLaw | None = None,
        split: Split | None = None,
    ) -> None:
        if mixed not in ("batch", "tasks"):
            raise ValueError(f"mixed={mixed!r}: {choose_from(mixed, ('batch', 'tasks'))}")
        _check_components(tasksets)
        self.tasksets = dict(tasksets)
        self.weights = _shares(weights, list(self.tasksets))
        self.mixed = mixed
        self._sets = list(self.tasksets.values())
        self._whole = [makes_whole_batches(taskset) for taskset in self._sets]
        self._counts = [n_tasks(taskset) for taskset in self._sets]
        self._drawn = [c for c, weight in enumerate(self.weights) if weight]
        self._spec = self._agreed_spec()
        own = (min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts, sizes)
        flags = predict_full_target or predict_full_target_during_eval
        given = flags or any(argument is not None for argument in own)
        self._own_sizes = (sizes or "metabatch") if given else None
        self._examples: dict[Any, Task] = {}
        self._alike = False
        self._endless = any(self._counts[c] is None for c in self._drawn)
        if mixed == "tasks" and not self._endless:
            self._component, self._inner = self._laid_out()
        super().__init__(
            min_pts,
            max_ctx_pts,
            max_tgt_pts,
            total_tgt_pts,
            eval,
            predict_full_target,
            predict_full_target_during_eval,
            sizes=sizes or "metabatch",
            split=split or ("val" if eval else self._common_split()),
        )

    def belong_to(self, split: Split) -> None:
        for name, taskset in self.tasksets.items():
            try:
                taskset.belong_to(split)
            except ValueError as error:
                raise ValueError(f"tasksets.{name}: {error}") from error
        laws = [taskset.law for taskset in self._sets]
        if self._own_sizes is not None:
            self.sizes = self._own_sizes
            super().belong_to(split)  # makes the law of these sizes
            laws = [self.law] * len(laws)
        elif self.mixed == "tasks":
            self._check_one_law(laws)
        kind = OneComponent if self.mixed == "batch" else OneLaw
        self.sizes = kind(
            tuple(self.tasksets),
            tuple(f"{type(t).__module__}.{type(t).__qualname__}" for t in self._sets),
            tuple(self.weights),
            tuple(self._counts),
            tuple(laws),
        )
        super().belong_to(split)

    def __len__(self) -> int:
        if self._endless:
            names = [list(self.tasksets)[c] for c in self._drawn if self._counts[c] is None]
            raise TypeError(f"a mixture has no length where a component is infinite: {names[0]}")
        if self.mixed == "tasks":
            return len(self._component)
        return sum(count or 0 for count in self._counts)

    @property
    def spec(self) -> TaskSpec | None:
        """What the components agree on; the most ways that one of them has."""
        return self._spec

    @property
    def classes(self) -> np.ndarray | None:
        """The component of each task of a finite mixture of tasks, int64 `[n_tasks]`."""
        if self.mixed == "batch" or self._endless:
            return None
        # one that is never drawn is no class
        return np.searchsorted(self._drawn, self._component)

    # --- creation ----------------------------------------------------------------------------

    def __gettasks__(
        self,
        indices: Tensor,
        n_context: int,
        n_target: int,
        generator: torch.Generator,
        component: int | None = None,
        **more: int,
    ) -> Task:
        self._check_alike()
        sizes = {"n_context": n_context, "n_target": n_target, **more}
        if component is None:
            return self._of_several(indices, sizes, generator)
        count, start = self._counts[component], 0
        if not self._endless:
            start = sum(count or 0 for count in self._counts[:component])
        inner = indices if count is None else (indices - start) % count
        tasks = self._create(component, inner, sizes, generator)
        number = torch.full((len(indices),), component)
        return tasks._replace(aux={**tasks.aux, "component": number})

    def _of_several(
        self, indices: Tensor, sizes: Mapping[str, int], generator: torch.Generator
    ) -> Task:
        component, inner = self._locate(indices)
        rows, parts = {}, {}
        for number in component.unique().tolist():
            rows[number] = (component == number).nonzero()[:, 0]
            parts[number] = self._create(number, inner[rows[number]], sizes, generator)
        joined = torch.cat(list(rows.values()))
        back = torch.empty_like(joined)
        back[joined] = torch.arange(len(joined))

        def merged(tensors: Sequence[Tensor]) -> Tensor:
            return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))[back]

        fields = [merged([getattr(part, name) for part in parts.values()]) for name in _FIELDS]
        aux = {"component": component}
        layouts = {
            number: (parts[number] if number in parts else self._example(number, sizes)).aux
            for number in self._drawn
        }
        for name in _common(list(layouts.values())):
            aux[name] = merged([part.aux[name] for part in parts.values()])
        for number, layout in layouts.items():
            for name in layout.keys() - aux.keys() - {"component"}:
                like = layout[name]
                field = like.new_full((len(indices), *like.shape[1:]), _nothing(like))
                if number in parts:
                    field[rows[number]] = parts[number].aux[name]
                aux[f"{self._name(number)}.{name}"] = field
        # sorted: whatever a batch holds, its fields have the same order
        return Task._make([*fields, {name: aux[name] for name in sorted(aux)}])

    def _locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The component of each index and its index inside of that, int64 `[tasks]`."""
        if not self._endless:
            places = indices.numpy()
            component = torch.from_numpy(self._component[places].astype(np.int64))
            return component, torch.from_numpy(self._inner[places])
        numbers = uniforms(indices, 2, self.split, "mixture")
        edges = torch.tensor(
            [float(edge) for edge in accumulate(self.weights)][:-1], dtype=torch.float64
        )
        component = torch.bucketize(numbers[:, 0].contiguous(), edges.double(), right=True)
        inner = indices.clone()
        for number in self._drawn:
            count = self._counts[number]
            if count is not None:
                mine = component == number
                inner[mine] = (numbers[mine, 1] * count).long()
        return component, inner

    def _laid_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Component and index inside of it, for every index of a finite mixture of tasks."""
        shares = [(c, self._counts[c] or 0, self.weights[c]) for c in self._drawn]
        total = max(-(-count // weight) for _, count, weight in shares)
        if total > _MOST_TASKS:
            raise ValueError(
                f"weights={[float(weight) for weight in self.weights]} make an epoch of {total:,} "
                f"tasks until every component has shown all of its own, more than "
                f"{_MOST_TASKS:,}: give larger components larger weights, or choose mixed=batch"
            )
        below = [int(weight * total) for _, _, weight in shares]
        rests = [
            weight * total - least for (_, _, weight), least in zip(shares, below, strict=True)
        ]
        for place in sorted(range(len(rests)), key=lambda p: -rests[p])[: total - sum(below)]:
            below[place] += 1
        component = np.repeat(np.array(self._drawn, dtype=np.int16), below)
        places = np.concatenate([(np.arange(length) + 0.5) / length for length in below])
        inner = np.concatenate(
            [np.arange(m) % n for m, (_, n, _) in zip(below, shares, strict=True)]
        )
        order = np.argsort(places, kind="stable")
        return component[order], inner[order]

    def _create(
        self,
        number: int,
        indices: Tensor,
        sizes: Mapping[str, int],
        generator: torch.Generator,
    ) -> Task:
        """Tasks of one component."""
        taskset, more = self._sets[number], dict(sizes)
        n_context, n_target = more.pop("n_context"), more.pop("n_target")
        if self._whole[number]:
            made = taskset.__gettasks__(indices, n_context, n_target, **more, generator=generator)
        else:
            words = torch.randint(2**62, (2,), generator=generator).tolist()
            stream = Stream(words[0] << 62 | words[1], "mixture")
            tasks = []
            with borrowed_global_generators():
                for position, index in enumerate(indices.tolist()):
                    seed_global_generators(stream, 0, position)
                    tasks.append(taskset.__gettask__(index, n_context, n_target, **more))
            made = stacked(tasks)
        try:
            task = as_task(made)
        except TypeError as error:
            raise TypeError(f"tasksets.{self._name(number)}: {error}") from error
        if not isinstance(task, Task):
            raise TypeError(
                f"tasksets.{self._name(number)} gave a {type(task).__name__}: tasks of sizes of "
                "their own cannot be mixed"
            )
        return task

    def _example(self, number: int, sizes: Mapping[str, int]) -> Task:
        """One task of a component: what its fields look like, for a batch that has none of it."""
        key = (number, *sorted(sizes.items()))
        if key not in self._examples:
            if len(self._examples) >= _EXAMPLES:
                self._examples.clear()
            generator = torch.Generator().manual_seed(0)
            made = self._create(number, torch.tensor([0]), sizes, generator)
            # not as it is: it may lie in the message of the batch at hand
            self._examples[key] = tree_map(Tensor.clone, made)
        return self._examples[key]

    # --- what is known -----------------------------------------------------------------------

    def truth(self, tasks: Task, x: Tensor) -> Tensor | None:
        """Each component's own; NaN for the tasks of a component that does not know it."""
        known = None
        for number, rows, mine in self._taken_apart(tasks):
            y = self._sets[number].truth(mine, x[rows])
            if y is not None:
                if known is None:
                    known = y.new_full((len(x), *y.shape[1:]), float("nan"))
                known[rows] = y
        return known

    def oracle(self, tasks: Task) -> dict[str, Tensor] | None:
        """The scores that all components know, each from its own."""
        names = self._known_scores
        if not names:
            return None
        scores: dict[str, Tensor] = {}
        for number, rows, mine in self._taken_apart(tasks):
            own = self._sets[number].oracle(mine) or {}
            for name in names:
                values = own[name]
                scores.setdefault(name, values.new_empty(len(tasks.context_x)))[rows] = values
        return scores

    @cached_property
    def _known_scores(self) -> list[str]:
        drawn = [self._sets[number] for number in self._drawn]
        if any(type(taskset).oracle is TaskSet.oracle for taskset in drawn):
            return []
        known = [set(self._sets[c].oracle(self._first(c)) or {}) for c in self._drawn]
        return sorted(set.intersection(*known))

    def _taken_apart(self, tasks: Task) -> list[tuple[int, Tensor, Task]]:
        """For each component in a batch: its number, the rows of its tasks, and these tasks."""
        component = tasks.aux["component"]
        apart = []
        for number in component.unique().tolist():
            rows = (component == number).nonzero()[:, 0]
            prefix = f"{self._name(number)}."
            aux = {
                name.removeprefix(prefix): field[rows]
                for name, field in tasks.aux.items()
                if name != "component"
            }
            mine = Task._make([*(getattr(tasks, name)[rows] for name in _FIELDS), aux])
            apart.append((number, rows, mine))
        return apart

    # --- agreement ---------------------------------------------------------------------------

    def _name(self, number: int) -> str:
        return list(self.tasksets)[number]

    def _first(self, number: int) -> Task:
        """A task of a component, of the smallest sizes that it may have."""
        law = self._sets[number].law if self._own_sizes is None else self.law.laws[0]  # type: ignore[attr-defined]
        return self._example(number, law.draw([0] * WORDS))

    def _common_split(self) -> Split:
        splits = {name: taskset.split for name, taskset in self.tasksets.items()}
        if len(set(splits.values())) > 1:
            listed = ", ".join(f"{name} is {split}" for name, split in splits.items())
            raise ValueError(f"tasksets of different splits ({listed}): say which, split=…")
        return next(iter(splits.values()))

    def _agreed_spec(self) -> TaskSpec | None:
        specs = {n: t.spec for n, t in self.tasksets.items() if t.spec is not None}
        if not specs:
            return None
        (first, spec), *others = specs.items()
        for name, other in others:
            for field in fields(TaskSpec):
                if field.name == "classes":
                    continue
                one, two = getattr(spec, field.name), getattr(other, field.name)
                several_ways = field.name == "ways" and None not in (one, two)
                if one != two and not several_ways:
                    raise ValueError(
                        f"tasksets.{first} and tasksets.{name} cannot be mixed: {field.name} is "
                        f"{one!r} in the one and {two!r} in the other"
                    )
        ways = [other.ways for other in specs.values() if other.ways is not None]
        # the same number may be another class in another component
        classes = None if others else spec.classes
        merged = {"ways": max(ways) if ways else None, "classes": classes}
        return TaskSpec(**{**vars(spec), **merged})

    def _check_one_law(self, laws: Sequence[SizeLaw]) -> None:
        for name, law in zip(self.tasksets, laws, strict=True):
            if law != laws[0]:
                one, other = laws[0].describe(), law.describe()
                if one == other:
                    one, other = repr(laws[0]), repr(law)
                raise ValueError(
                    f"mixed=tasks needs the same sizes in all components: {self._name(0)} has "
                    f"{one}; {name} has {other}; give the mixture sizes of its own (min_pts, "
                    "max_ctx_pts, max_tgt_pts, …)"
                )

    def _check_alike(self) -> None:
        """Raise TypeError, once, where the tasks of two components cannot be used alike."""
        if self._alike:
            return
        first, *others = self._drawn
        for number in others:
            for name in _FIELDS:
                one, two = (getattr(self._first(c), name) for c in (first, number))
                if one.dtype != two.dtype or one.shape[2:] != two.shape[2:]:
                    raise TypeError(
                        f"tasksets.{self._name(first)} and tasksets.{self._name(number)} cannot "
                        f"be mixed: {name} is {one.dtype} {list(one.shape[2:])} a point in the "
                        f"one and {two.dtype} {list(two.shape[2:])} in the other"
                    )
        self._alike = True


def _check_components(tasksets: Mapping[str, TaskSet]) -> None:
    if not isinstance(tasksets, Mapping) or not tasksets:
        raise ValueError(f"tasksets={tasksets!r} must be a mapping of names to task sets")
    for name, taskset in tasksets.items():
        if not isinstance(taskset, TaskSet):
            raise TypeError(f"tasksets.{name} is a {type(taskset).__name__}, not a TaskSet")
        if isinstance(taskset, Mixture):
            raise TypeError(f"tasksets.{name} is a mixture itself: name its components here")
        if taskset.ragged:
            raise TypeError(
                f"tasksets.{name} is ragged: tasks of sizes of their own cannot be mixed"
            )
        if "." in str(name):
            raise ValueError(f"tasksets.{name}: a name has no dot")


def _shares(
    weights: Mapping[str, float] | Sequence[float] | None, names: list[str]
) -> list[Fraction]:
    """The weights as shares that sum to one, in the order of the components."""
    if weights is None:
        return [Fraction(1, len(names))] * len(names)
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise ValueError(
                    f"weights.{name}: there is no such component; {choose_from(name, names)}"
                )
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"weights={dict(weights)!r} has none for {', '.join(missing)}")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(
            f"weights={list(weights)!r} are {len(weights)} for {len(names)} components: "
            f"{', '.join(names)}"
        )
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights.{name}={weight!r} must be a number, at least 0")
    exact = [Fraction(repr(float(weight))) for weight in weights]  # 0.1 is one tenth
    total = sum(exact)
    if not total:
        raise ValueError(f"weights={list(weights)!r}: one of them must be more than 0")
    return [weight / total for weight in exact]


def _common(layouts: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The fields that all have in the same shape and type, in a fixed order."""
    first, *others = layouts
    return sorted(
        name
        for name, like in first.items()
        if name != "component"
        and all(
            name in other
            and other[name].dtype == like.dtype
            and other[name].shape[1:] == like.shape[1:]
            for other in others
        )
    )


def _nothing(like: Tensor) -> float:
    """What stands where a component has no such field."""
    if like.is_floating_point():
        return float("nan")
    return False if like.dtype == torch.bool else -1 if like.dtype.is_signed else 0
