"""Relation networks: a network says how much alike a target and a class are."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from metabatch_cli.batching.arguments import at_least, one_of
from metabatch_cli.learners.embedding import (
    EmbeddingLearner,
    class_means,
    embedded_shape,
    widened,
    without_absent,
)
from metabatch_cli.models.normalisation import BatchNorm, Mode, normalised


class RelationNet(EmbeddingLearner):
    """Sung et al. 2018, "Learning to Compare: Relation Network for Few-Shot Learning"
    (arXiv:1711.06025).

    A class is the sum of its context's feature maps (§3.2); the relation module sees it beside
    those of a target and gives a relation score from 0 to 1 (eq. 1), whose squared distance from
    1 for the right class and 0 for the others is the loss (eq. 3). As probabilities of
    classes (for `log_likelihood` and predictions) the scores are divided by their sum.

    The module's own normalisation follows the mode too; under `support`, the moments are those of
    the context's points beside the classes.

    Args:
        model: embeds points as maps, `[points, …] → [points, channels, height, width]`
            (Conv-4: `flatten: false`, and not pooled to a single pixel: `pools: 2`).
        x_shape: of a point, given by the task set.
        width: channels of the relation module's two blocks.
        hidden: units before the score.
        prototype: whether a class is the `sum` of its maps, as in the paper, or their `mean`,
            which depends less on the number of shots.
        normalisation: whose moments normalise, see `EmbeddingLearner`.

    Raises:
        ValueError: a model that gives vectors.
    """

    exact = False  # the relation module is a network

    def __init__(
        self,
        model: nn.Module,
        x_shape: tuple[int, ...] | None = None,
        width: Annotated[int, Ge(1)] = 64,
        hidden: Annotated[int, Ge(1)] = 8,
        prototype: Literal["sum", "mean"] = "sum",
        normalisation: Mode = "running",
    ) -> None:
        super().__init__(model, normalisation)
        at_least("width", width, 1)
        at_least("hidden", hidden, 1)
        self.prototype = one_of("prototype", prototype, ("sum", "mean"))
        shape = embedded_shape(model, x_shape)
        if len(shape) != 3:
            raise ValueError(
                f"model embeds a point as {list(shape)}, but relations are seen in feature maps "
                "[channels, height, width] (model.flatten=false model.pools=2)"
            )
        self.relation = RelationModule(shape, width, hidden)

    def compare(
        self,
        context: Tensor,
        labels: Tensor,
        target: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        means, shots = class_means(context.flatten(2), labels, context_mask)
        classes = means * shots[..., None] if self.prototype == "sum" else means
        classes = classes.unflatten(2, context.shape[2:])
        logits = []
        for task, (own, counts) in enumerate(zip(classes, shots, strict=True)):
            there = counts > 0
            mine = context[task] if context_mask is None else context[task, context_mask[task]]
            asked = target[task] if target_mask is None else target[task, target_mask[task]]
            scores = self._relations(own[there], mine, asked)
            # minus infinity for classes that are not there; nothing is asked of padding
            row = scores.new_full((target.shape[1], len(counts)), -torch.inf)
            rows = torch.arange(len(row), device=row.device)
            rows = rows if target_mask is None else rows[target_mask[task]]
            columns = there.nonzero()[:, 0]
            logits.append(row.index_put((rows[:, None], columns[None]), scores))
        return without_absent(torch.stack(logits), shots)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The squared errors of a target's relation scores, summed over the classes (eq. 3)."""
        wanted = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        return (logits.exp() - wanted).square().sum(dim=-1)

    def _relations(self, classes: Tensor, context: Tensor, target: Tensor) -> Tensor:
        """Logarithms of relation scores `[n_target, ways]` of one task's real points."""
        if not len(target) or not len(classes):
            nothing = 0 * classes.sum()  # of which a loss can be differentiated all the same
            return nothing.expand(len(target), len(classes))
        if self.normalisation != "support":
            with normalised(self.relation, self.normalisation):
                return F.logsigmoid(widened(self.relation(target, classes)))
        n_context = len(context) * len(classes)
        with normalised(self.relation, self.normalisation, n_context):
            relations = self.relation(torch.cat([context, target]), classes)
        return F.logsigmoid(widened(relations[len(context) :]))


class RelationModule(nn.Module):
    """Two blocks of convolution, normalisation, pooling and ReLU, then two linear layers.

    The first convolution, over the maps of both side by side, is done for each of both alone: it
    is a sum, and points and classes are fewer than their pairs.

    Args:
        shape: `(channels, height, width)` of the maps.
        width: channels of the blocks.
        hidden: units before the score.
    """

    def __init__(self, shape: tuple[int, ...], width: int, hidden: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.beside = nn.Conv2d(2 * channels, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = BatchNorm(width), BatchNorm(width)
        self.pools = [min(side for side in sides) >= 2, min(side // 2 for side in sides) >= 2]
        shrunk = [side // 2 ** sum(self.pools) for side in sides]
        self.hidden = nn.Linear(width * shrunk[0] * shrunk[1], hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, points: Tensor, classes: Tensor) -> Tensor:
        """`[points, C, H, W]` and `[classes, C, H, W]` → logits `[points, classes]`."""
        of_class, of_point = self.beside.weight.chunk(2, dim=1)
        of_class = F.conv2d(classes, of_class, padding=1)
        of_point = F.conv2d(points, of_point, padding=1)
        pairs = (of_point[:, None] + of_class).flatten(0, 1)
        pairs = self._finish_block(self.first_norm(pairs), self.pools[0])
        pairs = self.second_norm.after(self.second, pairs)
        pairs = self._finish_block(pairs, self.pools[1])
        score = self.score(F.relu(self.hidden(pairs.flatten(1))))
        return score.view(len(points), len(classes))

    def _finish_block(self, maps: Tensor, pool: bool) -> Tensor:
        return F.relu(F.max_pool2d(maps, 2) if pool else maps)
