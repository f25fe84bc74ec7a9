"""Learner: what every meta-learning algorithm promises the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.distributions import Distribution

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.learners.meta_gradient import Differentiated
from metabatch_cli.models.calibration import Calibration


class Metric(NamedTuple):
    """The score that a learner is judged by."""

    name: str
    higher_is_better: bool

    def is_better(self, score: float, best: float | None) -> bool:
        """Whether a score beats the best one so far."""
        if best is None:
            return True
        return score > best if self.higher_is_better else score < best


class CompileCost(NamedTuple):
    """What compiling a learner's step takes and gives, as far as can be told before."""

    seconds: float
    saved_per_step: float


class Learner(nn.Module):
    """A meta-learning algorithm around a network; the training loop knows nothing else.

    A learner is built with `model=` and, where its constructor asks for them, the fields of the
    task set's spec (`dim_x`, `dim_y`, `ways`).

    Tasks of unequal sizes come as a `PaddedTask`. What stands in the padding changes nothing, and
    a task's loss and scores are those that it has alone. `tasks.target_mask`, which is None of a
    plain `Task`, goes to `masked_mean` and its like (models/masking.py) in both cases.
    """

    has_spread = True
    """Whether the deviation of `predict` means something: figures show it then."""

    only_classifies = False
    """Whether tasks have to be of classes."""

    when_tested: ClassVar[Mapping[str, str | None]] = {}
    """Arguments that say something of training only, and those that say it of tests instead, or
    None."""

    note = ""
    """What whoever starts a training should know of it."""

    copies = 1
    """How many copies of a context `predict` computes with at a time."""

    @property
    def metric(self) -> Metric:
        """The entry of `score` that picks the best checkpoint."""
        raise NotImplementedError

    def forward(self, tasks: Tasks) -> Tensor:
        """The loss of a batch of tasks, a scalar: the mean over its tasks that have targets."""
        raise NotImplementedError

    def judged(self, tasks: Tasks) -> Tensor | None:
        """Which tasks the mean of `forward` is over, bool `[tasks]`; None for all.

        By it the parts of a batch count, on several processes or one after the other.
        """
        return None if tasks.target_mask is None else tasks.target_mask.any(dim=1)

    def score(self, tasks: Tasks) -> dict[str, Tensor]:
        """Scores of each task by name, `[tasks]`; a name may end in `@steps=1` and the like.

        NaN for a task without targets, which evaluation leaves out.
        """
        raise NotImplementedError

    def predict(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Distribution:
        """The distribution of y at the targets, batch `[tasks, n_target]`.

        With masks `[tasks, points]` (`**tasks.masks`), only the real points say anything, and
        what is predicted at padding means nothing.
        """
        raise NotImplementedError

    def begin(self, step: int) -> None:
        """Told before every training step how many went before it, for what changes with them."""

    def choose(self, tasks: Tasks) -> dict[str, Any]:
        """Decide what the configuration leaves to the machine (`auto`), by trying it on tasks.

        Asked once, before a training begins; a resumed one is built with what was chosen.

        Returns:
            Those arguments of the learner, with the values that they have from now on.
        """
        return {}

    def cost_of_compiling(self, tasks: Tasks) -> CompileCost | None:
        """What compiling the step would take and give; None if nothing speaks for it."""
        return None

    def compiled(self, varying: bool) -> Callable[[Tasks], Tensor | Differentiated]:
        """`forward`, compiled; what it gives has `backward()`, `detach()` and `item()`.

        Args:
            varying: whether batches have other numbers of points from step to step.
        """
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True  # no compiler installed: run as it is
        return torch.compile(self, dynamic=varying or None)

    def about(self, metric: str) -> dict[str, str]:
        """What a result should say of a score beside its number, words by their names.

        Of a log-likelihood its `scoring`: whether targets are judged each by itself (`marginal`)
        or all together (`joint`), with whatever else is behind the `@` of its name.

        Args:
            metric: a name of `score`.
        """
        base, _, qualifiers = metric.partition("@")
        if base != "log_likelihood":
            return {}
        own = dict(part.partition("=")[::2] for part in qualifiers.split(",") if part)
        return {"scoring": "marginal", **own}

    def calibration(self, tasks: Tasks, levels: Tensor) -> Calibration | None:
        """Coverage of central intervals and predicted variance of each task.

        Args:
            levels: `[levels]`, probabilities that the intervals claim.

        Returns:
            None of a learner that predicts no spread. Asked for in tests, not in validations.
        """
        return None

    def why_not_autoregressive(self) -> str | None:
        """Why `predict` is not for contexts that grow target by target; None if it is.

        It is for learners whose `predict` takes a `context_mask`, and makes sense of contexts of
        any size (learners/autoregressive.py).
        """
        return "it is no conditional model, which predicts from a context of any size"
