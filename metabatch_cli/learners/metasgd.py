"""Meta-SGD: learn how far and which way to step, for every weight, beside where to begin."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import nn

from metabatch_cli.learners.at_once import InnerLoop
from metabatch_cli.learners.inner_loop import GradientBased, Weights, adapting
from metabatch_cli.models.normalisation import Mode


class MetaSGD(GradientBased):
    """Li et al. 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning"
    (arXiv:1707.09835), algorithms 1 and 2.

    Args:
        model, ways: as for `GradientBased`.
        inner_lr: what all rates α begin with: a number, or a range from which one is drawn (the
            paper has [0.005, 0.1]).
        inner_steps: gradient steps on the context while training (one in the paper).
        first_order: whether to leave the derivative of the inner gradients out.
        eval_steps, inner_loop, normalisation: as for `GradientBased`.
    """

    def __init__(
        self,
        model: nn.Module,
        ways: int | None = None,
        inner_lr: Annotated[float, Gt(0)] | tuple[float, float] = (0.005, 0.1),
        inner_steps: Annotated[int, Ge(1)] = 1,
        first_order: bool = False,
        eval_steps: list[Annotated[int, Ge(0)]] | None = None,
        inner_loop: InnerLoop = "auto",
        normalisation: Mode = "transductive",
    ) -> None:
        super().__init__(
            model, ways, inner_steps, first_order, eval_steps, inner_loop, normalisation
        )
        low, high = (inner_lr, inner_lr) if isinstance(inner_lr, int | float) else inner_lr
        if not 0 < low <= high:
            raise ValueError(f"inner_lr={inner_lr} must be a rate above 0, or a range of such")
        first = low + (high - low) * torch.rand(()).item()
        weights = adapting(model)
        self.names = list(weights)
        self.rates = nn.ParameterList(torch.full_like(w, first) for w in weights.values())

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, step: int) -> Weights:
        """`θ − α ∘ ∇L(θ)` (eq. 3), α of the shape of θ."""
        rates = {name: meta[f"rates.{number}"] for number, name in enumerate(self.names)}
        return {name: weight - rates[name] * gradients[name] for name, weight in weights.items()}
