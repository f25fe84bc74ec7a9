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

from metabatch_cli.batching.task import Task
from metabatch_cli.learners.learner import Learner, Metric

Weights = dict[str, Tensor]


class MAML(Learner):
    """Finn et al. 2017, "Model-Agnostic Meta-Learning" (arXiv:1703.03400), algorithms 1 and 2.

    All tasks of a batch adapt at once, `vmap` over the inner loop, unless the network has
    convolutions, which that makes slower on CPUs, or normalisation layers, whose second
    derivatives it gets wrong (torch 2.13): then one after the other. The inner loss is the mean
    squared error where y is float, cross-entropy where it is a class.

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

    def forward(self, tasks: Task) -> Tensor:
        weights: Weights = {**dict(self.model.named_parameters())}

        def target_loss(cx: Tensor, cy: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
            adapted = self._adapt(weights, cx, cy, self.inner_steps)
            return self._loss(self._call(adapted, tx), ty)

        (losses,) = self._for_each_task(lambda *task: [target_loss(*task)], *tasks[:4])
        return losses.mean()

    @torch.no_grad()
    def score(self, tasks: Task) -> dict[str, Tensor]:
        """`mse@steps=K`, or `accuracy@steps=K`, for every K of `eval_steps`."""
        scores = {}
        outputs = self._outputs(tasks.context_x, tasks.context_y, tasks.target_x, self.eval_steps)
        for steps, output in zip(self.eval_steps, outputs, strict=True):
            if self.classifies:
                hits = output.argmax(dim=-1) == tasks.target_y
                scores[f"accuracy@steps={steps}"] = hits.to(output.dtype).mean(dim=1)
            else:
                squares = (output - tasks.target_y).square()
                scores[f"mse@steps={steps}"] = squares.mean(dim=(1, 2))
        return scores

    @torch.no_grad()
    def predict(self, context_x: Tensor, context_y: Tensor, target_x: Tensor) -> Distribution:
        """After the monitored number of steps; regression has no spread of its own: σ = 1."""
        steps = int(self.metric.name.rpartition("=")[2])
        (output,) = self._outputs(context_x, context_y, target_x, [steps])
        if self.classifies:
            return Categorical(logits=output)
        return Independent(Normal(output, torch.ones_like(output)), 1)

    def _outputs(
        self, context_x: Tensor, context_y: Tensor, target_x: Tensor, checkpoints: Sequence[int]
    ) -> list[Tensor]:
        """The network's outputs `[tasks, n_target, dim_y]` after each number of inner steps."""
        start = {name: weight.detach() for name, weight in self.model.named_parameters()}

        def solve(cx: Tensor, cy: Tensor, tx: Tensor) -> list[Tensor]:
            weights, done, outputs = start, 0, []
            for steps in checkpoints:
                weights = self._adapt(weights, cx, cy, steps - done)
                done = steps
                outputs.append(self._call(weights, tx))
            return outputs

        return self._for_each_task(solve, context_x, context_y, target_x)

    def _for_each_task(self, solve: Callable[..., list[Tensor]], *fields: Tensor) -> list[Tensor]:
        """What `solve` makes of each task's fields, stacked: all at once, or one by one."""
        if self._at_once is None:
            self._at_once = self._looks_safe_at_once(fields[0][0])
        if self._at_once:
            return vmap(solve)(*fields)
        solved = [solve(*task) for task in zip(*fields, strict=True)]
        return [torch.stack(part) for part in zip(*solved, strict=True)]

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

    def _adapt(self, weights: Weights, x: Tensor, y: Tensor, steps: int) -> Weights:
        """The weights after some gradient steps on one task's context."""
        context_gradient = grad(lambda weights: self._loss(self._call(weights, x), y))
        for _ in range(steps):
            gradient = context_gradient(weights)
            if self.first_order:
                gradient = {name: part.detach() for name, part in gradient.items()}
            weights = {
                name: weight - self.inner_lr * gradient[name] for name, weight in weights.items()
            }
        return weights

    def _call(self, weights: Weights, x: Tensor) -> Tensor:
        return functional_call(self.model, weights, (x,))

    def _loss(self, output: Tensor, y: Tensor) -> Tensor:
        if self.classifies:
            return F.cross_entropy(output, y)
        return F.mse_loss(output, y)


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
