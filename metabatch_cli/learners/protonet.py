"""Prototypical networks: a class is the mean of its embedded support images."""

from __future__ import annotations

from torch import Tensor

from metabatch_cli.learners.embedding import (
    EmbeddingLearner,
    class_means,
    squared_distances,
    without_absent,
)


class ProtoNet(EmbeddingLearner):
    """Snell et al. 2017, "Prototypical Networks for Few-shot Learning" (arXiv:1703.05175).

    Queries are classified by the softmax over negative squared Euclidean distances to the
    prototypes (eq. 2).
    """

    def compare(
        self,
        context: Tensor,
        labels: Tensor,
        target: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        prototypes, shots = class_means(context, labels, context_mask)
        return without_absent(-squared_distances(target, prototypes), shots)
