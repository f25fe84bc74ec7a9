"""The neural-process learner: how likely are the targets, given the context?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor, nn
from torch.distributions import Distribution

from metabatch_cli.batching.arguments import one_of
from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners import objectives
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.learners.objectives import Judged, Objective
from metabatch_cli.learners.units import Units
from metabatch_cli.models.calibration import Calibration, calibration
from metabatch_cli.models.masking import blank, mean_over_tasks, task_scores
from metabatch_cli.models.predictive import Predictive, joint_log_prob, marginals, of_targets

JOINT = "log_likelihood@scoring=joint"


class NeuralProcess(Learner):
    """Neural processes of every kind: the network predicts, this says how well.

    Garnelo et al. 2018 (arXiv:1807.01613, eq. 4) and its successors. Every task counts alike,
    however many targets it has. All scores are in nats per target, summed over the dimensions of
    y, of targets only: `log_likelihood` is that of each target by itself (marginal); where the
    network predicts targets jointly, `log_likelihood@scoring=joint` is that of all together,
    divided by their number.

    Args:
        model: `(context_x, context_y, target_x) → Distribution`, batch `[tasks, n_target]`, or a
            joint `Predictive`. Where its `forward` names them it is also given `context_mask`
            and `target_mask`, bool `[tasks, points]`, True where a point is real (padded tasks
            bring them; a model without `context_mask` learns from tasks of a common size only),
            and `samples`, how many a latent variable or a bootstrap shall have. By a true `joint`
            it says that only a joint likelihood teaches it what targets have in common.
        objective: what is minimised; `likelihood` of the prediction, or for a model with a latent
            variable `elbo` or `iwae`, for one that resamples its context `bootstrap` (see
            learners/objectives.py).
        scoring: whether targets are judged each by itself or together, in the loss of the
            objective `likelihood`, and in the score that picks the best weights.
        loss_on: the points in the loss: the targets, or the context's points too, as in the code
            of the TNP paper for all but its transformers. Scores are of the targets only.
        loss_per: `point`, or `task` for the sum over a task's points: large tasks then weigh more.
        samples: of a latent variable or a bootstrap, in training.
        eval_samples: the same in evaluation.
        units: `x_mean, x_std, y_mean, y_std`, a number for each dimension: the network
            sees normalised numbers, while predictions and scores are in the data's own units.

    Raises:
        ValueError: a name that is none of those above, or an objective that the model cannot have.
    """

    when_tested: ClassVar = {
        "samples": "eval_samples",
        **dict.fromkeys(("objective", "loss_on", "loss_per")),
    }

    def __init__(
        self,
        model: nn.Module,
        objective: Objective = "likelihood",
        scoring: Literal["marginal", "joint"] = "marginal",
        loss_on: Literal["target", "context+target"] = "target",
        loss_per: Literal["point", "task"] = "point",
        samples: Annotated[int, Ge(1)] = 4,
        eval_samples: Annotated[int, Ge(1)] = 50,
        units: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.scoring = one_of("scoring", scoring, ("marginal", "joint"))
        self.loss = objectives.choose(objective, scoring, model)
        self.loss_on = one_of("loss_on", loss_on, ("target", "context+target"))
        self.loss_per = one_of("loss_per", loss_per, ("point", "task"))
        self.samples, self.eval_samples = samples, eval_samples
        parameters = inspect.signature(model.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        masks = {name for name in ("context_mask", "target_mask") if anything or name in parameters}
        self._asked_for = masks | ({"samples"} & set(parameters))
        self.units = Units(units) if units else None

    @property
    def metric(self) -> Metric:
        name = "log_likelihood" if self.scoring == "marginal" else JOINT
        return Metric(name, higher_is_better=True)

    @property
    def note(self) -> str:  # type: ignore[override]
        """That a network that predicts targets together is trained by each of them alone."""
        if not getattr(self.model, "joint", False) or self.loss is objectives.joint_likelihood:
            return ""
        kind = type(self.model).__name__
        return f"each target by itself: scoring=joint would train what {kind} says of all together"

    @property
    def copies(self) -> int:  # type: ignore[override]
        """Every sample of a bootstrap has a context of its own."""
        if not hasattr(self.model, "bootstrap"):
            return 1
        return self.samples if self.training else self.eval_samples

    def forward(self, tasks: Tasks) -> Tensor:
        judged = self._judged(tasks)
        losses = self.loss(self.model, self._ask, judged, self.samples)
        if self.loss_per == "point":
            losses = losses / objectives.counts(judged.y, judged.mask)
        return mean_over_tasks(losses, tasks.target_mask)

    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """`log_likelihood` and its joint form; `mse` and `rmse` of the predictive mean.

        A task's `rmse` is the root of its mean squared error.
        """
        prediction, target_y = self.prediction_of(tasks), tasks.target_y
        mask = tasks.target_mask
        target_y = blank(target_y, mask)
        alone = marginals(prediction)
        scores = task_scores(
            {
                "log_likelihood": alone.log_prob(target_y),
                "mse": (alone.mean - target_y).square().mean(dim=2),
            },
            mask,
        )
        if isinstance(prediction, Predictive):
            together = joint_log_prob(prediction, target_y, mask)
            scores[JOINT] = together / objectives.counts(target_y, mask, empty=float("nan"))
        elif self.scoring == "joint":
            scores[JOINT] = scores["log_likelihood"]
        return scores | {"rmse": scores["mse"].sqrt()}

    def calibration(self, tasks: Tasks, levels: Tensor) -> Calibration | None:
        mask = tasks.target_mask
        target_y = blank(tasks.target_y, mask)
        return calibration(self.prediction_of(tasks), target_y, mask, levels)

    def why_not_autoregressive(self) -> str | None:
        if "context_mask" in self._asked_for:
            return None
        return f"its model {type(self.model).__name__} takes no context_mask"

    def prediction_of(self, tasks: Tasks) -> Distribution:
        """What is predicted at the targets of tasks."""
        return self.predict(tasks.context_x, tasks.context_y, tasks.target_x, **tasks.masks)

    def predict(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Distribution:
        masks = context_mask, target_mask
        if self.units is None:
            return self._ask(context_x, context_y, target_x, *masks)
        inputs = self.units.of_x(context_x), self.units.of_y(context_y), self.units.of_x(target_x)
        return self.units.restore(self._ask(*inputs, *masks))

    def _ask(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None,
        target_mask: Tensor | None,
    ) -> Distribution:
        """The network's prediction, everything in its own units."""
        if context_mask is not None and "context_mask" not in self._asked_for:
            raise TypeError(
                f"{type(self.model).__name__} takes no context_mask, so that it cannot tell "
                "padding from points: it learns from tasks of a common size only"
            )
        more: dict[str, Any] = {}
        if context_mask is not None:
            context_x, context_y = blank(context_x, context_mask), blank(context_y, context_mask)
            more["context_mask"] = context_mask
        if target_mask is not None:
            target_x = blank(target_x, target_mask)
            if "target_mask" in self._asked_for:
                more["target_mask"] = target_mask
        if "samples" in self._asked_for:
            more["samples"] = self.samples if self.training else self.eval_samples
        return of_targets(self.model(context_x, context_y, target_x, **more))

    def _judged(self, tasks: Tasks) -> Judged:
        """The points that the loss is about, in the network's units and without what is padding."""
        context_x, context_y = tasks.context_x, tasks.context_y
        target_x, target_y = tasks.target_x, tasks.target_y
        context_mask, target_mask = tasks.context_mask, tasks.target_mask
        if self.units is not None:
            context_x, target_x = self.units.of_x(context_x), self.units.of_x(target_x)
            context_y, target_y = self.units.of_y(context_y), self.units.of_y(target_y)
        context_x, context_y = blank(context_x, context_mask), blank(context_y, context_mask)
        points = blank(target_x, target_mask), blank(target_y, target_mask), target_mask
        everything = self.loss_on == "context+target"
        if everything:
            points = objectives.joined(context_x, context_y, context_mask, *points)
        x, y, mask = points
        return Judged(context_x, context_y, x, y, context_mask, mask, everything)
