"""Evaluation: a learner's scores on frozen held-out tasks, with intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metabatch_cli.batching.loader import TaskLoader
from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.batching.task import digest, slice_tasks
from metabatch_cli.engine import random_states
from metabatch_cli.engine.precision import Precision
from metabatch_cli.engine.ranks import Ranks
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.models.calibration import LEVELS
from metabatch_cli.report.interval import t_quantile

LESS_IS_BETTER = (
    *("error", "mae", "mape", "nll", "nlpd", "crps", "brier", "perplexity", "ece", "kl"),
    *("divergence", "distance", "regret"),
)
"""Words in the name of a score by which less of it is better, as those that end in loss and mse."""

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


@dataclass
class Evaluation:
    """Scores on the held-out tasks of one split.

    Attributes:
        metrics: by `SPLIT/METRIC[@QUALIFIERS]`: `mean` over tasks, `ci95` (a half-width; None
            for a single task) and `ci95_over_batches` (see `summarise`), `tasks`, `oracle` where
            the best possible score is known, and `baselines`, the mean of each simple prediction
            by its name, where the task set has some that are scored by the metric.
            (`mse@steps=1` has the baselines of `mse`.)
            `over_points` holds `mean`, `ci95`, `points` and `oracle` with every target point
            counting alike (see `over_points`). What the learner says about a metric, such as
            the `scoring` of a log-likelihood, stands beside.
        digests: SHA-256 of the tasks of each set, by `SPLIT[@QUALIFIERS]`.
        calibration: by the same names, `levels` of central intervals and their `coverage`, the
            fraction of all target points in them.
        warnings: for a person: scores that cannot be.
    """

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def find(self, split: str, metric: str) -> float | None:
        """The mean of a metric: under its exact name, else over all named sets that have it."""
        exact = self.metrics.get(f"{split}/{metric}")
        if exact is not None:
            return exact["mean"]
        wanted = _parts(metric)
        found = [
            entry["mean"]
            for name, entry in self.metrics.items()
            if name.startswith(f"{split}/") and _matches(_parts(name[len(split) + 1 :]), wanted)
        ]
        return sum(found) / len(found) if found else None


def evaluate(
    learner: Learner,
    loaders: Mapping[str, TaskLoader],
    precision: Precision,
    *,
    split: str,
    n_tasks: int,
    calibrated: bool = False,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Score a learner on the first `n_tasks` tasks of every set (all of a smaller finite one).

    Tasks that have no target are among the `n_tasks`, but have no score and are not counted.

    Args:
        loaders: by the qualifiers of each set, such as `shots=5`; "" for none.
        precision: of the learner.
        split: what the metrics' names begin with.
        calibrated: whether to measure, with a second prediction, `calibration_error` and
            `sharpness` too, where the learner predicts a spread.
        ranks: who take turns with the batches; all get the scores of all, the same that one alone
            would.

    Returns:
        Means and intervals over tasks; the learner is left in the mode that it was in, and the
        global random generators in the states that they were in.
    """
    evaluation = Evaluation()
    was_training = learner.training
    learner.eval()
    try:
        for qualifiers, loader in loaders.items():
            with random_states.preserved():
                scores, tasks_digest = _score(
                    learner, loader, n_tasks, precision, calibrated, ranks or Ranks()
                )
            for name, values in scores.own.items():
                full = f"{split}/{qualified(name, qualifiers)}"
                entry = summarise(values, scores.batches) | learner.about(name)
                entry["over_points"] = over_points(values, scores.points, _power(name))
                best = scores.oracle.get(_what_is_measured(name))
                if best is not None:
                    entry["oracle"] = best.mean().item()
                    pooled = over_points(best, scores.points, _power(name))
                    entry["over_points"]["oracle"] = pooled["mean"]
                    if is_beaten(best, values, monitored(learner.metric, name)):
                        evaluation.warnings.append(_impossible(full, entry))
                base = name.partition("@")[0]
                baselines = {
                    baseline: found[base].mean().item()
                    for baseline, found in scores.baselines.items()
                    if base in found
                }
                if baselines:
                    entry["baselines"] = baselines
                evaluation.metrics[full] = entry
            if scores.coverage is not None:
                _calibrate(evaluation, split, qualifiers, scores)
            evaluation.digests[qualified(split, qualifiers)] = tasks_digest
    finally:
        learner.train(was_training)
    return evaluation


def summarise(values: Tensor, batches: Tensor) -> dict[str, Any]:
    """Mean and 95% intervals (half-widths, normal) of one number for each task.

    Tasks of a batch share their sizes, and what else a task set draws by the batch. `ci95` counts
    tasks as drawn independently: it is about other tasks of the sizes of this evaluation. Over
    other sizes too, where scores depend on them, means differ by more: `ci95_over_batches` counts
    only batches as independent (the sandwich estimator for clusters, Liang & Zeger 1986; with
    Student's t, as batches may be few).

    Args:
        values: `[tasks]`.
        batches: the number of the batch that each is from, int64 `[tasks]`.

    Returns:
        `mean`, `ci95`, `ci95_over_batches` (None where there is only one) and `tasks`.
    """
    mean, count = values.mean(), len(values)
    numbers, of_batch = batches.unique(return_inverse=True)
    off = values - mean
    together = off.new_zeros(len(numbers)).index_add_(0, of_batch, off)
    return {
        "mean": mean.item(),
        "ci95": _half_width(off, count),
        "ci95_over_batches": _half_width(together, count, t_quantile),
        "tasks": count,
    }


def over_points(values: Tensor, points: Tensor, power: int = 1) -> dict[str, Any]:
    """Mean and 95% interval with every target point counting alike, instead of every task.

    The mean is `m = Σ w v / Σ w` over tasks of w points and score v, itself a mean over them; its
    standard error that of a ratio, `√(n/(n−1) · Σ w² (v − m)²) / Σ w` (Cochran 1977, Sampling
    Techniques). Of a root (`power=2`) it is the root of the mean of squares, of all
    points' squared errors for `rmse`, and the interval comes by the delta method.

    Args:
        values: `[tasks]`.
        points: targets of each, `[tasks]`.
        power: of the values that is averaged.

    Returns:
        `mean`; `ci95`, a half-width, None for a single task; `points`, the targets of all tasks.
    """
    total = points.sum()
    raised = values**power
    mean = (points * raised).sum() / total
    slope = float(1 / (power * mean ** (1 - 1 / power))) if mean != 0 or power == 1 else 0.0
    ci95 = _half_width(slope * points * (raised - mean), float(total))
    return {"mean": float(mean ** (1 / power)), "ci95": ci95, "points": int(total)}


def _half_width(
    off: Tensor, total: float, quantile: Callable[[int], float] = lambda degrees: Z95
) -> float | None:
    """Of a mean `Σ …/total`, from how far its independent parts are off, which sum to 0.

    Args:
        quantile: in standard errors, by degrees of freedom.
    """
    count = len(off)
    if count < 2:
        return None
    return float(quantile(count - 1) * (off.square().sum() * count / (count - 1)).sqrt() / total)


def is_beaten(oracle: Tensor, own: Tensor, metric: Metric) -> bool:
    """Whether a score is better than the best possible one, by more than chance explains.

    That is more than three standard errors of the mean of the tasks' differences (and of a ten
    thousandth of the score, for rounding): then targets leak into the prediction, or the oracle
    is wrong.

    Args:
        oracle, own: `[tasks]`, of the same tasks.
        metric: says which end of the score is its best.
    """
    gain = own - oracle if metric.higher_is_better else oracle - own
    if len(gain) < 2:
        return False
    error = gain.std() / math.sqrt(len(gain))
    return bool(gain.mean() > 3 * error + 1e-4 * oracle.abs().mean())


def qualified(name: str, qualifiers: str) -> str:
    """`mse@steps=1` of the set `shots=10` as `mse@shots=10,steps=1`."""
    base, _, own = name.partition("@")
    together = ",".join(part for part in (qualifiers, own) if part)
    return f"{base}@{together}" if together else base


@dataclass
class _Scores:
    """By metric, `[tasks]` each on the CPU: the learner's, the oracle's, each baseline's.

    And of each task its `points`, targets; the number of its batch, int64; the `coverage [tasks,
    levels]` of central intervals and the predicted `variance`, where they are asked for and known.
    """

    own: dict[str, Tensor]
    oracle: dict[str, Tensor]
    baselines: dict[str, dict[str, Tensor]]
    points: Tensor
    batches: Tensor
    coverage: Tensor | None = None
    variance: Tensor | None = None


def _score(
    learner: Learner,
    loader: TaskLoader,
    n_tasks: int,
    precision: Precision,
    calibrated: bool,
    ranks: Ranks,
) -> tuple[_Scores, str]:
    """The scores of the tasks, and their digest."""
    total = loader.plan.n_tasks
    wanted = n_tasks if total is None else min(n_tasks, total)
    own = {}
    for step in range(ranks.rank, math.ceil(wanted / loader.batch_size), ranks.size):
        batch = slice_tasks(loader.batch_at(step), 0, wanted - step * loader.batch_size)
        # of learners that draw when they score: whoever takes a batch draws the same
        random_states.seed_everything(loader.seed, "scores", step)
        own[step] = _score_batch(learner, loader, batch, precision, calibrated), digest(batch)
    every: dict[int, tuple[_Scores, str]] = {}
    for part in ranks.gather(own):
        every |= part
    in_order = [every[step] for step in sorted(every)]
    sha = hashlib.sha256("".join(of_batch for _, of_batch in in_order).encode())
    return _joined([scores for scores, _ in in_order]), sha.hexdigest()


@torch.no_grad()
def _score_batch(
    learner: Learner, loader: TaskLoader, batch: Tasks, precision: Precision, calibrated: bool
) -> _Scores:
    """The scores of the tasks of a batch that have targets."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    tasks = precision.prepare(batch)
    mask = tasks.target_mask
    judged = slice(None) if mask is None else mask.any(dim=1).cpu()
    with precision.autocast():
        own = learner.score(tasks)
        with random_states.preserved():  # the scores are the same without it
            calibration = learner.calibration(tasks, levels) if calibrated else None
    best = loader.dataset.oracle(tasks) or {}  # type: ignore[arg-type] # a ragged set takes it
    count, number = tasks.target_x.shape[:2]
    points = torch.full((count,), number) if mask is None else mask.sum(dim=1).cpu()

    def kept(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values.cpu().double()[judged] for name, values in found.items()}

    baselines = loader.dataset.baselines(tasks)
    scores = _Scores(
        own=kept(own),
        oracle=kept(best),
        baselines={name: kept(found) for name, found in baselines.items()},
        points=points.double()[judged],
        batches=torch.zeros(count, dtype=torch.int64)[judged],
    )
    if calibration is not None:
        scores.coverage, scores.variance = (part.cpu().double()[judged] for part in calibration)
    return scores


def _joined(parts: Sequence[_Scores]) -> _Scores:
    """The scores of all batches, in their order."""

    def together(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for entries in found for name in entries)
        return {
            name: torch.cat([entries[name] for entries in found if name in entries])
            for name in names
        }

    baselines = dict.fromkeys(name for part in parts for name in part.baselines)
    calibrated = [part for part in parts if part.coverage is not None]
    scores = _Scores(
        own=together([part.own for part in parts]),
        oracle=together([part.oracle for part in parts]),
        baselines={
            name: together([part.baselines.get(name, {}) for part in parts]) for name in baselines
        },
        points=torch.cat([part.points for part in parts]),
        batches=torch.cat([part.batches + number for number, part in enumerate(parts)]),
    )
    if calibrated and len(scores.points):
        scores.coverage = torch.cat([part.coverage for part in calibrated])  # type: ignore[misc]
        scores.variance = torch.cat([part.variance for part in calibrated])  # type: ignore[misc]
    return scores


def _calibrate(evaluation: Evaluation, split: str, qualifiers: str, scores: _Scores) -> None:
    """Add the calibration curve of a set, `calibration_error` and `sharpness`.

    Both are of all points together, so that `over_points` says the same. The error is the mean
    over levels of `|coverage − level|`, without an interval: it is no mean over tasks. Sharpness
    is the root of the mean predicted variance, in y's units.
    """
    assert scores.coverage is not None
    assert scores.variance is not None
    weights = scores.points / scores.points.sum()
    coverage = weights @ scores.coverage
    error = (coverage - torch.tensor(LEVELS, dtype=torch.float64)).abs().mean().item()
    sharpness = over_points(scores.variance.sqrt(), scores.points, power=2)
    pooled = {"mean": error, "ci95": None, "points": sharpness["points"]}
    for name, entry in (("calibration_error", pooled), ("sharpness", sharpness)):
        evaluation.metrics[f"{split}/{qualified(name, qualifiers)}"] = {
            "mean": entry["mean"],
            "ci95": entry["ci95"],
            "tasks": len(scores.points),
            "over_points": entry,
        }
    evaluation.calibration[qualified(split, qualifiers)] = {
        "levels": list(LEVELS),
        "coverage": coverage.tolist(),
    }


def _power(name: str) -> int:
    """Of a score that is averaged over points: a root mean square is one of squares."""
    return 2 if name.partition("@")[0] == "rmse" else 1


def _what_is_measured(name: str) -> str:
    """A score's name without `predict=…`, which says how, not what: its oracle's name."""
    base, _, qualifiers = name.partition("@")
    kept = [part for part in qualifiers.split(",") if not part.startswith("predict=")]
    return qualified(base, ",".join(part for part in kept if part))


def _impossible(name: str, entry: Mapping[str, Any]) -> str:
    return (
        f"{name} = {entry['mean']:.4g} beats the best possible score, {entry['oracle']:.4g}, by "
        "more than three standard errors: targets leak into the prediction, or the task set's "
        "oracle is wrong"
    )


def monitored(metric: Metric, monitor: str | None) -> Metric:
    """The metric that picks the best checkpoint: the learner's own, or the one asked for.

    Of another one than the learner's own, less is better if a word of its name ends in `loss` or
    `mse`, or is one of `LESS_IS_BETTER`, as in `calibration_error`.
    """
    name = metric.name if monitor is None else monitor.removeprefix("val/")
    base = name.partition("@")[0].lower()
    if base == metric.name.partition("@")[0].lower():
        return Metric(name, metric.higher_is_better)
    words = base.split("_")
    less = any(word.endswith(("loss", "mse")) or word in LESS_IS_BETTER for word in words)
    return Metric(name, not less)


def _parts(name: str) -> tuple[str, set[str]]:
    base, _, qualifiers = name.partition("@")
    return base, {part for part in qualifiers.split(",") if part}


def _matches(name: tuple[str, set[str]], wanted: tuple[str, set[str]]) -> bool:
    """Whether a score is of what is wanted, of some set; scored jointly it is of something else."""
    others = name[1] - wanted[1]
    measured_otherwise = any(part.startswith(("scoring=", "predict=")) for part in others)
    return name[0] == wanted[0] and wanted[1] <= name[1] and not measured_otherwise
