"""R2D2: the head is the ridge regression of the context's classes, in closed form."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from metabatch_cli.learners.embedding import EmbeddingLearner, membership, without_absent
from metabatch_cli.models.masking import blank
from metabatch_cli.models.normalisation import Mode


class R2D2(EmbeddingLearner):
    """Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers"
    (arXiv:1805.08136).

    The context's classes, as ones and zeros, are regressed on its embeddings (eq. 4), and
    `α X W` are the targets' logits; λ and α are learned with the network. The paper's β (eq. 5),
    added to the logits of all classes, is left out: no softmax changes by it.

    Args:
        model: embeds points, `[points, …] → [points, features]`.
        ridge: λ, to begin with; its logarithm is the parameter.
        scale: α, to begin with.
        intercept: whether the regression has a constant term, a further feature that is 1.
        normalisation: whose moments normalise, see `EmbeddingLearner`.
    """

    def __init__(
        self,
        model: nn.Module,
        ridge: Annotated[float, Gt(0)] = 1.0,
        scale: float = 10.0,
        intercept: bool = True,
        normalisation: Mode = "running",
    ) -> None:
        super().__init__(model, normalisation)
        if not ridge > 0:
            raise ValueError(f"ridge={ridge} must be positive: it is what makes the solution one")
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.intercept = intercept

    def compare(
        self,
        context: Tensor,
        labels: Tensor,
        target: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        if self.intercept:
            context = torch.cat([context, torch.ones_like(context[..., :1])], dim=-1)
            target = torch.cat([target, torch.ones_like(target[..., :1])], dim=-1)
        classes = membership(labels, context_mask, context.dtype)
        weights = ridge_regression(blank(context, context_mask), classes, self.log_ridge.exp())
        return without_absent(self.scale * (target @ weights), classes.sum(dim=1))


def ridge_regression(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    """`W = (Xᵀ X + λ I)⁻¹ Xᵀ Y`, the W that makes `|X W − Y|² + λ |W|²` least, of many tasks.

    Where points are fewer than features, the same as `Xᵀ (X Xᵀ + λ I)⁻¹ Y` (Woodbury's identity;
    Bertinetto et al. 2019, eq. 4): a system as large as the points. A point of zeros, in x and
    y, changes nothing.

    Args:
        x: `[tasks, points, features]`.
        y: `[tasks, points, outputs]`.
        ridge: λ > 0, `[]`.

    Returns:
        `[tasks, features, outputs]`.
    """
    points, features = x.shape[1:]
    penalty = ridge * torch.eye(min(points, features), dtype=x.dtype, device=x.device)
    if points < features:
        return x.mT @ torch.linalg.solve(x @ x.mT + penalty, y)
    return torch.linalg.solve(x.mT @ x + penalty, x.mT @ y)
