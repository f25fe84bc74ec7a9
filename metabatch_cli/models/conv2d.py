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

    def forward(self, x: Tensor) -> Tensor:
        """`x [points, C, H, W]` → `[points, C_out, H_out, W_out]`."""
        if not _each_its_own.get():
            return super().forward(x)
        return by_patches(x, self.weight, self.bias, self.stride[0], int(self.padding[0]))


def by_patches(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """A convolution as patches times weights.

    Args:
        x: `[points, C, H, W]`; best in memory with channels last, as is what comes out.
        weight: `[C_out, C, k, k]`.
        bias: `[C_out]`.

    Returns:
        `[points, C_out, H_out, W_out]`.
    """
    side = weight.shape[-1]
    rows = F.pad(x.movedim(1, -1), (0, 0, padding, padding, padding, padding))
    height, width = ((size - side) // stride + 1 for size in rows.shape[1:3])
    patches = Patches.apply(rows, side, stride, height, width)
    kernel = weight.movedim(1, -1).flatten(1)  # [C_out, k·k·C]
    out = F.linear(patches, kernel, bias)
    return out.unflatten(0, (-1, height, width)).movedim(-1, 1)


class Patches(torch.autograd.Function):
    """`[points, H, W, C]` → `[points · height · width, side² · C]`: all patches, side by side."""

    @staticmethod
    def forward(x: Tensor, side: int, stride: int, height: int, width: int) -> Tensor:
        return _patches(x, side, stride, height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.how = inputs
        ctx.shape = tuple(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Overlaid.apply(gradient, ctx.shape, *ctx.how), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *how: int) -> Any:
        if in_dims[0] is None:
            return Patches.apply(x, *how), None
        tasks = x.movedim(in_dims[0], 0)
        out = Patches.apply(tasks.flatten(0, 1), *how)
        return out.unflatten(0, (len(tasks), -1)), 0


class Overlaid(torch.autograd.Function):
    """The transpose of `Patches`: patches are added up where they came from."""

    @staticmethod
    def forward(
        patches: Tensor, shape: tuple[int, ...], side: int, stride: int, height: int, width: int
    ) -> Tensor:
        return _overlaid(patches, shape, side, stride, height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Patches.apply(gradient, *ctx.how), None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], patches: Tensor, shape: Any, *how: int
    ) -> Any:
        if in_dims[0] is None:
            return Overlaid.apply(patches, shape, *how), None
        tasks = patches.movedim(in_dims[0], 0)
        shape = (len(tasks) * shape[0], *shape[1:])
        out = Overlaid.apply(tasks.flatten(0, 1), shape, *how)
        return out.unflatten(0, (len(tasks), -1)), 0


def _patches(x: Tensor, side: int, stride: int, height: int, width: int) -> Tensor:
    # a view in which patches overlap, then one copy, channels in a row
    points, rows, columns, channels = x.stride()
    view = x.as_strided(
        (len(x), height, width, side, side, x.shape[-1]),
        (points, stride * rows, stride * columns, rows, columns, channels),
        x.storage_offset(),
    )
    return view.reshape(len(x) * height * width, -1)


def _overlaid(
    patches: Tensor, shape: tuple[int, ...], side: int, stride: int, height: int, width: int
) -> Tensor:
    parts = patches.reshape(shape[0], height, width, side, side, shape[-1])
    x = patches.new_zeros(shape)
    for i in range(side):
        for j in range(side):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            x[:, rows, columns] += parts[:, :, :, i, j]
    return x
