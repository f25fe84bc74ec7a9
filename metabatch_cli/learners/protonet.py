"""Prototypical networks: a class is the mean of its embedded support images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from metabatch_cli.batching.task import Task
from metabatch_cli.learners.learner import Learner, Metric


class ProtoNet(Learner):
    """Snell et al. 2017, "Prototypical Networks for Few-shot Learning" (arXiv:1703.05175).

    Queries are classified by the softmax over negative squared Euclidean distances to the
    prototypes (eq. 2). Every class of a task must have a context image.

    While training, batch statistics are those of one task, its context and target together; in
    evaluation they are the running ones, or again those of one task for a network that keeps
    none. So a batch's other tasks never matter.

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

    def forward(self, tasks: Task) -> Tensor:
        logits = self._logits(tasks.context_x, tasks.context_y, tasks.target_x)
        return F.cross_entropy(logits.flatten(0, 1), tasks.target_y.flatten())

    def score(self, tasks: Task) -> dict[str, Tensor]:
        """`accuracy`: a fraction of the queries; `log_likelihood`: nats per query."""
        logits = self._logits(tasks.context_x, tasks.context_y, tasks.target_x)
        losses = F.cross_entropy(logits.mT, tasks.target_y, reduction="none")
        hits = logits.argmax(dim=-1) == tasks.target_y
        return {
            "accuracy": hits.to(logits.dtype).mean(dim=1),
            "log_likelihood": -losses.mean(dim=1),
        }

    def predict(self, context_x: Tensor, context_y: Tensor, target_x: Tensor) -> Categorical:
        return Categorical(logits=self._logits(context_x, context_y, target_x))

    def _logits(self, context_x: Tensor, context_y: Tensor, target_x: Tensor) -> Tensor:
        """`[tasks, n_target, ways]`: minus the squared distance to each prototype."""
        n_context = context_x.shape[1]
        images = torch.cat([context_x, target_x], dim=1)
        if self.training or self._normalises_by_batch:
            embedded = torch.stack([self.model(task) for task in images])
        else:
            embedded = self.model(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        # distances between far points lose their digits in bfloat16, also in the product alone
        with torch.autocast(embedded.device.type, enabled=False):
            embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
            prototypes = class_means(embedded[:, :n_context], context_y)
            return -squared_distances(embedded[:, n_context:], prototypes)


def class_means(embedded: Tensor, labels: Tensor) -> Tensor:
    """The mean embedding of each class.

    Args:
        embedded: `[tasks, points, features]`.
        labels: `[tasks, points]` int64, classes 0 … ways − 1.

    Returns:
        `[tasks, ways, features]`, `ways` being the largest label plus one.
    """
    membership = F.one_hot(labels).to(embedded.dtype)
    return membership.mT @ embedded / membership.sum(dim=1)[..., None]


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """`[tasks, points, centres]` from `[tasks, points, features]` and `[tasks, centres, features]`.

    Expanded into products, `|p|² − 2 p·c + |c|²`: one matrix product instead of a difference
    for every pair.
    """
    cross = points @ centres.mT
    return points.square().sum(-1)[..., None] - 2 * cross + centres.square().sum(-1)[:, None, :]
