"""Regression on simulated populations of predators and their prey, seen at random times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.sizes import SizeLaw
from metabatch_cli.batching.streams import uniforms
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import Split, TaskSpec
from tasksets.functions import Family, Range
from tasksets.points import DrawnTaskSet, as_count, divided

_STEP = 0.025  # years
_EVERY = 2  # steps from one population that is kept to the next
_BLOCK = 64  # trajectories of a finite set that are simulated together
_BLOCKS = 64  # of them that are remembered, 16 MB for each hundred years


class LotkaVolterra(Family):
    """Stochastic Lotka–Volterra populations X (prey) and Y (predators), at times in years.

    `dX = (α − β Y) X dt + σ X^(1/6) dW₁`, `dY = (γ X − δ) Y dt + σ Y^(1/6) dW₂`, both reflected at
    zero, then multiplied by a scale. The power emphasises the noise where a population is small
    and keeps it from dying out. By Euler and Maruyama's method in steps of 0.025 years.

    Equations and ranges are those of the simulator in `neuralprocesses`, for the hare–lynx task of
    Bruinsma et al. 2023 (arXiv:2303.14468); the idea of training on simulations for that task is
    that of ConvCNPs (Gordon et al. 2020, arXiv:1910.13556, §5.3).

    Args:
        birth: α, of prey, a year.
        predation: β, for each predator, a year.
        death: δ, of predators, a year.
        growth: γ, of predators for each prey, a year.
        noise: σ.
        scale: what populations are multiplied by at the end.
        prey, predators: how many there are at the start, before the scale.
    """

    def __init__(
        self,
        birth: Range = (0.2, 0.8),
        predation: Range = (0.04, 0.08),
        death: Range = (0.8, 1.2),
        growth: Range = (0.04, 0.08),
        noise: Range = (0.5, 10.0),
        scale: Range = (1.0, 5.0),
        prey: Range = (5.0, 100.0),
        predators: Range = (5.0, 100.0),
    ) -> None:
        super().__init__(
            birth=birth,
            predation=predation,
            death=death,
            growth=growth,
            noise=noise,
            scale=scale,
            prey=prey,
            predators=predators,
        )
        if (self.low < 0).any():
            name = self.names[int(self.low.argmin())]
            raise ValueError(f"{name}: rates, noise and populations are at least 0")

    def simulate(self, parameters: Tensor, normal: Tensor) -> Tensor:
        """Trajectories of the populations.

        Args:
            parameters: `[tasks, 8]`, in the order of `names`.
            normal: standard normal numbers, float64 `[steps, 2, tasks]`, for steps of 0.025 years.

        Returns:
            float32 `[tasks, times, 2]`: prey and predators at the start and every 0.05 years.
        """
        birth, predation, death, growth, noise, scale, *start = parameters.double().numpy().T
        own = 1 + _STEP * np.stack([birth, -death])
        of_other = _STEP * np.stack([-predation, growth])
        pushes = normal.numpy() * (math.sqrt(_STEP) * noise)
        path = np.empty((len(pushes) + 1, *own.shape))
        path[0] = start
        factor, root = np.empty_like(own), np.empty_like(own)
        for step, push in enumerate(pushes):  # the hot loop: six calls, no allocation
            now, following = path[step], path[step + 1]
            np.multiply(now[::-1], of_other, out=factor)
            factor += own
            np.power(now, 1 / 6, out=root)
            root *= push
            np.multiply(now, factor, out=following)
            following += root
            np.abs(following, out=following)
        kept = torch.from_numpy(path[::_EVERY] * scale).permute(2, 0, 1)
        return kept.to(torch.float32, memory_format=torch.contiguous_format)


class PredatorPrey(DrawnTaskSet):
    """Tasks of populations at random times: x in years, y their sizes `[prey, predators]`.

    A task is a trajectory of a simulation of its own that began `warm_up` years before x = 0; it is
    known every 0.05 years, and a point shows it at the nearest of these times (x is where it was
    drawn). Both populations are seen at the same times, unlike in `neuralprocesses`, whose prey and
    predators have times of their own. `aux["parameters"]`, `[tasks, 8]`, holds the simulation's
    parameters, in the order of `dataset.names`.

    A simulation has thousands of steps, one after the other: a fresh batch of 16 takes some tens of
    milliseconds. A finite set simulates each of its trajectories once in every process, many
    together.

    Args:
        dataset: the simulation, with the ranges of its parameters.
        min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts, eval, predict_full_target,
            predict_full_target_during_eval, sizes, split: as in `TaskSet`.
        mode: `interpolation`: contexts and targets anywhere; `forecasting`: contexts before a time
            drawn for each task, targets after it.
        years: x lies between 0 and this.
        forecast_start: range of the time from which a forecast begins, uniform.
        warm_up: years of the simulation before x = 0.
        n_tasks: trajectories in the set, the same ones every epoch; None for a fresh one with every
            task.

    Raises:
        ValueError: a mode or a number that cannot be.
    """

    def __init__(
        self,
        dataset: LotkaVolterra,
        min_pts: int | None = None,
        max_ctx_pts: int | None = None,
        max_tgt_pts: int | None = None,
        total_tgt_pts: int | None = None,
        eval: bool = False,
        predict_full_target: bool = False,
        predict_full_target_during_eval: bool = False,
        *,
        mode: Literal["interpolation", "forecasting"] = "interpolation",
        years: Annotated[float, Ge(1)] = 100.0,
        forecast_start: tuple[float, float] = (25.0, 75.0),
        warm_up: Annotated[float, Ge(0)] = 10.0,
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
        one_of("mode", mode, ("interpolation", "forecasting"))
        if not 1 <= years < math.inf:
            raise ValueError(f"years={years} must be at least 1")
        if not 0 <= warm_up < math.inf:
            raise ValueError(f"warm_up={warm_up} must be at least 0 years")
        self.dataset = dataset
        self.mode = mode
        self.years = years
        self.forecast_start = _within(forecast_start, years)
        self.warm_up = warm_up
        self.n_tasks = as_count(n_tasks)
        self._skipped = round(warm_up / (_STEP * _EVERY))
        self._steps = _EVERY * (self._skipped + math.ceil(years / (_STEP * _EVERY)))
        self._known: dict[int, Tensor] = {}

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Task:
        count, names = len(indices), self.dataset.names
        if self.n_tasks is None:
            parameters = self.dataset.parameters(torch.rand(count, len(names), generator=generator))
            shape = (self._steps, 2, count)
            normal = torch.randn(shape, dtype=torch.float64, generator=generator)
            paths = self.dataset.simulate(parameters, normal)[:, self._skipped :]
        else:
            parameters = self.dataset.parameters(self._uniforms(indices))
            known = [self._block(index // _BLOCK)[index % _BLOCK] for index in indices.tolist()]
            paths = torch.stack(known)
        x = torch.rand(count, n_context + n_target, 1, generator=generator)
        if self.mode == "interpolation":
            x.mul_(self.years)
        else:
            low, high = self.forecast_start
            start = low + (high - low) * torch.rand(count, 1, 1, generator=generator)
            x[:, :n_context].mul_(start)
            x[:, n_context:].mul_(self.years - start).add_(start)
        nearest = (x / (_STEP * _EVERY)).round_().long().clamp_(max=paths.shape[1] - 1)
        y = paths.gather(1, nearest.expand(-1, -1, 2))
        return divided(x, y, n_context, {"parameters": parameters})

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(x_shape=(1,), y_shape=(2,))

    def _block(self, block: int) -> Tensor:
        """Trajectories of a finite set, `[64, times, 2]`: always as many, whose bits are the same
        whichever of them is wanted."""
        if block not in self._known:
            if len(self._known) >= _BLOCKS:
                self._known.clear()
            indices = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)
            uniform = uniforms(indices, 2 * self._steps, self.split, "predator_prey", "noise")
            normal = torch.special.ndtri(uniform + 2**-54).view(_BLOCK, self._steps, 2)
            parameters = self.dataset.parameters(self._uniforms(indices))
            paths = self.dataset.simulate(parameters, normal.permute(1, 2, 0))
            self._known[block] = paths[:, self._skipped :].contiguous()
        return self._known[block]

    def _uniforms(self, indices: Tensor) -> Tensor:
        return uniforms(indices, len(self.dataset.names), self.split, "predator_prey")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": {}}  # may be large


def _within(forecast_start: Sequence[float], years: float) -> tuple[float, float]:
    bounds = tuple(forecast_start)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= years:
        raise ValueError(
            f"forecast_start={forecast_start!r} must be a range [low, high] from 0 to years={years}"
        )
    return float(bounds[0]), float(bounds[1])
