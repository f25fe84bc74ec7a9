"""The neural-process learner: maximum likelihood of the targets given the context."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from torch.distributions import Distribution

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.models.masking import blank, mean_loss, task_scores


class NeuralProcess(Learner):
    """Garnelo et al. 2018 (arXiv:1807.01613), eq. 4, over the targets.

    The loss is the mean negative log-likelihood of a target point, in nats, summed over the
    dimensions of y; every task counts alike, however many targets it has.

    Args:
        model: `(context_x, context_y, target_x) → Distribution`, batch `[tasks, n_target]`. To
            learn from tasks of unequal sizes it takes a `context_mask`, and, where its targets
            see each other, a `target_mask`: bool `[tasks, points]`, True where a point is real.
            Padded tasks bring them, others do not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        names = ("context_mask", "target_mask")
        self._asked_for = {name for name in names if anything or name in parameters}

    @property
    def metric(self) -> Metric:
        return Metric("log_likelihood", higher_is_better=True)

    def forward(self, tasks: Tasks) -> Tensor:
        prediction, target_y = self._judged(tasks)
        return -mean_loss(prediction.log_prob(target_y), tasks.target_mask)

    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """`log_likelihood`: nats per target point; `mse`: of the predictive mean."""
        prediction, target_y = self._judged(tasks)
        of_points = {
            "log_likelihood": prediction.log_prob(target_y),
            "mse": (prediction.mean - target_y).square().mean(dim=2),
        }
        return task_scores(of_points, tasks.target_mask)

    def predict(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Distribution:
        if context_mask is None and target_mask is None:
            return self.model(context_x, context_y, target_x)
        if context_mask is not None and "context_mask" not in self._asked_for:
            raise TypeError(
                f"{type(self.model).__name__} takes no context_mask, so that it cannot tell "
                "padding from points: it learns from tasks of a common size only"
            )
        masks = {"context_mask": context_mask, "target_mask": target_mask}
        return self.model(
            blank(context_x, context_mask),
            blank(context_y, context_mask),
            blank(target_x, target_mask),
            **{name: mask for name, mask in masks.items() if name in self._asked_for},
        )

    def _judged(self, tasks: Tasks) -> tuple[Distribution, Tensor]:
        """The prediction at the targets, and their y."""
        prediction = self.predict(tasks.context_x, tasks.context_y, tasks.target_x, **tasks.masks)
        return prediction, blank(tasks.target_y, tasks.target_mask)
