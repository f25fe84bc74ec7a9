"""MAML: learn an initialisation from which a few gradient steps solve a new task."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import nn

from metabatch_cli.learners.at_once import InnerLoop
from metabatch_cli.learners.inner_loop import GradientBased, Weights
from metabatch_cli.models.normalisation import Mode


class MAML(GradientBased):
    """Finn et al. 2017, "Model-Agnostic Meta-Learning" (arXiv:1703.03400), algorithms 1 and 2.

    Args:
        model, ways: as for `GradientBased`.
        inner_lr: α, the step size of the inner loop.
        inner_steps: gradient steps on the context while training.
        first_order: whether to leave the derivative of the inner gradients out (§5.2, FOMAML).
        eval_steps, inner_loop, normalisation: as for `GradientBased`.
    """

    def __init__(
        self,
        model: nn.Module,
        ways: int | None = None,
        inner_lr: Annotated[float, Gt(0)] = 0.01,
        inner_steps: Annotated[int, Ge(1)] = 1,
        first_order: bool = False,
        eval_steps: list[Annotated[int, Ge(0)]] | None = None,
        inner_loop: InnerLoop = "auto",
        normalisation: Mode = "transductive",
    ) -> None:
        super().__init__(
            model, ways, inner_steps, first_order, eval_steps, inner_loop, normalisation
        )
        self.inner_lr = inner_lr

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, step: int) -> Weights:
        """`θ − α ∇L(θ)` (eq. 1)."""
        return {name: weight - self.inner_lr * gradients[name] for name, weight in weights.items()}
