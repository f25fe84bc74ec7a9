"""ANIL: only the head adapts; the body's features are computed once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metabatch_cli.learners.inner_loop import Points, Weights, adapting, of_model
from metabatch_cli.learners.maml import MAML
from metabatch_cli.models.conv2d import weights_of_each_task


class ANIL(MAML):
    """Raghu et al. 2020, "Rapid Learning or Feature Reuse?" (arXiv:1909.09157), §4.

    MAML whose inner loop changes the last layer only. Context and target go through the body
    apart, so that the target's moments do not enter the context's.

    Args:
        model: with a method `features`, `[points, …] → [points, n]`, and a module `head` behind it.
        ways, arguments: as for `MAML`.

    Raises:
        ValueError: a network that is not of such parts.
    """

    def __init__(self, model: nn.Module, ways: int | None = None, **arguments: Any) -> None:
        super().__init__(model, ways, **arguments)
        head = getattr(model, "head", None)
        own = {}
        if isinstance(head, nn.Module):
            own = {id(part): name for name, part in head.named_parameters()}
        if not own or not hasattr(model, "features"):
            raise ValueError(
                f"{type(model).__name__} has no features(x) and head with weights, of which ANIL "
                "adapts the head (Conv-4: model.head=true)"
            )
        self.of_head = {
            name: own[id(part)] for name, part in model.named_parameters() if id(part) in own
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
        free = adapting(self.model)
        return {own: meta[f"model.{name}"] for name, own in self.of_head.items() if name in free}

    def output(
        self,
        meta: Weights,
        weights: Weights,
        points: Points,
        step: int,
        context: Points | None = None,
    ) -> Tensor:
        head = {own: meta[f"model.{name}"] for name, own in self.of_head.items()}
        return self.call(self.model.head, {**head, **weights}, points)  # type: ignore[arg-type]


class _Features(nn.Module):
    """The body of a network as a module of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.features(x)  # type: ignore[operator]
