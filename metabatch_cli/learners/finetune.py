"""Fine-tuning: an ordinary classifier of all training classes, and a new head for each task."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from metabatch_cli.batching.arguments import at_least, one_of
from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners.embedding import (
    EmbeddingLearner,
    cross_entropies,
    embedded_shape,
    membership,
    widened,
    without_absent,
)
from metabatch_cli.models.masking import blank, joined_masks, masked_mean, mean_over_tasks
from metabatch_cli.models.normalisation import Mode


class Finetune(EmbeddingLearner):
    """Chen et al. 2019, "A Closer Look at Few-shot Classification" (arXiv:1904.04232), §3.2.

    While training, no task is solved: network and head learn by cross-entropy to tell all classes
    of the training split apart, contexts and targets alike (`aux["classes"]` names them). In
    evaluation the network stays as it is, and a new head learns from the context by gradient
    steps with momentum, the heads of all tasks at once.

    Args:
        model: embeds points, `[points, …] → [points, features]`.
        classes: of the training split, given by the task set.
        x_shape: of a point, given by the task set.
        head: `linear`, the paper's Baseline; `cosine`, its Baseline++, without a bias, where
            logits are the cosine between embedding and weights times `scale`.
        scale: of the cosine head.
        eval_steps: gradient steps on the whole context, in evaluation.
        eval_lr: the length of these.
        momentum: of these.
        weight_decay: of the new head.
        normalisation: whose moments normalise, see `EmbeddingLearner`.

    Raises:
        ValueError: a task set that does not count its classes.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int | None = None,
        x_shape: tuple[int, ...] | None = None,
        head: Literal["linear", "cosine"] = "linear",
        scale: Annotated[float, Gt(0)] = 10.0,
        eval_steps: Annotated[int, Ge(0)] = 100,
        eval_lr: Annotated[float, Gt(0)] = 0.01,
        momentum: Annotated[float, Ge(0)] = 0.9,
        weight_decay: Annotated[float, Ge(0)] = 0.001,
        normalisation: Mode = "running",
    ) -> None:
        super().__init__(model, normalisation)
        if classes is None:
            raise ValueError(
                "classes=None: the task set does not say how many classes it draws from "
                "(TaskSpec.classes), and there is no head for all of them"
            )
        self.head = one_of("head", head, ("linear", "cosine"))
        self.scale = scale
        self.eval_steps = at_least("eval_steps", eval_steps, 0)
        self.eval_lr = eval_lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        (features,) = embedded_shape(model, x_shape)
        bound = 1 / math.sqrt(features)
        self.weight = nn.Parameter(torch.empty(classes, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(classes)) if head == "linear" else None

    def forward(self, tasks: Tasks) -> Tensor:
        """The cross-entropy of all points, context and target, among all training classes."""
        if "classes" not in tasks.aux:
            raise ValueError(
                'aux has no "classes": fine-tuning learns from which class of the split each label '
                "of a task stands for, int64 [tasks, ways], as tasksets.episodes.Episodes says it"
            )
        masks = tasks.masks
        embedded = widened(self.embed(tasks.context_x, tasks.target_x, **masks))
        mask = joined_masks(tasks.context_x, tasks.context_mask, tasks.target_x, tasks.target_mask)
        labels = blank(torch.cat([tasks.context_y, tasks.target_y], dim=1), mask)
        with torch.autocast(embedded.device.type, enabled=False):
            logits = self._logits_of(embedded, self.weight, self.bias)
            losses = cross_entropies(logits, tasks.aux["classes"].gather(1, labels))
        return mean_over_tasks(masked_mean(losses, mask), tasks.target_mask)

    @torch.no_grad()
    def compare(
        self,
        context: Tensor,
        labels: Tensor,
        target: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        classes = membership(labels, context_mask, context.dtype)
        weight, bias = self._new_heads(context, classes)
        return without_absent(self._logits_of(target, weight, bias), classes.sum(dim=1))

    def _logits_of(self, embedded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[tasks, points, classes]` from `[tasks, points, features]`.

        Args:
            weight: `[classes, features]`, or `[tasks, classes, features]`.
            bias: `[classes]` or `[tasks, classes]`; None for a cosine head.
        """
        if bias is None:
            return self.scale * F.normalize(embedded, dim=-1) @ F.normalize(weight, dim=-1).mT
        return embedded @ weight.mT + bias[..., None, :]

    def _new_heads(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | None]:
        """A head for each task, learned from its context: weights and bias.

        The loss is the mean cross-entropy of the context; its gradient is written out: with
        `D = (softmax − Y) / n`, it is `Dᵀ X` for the weights and the sum of D for the bias.

        Args:
            x: `[tasks, n_context, features]`, 0 for padding.
            classes: ones and zeros `[tasks, n_context, ways]`.
        """
        cosine = self.head == "cosine"
        n_tasks, _, ways = classes.shape
        shots = classes.sum(dim=1)
        share = classes.sum(dim=2, keepdim=True) / shots.sum(dim=1).clamp(min=1)[:, None, None]
        weight = self._beginning(ways, x).repeat(n_tasks, 1, 1)
        bias = None if cosine else x.new_zeros(n_tasks, ways)
        velocity, bias_velocity = torch.zeros_like(weight), x.new_zeros(n_tasks, ways)
        given = self.scale * F.normalize(x, dim=-1) if cosine else x
        for _ in range(self.eval_steps):
            logits = without_absent(self._logits_of(x, weight, bias), shots)
            # a task without any context has no classes, and the share 0
            wrong = (logits.softmax(dim=-1).nan_to_num(0) - classes) * share
            gradient = wrong.mT @ given
            if cosine:  # only what turns the weights counts
                direction = F.normalize(weight, dim=-1)
                along = (gradient * direction).sum(dim=-1, keepdim=True) * direction
                gradient = (gradient - along) / weight.norm(dim=-1, keepdim=True)
            velocity = self.momentum * velocity + gradient + self.weight_decay * weight
            weight = weight - self.eval_lr * velocity
            if bias is not None:
                of_bias = wrong.sum(dim=1) + self.weight_decay * bias
                bias_velocity = self.momentum * bias_velocity + of_bias
                bias = bias - self.eval_lr * bias_velocity
        return weight, bias

    def _beginning(self, ways: int, x: Tensor) -> Tensor:
        """The weights `[ways, features]` that new heads begin with, always the same ones.

        Zeros, whose gradient tells the classes apart; of a cosine head, which needs a direction,
        random ones.
        """
        features = x.shape[-1]
        if self.head == "linear":
            return x.new_zeros(ways, features)
        rows = []
        for label in range(ways):
            generator = torch.Generator().manual_seed(label)
            rows.append(torch.randn(features, generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(x) / math.sqrt(features)
