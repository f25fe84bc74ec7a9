"""Matching networks: a target has the labels of the context points that it attends to."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metabatch_cli.batching.arguments import at_least, one_of
from metabatch_cli.learners.embedding import (
    EmbeddingLearner,
    embedded_shape,
    membership,
    squared_distances,
    without_absent,
)
from metabatch_cli.models.masking import blank
from metabatch_cli.models.normalisation import Mode


class MatchingNet(EmbeddingLearner):
    """Vinyals et al. 2016, "Matching Networks for One Shot Learning" (arXiv:1606.04080).

    A class has the attention that its context points have together (eq. 1); attention is the
    softmax over context points of the cosine with the target (§2.1.1), or of minus the squared
    Euclidean distance, divided by a temperature. The paper has none, that is 1: then the cosine,
    never beyond ±1, cannot make one of twenty points much likelier than the others.

    Args:
        model: embeds points, `[points, …] → [points, features]`.
        x_shape: of a point, given by the task set.
        distance: `cosine` or `euclidean`.
        temperature: what similarities are divided by, to begin with.
        learn_temperature: whether its logarithm is a parameter.
        fce: full context embeddings (§2.1.2, appendix A): the context points are embedded once
            more by a bidirectional LSTM over them, in the order in which they stand, and the
            targets by an LSTM that reads from the context by attention.
        fce_steps: how often it reads (K).
        normalisation: whose moments normalise, see `EmbeddingLearner`.
    """

    def __init__(
        self,
        model: nn.Module,
        x_shape: tuple[int, ...] | None = None,
        distance: Literal["cosine", "euclidean"] = "cosine",
        temperature: Annotated[float, Gt(0)] = 0.1,
        learn_temperature: bool = True,
        fce: bool = False,
        fce_steps: Annotated[int, Ge(1)] = 5,
        normalisation: Mode = "running",
    ) -> None:
        super().__init__(model, normalisation)
        one_of("distance", distance, ("cosine", "euclidean"))
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        at_least("fce_steps", fce_steps, 1)
        self.distance = distance
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self.full_context = None
        if fce:
            (features,) = embedded_shape(model, x_shape)
            self.full_context = FullContext(features, fce_steps)

    def compare(
        self,
        context: Tensor,
        labels: Tensor,
        target: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        if self.full_context is not None:
            context, target = self.full_context(context, target, context_mask)
        if self.distance == "cosine":
            similarities = F.normalize(target, dim=-1) @ F.normalize(context, dim=-1).mT
        else:
            similarities = -squared_distances(target, context)
        members = membership(labels, context_mask, context.dtype)
        return attention_of_classes(similarities / self.log_temperature.exp(), members)


def attention_of_classes(similarities: Tensor, members: Tensor) -> Tensor:
    """The logarithm of each class's attention, up to a constant: `[tasks, n_target, ways]`.

    `log Σ exp s` over the class's own points, instead of the logarithm of a sum of softmaxes: it
    is finite however small the attention is. −∞ for a class without points.

    Args:
        similarities: `[tasks, n_target, n_context]`, whatever for padding.
        members: ones and zeros `[tasks, n_context, ways]`.
    """
    shots = members.sum(dim=1)
    of_class = similarities[..., None].masked_fill(members[:, None] == 0, -torch.inf)
    # a class without points would have the gradient of log 0
    of_class = of_class.masked_fill((shots == 0)[:, None, None], 0)
    return without_absent(of_class.logsumexp(dim=2), shots)


class FullContext(nn.Module):
    """Embeddings that know the whole context (Vinyals et al. 2016, appendix A).

    Args:
        features: numbers of an embedding.
        steps: how often a target reads from the context.
    """

    def __init__(self, features: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.over_context = nn.LSTM(features, features, batch_first=True, bidirectional=True)
        # the paper's state is [h, r]: what enters from r enters as a part of the input
        self.over_steps = nn.LSTMCell(2 * features, features)

    def forward(
        self, context: Tensor, target: Tensor, context_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`[tasks, n_context, features]` and `[tasks, n_target, features]` → the same shapes."""
        context = context + self._summary_of_neighbours(context, context_mask)
        state = cell = read = torch.zeros_like(target).flatten(0, 1)
        given = target.flatten(0, 1)
        for _ in range(self.steps):
            state, cell = self.over_steps(torch.cat([given, read], dim=-1), (state, cell))
            state = state + given
            scores = state.view_as(target) @ context.mT
            if context_mask is not None:
                least = torch.finfo(scores.dtype).min  # finite, for tasks without any context
                scores = scores.masked_fill(~context_mask[:, None, :], least)
            read = (scores.softmax(dim=-1) @ context).flatten(0, 1)
        return context, state.view_as(target)

    def _summary_of_neighbours(self, context: Tensor, mask: Tensor | None) -> Tensor:
        """What both directions have read up to each point, added: 0 for padding."""
        if not context.numel():
            return context
        if mask is None:
            return torch.stack(self.over_context(context)[0].chunk(2, dim=-1)).sum(dim=0)
        order = (~mask).int().argsort(dim=1, stable=True)  # real points first, as they stood
        lengths = mask.sum(dim=1).clamp(min=1).cpu()
        moved = context.take_along_dim(order[..., None], dim=1)
        packed = pack_padded_sequence(moved, lengths, batch_first=True, enforce_sorted=False)
        read, _ = pad_packed_sequence(
            self.over_context(packed)[0], batch_first=True, total_length=context.shape[1]
        )
        read = read.take_along_dim(order.argsort(dim=1)[..., None], dim=1)
        return blank(torch.stack(read.chunk(2, dim=-1)).sum(dim=0), mask)
