"""ProtoMAML: MAML whose last layer begins as the classifier of prototypical networks."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from metabatch_cli.learners.embedding import check_embeds
from metabatch_cli.learners.inner_loop import Points, Weights, adapting, of_model
from metabatch_cli.learners.maml import MAML

HEAD = ("prototypes.weight", "prototypes.bias")


class ProtoMAML(MAML):
    """Triantafillou et al. 2020, "Meta-Dataset" (arXiv:1903.03096), §3.

    A linear layer with weights `2 c_k` and biases `−‖c_k‖²`, of the prototypes `c_k` of a task's
    classes, scores as negative squared distances do, up to what is the same for all classes.
    From there, it and the embedding adapt as in MAML; gradients go through the prototypes.

    Args:
        model: embeds images, `[points, …] → [points, n]`.
        ways: classes in a task; given by the task set.
        inner_steps: gradient steps on the context while training.
        first_order: whether to leave the derivative of the inner gradients out, as in the paper.
        arguments: as for `MAML`.

    Raises:
        ValueError: tasks that have no classes.
    """

    def __init__(
        self,
        model: nn.Module,
        ways: int | None = None,
        inner_steps: Annotated[int, Ge(1)] = 5,
        first_order: bool = True,
        **arguments: Any,
    ) -> None:
        if ways is None:
            raise ValueError("ProtoMAML begins with the prototypes of classes: tasks need ways")
        check_embeds(model, "ProtoMAML")
        super().__init__(model, ways, inner_steps=inner_steps, first_order=first_order, **arguments)
        self.n_classes = ways

    def first(self, meta: Weights, context: Points) -> Weights:
        """All of the embedding, and a head made of the context's prototypes."""
        weights = of_model(meta, adapting(self.model))
        embedded = self.call(self.model, of_model(meta), context)
        embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        labels = torch.arange(self.n_classes, device=embedded.device)
        members = (context["y"][:, None] == labels).to(embedded.dtype)  # [points, ways]
        if "mask" in context:
            members = members * context["mask"][:, None]
        counts = members.sum(dim=0)[:, None]
        with torch.autocast(embedded.device.type, enabled=False):  # in as many bits, as in `output`
            prototypes = members.mT @ embedded / counts.clamp(min=1)
        # a class without an image in the context is no answer
        absent = torch.where(counts[:, 0] > 0, 0.0, -1e4).to(embedded.dtype)
        head = 2 * prototypes, absent - prototypes.square().sum(dim=1)
        return weights | dict(zip(HEAD, head, strict=True))

    def output(
        self,
        meta: Weights,
        weights: Weights,
        points: Points,
        step: int,
        context: Points | None = None,
    ) -> Tensor:
        body = {name: weight for name, weight in weights.items() if name not in HEAD}
        embedded = self.call(self.model, {**of_model(meta), **body}, points, context)
        # 2c·x − ‖c‖² loses its digits in fewer bits
        embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        with torch.autocast(embedded.device.type, enabled=False):
            return F.linear(embedded, *(weights[name].to(embedded.dtype) for name in HEAD))
