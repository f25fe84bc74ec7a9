"""MAML: learn an initialisation from which a few gradient steps solve a new task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.models.masking import blank, masked_mean, mean_over_tasks, task_scores

Weights = dict[str, Tensor]
Points = dict[str, Tensor]  # a context or a target: x, y and, if padded, mask


class MAML(Learner):
    """Finn et al. 2017, "Model-Agnostic Meta-Learning" (arXiv:1703.03400), algorithms 1 and 2.

    All tasks of a batch adapt at once, `vmap` over the inner loop, unless the network has
    convolutions, which that makes slower on CPUs, or normalisation layers, whose second
    derivatives it gets wrong (torch 2.13): then one after the other. The inner loss is the mean
    squared error where y is float, cross-entropy where it is a class.

    Of tasks of unequal sizes, both losses are means over the real points, and a task without
    context does not adapt. Padded tasks adapt at once only if the network treats every point by
    itself; else it sees one after the other, without the padding.

    Args:
        model: `[points, …] → [points, dim_y]`; without running statistics, into which an inner
            loop would write (Conv-4: `norm: transductive`).
        ways: classes in a task, None for regression; given by the task set.
        inner_lr: α, the step size of the inner loop.
        inner_steps: gradient steps on the context while training.
        first_order: whether to leave the derivative of the inner gradients out (§5.2, FOMAML).
        eval_steps: numbers of inner steps to report; the first positive one is monitored.
    """

    has_spread = False

    def __init__(
        self,
        model: nn.Module,
        ways: int | None = None,
        inner_lr: Annotated[float, Gt(0)] = 0.01,
        inner_steps: Annotated[int, Ge(1)] = 1,
        first_order: bool = False,
        eval_steps: list[Annotated[int, Ge(0)]] | None = None,
    ) -> None:
        super().__init__()
        shared = [name for name, _ in model.named_buffers()]
        if shared:
            raise ValueError(
                f"the model keeps running statistics ({shared[0]}), into which every task's "
                "inner loop would write: choose a normalisation without them "
                "(model.norm=transductive)"
            )
        self.model = model
        self.ways = ways
        self.classifies = ways is not None
        self._at_once: bool | None = None  # decided by the first task
        self._points_apart: bool | None = None  # decided by the first padded one
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.eval_steps = sorted(set(eval_steps if eval_steps is not None else [inner_steps]))
        if not self.eval_steps:
            raise ValueError("eval_steps=[] leaves nothing to report: give at least one number")

    @property
    def metric(self) -> Metric:
        steps = next((steps for steps in self.eval_steps if steps > 0), self.eval_steps[0])
        if self.classifies:
            return Metric(f"accuracy@steps={steps}", higher_is_better=True)
        return Metric(f"mse@steps={steps}", higher_is_better=False)

    def forward(self, tasks: Tasks) -> Tensor:
        weights: Weights = {**dict(self.model.named_parameters())}

        def target_loss(context: Points, target: Points) -> list[Tensor]:
            adapted = self._adapt(weights, context, self.inner_steps)
            return [self._loss(adapted, target)]

        context = _points(tasks.context_mask, x=tasks.context_x, y=tasks.context_y)
        target = _points(tasks.target_mask, x=tasks.target_x, y=tasks.target_y)
        (losses,) = self._for_each_task(target_loss, context, target)
        return mean_over_tasks(losses, tasks.target_mask)

    @torch.no_grad()
    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """`mse@steps=K`, or `accuracy@steps=K`, for every K of `eval_steps`."""
        of_points = {}
        context = _points(tasks.context_mask, x=tasks.context_x, y=tasks.context_y)
        target = _points(tasks.target_mask, x=tasks.target_x)
        outputs = self._outputs(context, target, self.eval_steps)
        target_y = blank(tasks.target_y, tasks.target_mask)
        for steps, output in zip(self.eval_steps, outputs, strict=True):
            if self.classifies:
                hits = output.argmax(dim=-1) == target_y
                of_points[f"accuracy@steps={steps}"] = hits.to(output.dtype)
            else:
                of_points[f"mse@steps={steps}"] = (output - target_y).square().mean(dim=2)
        return task_scores(of_points, tasks.target_mask)

    @torch.no_grad()
    def predict(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Distribution:
        """After the monitored number of steps; regression has no spread of its own: σ = 1."""
        steps = int(self.metric.name.rpartition("=")[2])
        context = _points(context_mask, x=context_x, y=context_y)
        (output,) = self._outputs(context, _points(target_mask, x=target_x), [steps])
        if self.classifies:
            return Categorical(logits=output)
        return Independent(Normal(output, torch.ones_like(output)), 1)

    def _outputs(self, context: Points, target: Points, checkpoints: Sequence[int]) -> list[Tensor]:
        """The network's outputs `[tasks, n_target, dim_y]` after each number of inner steps."""
        start = {name: weight.detach() for name, weight in self.model.named_parameters()}

        def solve(context: Points, target: Points) -> list[Tensor]:
            weights, done, outputs = start, 0, []
            for steps in checkpoints:
                weights = self._adapt(weights, context, steps - done)
                done = steps
                outputs.append(self._call(weights, target))
            return outputs

        return self._for_each_task(solve, context, target)

    def _for_each_task(
        self, solve: Callable[[Points, Points], list[Tensor]], context: Points, target: Points
    ) -> list[Tensor]:
        """What `solve` makes of each task, stacked: all at once, or one by one."""
        if self._can_go_at_once(context, target):
            return vmap(solve)(context, target)
        solved = [solve(*task) for task in zip(_each(context), _each(target), strict=True)]
        return [torch.stack(part) for part in zip(*solved, strict=True)]

    def _can_go_at_once(self, context: Points, target: Points) -> bool:
        """Whether tasks can adapt under vmap; asked of the network once, then remembered."""
        if self._at_once is None:
            self._at_once = self._looks_safe_at_once(context["x"][0])
        if not self._at_once or ("mask" not in context and "mask" not in target):
            return self._at_once
        if self._points_apart is None:
            self._points_apart = self._treats_points_apart(target["x"])
        return self._points_apart

    @torch.no_grad()
    def _looks_safe_at_once(self, x: Tensor) -> bool:
        """Whether tasks can adapt under vmap: by what the network computes, not by its name."""
        with _Operators() as operators:
            output = self.model(x)
        if self.ways is not None and output.shape[-1] != self.ways:
            raise ValueError(
                f"the network has {output.shape[-1]} outputs for ways={self.ways} classes (Conv-4 "
                "is an embedding unless model.head=true)"
            )
        return not any("norm" in name or "conv" in name for name in operators.names)

    def _treats_points_apart(self, x: Tensor) -> bool:
        """Whether a point's output depends on no other point, so that padding cannot matter."""
        if not x.is_floating_point():
            return False  # nothing to differentiate by: one after the other is always right
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(4, *x.shape[2:], generator=generator).to(x).requires_grad_()
        with torch.enable_grad():
            first = self.model(points)[0].flatten()
            # weighted, since a plain sum may be constant (of probabilities it is 1)
            weighted = first @ torch.arange(1, len(first) + 1).to(first)
            (gradient,) = torch.autograd.grad(weighted, points, allow_unused=True)
        return gradient is None or not gradient[1:].any()

    def _adapt(self, weights: Weights, context: Points, steps: int) -> Weights:
        """The weights after some gradient steps on one task's context."""
        context_gradient = grad(lambda weights: self._loss(weights, context))
        for _ in range(steps):
            gradient = context_gradient(weights)
            if self.first_order:
                gradient = {name: part.detach() for name, part in gradient.items()}
            weights = {
                name: weight - self.inner_lr * gradient[name] for name, weight in weights.items()
            }
        return weights

    def _call(self, weights: Weights, points: Points) -> Tensor:
        """The network's outputs `[points, dim_y]` for one task's points, padding among them."""
        mask = points.get("mask")
        if mask is None or (self._at_once and self._points_apart):
            return functional_call(self.model, weights, (points["x"],))
        if not mask.any():  # the network has to be shown something
            mask = torch.ones_like(mask)
        real = functional_call(self.model, weights, (points["x"][mask],))
        return real.new_zeros(len(mask), *real.shape[1:]).index_put((mask,), real)

    def _loss(self, weights: Weights, points: Points) -> Tensor:
        """The mean loss over one task's points; 0 if there is none."""
        mask = points.get("mask")
        loss_of = F.cross_entropy if self.classifies else F.mse_loss
        output = self._call(weights, points)
        if mask is None:
            return loss_of(output, points["y"])
        losses = loss_of(output, points["y"], reduction="none")
        return masked_mean(losses, mask, dim=0).mean()


def _points(mask: Tensor | None, **values: Tensor) -> Points:
    """Contexts or targets, with zeros for padding and their mask where there is one."""
    if mask is None:
        return values
    return {**{name: blank(value, mask) for name, value in values.items()}, "mask": mask}


def _each(points: Points) -> list[Points]:
    """Those of each task."""
    columns = zip(*points.values(), strict=True)
    return [dict(zip(points, column, strict=True)) for column in columns]


class _Operators(TorchDispatchMode):
    """Meanwhile, the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))
