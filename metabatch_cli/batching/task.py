"""A task, and a batch of tasks of a common shape: the same five fields."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from metabatch_cli.batching.ragged import Tasks


class Task(NamedTuple):
    """A context set to learn from and a target set to be judged on.

    One task has `[points, …]` in every field, a batch of tasks `[tasks, points, …]`.

    Regression: `x [points, dim_x]` and `y [points, dim_y]`, float. Image completion:
    `x ∈ [−1, 1]²`, `y [points, channels]`. Few-shot classification: `x [points, C, H, W]`
    uint8, `y [points]` int64.

    Attributes:
        aux: what else is known about each task, as tensors `[…]` or `[tasks, …]`: true
            hyper-parameters, class indices. No learner sees it.
    """

    context_x: Tensor
    context_y: Tensor
    target_x: Tensor
    target_y: Tensor
    aux: dict[str, Tensor] = {}  # noqa: RUF012 (nobody writes into a default)

    # what a PaddedTask has in these places, so that whoever asks need not tell them apart

    @property
    def context_mask(self) -> None:
        """None: all context points are real."""

    @property
    def target_mask(self) -> None:
        """None: all target points are real."""

    @property
    def masks(self) -> dict[str, Tensor]:
        """Nothing: there is no padding."""
        return {}


POINTS = Task._fields[:4]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree of tuples, lists and mappings with `function` applied to every leaf."""
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(function, value) for value in tree)
    return function(tree)


def contiguous(tree: Any) -> Any:
    """The tree with every tensor laid out without gaps, as it arrives from a worker.

    Sums over other strides may round in another order: a batch that is made here must not differ
    in them from one that has travelled.
    """
    if type(tree) is Task:  # the hot path: most are as they should be
        try:
            context_x, context_y, target_x, target_y, aux = tree
            if (
                context_x.is_contiguous()
                and context_y.is_contiguous()
                and target_x.is_contiguous()
                and target_y.is_contiguous()
                and all(map(Tensor.is_contiguous, aux.values()))
            ):
                return tree
        except (AttributeError, TypeError):  # not all of it are tensors
            pass
    if _lies_without_gaps(tree):
        return tree
    return tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, tree)


def _lies_without_gaps(tree: Any) -> bool:
    kind = type(tree)
    if kind is Tensor:
        return tree.is_contiguous()
    if isinstance(tree, Mapping):
        return all(map(_lies_without_gaps, tree.values()))
    if isinstance(tree, (tuple, list)):
        return all(map(_lies_without_gaps, tree))
    return True


def tree_paths(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree with its place, such as `aux.parameters` or `[0]`."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tree_paths(value, f"{path}.{key}" if path else f"{key}")
    elif isinstance(tree, (tuple, list)):
        for number, value in enumerate(tree):
            yield from tree_paths(value, f"{path}[{number}]")
    else:
        yield path, tree


def to_device(tree: Any, device: torch.device | str) -> Any:
    """The tree with its tensors on `device`; pinned memory is copied asynchronously."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf

    return tree_map(move, tree)


def pin(tree: Any) -> Any:
    """The tree with its CPU tensors in page-locked memory; what is there already stays."""

    def move(leaf: Any) -> Any:
        return leaf.pin_memory() if isinstance(leaf, Tensor) and not leaf.is_cuda else leaf

    return tree_map(move, tree)


def slice_tasks(tree: Any, start: int, stop: int) -> Any:
    """Tasks `start … stop − 1` of a batch."""
    return tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, tree)


def concatenate(batches: list[Any]) -> Any:
    """Batches of the same structure joined along the tasks; padded ones to the longest."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if hasattr(first, "join_padded"):
        return first.join_padded(batches)
    if isinstance(first, Mapping):
        return {key: concatenate([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(concatenate(list(parts)) for parts in zip(*batches, strict=True)))
    if isinstance(first, (tuple, list)):
        return type(first)(concatenate(list(parts)) for parts in zip(*batches, strict=True))
    if isinstance(first, Tensor):
        return torch.cat(batches)
    raise TypeError(
        f"a batch made whole must be of tensors [tasks, …], not {type(first).__name__}: "
        "with shards > 1 its parts have to be joined"
    )


def as_task(batch: Any) -> Tasks:
    """Any batch that has the four fields, by name or by position, as a `Task`.

    One that also has the two masks, by name, is a `PaddedTask`.

    Raises:
        TypeError: the batch has other fields.
    """
    if isinstance(batch, Task):
        return batch
    from metabatch_cli.batching.ragged import PackedTask, PaddedTask  # which is made of ours

    if isinstance(batch, PaddedTask):
        return batch
    if isinstance(batch, PackedTask):
        raise TypeError("a PackedTask has no dimension of tasks: make it a batch with .padded()")
    names = Task._fields
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, Mapping) and {"context_mask", "target_mask"} & set(batch):
        missing = [name for name in PaddedTask._fields[:-1] if name not in batch]
        if missing:
            raise TypeError(
                f"a padded batch needs both masks and the four fields; this one is "
                f"{_outline(batch)}, without {', '.join(missing)}"
            )
        return PaddedTask(**{name: batch[name] for name in PaddedTask._fields if name in batch})
    if isinstance(batch, Mapping) and set(names[:4]) <= set(batch):
        return Task(**{name: batch[name] for name in names if name in batch})
    if isinstance(batch, (tuple, list)) and len(batch) in (4, 5):
        return Task(*batch)
    raise TypeError(
        f"a task must have the fields {', '.join(names[:4])} (and optionally aux), as a Task, a "
        f"mapping or a tuple in this order; this one is {_outline(batch)}"
    )


def _outline(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} with {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {kind} of {len(batch)}"
    return f"a {kind}"


def digest(*batches: Any) -> str:
    """SHA-256 over the bytes, types and shapes of all tensors, in order."""
    sha = hashlib.sha256()

    def add(leaf: Any) -> None:
        if isinstance(leaf, np.ndarray) and leaf.dtype != object:
            sha.update(f"{leaf.dtype}{leaf.shape}".encode())
            sha.update(leaf.tobytes())
        elif isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
            sha.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            # not flatten: a single number may keep a stride that no other type can view
            sha.update(leaf.as_strided((leaf.numel(),), (1,)).view(torch.uint8).numpy())
        else:
            sha.update(repr(leaf).encode())

    tree_map(add, list(batches))
    return sha.hexdigest()
