"""A convolution whose weights may differ from task to task: products of matrices, not groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_each_its_own: ContextVar[bool] = ContextVar("each_its_own", default=False)


@contextmanager
def weights_of_each_task(given: bool = True) -> Iterator[None]:
    """Meanwhile, every `Conv2d` computes as is best where each task has weights of its own."""
    token = _each_its_own.set(given)
    try:
        yield
    finally:
        _each_its_own.reset(token)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` for adaptation at once: under `vmap` with weights of each task it is a product
    of matrices for all tasks together.

    What torch makes of it there is a convolution in groups, one a task, and of its second
    derivatives convolutions with kernels as large as images; both are several times slower on a
    CPU than patches, copied side by side, times weights, whose derivatives of any order are
    copies and products again.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[points, C, H, W]` → `[points, C_out, H_out, W_out]`, by the weights given."""
        plain = self.groups == 1 and self.padding_mode == "zeros" and set(self.dilation) == {1}
        if not (_each_its_own.get() and plain and not isinstance(self.padding, str)):
            return super()._conv_forward(input, weight, bias)
        return by_patches(input, weight, bias, self.stride, self.padding)


def by_patches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
) -> Tensor:
    """A convolution as patches times weights.

    Args:
        x: `[points, C, H, W]`; best in memory with channels last, as is what comes out.
        weight: `[C_out, C, k, l]`.
        bias: `[C_out]`.
        stride, padding: down and across, or one number for both.

    Returns:
        `[points, C_out, H_out, W_out]`.
    """
    if torch.is_autocast_enabled(x.device.type):  # before it is copied nine times
        x = x.to(torch.get_autocast_dtype(x.device.type))
    down, across = (padding, padding) if isinstance(padding, int) else padding
    steps = (stride, stride) if isinstance(stride, int) else tuple(stride)
    rows = F.pad(x.movedim(1, -1), (0, 0, across, across, down, down))
    window = Window(tuple(weight.shape[2:]), steps, rows.shape[1:3])
    kernel = weight.movedim(1, -1).flatten(1)  # [C_out, k·l·C]
    out = F.linear(Patches.apply(rows, window), kernel, bias)
    return out.unflatten(0, (-1, *window.places)).movedim(-1, 1)


class Window:
    """What moves over an image of `size`: its own size, its steps, and how many places it has."""

    def __init__(
        self, size: tuple[int, ...], steps: tuple[int, ...], image: tuple[int, ...]
    ) -> None:
        self.size = size
        self.steps = steps
        self.places = [
            (whole - part) // step + 1 for whole, part, step in zip(image, size, steps, strict=True)
        ]

    def ranges(self) -> Iterator[tuple[int, int, slice, slice]]:
        """For each of its pixels, where in the image that one is at all places."""
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                down, across = (
                    slice(start, start + step * (count - 1) + 1, step)
                    for start, step, count in zip((i, j), self.steps, self.places, strict=True)
                )
                yield i, j, down, across


class Patches(torch.autograd.Function):
    """`[points, H, W, C]` → `[points · places, pixels of a window · C]`: patches side by side."""

    @staticmethod
    def forward(x: Tensor, window: Window) -> Tensor:
        # a view in which patches overlap, then one copy, channels in a row
        points, down, across, channels = x.stride()
        view = x.as_strided(
            (len(x), *window.places, *window.size, x.shape[-1]),
            (points, window.steps[0] * down, window.steps[1] * across, down, across, channels),
            x.storage_offset(),
        )
        return view.reshape(len(x) * window.places[0] * window.places[1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.window = inputs
        ctx.shape = tuple(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Overlaid.apply(gradient, ctx.window, ctx.shape), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, window: Window) -> Any:
        tasks = x.movedim(in_dims[0], 0)  # type: ignore[arg-type]
        patches = Patches.apply(tasks.flatten(0, 1), window)
        return patches.unflatten(0, (len(tasks), -1)), 0


class Overlaid(torch.autograd.Function):
    """The transpose of `Patches`: patches are added up where they came from, `shape` in all."""

    @staticmethod
    def forward(patches: Tensor, window: Window, shape: tuple[int, ...]) -> Tensor:
        parts = patches.reshape(shape[0], *window.places, *window.size, shape[-1])
        x = patches.new_zeros(shape)
        for i, j, down, across in window.ranges():
            x[:, down, across] += parts[:, :, :, i, j]
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.window, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Patches.apply(gradient, ctx.window), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], patches: Tensor, window: Window, shape: Any
    ) -> Any:
        tasks = patches.movedim(in_dims[0], 0)  # type: ignore[arg-type]
        x = Overlaid.apply(tasks.flatten(0, 1), window, (len(tasks) * shape[0], *shape[1:]))
        return x.unflatten(0, (len(tasks), -1)), 0
