"""Covariance functions of Gaussian processes, a whole batch of tasks at a time.

A kernel is called with points and hyper-parameters, so that every task has its own; the same
object serves all of them. Hyper-parameters are named as in Rasmussen & Williams (2006,
*Gaussian Processes for Machine Learning*), chapter 4: `amplitude` is the standard deviation of
the function, `lengthscale` and `period` are in units of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

Range = float | tuple[float, float] | tuple[float, float, Literal["log"]]
"""A number; `[low, high]`, uniform; or `[low, high, log]`, uniform in the logarithm."""


class Kernel:
    """A covariance function whose hyper-parameters are drawn for each task.

    A subclass passes its hyper-parameters' ranges by name and implements `__call__`.

    Attributes:
        names: of the hyper-parameters, in the order of their columns.

    Raises:
        ValueError: a range that is not `[low, high]` with `0 < low ≤ high`.
    """

    names: tuple[str, ...]
    _may_be_zero: tuple[str, ...] = ()

    def __init__(self, **ranges: Range) -> None:
        self.names = tuple(ranges)
        bounds = [
            _as_range(name, value, name in self._may_be_zero) for name, value in ranges.items()
        ]
        self._low = torch.tensor([low for low, _, _ in bounds])
        self._width = torch.tensor([high - low for low, high, _ in bounds])
        self._logs = torch.tensor([is_log for *_, is_log in bounds])
        self._any_logs = any(is_log for *_, is_log in bounds)

    def parameters(self, uniform: Tensor) -> Tensor:
        """Hyper-parameters, float32 `[tasks, k]`, from numbers of [0, 1) of the same shape."""
        low, width = (bound.to(uniform.device) for bound in (self._low, self._width))
        values = low + width * uniform.to(low.dtype)
        if self._any_logs:
            values = torch.where(self._logs.to(uniform.device), values.exp(), values)
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


class WeaklyPeriodic(Kernel):
    """A periodic function that changes slowly: `Periodic` times an `RBF` (R&W eq. 5.16, in part).

    `amplitude² · exp(−|x − x'|² / 2 lengthscale² − 2 Σ sin²(π (x − x') / period) /
    periodic_lengthscale²)`; the defaults are those of `neuralprocesses` (and of Bruinsma et al.
    2023, arXiv:2303.14468).
    """

    def __init__(
        self,
        lengthscale: Range = 0.5,
        amplitude: Range = 1.0,
        period: Range = 0.25,
        periodic_lengthscale: Range = 1.0,
    ) -> None:
        super().__init__(
            lengthscale=lengthscale,
            amplitude=amplitude,
            period=period,
            periodic_lengthscale=periodic_lengthscale,
        )

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        lengthscale, amplitude, period, periodic_lengthscale = self._split(parameters)
        scale = lengthscale * math.sqrt(2)
        exponent = _sine_squares(x1, x2, period).mul_(-2 / periodic_lengthscale.square())
        exponent.sub_(_squares(x1 / scale, x2 / scale))
        return exponent.exp_().mul_(amplitude.square())


class SpectralMixture(Kernel):
    """A density of frequencies that is a sum of normal ones (Wilson & Adams 2013, eq. 12).

    `Σ_q amplitude_q² Π exp(−2π² τ² bandwidth_q²) cos(2π τ frequency_q)`, with the product over the
    dimensions of `τ = x − x'`. Each component draws its own hyper-parameters from the same ranges.

    Args:
        components: how many normal densities.
        frequency: the mean of one, in periods for each unit of x; may be 0.
        bandwidth: its standard deviation.
        amplitude: see the module.
    """

    _may_be_zero = ("frequency",)

    def __init__(
        self,
        components: Annotated[int, Ge(1)] = 2,
        frequency: Range = (0.0, 3.0),
        bandwidth: Range = (0.1, 0.5),
        amplitude: Range = 1.0,
    ) -> None:
        super().__init__(frequency=frequency, bandwidth=bandwidth, amplitude=amplitude)
        if components < 1:
            raise ValueError(f"components={components} must be at least 1")
        self.names = tuple(f"{c}.{name}" for c in range(components) for name in self.names)
        self._low, self._width = self._low.repeat(components), self._width.repeat(components)
        self._logs = self._logs.repeat(components)

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        difference = _differences(x1, x2).mul_(2 * math.pi)
        covariance: Tensor | None = None
        for own in parameters.split(3, dim=1):
            frequency, bandwidth, amplitude = self._split(own)
            waves = torch.cos(difference * frequency)
            waves = waves if waves.dim() == 3 else waves.prod(0)
            decay = _sum((difference * bandwidth).square_()).mul_(-0.5).exp_()
            part = waves.mul_(decay).mul_(amplitude.square())
            covariance = part if covariance is None else covariance.add_(part)
        assert covariance is not None
        return covariance


class _Composite(Kernel):
    """Several kernels, whose hyper-parameters stand one behind the other: `0.lengthscale`, ….

    Raises:
        ValueError: no kernels.
    """

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self.kernels = list(kernels)
        if not self.kernels:
            raise ValueError("kernels=[] must hold at least one")
        self.names = tuple(
            f"{number}.{name}" for number, kernel in enumerate(kernels) for name in kernel.names
        )

    def parameters(self, uniform: Tensor) -> Tensor:
        parts = zip(self.kernels, self._parts(uniform), strict=True)
        return torch.cat([kernel.parameters(part) for kernel, part in parts], dim=1)

    def _parts(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Of columns `[tasks, k]`, those of each kernel."""
        return columns.split([len(kernel.names) for kernel in self.kernels], dim=1)


class Sum(_Composite):
    """The sum of kernels: of independent functions (R&W §4.2.4).

    Args:
        kernels: the summands.
    """

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        first, *others = zip(self.kernels, self._parts(parameters), strict=True)
        covariance = first[0](x1, x2, first[1])
        for kernel, part in others:
            covariance.add_(kernel(x1, x2, part))
        return covariance


class Product(_Composite):
    """The product of kernels (R&W §4.2.4).

    Args:
        kernels: the factors.
    """

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        first, *others = zip(self.kernels, self._parts(parameters), strict=True)
        covariance = first[0](x1, x2, first[1])
        for kernel, part in others:
            covariance.mul_(kernel(x1, x2, part))
        return covariance


class KernelMixture(_Composite):
    """One of several kernels, drawn like a hyper-parameter: which one is the first of these.

    With `vary: batch` in the Gaussian process, all tasks of a batch have the same one. The
    hyper-parameters of the kernels that were not drawn are drawn all the same, and not used.

    Args:
        kernels: what to choose from.
        weights: how often each comes, in any unit; equal by default.

    Raises:
        ValueError: weights that do not fit the kernels, are negative or all zero.
    """

    def __init__(
        self, kernels: Sequence[Kernel], weights: Sequence[Annotated[float, Ge(0)]] | None = None
    ) -> None:
        super().__init__(kernels)
        shares = [1.0] * len(self.kernels) if weights is None else [float(w) for w in weights]
        if len(shares) != len(self.kernels):
            raise ValueError(f"weights={shares} must have one for each of {len(kernels)} kernels")
        if min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise ValueError(f"weights={shares} must be at least 0, and not all 0")
        self.names = ("kernel", *self.names)
        # a number of [0, 1) is below the last edge whose kernel has a weight
        self._edges = torch.tensor([sum(shares[: k + 1]) / sum(shares) for k in range(len(shares))])
        self._edges[max(k for k, share in enumerate(shares) if share) :] = 1.0

    def parameters(self, uniform: Tensor) -> Tensor:
        edges = self._edges.to(uniform.device, uniform.dtype)
        which = torch.bucketize(uniform[:, :1].contiguous(), edges, right=True)
        return torch.cat([which.float(), super().parameters(uniform[:, 1:])], dim=1)

    def __call__(self, x1: Tensor, x2: Tensor, parameters: Tensor) -> Tensor:
        which, parts = parameters[:, 0], self._parts(parameters[:, 1:])
        drawn = [int(number) for number in which.unique()]
        if len(drawn) == 1:
            return self.kernels[drawn[0]](x1, x2, parts[drawn[0]])
        covariance = x1.new_empty(len(x1), x1.shape[1], x2.shape[1])
        for number in drawn:
            rows = (which == number).nonzero()[:, 0]
            covariance[rows] = self.kernels[number](x1[rows], x2[rows], parts[number][rows])
        return covariance


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


def _as_range(name: str, value: Any, may_be_zero: bool = False) -> tuple[float, float, bool]:
    """The lower and the upper bound, as logarithms where the third is True."""
    bounds = (value, value) if isinstance(value, (int, float)) else tuple(value)
    is_log = bounds[2:] == ("log",)
    if len(bounds) != 2 + is_log:
        raise ValueError(f"{name}={value!r} must be a number, [low, high] or [low, high, log]")
    low, high = bounds[:2]
    least_is_fine = low > 0 or (low == 0 and may_be_zero and not is_log)
    if not (least_is_fine and low <= high < math.inf):
        raise ValueError(f"{name}={value!r} must be a number or a range with 0 < low ≤ high")
    if is_log:
        return math.log(low), math.log(high), True
    return float(low), float(high), False
