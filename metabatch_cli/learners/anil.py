"""ANIL: only the head adapts; the body's features are computed once."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import Tensor, nn

from metabatch_cli.learners.at_once import InnerLoop
from metabatch_cli.learners.inner_loop import GradientBased, Points, Weights, of_model
from metabatch_cli.models.conv2d import weights_of_each_task
from metabatch_cli.models.normalisation import Mode


class ANIL(GradientBased):
    """Raghu et al. 2020, "Rapid Learning or Feature Reuse?" (arXiv:1909.09157), §4.

    MAML whose inner loop changes the last layer only. Context and target go through the body
    apart, so that the target's moments do not enter the context's.

    Args:
        model: with a method `features`, `[points, …] → [points, n]`, and a module `head` behind it.
        ways: as for `GradientBased`.
        inner_lr: α, the step size of the inner loop.
        inner_steps: gradient steps on the context while training.
        first_order: whether to leave the derivative of the inner gradients out.
        eval_steps, inner_loop, normalisation: as for `GradientBased`.

    Raises:
        ValueError: a network that is not of such parts.
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
        head = getattr(model, "head", None)
        own = {id(part) for part in head.parameters()} if isinstance(head, nn.Module) else set()
        if not own or not hasattr(model, "features"):
            raise ValueError(
                f"{type(model).__name__} has no features(x) and head with weights, of which ANIL "
                "adapts the head (Conv-4: model.head=true)"
            )
        self.of_head = {
            name: name.rpartition(".")[2]
            for name, part in model.named_parameters()
            if id(part) in own
        }
        self._body = (_Features(model),)  # in a tuple: no module of this one a second time

    def seen(self, meta: Weights, context: Points, target: Points) -> tuple[Points, Points]:
        """Features instead of x: the body is the same for all tasks."""
        weights = {f"model.{name}": weight for name, weight in of_model(meta).items()}
        with weights_of_each_task(False):
            of_target = self.call(self._body[0], weights, target, context)
            of_context = self.call(self._body[0], weights, context)
        return {**context, "x": of_context}, {**target, "x": of_target}

    def first(self, meta: Weights, context: Points) -> Weights:
        return {own: meta[f"model.{name}"] for name, own in self.of_head.items()}

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, step: int) -> Weights:
        return {name: weight - self.inner_lr * gradients[name] for name, weight in weights.items()}

    def output(
        self,
        meta: Weights,
        weights: Weights,
        points: Points,
        step: int,
        context: Points | None = None,
    ) -> Tensor:
        return self.call(self.model.head, weights, points)  # type: ignore[arg-type]


class _Features(nn.Module):
    """The body of a network as a module of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.features(x)  # type: ignore[operator]
