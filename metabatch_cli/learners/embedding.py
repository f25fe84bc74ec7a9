"""Embedding learners: a network embeds context and target, and each target is compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.models.masking import blank, joined_masks, mean_loss, task_scores
from metabatch_cli.models.normalisation import Mode, check_mode, normalised, what_normalises


class EmbeddingLearner(Learner):
    """Classifies targets by comparing embeddings; how is what a subclass says in `compare`.

    Tasks may have classes of different numbers: one that a task has no context point of has
    probability 0 there, so the targets are of classes that have one.

    A network with batch normalisation sees one task at a time where the moments of the points at
    hand count (while training, and in evaluation under `support` and `transductive`), else all
    tasks at once. So a batch's other tasks never matter, and the network never sees padding.

    Args:
        model: embeds points, `[points, …] → [points, features]`.
        normalisation: whose moments normalise in evaluation: running averages of the training's,
            those of the context alone (`support`), or those of all points (`transductive`).
            Training under `support` takes those of the context too.

    Raises:
        ValueError: a normalisation that a layer of the network cannot follow.
    """

    only_classifies = True

    exact = True
    """Whether `compare` is computed in 32 bits at least, without autocast."""

    def __init__(self, model: nn.Module, normalisation: Mode = "running") -> None:
        super().__init__()
        check_embeds(model, type(self).__name__)
        check_mode(model, normalisation)
        self.model = model
        self.normalisation = normalisation

    # --- for subclasses --------------------------------------------------------------------------

    def compare(
        self,
        context: Tensor,
        labels: Tensor,
        target: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the targets, `[tasks, n_target, ways]`, −∞ for classes without context.

        Args:
            context, target: `[tasks, points, …]`, embedded, 0 for padding.
            labels: int64 `[tasks, n_context]`, 0 for padding.
            context_mask, target_mask: bool `[tasks, points]`, True where a point is real.
        """
        raise NotImplementedError

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each target `[tasks, n_target]`: minus its log-likelihood, by default."""
        return cross_entropies(logits, labels)

    # --- what they share -------------------------------------------------------------------------

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", higher_is_better=True)

    def forward(self, tasks: Tasks) -> Tensor:
        logits, labels = self._judged(tasks)
        return mean_loss(self.losses(logits, labels), tasks.target_mask)

    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """`accuracy`: a fraction of the queries; `log_likelihood`: nats per query."""
        logits, labels = self._judged(tasks)
        of_queries = {
            "accuracy": (logits.argmax(dim=-1) == labels).to(logits.dtype),
            "log_likelihood": -cross_entropies(logits, labels),
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

    def about(self, metric: str) -> dict[str, str]:
        """Its normalisation too, of a network that has one."""
        said = what_normalises(self, self.normalisation)
        return super().about(metric) | ({} if said is None else {"normalisation": said})

    def embed(
        self,
        context_x: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Context and target side by side: `[tasks, n_context + n_target, …]`, 0 for padding."""
        points = torch.cat([context_x, target_x], dim=1)
        mask = joined_masks(context_x, context_mask, target_x, target_mask)
        if mask is None:
            if self.one_by_one:
                n_context = context_x.shape[1]
                return torch.stack([self._embed_one(task, n_context) for task in points])
            return self.model(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        real = points[mask]
        if self.one_by_one:
            parts = real.split(mask.sum(dim=1).tolist())
            counts = mask[:, : context_x.shape[1]].sum(dim=1).tolist()
            pairs = [pair for pair in zip(parts, counts, strict=True) if len(pair[0])]
            if pairs:
                embedded = torch.cat([self._embed_one(part, count) for part, count in pairs])
            else:  # nothing, of which a loss can be differentiated all the same
                weights = (weight.flatten()[:0].sum() for weight in self.model.parameters())
                shape = embedded_shape(self.model, tuple(points.shape[2:]))
                embedded = real.new_zeros(0, *shape) + sum(weights)
        else:
            embedded = self.model(real)
        return embedded.new_zeros(*mask.shape, *embedded.shape[1:]).index_put((mask,), embedded)

    @property
    def one_by_one(self) -> bool:
        """Whether a task's points have to be alone with each other in the network."""
        return self.training or what_normalises(self, self.normalisation) not in (None, "running")

    def _embed_one(self, points: Tensor, n_context: int) -> Tensor:
        with normalised(self.model, self.normalisation, n_context):
            return self.model(points)

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
        embedded = self.embed(context_x, target_x, context_mask, target_mask)
        device = embedded.device.type
        # differences between far points lose their digits in bfloat16, also in a product alone
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not self.exact):
            embedded = widened(embedded)
            context, target = embedded.tensor_split([context_x.shape[1]], dim=1)
            labels = blank(context_y, context_mask)
            return self.compare(context, labels, target, context_mask, target_mask)


def widened(values: Tensor) -> Tensor:
    """The values in 32 bits at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-likelihood of each label: `[tasks, points]` from `[tasks, points, ways]`."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)


def membership(labels: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Which class each point is of: ones and zeros `[tasks, points, ways]`, zeros for padding.

    `ways` is the largest label plus one.

    Args:
        labels: int64 `[tasks, points]`, classes 0 … ways − 1.
        mask: bool `[tasks, points]`, True where a point is real; None if all are.
    """
    return blank(F.one_hot(blank(labels, mask)).to(dtype), mask)


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
    members = membership(labels, mask, embedded.dtype)
    shots = members.sum(dim=1)
    return members.mT @ embedded / shots.clamp(min=1)[..., None], shots


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """`[tasks, points, centres]` from `[tasks, points, features]` and `[tasks, centres, features]`.

    Expanded into products, `|p|² − 2 p·c + |c|²`: one matrix product instead of a difference
    for every pair.
    """
    cross = points @ centres.mT
    return points.square().sum(-1)[..., None] - 2 * cross + centres.square().sum(-1)[:, None, :]


def without_absent(logits: Tensor, shots: Tensor) -> Tensor:
    """Logits `[tasks, points, ways]` with −∞ for classes of which there are no shots; of a task
    without any, where all classes are as likely, 0.

    Args:
        shots: points of each class, `[tasks, ways]`.
    """
    absent = shots == 0
    logits = logits.masked_fill(absent[:, None, :], -torch.inf)
    return logits.masked_fill(absent.all(dim=1)[:, None, None], 0)


@torch.no_grad()
def embedded_shape(model: nn.Module, x_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one embedded point, found by embedding two blank ones.

    Args:
        x_shape: of a point, as the task set knows it.

    Raises:
        ValueError: the task set does not know it.
    """
    if x_shape is None:
        raise ValueError("x_shape=None: the shape of an x is needed to know that of its embedding")
    was_training = model.training
    weights = next(model.parameters(), torch.zeros(()))
    shape = model.eval()(weights.new_zeros(2, *x_shape)).shape[1:]
    model.train(was_training)
    return tuple(shape)


def check_embeds(model: nn.Module, learner: str) -> None:
    """Refuse a network that says of itself, by `classifies`, that it ends in scores of classes.

    Raises:
        ValueError: names the learner that compares embeddings.
    """
    if getattr(model, "classifies", False):
        raise ValueError(f"{learner} compares embeddings, and the network has a head: head=false")
