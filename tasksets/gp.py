"""Regression on functions drawn from a Gaussian process, with the best possible scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from metabatch_cli.batching.arguments import at_least, one_of
from metabatch_cli.batching.sizes import SizeLaw, extremes
from metabatch_cli.batching.streams import uniforms
from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import Split, TaskSpec
from tasksets.kernels import Kernel
from tasksets.points import DrawnTaskSet, as_count, as_range, divided

JITTER = 1e-10
"""Of the variance, added to it: without noise, rounding would make near points' covariances
indefinite. In float64 this is far more than rounding, and far less than any noise of interest."""

_REMEMBERED = 20_000  # functions of a finite set, 2 KB each


class GaussianProcess(DrawnTaskSet):
    """Tasks of noisy points on functions of a Gaussian process: each task draws hyper-parameters,
    points, and the function's values there.

    The values at all points of a task are drawn together, exactly: `y = L ε` with the Cholesky
    factor L of the covariance of the noisy values (Rasmussen & Williams 2006, §A.2), in float64.
    A function of a finite set is drawn once and for all at the points of a pool, uniform
    themselves, from which every task draws its contexts and targets anew: so that it is the same
    function each time, and exact at any sizes.
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
        n_tasks: functions in the set, the same ones every epoch; None for a fresh function with
            every task.
        pool: points at which each function of a finite set is known; a task's points are drawn
            from them without repetition. For a fresh function it does not count.

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
        pool: Annotated[int, Ge(1)] = 256,
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
        if target_x_range is None:
            self.target_x_range = self.x_range
        else:
            self.target_x_range = as_range("target_x_range", target_x_range)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise={noise} is a standard deviation: at least 0")
        one_of("vary", vary, ("task", "batch"))
        if vary == "batch" and n_tasks is not None:
            raise ValueError(
                f"vary='batch' with n_tasks={n_tasks}: an index of a finite set names a function, "
                "which has hyper-parameters of its own"
            )
        self.dim_x = at_least("dim_x", dim_x, 1)
        self.noise = noise
        self.vary = vary
        self.n_tasks = as_count(n_tasks)
        self.pool = at_least("pool", pool, 1)
        if self.n_tasks is not None:
            for drawn in extremes(self.law):
                self._check_pool(drawn["n_context"], drawn["n_target"])
        self._known: dict[int, Tensor] = {}

    def __gettasks__(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> Task:
        draw = self._fresh if self.n_tasks is None else self._from_pools
        x, y, parameters = draw(indices, n_context, n_target, generator)
        return divided(x, y, n_context, {"parameters": parameters})

    def _fresh(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points `[tasks, points, dim_x]`, values and hyper-parameters of new functions."""
        count, hyper = len(indices), len(self.dataset.names)
        anywhere: dict[str, Any] = {"generator": generator, "device": generator.device}
        if self.vary == "task":
            uniform = torch.rand(count, hyper, **anywhere)
        else:
            uniform = torch.rand(1, hyper, **anywhere).expand(count, -1)
        parameters = self.dataset.parameters(uniform)
        x = torch.rand(count, n_context + n_target, self.dim_x, **anywhere)
        self._place(x[:, :n_context], x[:, n_context:])
        normal = torch.randn(count, 1, x.shape[1], dtype=torch.float64, **anywhere)
        factor = self._factor(x.double(), parameters.double())
        # a row times a matrix: half the time of a matrix times a column
        return x, (normal @ factor.mT).mT.float(), parameters

    def _from_pools(
        self, indices: Tensor, n_context: int, n_target: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of functions that have an index, at some of the points where they are known."""
        anywhere: dict[str, Any] = {"generator": generator, "device": generator.device}
        self._check_pool(n_context, n_target)
        known = torch.stack([self._function(index) for index in indices.tolist()])
        known = known.to(generator.device)
        order = torch.rand(known.shape[:2], **anywhere)
        if self._apart:
            context, target = order.split(self.pool, dim=1)
            first = context.argsort(1)[:, :n_context]
            chosen = torch.cat([first, target.argsort(1)[:, :n_target] + self.pool], dim=1)
        else:
            chosen = order.argsort(1)[:, : n_context + n_target]
        points = known.gather(1, chosen[..., None].expand(-1, -1, known.shape[2]))
        x, y = points[..., :-1], points[..., -1:]
        y = y + self.noise * torch.randn(y.shape, **anywhere)
        uniform = uniforms(indices, len(self.dataset.names), self.split, "gp")
        return x, y, self.dataset.parameters(uniform.to(generator.device))

    def _function(self, index: int) -> Tensor:
        """A function without noise at the points of its pool: `[points, dim_x + 1]`, y behind x.

        It is made by itself: whatever is made beside it, it has the same bits.
        """
        if index not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            at, count = torch.tensor([index]), self.pool * (1 + self._apart)
            uniform = uniforms(at, len(self.dataset.names), self.split, "gp")
            x = uniforms(at, count * self.dim_x, self.split, "gp", "x").float()
            x = x.view(1, count, self.dim_x)
            self._place(x[:, : self.pool], x[:, self.pool :])
            normal = torch.special.ndtri(uniforms(at, count, self.split, "gp", "y") + 2**-54)
            parameters = self.dataset.parameters(uniform).double()
            factor = self._factor(x.double(), parameters, noise=0.0)
            y = (normal[:, None] @ factor.mT).mT.float()
            self._known[index] = torch.cat([x, y], dim=2)[0]
        return self._known[index]

    @property
    def _apart(self) -> bool:
        """Whether context and target are of pools of their own."""
        return self.target_x_range != self.x_range

    def _check_pool(self, n_context: int, n_target: int) -> None:
        for wanted in (n_context, n_target) if self._apart else (n_context + n_target,):
            if wanted > self.pool:
                raise ValueError(
                    f"pool={self.pool} is too small for a task of {n_context} context and "
                    f"{n_target} target points: at least {wanted}"
                )

    def _place(self, context: Tensor, target: Tensor) -> None:
        """Turn numbers of [0, 1) into points of their ranges, in place."""
        for part, (low, high) in ((context, self.x_range), (target, self.target_x_range)):
            part.mul_(high - low).add_(low)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": {}}  # quicker made than sent

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(x_shape=(self.dim_x,), y_shape=(1,))

    def oracle(self, tasks: Task) -> dict[str, Tensor]:
        """The scores of the exact posterior, under each task's true hyper-parameters.

        It knows the process, not the function: of the functions of a finite set that it has seen
        before, a learner may know more.

        Args:
            tasks: `[tasks, points, …]` with `aux["parameters"]`, of any type and device.

        Returns:
            float64 `[tasks]` each. `log_likelihood`: the mean over target points of the log
            density of each by itself; `log_likelihood@scoring=joint`: the log density of all of
            them together, divided by their number; both with the noise, in nats for each point.
            `mse`: of the posterior mean.
        """
        n_context = tasks.context_x.shape[1]
        x = _double(torch.cat([tasks.context_x, tasks.target_x], dim=1))
        y = _double(torch.cat([tasks.context_y, tasks.target_y], dim=1))
        factor = self._factor(x, tasks.aux["parameters"].to(x))
        # rows of the factor: what context, then targets before, tell of a target, and what is new
        white = torch.linalg.solve_triangular(factor, y, upper=False)[:, n_context:, 0]
        fresh = factor.diagonal(dim1=1, dim2=2)[:, n_context:]
        joint = _log_normal(white, fresh)
        told = factor[:, n_context:, :n_context]
        mean = told @ torch.linalg.solve_triangular(
            factor[:, :n_context, :n_context], y[:, :n_context], upper=False
        )
        error = y[:, n_context:, 0] - mean[..., 0]
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
            Mean and standard deviation, `[tasks, points, 1]`, of x's type and on its device.
        """
        context_x, context_y, at = (_double(t) for t in (tasks.context_x, tasks.context_y, x))
        parameters = tasks.aux["parameters"].to(at)
        factor = self._factor(context_x, parameters)
        between = self.dataset(context_x, at, parameters)
        told = torch.linalg.solve_triangular(factor, between, upper=False)
        white = torch.linalg.solve_triangular(factor, context_y, upper=False)
        points = at.flatten(0, 1)[:, None]
        each = parameters.repeat_interleave(at.shape[1], dim=0)
        variance = self.dataset(points, points, each).view(at.shape[:2])
        variance = (variance - told.square().sum(1)).clamp_(min=0) + self.noise**2 * noisy
        return (told.mT @ white).to(x), variance.sqrt()[..., None].to(x)

    def _factor(self, x: Tensor, parameters: Tensor, noise: float | None = None) -> Tensor:
        """The Cholesky factor of the covariance of noisy values, `[tasks, points, points]`."""
        noise = self.noise if noise is None else noise
        covariance = self.dataset(x, x, parameters).contiguous()
        covariance.diagonal(dim1=1, dim2=2).mul_(1 + JITTER).add_(noise**2)
        # it is its own transpose, which LAPACK factorises where it lies: a second matrix of many
        # points would cost as much in fresh memory as in arithmetic
        factor = covariance.mT
        failed = torch.empty(len(x), dtype=torch.int32, device=x.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed.any():
            raise ValueError(
                f"dataset={type(self.dataset).__name__}: its covariances of {x.shape[1]} points "
                f"(with noise={noise}) are not positive definite"
            )
        return factor


def _double(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _log_normal(white: Tensor, sigma: Tensor) -> Tensor:
    return -0.5 * (white.square() + math.log(2 * math.pi)) - sigma.log()
