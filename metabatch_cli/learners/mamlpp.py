"""MAML++: MAML with what makes its training stable, and rates that are learned."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metabatch_cli.learners.at_once import InnerLoop
from metabatch_cli.learners.inner_loop import GradientBased, Points, Weights, adapting, of_model
from metabatch_cli.models.normalisation import Mode


class MAMLPlusPlus(GradientBased):
    """Antoniou et al. 2019, "How to Train Your MAML" (arXiv:1810.09502), §4.

    The target's loss after every inner step counts, with weights that move to the last step (MSL);
    every layer has a rate of its own at every step (LSLR); normalisation has a scale and a shift
    of its own at every step (BNWB), which the inner loop leaves alone; inner gradients are without
    their derivative at first, if so wanted (DA). Its running statistics at every step (BNRS) are
    tracked and never used in the published code; there are none here.

    Args:
        model, ways: as for `GradientBased`.
        inner_lr: what all rates begin with.
        inner_steps: gradient steps on the context while training.
        epoch: training steps that make an epoch, by which the weights of MSL move (500 in the
            published code).
        multi_step_epochs: epochs after which only the last step counts; 0 for MAML's loss.
        first_order_epochs: epochs without the derivative of the inner gradients.
        eval_steps, inner_loop, normalisation: as for `GradientBased`.
    """

    importance: Tensor
    when_tested: ClassVar = {
        "inner_steps": "eval_steps",
        **dict.fromkeys(("epoch", "multi_step_epochs", "first_order_epochs")),
    }

    def __init__(
        self,
        model: nn.Module,
        ways: int | None = None,
        inner_lr: Annotated[float, Gt(0)] = 0.1,
        inner_steps: Annotated[int, Ge(1)] = 5,
        epoch: Annotated[int, Ge(1)] = 500,
        multi_step_epochs: Annotated[int, Ge(0)] = 10,
        first_order_epochs: Annotated[int, Ge(0)] = 0,
        eval_steps: list[Annotated[int, Ge(0)]] | None = None,
        inner_loop: InnerLoop = "auto",
        normalisation: Mode = "transductive",
    ) -> None:
        super().__init__(model, ways, inner_steps, False, eval_steps, inner_loop, normalisation)
        self.epoch = epoch
        self.multi_step_epochs = multi_step_epochs
        self.first_order_epochs = first_order_epochs
        of_norms = [
            f"{name}.{part}" if name else part
            for name, layer in model.named_modules()
            if isinstance(layer, _BatchNorm)
            for part, _ in layer.named_parameters(recurse=False)
        ]
        self.adapting = [name for name in adapting(model) if name not in of_norms]
        self.of_norms = of_norms
        self.rates = nn.ParameterList(
            torch.full((inner_steps,), inner_lr).to(model.get_parameter(name))
            for name in self.adapting
        )
        self.norms = nn.ParameterList(
            nn.Parameter(own.detach().repeat(inner_steps, 1), requires_grad=own.requires_grad)
            for own in map(model.get_parameter, of_norms)
        )
        for name in of_norms:  # the network's own were only what those of every step begin with
            owner, _, part = name.rpartition(".")
            layer = model.get_submodule(owner)
            before = getattr(layer, part).detach()
            delattr(layer, part)
            layer.register_buffer(part, before, persistent=False)
        self.register_buffer("importance", torch.ones(inner_steps), persistent=False)
        self._epoch_begun: int | None = None
        self.begin(0)

    def begin(self, step: int) -> None:
        epoch = step // self.epoch
        if epoch == self._epoch_begun:
            return
        self._epoch_begun = epoch
        self.first_order = epoch < self.first_order_epochs
        self.only_last = epoch >= self.multi_step_epochs
        if not self.only_last:
            weights = importance(self.inner_steps, epoch, self.multi_step_epochs)
            self.importance.copy_(torch.tensor(weights))

    def phase(self) -> tuple[bool, bool]:
        return self.first_order, self.only_last

    def first(self, meta: Weights, context: Points) -> Weights:
        return of_model(meta, self.adapting)

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, step: int) -> Weights:
        """`θ_l − α_{l,s} ∇L(θ)_l` for every layer's tensor l at step s (LSLR)."""
        rates = {name: meta[f"rates.{n}"] for n, name in enumerate(self.adapting)}
        step = min(step, self.inner_steps - 1)
        return {name: w - rates[name][step] * gradients[name] for name, w in weights.items()}

    def output(
        self,
        meta: Weights,
        weights: Weights,
        points: Points,
        step: int,
        context: Points | None = None,
    ) -> Tensor:
        # a target is normalised as the context was in the step before it
        row = min(step if context is None else max(step - 1, 0), self.inner_steps - 1)
        norms = {name: meta[f"norms.{n}"][row] for n, name in enumerate(self.of_norms)}
        return super().output(meta, {**weights, **norms}, points, step, context)

    def task_loss(self, meta: Weights, context: Points, target: Points) -> Tensor:
        """Of the target after every step, by their importance; later after the last."""
        if self.only_last:
            return super().task_loss(meta, context, target)
        weights = self.first(meta, context)
        losses = []
        for step in range(self.inner_steps):
            weights = self.adapted(meta, weights, context, [step])
            output = self.output(meta, weights, target, step + 1, context)
            losses.append(self.loss_of(output, target))
        together = torch.stack(losses)
        return together @ meta["importance"].to(together.dtype)


def importance(steps: int, epoch: int, epochs: int) -> list[float]:
    """The weight of each step's target loss in an epoch: alike at first, then ever more the last's.

    The published code's `get_per_step_loss_importance_vector`: each but the last loses
    `1/(steps · epochs)` an epoch, to the last one's gain, down to `0.03/steps`.
    """
    lost = epoch / (steps * epochs)
    others = max(1 / steps - lost, 0.03 / steps)
    last = min(1 / steps + lost * (steps - 1), 1 - (steps - 1) * 0.03 / steps)
    return [others] * (steps - 1) + [last]
