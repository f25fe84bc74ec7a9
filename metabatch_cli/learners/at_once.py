"""All tasks of a batch at once, or one after the other: whichever is right, then the faster one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

InnerLoop = Literal["auto", "vmap", "loop"]
"""`vmap`: all tasks at once, each with weights of its own; `loop`: one after the other."""


def for_each_task(at_once: bool, solve: Callable[..., Any], *trees: Any) -> Any:
    """What `solve` makes of each task, stacked.

    Args:
        at_once: whether by `vmap`, else in a loop.
        solve: from trees of one task's tensors to a tree of tensors.
        trees: of tensors `[tasks, …]`.
    """
    if at_once:
        return vmap(solve, randomness="different")(*trees)
    solved = [tree_flatten(solve(*task)) for task in each_task(*trees)]
    stacked = [
        torch.stack(leaves) for leaves in zip(*(leaves for leaves, _ in solved), strict=True)
    ]
    return solved[0][1].unflatten(stacked)


def each_task(*trees: Any) -> list[tuple[Any, ...]]:
    """The trees of every task, from trees of tensors `[tasks, …]`."""
    count = len(tree_flatten(trees)[0][0])
    return [tree_map(lambda leaf, index=index: leaf[index], trees) for index in range(count)]


def why_not_at_once(compute: Callable[[], Tensor]) -> str | None:
    """Why tasks should not go through a computation at once, each with weights of its own.

    Judged by what is computed, not by the network's name: normalisation by torch's layers with
    weights has wrong second derivatives under `vmap`, without a word (torch 2.13); convolutions by
    torch's layers become grouped ones, which on CPUs are several times slower than a loop.

    Returns:
        None if there is no reason.
    """
    with _Operators() as operators, torch.no_grad():
        device = compute().device.type
    if operators.norms:
        return f"under vmap the derivatives of its {operators.norms[0]} are wrong"
    if operators.convolutions and device == "cpu":
        return "convolutions by torch's own layers are slower at once"
    return None


def treats_points_apart(model: nn.Module, x: Tensor) -> bool:
    """Whether a point's output depends on no other point, so that padding cannot matter.

    Torch's generators stay as they were, also if the network draws: a training that was resumed
    may ask at another step.

    Args:
        x: `[tasks, points, …]`, for its shape and type.
    """
    if not x.is_floating_point():
        return False  # nothing to differentiate by: one after the other is always right
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, *x.shape[2:], generator=generator).to(x).requires_grad_()
    drawn_from = [x.device] if x.is_cuda else []  # beside the CPU's generator
    with torch.random.fork_rng(drawn_from), torch.enable_grad():
        first = model(points)[0].flatten()
        # weighted, since a plain sum may be constant (of probabilities it is 1)
        weighted = first @ torch.arange(1, len(first) + 1).to(first)
        (gradient,) = torch.autograd.grad(weighted, points, allow_unused=True)
    return gradient is None or not gradient[1:].any()


class _Operators(TorchDispatchMode):
    """Notes what is computed that matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[str] = []
        self.convolutions = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        if "norm" in name and isinstance(given.get("weight"), Tensor):
            self.norms.append(name)
        self.convolutions |= "conv" in name
        return func(*args, **(kwargs or {}))
