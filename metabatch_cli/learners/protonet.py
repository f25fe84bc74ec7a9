"""Prototypical networks: a class is the mean of its embedded support images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.models.masking import blank, joined_masks, mean_loss, task_scores


class ProtoNet(Learner):
    """Snell et al. 2017, "Prototypical Networks for Few-shot Learning" (arXiv:1703.05175).

    Queries are classified by the softmax over negative squared Euclidean distances to the
    prototypes (eq. 2). Tasks may have classes of different numbers: one that a task has no
    context image of has probability 0 there, so the targets are of classes that have one.

    While training, batch statistics are those of one task, its context and target together; in
    evaluation they are the running ones, or again those of one task for a network that keeps
    none. So a batch's other tasks never matter, and the network never sees padding.

    Args:
        model: embeds images, `[images, C, H, W] → [images, features]`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._normalises_by_batch = any(
            isinstance(module, _NormBase) and not module.track_running_stats
            for module in model.modules()
        )

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", higher_is_better=True)

    def forward(self, tasks: Tasks) -> Tensor:
        logits, labels = self._judged(tasks)
        return mean_loss(_losses(logits, labels), tasks.target_mask)

    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """`accuracy`: a fraction of the queries; `log_likelihood`: nats per query."""
        logits, labels = self._judged(tasks)
        of_queries = {
            "accuracy": (logits.argmax(dim=-1) == labels).to(logits.dtype),
            "log_likelihood": -_losses(logits, labels),
        }
        return task_scores(of_queries, tasks.target_mask)

    def predict(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Categorical:
        logits = self._logits(context_x, context_y, target_x, context_mask, target_mask)
        # unchecked: a task that is all padding has no classes
        return Categorical(logits=logits, validate_args=False)

    def _judged(self, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """The logits of the targets, and their labels."""
        logits = self._logits(tasks.context_x, tasks.context_y, tasks.target_x, **tasks.masks)
        return logits, blank(tasks.target_y, tasks.target_mask)

    def _logits(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """`[tasks, n_target, ways]`: minus the squared distance to each prototype."""
        n_context = context_x.shape[1]
        images = torch.cat([context_x, target_x], dim=1)
        embedded = self._embed(images, joined_masks(context_x, context_mask, target_x, target_mask))
        # distances between far points lose their digits in bfloat16, also in the product alone
        with torch.autocast(embedded.device.type, enabled=False):
            embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
            prototypes, shots = class_means(embedded[:, :n_context], context_y, context_mask)
            distances = squared_distances(embedded[:, n_context:], prototypes)
            return (-distances).masked_fill((shots == 0)[:, None, :], -torch.inf)

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """`[tasks, points, features]`, 0 for padding, which the network is not shown."""
        one_by_one = self.training or self._normalises_by_batch
        if mask is None:
            if one_by_one:
                return torch.stack([self.model(task) for task in images])
            return self.model(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        parts = images[mask].split(mask.sum(dim=1).tolist()) if one_by_one else [images[mask]]
        embedded = torch.cat([self.model(part) for part in parts if len(part)])
        return embedded.new_zeros(*mask.shape, embedded.shape[1]).index_put((mask,), embedded)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each target, `[tasks, n_target]`."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)


def class_means(
    embedded: Tensor, labels: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean embedding of each class.

    Args:
        embedded: `[tasks, points, features]`, finite.
        labels: `[tasks, points]` int64, classes 0 … ways − 1.
        mask: bool `[tasks, points]`, True where a point is real; None if all are.

    Returns:
        The means `[tasks, ways, features]`, 0 where a task has no point of the class, and the
        points of each class `[tasks, ways]`; `ways` is the largest label plus one.
    """
    membership = blank(F.one_hot(blank(labels, mask)).to(embedded.dtype), mask)
    shots = membership.sum(dim=1)
    return membership.mT @ embedded / shots.clamp(min=1)[..., None], shots


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """`[tasks, points, centres]` from `[tasks, points, features]` and `[tasks, centres, features]`.

    Expanded into products, `|p|² − 2 p·c + |c|²`: one matrix product instead of a difference
    for every pair.
    """
    cross = points @ centres.mT
    return points.square().sum(-1)[..., None] - 2 * cross + centres.square().sum(-1)[:, None, :]
