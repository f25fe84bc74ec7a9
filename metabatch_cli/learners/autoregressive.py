"""Autoregressive deployment: a trained conditional model predicts targets one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners import objectives
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.models.calibration import Calibration
from metabatch_cli.models.masking import blank
from metabatch_cli.models.predictive import Predictive, marginals

AUTOREGRESSIVE = "log_likelihood@scoring=joint,predict=autoregressive"

MOST_POINTS = 2**16
"""Context points that the network sees at a time, over all grown contexts: some 100 MB for a
transformer of width 64."""


class AutoregressiveDeployment(Learner):
    """A learner whose targets are predicted one by one, each given the y of those before it.

    Bruinsma et al. 2023, "Autoregressive Conditional Neural Processes" (arXiv:2303.14468):
    `p(y_1 … y_n | C) = Π_i p(y_i | C ∪ {(x_j, y_j) : j < i})`. Nothing is trained anew: a model
    that predicts each target by itself becomes a joint one. What it says depends on the order.

    Args:
        learner: predicts from a context that grows point by point.
        order: of the targets: `given`, as they stand in the task (random, where x is drawn at
            random), or `random`, drawn anew at each prediction from torch's global generator,
            which evaluation seeds by `evaluation.seed`.
        most_points: context points at a time; more take several passes of the network.

    Raises:
        ValueError: the learner cannot, or there is no such order.
    """

    def __init__(
        self,
        learner: Learner,
        order: Literal["given", "random"] = "given",
        most_points: int = MOST_POINTS,
    ) -> None:
        super().__init__()
        reason = learner.why_not_autoregressive()
        if reason is not None:
            raise ValueError(f"{type(learner).__name__} cannot: {reason}")
        self.learner = learner
        self.order = one_of("order", order, ("given", "random"))
        self.most_points = most_points
        self.has_spread = learner.has_spread

    @property
    def metric(self) -> Metric:
        return self.learner.metric

    def forward(self, tasks: Tasks) -> Tensor:
        return self.learner(tasks)

    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """The learner's own scores, and `log_likelihood@scoring=joint,predict=autoregressive`.

        The latter is the log density of all targets together, divided by their number: nats per
        point, `[tasks]`.
        """
        scores = self.learner.score(tasks)
        prediction = self.predict(tasks.context_x, tasks.context_y, tasks.target_x, **tasks.masks)
        together = prediction.log_prob(tasks.target_y)
        number = objectives.counts(tasks.target_y, tasks.target_mask, empty=float("nan"))
        return scores | {AUTOREGRESSIVE: together / number}

    def predict(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> OneByOne:
        order = None
        if self.order == "random":  # on the CPU: the same on every device
            order = torch.rand(target_x.shape[:2]).argsort(dim=1).to(target_x.device)
        task = (context_x, context_y, target_x, context_mask, target_mask)
        most = max(1, self.most_points // self.learner.copies)
        return OneByOne(self.learner.predict, *task, order=order, most_points=most)

    def about(self, metric: str) -> dict[str, str]:
        if metric != AUTOREGRESSIVE:
            return self.learner.about(metric)
        return self.learner.about("log_likelihood") | super().about(metric)

    def calibration(self, tasks: Tasks, levels: Tensor) -> Calibration | None:
        return self.learner.calibration(tasks, levels)


class OneByOne(Predictive):
    """What a conditional model says of targets one after the other.

    Args:
        predict: as of `Learner`; of one target at a time.
        context_x, context_y: `[tasks, n_context, …]`.
        target_x: `[tasks, n_target, dim_x]`.
        context_mask, target_mask: bool `[tasks, points]`, True where a point is real; None if all
            are.
        order: int64 `[tasks, n_target]`, which target comes first, second, …; None as they stand.
        most_points: context points that `predict` is given at a time.
    """

    def __init__(
        self,
        predict: Callable[..., Distribution],
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        *,
        order: Tensor | None = None,
        most_points: int = MOST_POINTS,
    ) -> None:
        n_tasks, n_target = target_x.shape[:2]
        super().__init__(n_tasks, n_target, context_y.shape[2], target_mask)
        self.predict = predict
        self.context_x, self.context_y, self.target_x = context_x, context_y, target_x
        self.context_mask = context_mask
        self.order = order
        self.most_points = most_points

    @property
    def marginals(self) -> Distribution:
        """What is predicted of each target from the context only."""
        masks = self.context_mask, self.mask
        return marginals(self.predict(self.context_x, self.context_y, self.target_x, *masks))

    def log_prob(self, value: Tensor) -> Tensor:
        if value.dim() > 3:
            return torch.stack([self.log_prob(each) for each in value])
        return self.conditional_log_prob(value).sum(dim=1)

    def conditional_log_prob(self, value: Tensor) -> Tensor:
        """`log p(y_i | context, y of the targets before it)`, `[tasks, n_target]`; 0 of padding.

        Args:
            value: y `[tasks, n_target, dim_y]`.
        """
        x, y = self._in_order(self.target_x), self._in_order(value)
        real = None if self.mask is None else self._in_order(self.mask)
        (n_tasks, n_target), longest = x.shape[:2], self.context_x.shape[1] + x.shape[1]
        tasks_at_once = max(1, self.most_points // longest)
        found = []
        for start in range(0, n_tasks, tasks_at_once):
            some = slice(start, min(start + tasks_at_once, n_tasks))
            number = max(1, self.most_points // (longest * (some.stop - start)))
            parts = [
                self._given_before(some, first, min(first + number, n_target), x, y, real)
                for first in range(0, n_target, number)
            ]
            found.append(torch.cat(parts, dim=1))
        return blank(self._as_given(torch.cat(found)), self.mask)

    def _given_before(
        self, tasks: slice, first: int, stop: int, x: Tensor, y: Tensor, real: Tensor | None
    ) -> Tensor:
        """Of targets `first … stop − 1` of some tasks, each a row of a batch of its own."""
        number, before = stop - first, stop - 1
        x, y = x[tasks], y[tasks]
        seen_x = torch.cat([self.context_x[tasks], x[:, :before]], dim=1)
        seen_y = torch.cat([self.context_y[tasks], y[:, :before]], dim=1)
        n_context = seen_x.shape[1] - before
        counts = n_context + torch.arange(first, stop, device=x.device)
        seen = torch.arange(seen_x.shape[1], device=x.device) < counts[:, None]  # [number, points]
        seen = seen.expand(len(x), -1, -1).clone()
        if self.context_mask is not None:
            seen[..., :n_context] &= self.context_mask[tasks, None]
        if real is not None:
            seen[..., n_context:] &= real[tasks, None, :before]
        prediction = self.predict(
            seen_x.repeat_interleave(number, dim=0),
            seen_y.repeat_interleave(number, dim=0),
            x[:, first:stop].flatten(0, 1)[:, None],
            seen.flatten(0, 1),
            None if real is None else real[tasks, first:stop].flatten()[:, None],
        )
        wanted = y[:, first:stop].flatten(0, 1)[:, None]
        if real is not None:
            wanted = blank(wanted, real[tasks, first:stop].flatten()[:, None])
        return marginals(prediction).log_prob(wanted).view(len(x), number)

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws `[…, tasks, n_target, dim_y]`: a pass for each target, many samples at once."""
        shape = Size(sample_shape)
        count = shape.numel()
        longest = self.context_x.shape[1] + self.target_x.shape[1]
        at_once = max(1, self.most_points // (longest * len(self.target_x)))
        drawn = [self._draw(min(at_once, count - start)) for start in range(0, count, at_once)]
        return torch.cat(drawn).reshape(*shape, *self.batch_shape, *self.event_shape)

    def _draw(self, count: int) -> Tensor:
        """Samples `[count, tasks, n_target, dim_y]`."""

        def each(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.repeat(count, *[1] * (part.dim() - 1))

        seen_x, seen_y = (part.repeat(count, 1, 1) for part in (self.context_x, self.context_y))
        x = self._in_order(self.target_x).repeat(count, 1, 1)
        mask, real = each(self.context_mask), None
        if self.mask is not None:
            real = each(self._in_order(self.mask))
            mask = seen_x.new_ones(seen_x.shape[:2], dtype=torch.bool) if mask is None else mask
        for target in range(x.shape[1]):
            here = slice(target, target + 1)
            this = None if real is None else real[:, here]
            drawn = marginals(self.predict(seen_x, seen_y, x[:, here], mask, this)).sample()
            seen_x = torch.cat([seen_x, x[:, here]], dim=1)
            seen_y = torch.cat([seen_y, drawn.to(seen_y)], dim=1)
            if mask is not None:
                new = mask.new_ones(len(mask), 1) if this is None else this
                mask = torch.cat([mask, new], dim=1)
        y = seen_y[:, self.context_y.shape[1] :].unflatten(0, (count, len(self.target_x)))
        return torch.stack([self._as_given(sample) for sample in y])

    def _in_order(self, of_targets: Tensor) -> Tensor:
        """`[tasks, n_target, …]` with the target that comes first at the first place."""
        return of_targets if self.order is None else _arranged(of_targets, self.order)

    def _as_given(self, in_order: Tensor) -> Tensor:
        """The reverse."""
        return in_order if self.order is None else _arranged(in_order, self.order.argsort(dim=1))


def _arranged(values: Tensor, places: Tensor) -> Tensor:
    places = places.reshape(*places.shape, *[1] * (values.dim() - 2))
    return values.take_along_dim(places, dim=1)
