"""Regression on functions drawn from a Gaussian process, with the best possible scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from metabatch_cli.batching.sizes import SizeLaw
from metabatch_cli.batching.streams import uniforms
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import Split, TaskSet, TaskSpec
from tasksets.kernels import Kernel

JITTER = 1e-10
"""Of the variance, added to it: without noise, rounding would make near points' covariances
indefinite. In float64 this is far more than rounding, and far less than any noise of interest."""


class GaussianProcess(TaskSet):
    """Tasks of noisy points on functions of a Gaussian process: each task draws hyper-parameters,
    points, and the function's values there.

    The values at all points of a task are drawn together, exactly: `y = L ε` with the Cholesky
    factor L of the covariance of the noisy values (Rasmussen & Williams 2006, §A.2), in float64.
    `aux["parameters"]`, `[tasks, k]`, holds each task's hyper-parameters, in the order of
    `dataset.names`.

    Args:
        dataset: the kernel, with the ranges of its hyper-parameters.
        min_pts, max_ctx_pts, max_tgt_pts, total_tgt_pts, eval, predict_full_target,
            predict_full_target_during_eval, sizes, split: as in `TaskSet`.
        x_range: where points lie, uniformly in every dimension.
        target_x_range: where target points lie, if elsewhere: beyond the contexts, to judge
            extrapolation.
        dim_x: dimensions of x.
        noise: standard deviation of the normal noise on y, in y's units.
        vary: whether each `task` has hyper-parameters of its own, or all tasks of a `batch` (made
            in shards: of a shard) share them.
        n_tasks: processes in the set: an index names hyper-parameters, and its function is drawn
            with its points; None for fresh ones with every task.

    Raises:
        ValueError: a range, a noise or a number that cannot be.
    """

    creates_anywhere = True

    def __init__(
        self,
        dataset: Kernel,
        min_pts: int | None = None,
        max_ctx_pts: int | None = None,
        max_tgt_pts: int | None = None,
        total_tgt_pts: int | None = None,
        eval: bool = False,
        predict_full_target: bool = False,
        predict_full_target_during_eval: bool = False,
        *,
        x_range: tuple[float, float] = (-2.0, 2.0),
        target_x_range: tuple[float, float] | None = None,
        dim_x: Annotated[int, Ge(1)] = 1,
        noise: Annotated[float, Ge(0)] = 0.02,
        vary: Literal["task", "batch"] = "task",
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
        self.x_range = _as_interval("x_range", x_range)
        if target_x_range is None:
            self.target_x_range = self.x_range
        else:
            self.target_x_range = _as_interval("target_x_range", target_x_range)
        if dim_x < 1:
            raise ValueError(f"dim_x={dim_x} must be at least 1")
        if not noise >= 0:
            raise ValueError(f"noise={noise} is a standard deviation: at least 0")
        if vary not in ("task", "batch"):
            raise ValueError(f"vary={vary!r} must be 'task' or 'batch'")
        if vary == "batch" and n_tasks is not None:
            raise ValueError(
                f"vary='batch' with n_tasks={n_tasks}: an index names hyper-parameters of its own"
            )
        if n_tasks is not None and n_tasks < 1:
            raise ValueError(f"n_tasks={n_tasks} must be at least 1, or null for no end")
        self.dim_x = dim_x
        self.noise = noise
        self.vary = vary
        self.n_tasks = n_tasks

    def __len__(self) -> int:
        if self.n_tasks is None:
            raise TypeError("an infinite task set has no length: every index is a fresh function")
        return self.n_tasks

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Task:
        count, names = len(indices), self.dataset.names
        anywhere: dict[str, Any] = {"generator": generator, "device": generator.device}
        if self.n_tasks is not None:
            uniform = uniforms(indices, len(names), self.split, "gp")
        elif self.vary == "task":
            uniform = torch.rand(count, len(names), **anywhere)
        else:
            uniform = torch.rand(1, len(names), **anywhere).expand(count, -1)
        parameters = self.dataset.parameters(uniform)
        x = torch.rand(count, n_context + n_target, self.dim_x, **anywhere)
        for part, (low, high) in (
            (x[:, :n_context], self.x_range),
            (x[:, n_context:], self.target_x_range),
        ):
            part.mul_(high - low).add_(low)
        factor = self._factor(x.double(), parameters.double())
        normal = torch.randn(count, x.shape[1], 1, dtype=torch.float64, **anywhere)
        y = (factor @ normal).float()
        return Task(
            x[:, :n_context].contiguous(),
            y[:, :n_context].contiguous(),
            x[:, n_context:].contiguous(),
            y[:, n_context:].contiguous(),
            {"parameters": parameters},
        )

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(x_shape=(self.dim_x,), y_shape=(1,))

    def oracle(self, tasks: Task) -> dict[str, Tensor]:
        """The scores of the exact posterior, under each task's true hyper-parameters.

        Args:
            tasks: `[tasks, points, …]` with `aux["parameters"]`, of any type and device.

        Returns:
            float64 `[tasks]` each. `log_likelihood`: the mean over target points of the log
            density of each by itself; `log_likelihood@scoring=joint`: the log density of all of
            them together, divided by their number; both with the noise, in nats for each point.
            `mse`: of the posterior mean.
        """
        n_context = tasks.context_x.shape[1]
        x = torch.cat([tasks.context_x, tasks.target_x], dim=1).double()
        y = torch.cat([tasks.context_y, tasks.target_y], dim=1).double()
        factor = self._factor(x, tasks.aux["parameters"].to(x))
        # rows of the factor: what context, then targets before, tell of a target, and what is new
        white = torch.linalg.solve_triangular(factor, y, upper=False)[:, n_context:, 0]
        fresh = factor.diagonal(dim1=1, dim2=2)[:, n_context:]
        joint = _log_normal(white, fresh)
        told = factor[:, n_context:, :n_context]
        mean = told @ torch.linalg.solve_triangular(
            factor[:, :n_context, :n_context], y[:, :n_context], upper=False
        )
        error = tasks.target_y.double()[..., 0] - mean[..., 0]
        spread = factor[:, n_context:, n_context:].square().sum(-1).sqrt_()
        return {
            "log_likelihood": _log_normal(error / spread, spread).mean(-1),
            "log_likelihood@scoring=joint": joint.mean(-1),
            "mse": error.square().mean(-1),
        }

    def posterior(self, tasks: Task, x: Tensor, noisy: bool = True) -> tuple[Tensor, Tensor]:
        """What the contexts tell of y at x, under each task's true hyper-parameters.

        Args:
            x: `[tasks, points, dim_x]`.
            noisy: whether y is what is observed (as a learner predicts it) or the function.

        Returns:
            Mean and standard deviation, `[tasks, points, 1]`, of x's type.
        """
        context_x, at = tasks.context_x.double(), x.double()
        parameters = tasks.aux["parameters"].to(at)
        factor = self._factor(context_x, parameters)
        between = self.dataset(context_x, at, parameters)
        told = torch.linalg.solve_triangular(factor, between, upper=False)
        white = torch.linalg.solve_triangular(factor, tasks.context_y.double(), upper=False)
        points = at.flatten(0, 1)[:, None]
        each = parameters.repeat_interleave(at.shape[1], dim=0)
        variance = self.dataset(points, points, each).view(at.shape[:2])
        variance = (variance - told.square().sum(1)).clamp_(min=0) + self.noise**2 * noisy
        return (told.mT @ white).to(x.dtype), variance.sqrt()[..., None].to(x.dtype)

    def _factor(self, x: Tensor, parameters: Tensor) -> Tensor:
        """The Cholesky factor of the covariance of noisy values, `[tasks, points, points]`."""
        covariance = self.dataset(x, x, parameters)
        covariance.diagonal(dim1=1, dim2=2).mul_(1 + JITTER).add_(self.noise**2)
        return torch.linalg.cholesky(covariance)


def _log_normal(white: Tensor, sigma: Tensor) -> Tensor:
    return -0.5 * (white.square() + math.log(2 * math.pi)) - sigma.log()


def _as_interval(name: str, value: Any) -> tuple[float, float]:
    bounds = tuple(value)
    if len(bounds) != 2 or bounds[1] < bounds[0]:
        raise ValueError(f"{name}={value!r} must be a range [low, high]")
    return float(bounds[0]), float(bounds[1])
