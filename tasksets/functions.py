"""Regression on random functions of one variable: a family of functions, seen through points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from metabatch_cli.batching.sizes import SizeLaw
from metabatch_cli.batching.streams import uniforms
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import Split, TaskSpec
from tasksets.points import DrawnTaskSet, as_count, as_range, divided

Range = float | tuple[float, float]


class Family:
    """Functions of one variable that differ in a few parameters, each uniform in a range.

    A subclass passes its parameters' ranges by name (a number is a range of one value) and
    implements `__call__`.

    Raises:
        ValueError: a range that is not `[low, high]` with `low ≤ high`.
    """

    def __init__(self, **ranges: Range | Sequence[float]) -> None:
        self.names = tuple(ranges)
        bounds = [as_range(name, value) for name, value in ranges.items()]
        self.low = torch.tensor([low for low, _ in bounds])
        self.width = torch.tensor([high - low for low, high in bounds])

    def __call__(self, x: Tensor, parameters: Tensor) -> Tensor:
        """The functions' values.

        Args:
            x: `[tasks, points, 1]`.
            parameters: `[tasks, parameters]`, in the order of `names`.

        Returns:
            `[tasks, points, 1]`.
        """
        raise NotImplementedError

    def parameters(self, uniform: Tensor) -> Tensor:
        """Parameters `[tasks, parameters]` from numbers of [0, 1) of the same shape."""
        low, width = (bound.to(uniform.device) for bound in (self.low, self.width))
        return low + width * uniform.to(low.dtype)

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        return parameters[:, None, None, :].unbind(-1)


class Sine(Family):
    """`y = amplitude · sin(frequency · x + phase) + offset`.

    The defaults are the sinusoids of MAML (Finn et al. 2017, arXiv:1703.03400, §5.1), with
    `phase ∈ [0, π]` and, in their code, `sin(x − phase)`: the same family, mirrored.

    Args:
        amplitude: half the height of the wave.
        phase: in radians.
        frequency: in radians for each unit of x.
        offset: added to every value.
    """

    def __init__(
        self,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, math.pi),
        frequency: Range = 1.0,
        offset: Range = 0.0,
    ) -> None:
        super().__init__(amplitude=amplitude, phase=phase, frequency=frequency, offset=offset)

    def __call__(self, x: Tensor, parameters: Tensor) -> Tensor:
        amplitude, phase, frequency, offset = self._split(parameters)
        return amplitude * torch.sin(frequency * x + phase) + offset


class Sawtooth(Family):
    """`y = amplitude · ((± frequency · x + phase) mod 1) + offset`: ramps with sudden falls.

    As in the benchmarks of ConvCNP (Gordon et al. 2020, arXiv:1910.13556) and of
    `neuralprocesses`, whose frequencies are the default here.

    Args:
        amplitude: the height of a ramp.
        frequency: ramps for each unit of x.
        phase: where in a ramp x = 0 lies.
        offset: added to every value.
        both_directions: whether every other function falls slowly and rises suddenly.
    """

    def __init__(
        self,
        amplitude: Range = 1.0,
        frequency: Range = (2.0, 4.0),
        phase: Range = (0.0, 1.0),
        offset: Range = 0.0,
        both_directions: bool = True,
    ) -> None:
        super().__init__(
            amplitude=amplitude,
            frequency=frequency,
            phase=phase,
            offset=offset,
            direction=(-1.0 if both_directions else 1.0, 1.0),
        )

    def __call__(self, x: Tensor, parameters: Tensor) -> Tensor:
        amplitude, frequency, phase, offset, direction = self._split(parameters)
        turned = torch.where(direction < 0, -x, x)
        return amplitude * torch.remainder(frequency * turned + phase, 1.0) + offset


class Functions(DrawnTaskSet):
    """Tasks of points on functions of a family: context and target are drawn alike.

    Context and target points are independent draws from `x_range`; noise is added to both.
    `aux["parameters"]` holds each task's function.

    Args:
        dataset: the family of functions.
        min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts, eval, predict_full_target,
            predict_full_target_during_eval, sizes, split: as in `TaskSet`.
        x_range: where points lie, uniformly.
        noise: standard deviation of the normal noise on y, in y's units.
        n_tasks: functions in the set, the same ones every epoch; None for a fresh function with
            every task.
    """

    creates_anywhere = True

    def __init__(
        self,
        dataset: Family,
        min_pts: int | None = None,
        max_ctx_pts: int | None = None,
        max_tgt_pts: int | None = None,
        total_tgt_pts: int | None = None,
        eval: bool = False,
        predict_full_target: bool = False,
        predict_full_target_during_eval: bool = False,
        *,
        x_range: tuple[float, float] = (-5.0, 5.0),
        noise: Annotated[float, Ge(0)] = 0.0,
        n_tasks: Annotated[int, Ge(1)] | None = None,
        sizes: str | Mapping[str, Any] | SizeLaw = "metabatch",
        split: Split | None = None,
    ) -> None:
        super().__init__(
            min_pts,
            max_ctx_pts,
            max_tgt_pts,
            total_tgt_pts,
            eval,
            predict_full_target,
            predict_full_target_during_eval,
            sizes=sizes,
            split=split,
        )
        self.dataset = dataset
        self.x_range = as_range("x_range", x_range)
        if noise < 0:
            raise ValueError(f"noise={noise} is a standard deviation: at least 0")
        self.noise = noise
        self.n_tasks = as_count(n_tasks)

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Task:
        count, names = len(indices), self.dataset.names
        anywhere: dict[str, Any] = {"generator": generator, "device": generator.device}
        if self.n_tasks is None:
            uniform = torch.rand(count, len(names), **anywhere)
        else:
            uniform = uniforms(indices, len(names), self.split, "functions")
        parameters = self.dataset.parameters(uniform)
        low, high = self.x_range
        x = torch.rand(count, n_context + n_target, 1, **anywhere)
        x = x.mul_(high - low).add_(low)
        y = self.dataset(x, parameters)
        if self.noise:
            y = y + self.noise * torch.randn(y.shape, **anywhere)
        return divided(x, y, n_context, {"parameters": parameters})

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(x_shape=(1,), y_shape=(1,))

    def truth(self, tasks: Task, x: Tensor) -> Tensor:
        return self.dataset(x, tasks.aux["parameters"].to(x.device, x.dtype))
