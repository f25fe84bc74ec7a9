"""Covariance functions of Gaussian processes, a whole batch of tasks at a time.

A kernel is called with points and hyper-parameters, so that every task has its own; the same
object serves all of them. Hyper-parameters are named as in Rasmussen & Williams (2006,
*Gaussian Processes for Machine Learning*), chapter 4: `amplitude` is the standard deviation of
the function, `lengthscale` and `period` are in units of x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Range = float | tuple[float, float] | dict[str, Any]
"""A number; `[low, high]`, uniform; or `{low: …, high: …, scale: log}`, log-uniform."""


class Kernel:
    """A covariance function whose hyper-parameters are drawn for each task.

    A subclass passes its hyper-parameters' ranges by name and implements `__call__`.

    Attributes:
        names: of the hyper-parameters, in the order of their columns.

    Raises:
        ValueError: a range that is not `[low, high]` with `0 < low ≤ high`.
    """

    names: tuple[str, ...]

    def __init__(self, **ranges: Range | Sequence[float]) -> None:
        self.names = tuple(ranges)
        bounds = [_as_range(name, value) for name, value in ranges.items()]
        self._low = torch.tensor([low for low, _, _ in bounds])
        self._width = torch.tensor([high - low for low, high, _ in bounds])
        self._logs = [column for column, (_, _, is_log) in enumerate(bounds) if is_log]

    def parameters(self, uniform: Tensor) -> Tensor:
        """Hyper-parameters, float32 `[tasks, k]`, from numbers of [0, 1) of the same shape."""
        low, width = (bound.to(uniform.device) for bound in (self._low, self._width))
        values = low + width * uniform.to(low.dtype)
        for column in self._logs:
            values[:, column].exp_()
        return values

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        """The covariances of the functions' values at x1 with those at x2.

        Args:
            x1: `[tasks, n, dim_x]`.
            x2: `[tasks, m, dim_x]`, of the same type.
            parameters: `[tasks, k]`, in the order of `names`, of the same type.

        Returns:
            `[tasks, n, m]`, a new tensor.
        """
        raise NotImplementedError

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        return parameters[:, None, None, :].unbind(-1)


class RBF(Kernel):
    """`amplitude² · exp(−|x − x'|² / 2 lengthscale²)`, infinitely smooth (R&W eq. 4.9).

    Also known as EQ, squared exponential and Gaussian.
    """

    def __init__(self, lengthscale: Range = 0.25, amplitude: Range = 1.0) -> None:
        super().__init__(lengthscale=lengthscale, amplitude=amplitude)

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        lengthscale, amplitude = self._split(parameters)
        scale = lengthscale * math.sqrt(2)
        return _squares(x1 / scale, x2 / scale).neg_().exp_().mul_(amplitude.square())


class Matern(Kernel):
    """`amplitude²` times a polynomial and an exponential of the distance (R&W eq. 4.14–4.17).

    Args:
        nu: smoothness: 0.5 (continuous only: Ornstein–Uhlenbeck), 1.5 (once differentiable) or
            2.5 (twice).
        lengthscale, amplitude: see the module.
    """

    def __init__(self, nu: float = 2.5, lengthscale: Range = 0.25, amplitude: Range = 1.0) -> None:
        super().__init__(lengthscale=lengthscale, amplitude=amplitude)
        if nu not in (0.5, 1.5, 2.5):
            raise ValueError(f"nu={nu} must be 0.5, 1.5 or 2.5")
        self.nu = nu

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        lengthscale, amplitude = self._split(parameters)
        scale = lengthscale / math.sqrt(2 * self.nu)
        distance = _distances(x1 / scale, x2 / scale)
        decay = torch.exp(-distance).mul_(amplitude.square())
        if self.nu == 0.5:
            return decay
        if self.nu == 1.5:
            return distance.add_(1).mul_(decay)
        return (distance / 3).add_(1).mul_(distance).add_(1).mul_(decay)


class Periodic(Kernel):
    """`amplitude² · exp(−2 Σ sin²(π (x − x') / period) / lengthscale²)`, sum over dim_x.

    MacKay (1998), R&W eq. 4.31, with the period as in the code of transformer neural processes
    (Nguyen & Grover 2022, arXiv:2207.04179). `lengthscale` has no unit here.
    """

    def __init__(
        self, lengthscale: Range = 1.0, amplitude: Range = 1.0, period: Range = 1.0
    ) -> None:
        super().__init__(lengthscale=lengthscale, amplitude=amplitude, period=period)

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        lengthscale, amplitude, period = self._split(parameters)
        exponent = _sine_squares(x1, x2, period).mul_(-2 / lengthscale.square())
        return exponent.exp_().mul_(amplitude.square())


def _differences(x1: Tensor, x2: Tensor) -> Tensor:
    """`[tasks, n, m]` for dim_x = 1, else `[dim_x, tasks, n, m]`."""
    if x1.shape[-1] == 1:
        return x1 - x2.mT
    return (x1[:, :, None] - x2[:, None]).movedim(-1, 0)


def _sum(parts: Tensor) -> Tensor:
    return parts if parts.dim() == 3 else parts.sum(0)


def _squares(x1: Tensor, x2: Tensor) -> Tensor:
    """Squared distances `[tasks, n, m]`; by differences, which lose no digits."""
    return _sum(_differences(x1, x2).square_())


def _distances(x1: Tensor, x2: Tensor) -> Tensor:
    if x1.shape[-1] == 1:
        return _differences(x1, x2).abs_()
    return _squares(x1, x2).sqrt_()


def _sine_squares(x1: Tensor, x2: Tensor, period: Tensor) -> Tensor:
    """`Σ sin²(π (x − x') / period)` over dim_x, `[tasks, n, m]`."""
    frequency = math.pi / period
    return _sum(_differences(x1 * frequency, x2 * frequency).sin_().square_())


def _as_range(name: str, value: Any) -> tuple[float, float, bool]:
    """The lower and the upper bound, as logarithms where the third is True."""
    form = "must be a number, [low, high] or {low: …, high: …, scale: log}"
    scale = "linear"
    if isinstance(value, (int, float)):
        low = high = float(value)
    elif isinstance(value, Mapping):
        if set(value) - {"scale"} != {"low", "high"}:
            raise ValueError(f"{name}={dict(value)!r} {form}")
        low, high, scale = value["low"], value["high"], value.get("scale", "linear")
    elif len(bounds := tuple(value)) == 2:
        low, high = bounds
    else:
        raise ValueError(f"{name}={value!r} {form}")
    if scale not in ("linear", "log"):
        raise ValueError(f"{name}.scale={scale!r} must be 'linear' or 'log'")
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name}={value!r} {form}, with 0 < low ≤ high")
    if scale == "log":
        return math.log(low), math.log(high), True
    return float(low), float(high), False
