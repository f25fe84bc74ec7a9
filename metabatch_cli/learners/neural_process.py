"""The neural-process learner: maximum likelihood of the targets given the context."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributions import Distribution

from metabatch_cli.batching.task import Task
from metabatch_cli.learners.learner import Learner, Metric


class NeuralProcess(Learner):
    """Garnelo et al. 2018 (arXiv:1807.01613), eq. 4, over the targets.

    The loss is the mean negative log-likelihood of a target point, in nats, summed over the
    dimensions of y.

    Args:
        model: `(context_x, context_y, target_x) → Distribution`, batch `[tasks, n_target]`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def metric(self) -> Metric:
        return Metric("log_likelihood", higher_is_better=True)

    def forward(self, tasks: Task) -> Tensor:
        prediction = self.predict(tasks.context_x, tasks.context_y, tasks.target_x)
        return -prediction.log_prob(tasks.target_y).mean()

    def score(self, tasks: Task) -> dict[str, Tensor]:
        """`log_likelihood`: nats per target point; `mse`: of the predictive mean."""
        prediction = self.predict(tasks.context_x, tasks.context_y, tasks.target_x)
        deviation = prediction.mean - tasks.target_y
        return {
            "log_likelihood": prediction.log_prob(tasks.target_y).mean(dim=1),
            "mse": deviation.square().mean(dim=(1, 2)),
        }

    def predict(self, context_x: Tensor, context_y: Tensor, target_x: Tensor) -> Distribution:
        return self.model(context_x, context_y, target_x)
