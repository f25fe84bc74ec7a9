"""Reptile: move to where the inner loop ends, on average over tasks."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.func import grad_and_value

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.ragged import PaddedTask, Tasks
from metabatch_cli.learners.at_once import InnerLoop
from metabatch_cli.learners.inner_loop import GradientBased, Points, Weights, adapting, of_model
from metabatch_cli.learners.meta_gradient import Found
from metabatch_cli.models.masking import mean_over_tasks
from metabatch_cli.models.normalisation import Mode

InnerOptimizer = Literal["sgd", "adam"]
BETA2 = 0.999  # of Adam, as everywhere


class Reptile(GradientBased):
    """Nichol et al. 2018, "On First-Order Meta-Learning Algorithms" (arXiv:1803.02999), alg. 2.

    There is no target in training: a task takes steps on its context, a part of it at a time, and
    `θ − φ`, from where the steps led back to where they began, stands in for the gradient. So an
    outer SGD with rate ε moves θ by `ε (φ − θ)`, averaged over the tasks of a batch.

    Args:
        model, ways: as for `GradientBased`.
        inner_lr: of the inner optimiser.
        inner_steps: steps on a task while training.
        inner_batch: points of the context that a step sees while training, drawn anew each time
            that all were seen; None for all of them.
        inner_optimizer: `sgd`, or `adam` with β₁ = 0 and β₂ = 0.999, whose mean squares go on from
            batch to batch, as in the published code; there also from task to task, here as their
            average over the tasks of a batch (of its part, with `trainer.accumulate`).
        eval_steps, inner_loop, normalisation: as for `GradientBased`; held-out tasks are adapted
            to with all of their context at every step.
    """

    def __init__(
        self,
        model: nn.Module,
        ways: int | None = None,
        inner_lr: Annotated[float, Gt(0)] = 0.02,
        inner_steps: Annotated[int, Ge(1)] = 5,
        inner_batch: Annotated[int, Ge(1)] | None = 10,
        inner_optimizer: InnerOptimizer = "sgd",
        eval_steps: list[Annotated[int, Ge(0)]] | None = None,
        inner_loop: InnerLoop = "auto",
        normalisation: Mode = "transductive",
    ) -> None:
        super().__init__(model, ways, inner_steps, True, eval_steps, inner_loop, normalisation)
        self.inner_lr = inner_lr
        self.inner_batch = inner_batch
        self.inner_optimizer = one_of("inner_optimizer", inner_optimizer, get_args(InnerOptimizer))
        weights = adapting(model)
        self.names = list(weights)
        if inner_optimizer == "adam":
            for number, weight in enumerate(weights.values()):
                self.register_buffer(f"squares_{number}", torch.zeros_like(weight))
            self.register_buffer("taken", torch.zeros(()))

    def judged(self, tasks: Tasks) -> Tensor | None:
        return tasks.context_mask.any(dim=1) if isinstance(tasks, PaddedTask) else None

    def shown(self, tasks: Tasks) -> tuple[Points, Points]:
        """With the order in which a task's points are seen, `[tasks, inner_steps · inner_batch]`,
        from torch's global generator."""
        context, target = super().shown(tasks)
        (tasks_here, points), device = context["x"].shape[:2], context["x"].device
        if self.inner_batch is None or not points:
            return context, target
        wanted = self.inner_steps * self.inner_batch
        counts, fewest = torch.full((tasks_here, 1), points, device=device), points
        if "mask" in context:
            counts = context["mask"].sum(dim=1, keepdim=True).clamp(min=1)
            fewest = int(counts.min())
        # an order for each time that a task's points are gone through
        keys = torch.rand(-(-wanted // fewest), tasks_here, points).to(device)
        if "mask" in context:
            keys = keys.masked_fill(~context["mask"], 2.0)
        orders = keys.argsort(dim=2).movedim(0, 1).flatten(1)
        place = torch.arange(wanted, device=device)
        order = orders.gather(1, place // counts * points + place % counts)
        return {**context, "order": order}, target

    def first(self, meta: Weights, context: Points) -> Weights:
        """The network's weights; for Adam the mean squares of their gradients, and a count, too."""
        weights = of_model(meta, self.names)
        if self.inner_optimizer == "adam":
            squares = {f"squares_{n}": meta[f"squares_{n}"] for n in range(len(self.names))}
            weights = weights | squares | {"taken": meta["taken"]}
        return weights

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, step: int) -> Weights:
        if self.inner_optimizer == "sgd":
            return {name: w - self.inner_lr * gradients[name] for name, w in weights.items()}
        taken = weights["taken"] + 1
        new = {"taken": taken}
        for number, name in enumerate(self.names):
            squares = BETA2 * weights[f"squares_{number}"]
            squares = squares + (1 - BETA2) * gradients[name].square()
            root = (squares / -torch.expm1(taken * math.log(BETA2))).sqrt() + 1e-8
            new[name] = weights[name] - self.inner_lr * gradients[name] / root
            new[f"squares_{number}"] = squares
        return new

    def output(
        self,
        meta: Weights,
        weights: Weights,
        points: Points,
        step: int,
        context: Points | None = None,
    ) -> Tensor:
        own = {name: weights[name] for name in self.names}
        return super().output(meta, own, points, step, context)

    def batch_loss(
        self, parameters: Weights, buffers: Weights, context: Points, target: Points
    ) -> Tensor:
        """The mean of the losses at all inner steps, over the tasks with a context."""
        return self.loss_and_gradients(parameters, buffers, context, target)[0]

    def loss_and_gradients(
        self, parameters: Weights, buffers: Weights, context: Points, target: Points
    ) -> Found:
        meta = {**parameters, **buffers}
        ended, losses = self._for_each_task(partial(self._walk, meta), context, target)
        mask = context.get("mask")
        began = self.first(meta, {})
        # only tasks with a context led anywhere
        led = {name: mean_over_tasks(end - began[name], mask) for name, end in ended.items()}
        gradients = {name: torch.zeros_like(part) for name, part in parameters.items()}
        gradients |= {f"model.{name}": -led[name] for name in self.names}
        new = {name: began[name] + led[name] for name in led if name not in self.names}
        return mean_over_tasks(losses, mask), gradients, new

    def _walk(self, meta: Weights, context: Points, target: Points) -> tuple[Weights, Tensor]:
        """Where the steps on one task lead, and the mean of the losses on the way."""
        order = context.get("order")
        everything = {name: value for name, value in context.items() if name != "order"}
        weights, losses = self.first(meta, context), []
        for step in range(self.inner_steps):
            part = everything
            if order is not None and self.inner_batch is not None:
                chosen = order[step * self.inner_batch : (step + 1) * self.inner_batch]
                part = {name: value[chosen] for name, value in everything.items()}

            def loss_of(weights: Weights, part: Points = part, step: int = step) -> Tensor:
                return self.loss_of(self.output(meta, weights, part, step), part)

            gradients, loss = grad_and_value(loss_of)(weights)
            weights = self.stepped(meta, weights, gradients, step)
            losses.append(loss)
        return weights, torch.stack(losses).mean()
