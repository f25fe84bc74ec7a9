"""Strict mode: makes batches again in another order, to catch what seeds do not reach."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.loader import TaskLoader
from metabatch_cli.batching.preflight import attributes
from metabatch_cli.batching.streams import borrowed_global_generators
from metabatch_cli.batching.task import digest, tree_paths
from metabatch_cli.batching.taskset import TaskSet

_STEPS = (0, 1, 2, 3, 1000)
_LARGE = 100_000  # numbers in an array beyond which nobody looks whether it changes


class NotReproducible(ValueError):
    """Batches depend on something else than seed and step; says on what, as far as it shows."""


def check_strictly(
    loader: TaskLoader, again: TaskSet | None = None, steps: Sequence[int] = _STEPS
) -> None:
    """Make some batches forwards, and again backwards by a second, unused task set.

    A task set passes if its batches follow from seed and step alone, so that workers, resumes
    and ranks cannot change them, and if it leaves the caller's generators alone.

    Args:
        loader: whose batches; nothing of it changes.
        again: the same task set constructed once more, as a worker or a resumed run would have
            it; None for a copy of the loader's, which cannot show what its constructor draws.
        steps: which ones.

    Raises:
        NotReproducible: the first difference by step, field and task, and its cause: a global
            generator, a generator that the task set owns, an attribute that changes.
    """
    name = type(loader.dataset).__name__
    with borrowed_global_generators():
        other = BatchMaker(
            deepcopy(loader.dataset) if again is None else again,
            loader.seed,
            loader.dataset.split,
            loader.collate_fn,
            loader.created_on,
        )
        before = _outline(loader.dataset)
        expected: dict[int, Any] = {}
        moved = _moved_by(lambda: expected.update((step, loader.batch_at(step)) for step in steps))
        cause = _changes(before, _outline(loader.dataset))
        if moved:
            cause = f"it draws from the global generator of {moved}"
        for step in reversed(steps):
            place = _difference(expected[step], other(loader.plan.spec(step)))
            if place is not None:
                raise NotReproducible(
                    f"{name} is not reproducible: {place} of step {step}, made twice, differs; "
                    f"{cause or 'it has a state or a generator that no seed reaches'}\n"
                    f"  batch: {loader.plan.spec(step)}\n"
                    f"  {_advice(loader)}"
                )
    if moved:
        raise NotReproducible(
            f"{name} draws from the global generator of {moved}, which belongs to the program "
            f"around it\n  {_advice(loader)}"
        )


def _advice(loader: TaskLoader) -> str:
    if loader.makes_whole_batches:
        return "draw from the generator that __gettasks__ is given, and from nothing else"
    return (
        "in __gettask__ draw from random, numpy.random or torch's global functions: the loader "
        "seeds all three for every task"
    )


def _difference(expected: Any, found: Any) -> str | None:
    """Where two batches differ, by field and task; None where they do not."""
    if digest(expected) == digest(found):
        return None
    one, two = dict(tree_paths(expected)), dict(tree_paths(found))
    for path, leaf in one.items():
        other = two.get(path)
        if digest(leaf) == digest(other):
            continue
        if not isinstance(leaf, Tensor) or not isinstance(other, Tensor) or not leaf.ndim:
            return path
        if leaf.shape != other.shape:
            return f"{path}, once {list(leaf.shape)} and once {list(other.shape)},"
        for task, (left, right) in enumerate(zip(leaf, other, strict=True)):
            if digest(left) != digest(right):
                return f"{path} of task {task}"
    return "its structure"


# --- causes ------------------------------------------------------------------------------------


def _moved_by(action: Callable[[], object]) -> str | None:
    """The name of a global generator that an action draws from."""
    before = _global_states()
    action()
    after = _global_states()
    return next((name for name in before if before[name] != after[name]), None)


def _global_states() -> dict[str, str]:
    state: Any = np.random.get_state(legacy=False)
    return {
        "random": repr(random.getstate()),
        "numpy.random": _text_of(state),
        "torch": digest(torch.default_generator.get_state()),
    }


def _outline(taskset: Any) -> dict[str, tuple[str, str]]:
    """What each attribute is and holds, as far as that is quickly seen."""
    named = attributes(taskset, type(taskset).__name__)
    return {name: (_kind(value), _text_of(value)) for name, value in named}


def _changes(before: dict[str, tuple[str, str]], after: dict[str, tuple[str, str]]) -> str | None:
    """The attribute that changed; a generator rather than a cache that may be innocent."""
    changed = [name for name in after if after[name] != before.get(name)]
    changed.sort(key=lambda name: not after[name][0].endswith(("Generator", "Random", "State")))
    return (
        f"{changed[0]}, {after[changed[0]][0]}, changes while tasks are made" if changed else None
    )


def _kind(value: Any) -> str:
    module = type(value).__module__.partition(".")[0]
    kind = type(value).__qualname__
    return f"a {kind}" if module == "builtins" else f"a {module}.{kind}"


def _text_of(value: Any) -> str:
    if isinstance(value, np.random.Generator):
        return _text_of(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return _text_of(value.get_state(legacy=False))
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, torch.Generator):
        return digest(value.get_state())
    if isinstance(value, (Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, Tensor) else value.size
        return digest(value) if size <= _LARGE else f"{value.shape}"
    if isinstance(value, dict):
        return repr([(key, _text_of(held)) for key, held in list(value.items())[:1000]])
    if isinstance(value, (list, tuple)):
        return repr([len(value), *map(_text_of, value[:1000])])
    if isinstance(value, (int, float, str, bytes, bool, type(None), set, frozenset)):
        return repr(value)
    return ""
