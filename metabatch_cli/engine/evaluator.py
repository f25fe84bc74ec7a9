"""Evaluation: a learner's scores on frozen held-out tasks, with intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metabatch_cli.batching.loader import TaskLoader
from metabatch_cli.batching.task import digest, slice_tasks
from metabatch_cli.engine import random_states
from metabatch_cli.engine.precision import Precision
from metabatch_cli.learners.learner import Learner, Metric

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


@dataclass
class Evaluation:
    """Scores on the held-out tasks of one split.

    Attributes:
        metrics: by `SPLIT/METRIC[@QUALIFIERS]`: `mean` over tasks, `ci95` (a half-width; None
            for a single task), `tasks`, `oracle` where the best possible score is known, and
            `baselines`, the mean of each simple prediction by its name, where the task set has
            some that are scored by the metric. (`mse@steps=1` has the baselines of `mse`.)
        digests: SHA-256 of the tasks of each set, by `SPLIT[@QUALIFIERS]`.
    """

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

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
) -> Evaluation:
    """Score a learner on the first `n_tasks` tasks of every set (all of a smaller finite one).

    Tasks that have no target are among the `n_tasks`, but have no score and are not counted.

    Args:
        loaders: by the qualifiers of each set, such as `shots=5`; "" for none.
        precision: of the learner.
        split: what the metrics' names begin with.

    Returns:
        Means and intervals over tasks; the learner is left in the mode that it was in, and the
        global random generators in the states that they were in.
    """
    evaluation = Evaluation()
    was_training = learner.training
    learner.eval()
    try:
        for qualifiers, loader in loaders.items():
            with random_states.preserved(loader.seed):  # of learners that draw when they score
                scores, tasks_digest = _score(learner, loader, n_tasks, precision)
            for name, values in scores.own.items():
                entry = summarise(values)
                if name in scores.oracle:
                    entry["oracle"] = scores.oracle[name].mean().item()
                base = name.partition("@")[0]
                baselines = {
                    baseline: found[base].mean().item()
                    for baseline, found in scores.baselines.items()
                    if base in found
                }
                if baselines:
                    entry["baselines"] = baselines
                evaluation.metrics[f"{split}/{qualified(name, qualifiers)}"] = entry
            evaluation.digests[qualified(split, qualifiers)] = tasks_digest
    finally:
        learner.train(was_training)
    return evaluation


def summarise(values: Tensor) -> dict[str, Any]:
    """Mean and 95% interval (half-width, normal) of one number for each task, `[tasks]`."""
    count = len(values)
    ci95 = Z95 * values.std().item() / math.sqrt(count) if count > 1 else None
    return {"mean": values.mean().item(), "ci95": ci95, "tasks": count}


def qualified(name: str, qualifiers: str) -> str:
    """`mse@steps=1` of the set `shots=10` as `mse@shots=10,steps=1`."""
    base, _, own = name.partition("@")
    together = ",".join(part for part in (qualifiers, own) if part)
    return f"{base}@{together}" if together else base


@dataclass
class _Scores:
    """By metric, `[tasks]` each on the CPU: the learner's, the oracle's, each baseline's."""

    own: dict[str, Tensor] = field(default_factory=dict)
    oracle: dict[str, Tensor] = field(default_factory=dict)
    baselines: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def _score(
    learner: Learner, loader: TaskLoader, n_tasks: int, precision: Precision
) -> tuple[_Scores, str]:
    """The scores of the tasks, and their digest."""
    scores = _Scores()
    sha = hashlib.sha256()
    total = loader.plan.n_tasks
    wanted = n_tasks if total is None else min(n_tasks, total)
    for step in range(math.ceil(wanted / loader.batch_size)):
        keep = min(loader.batch_size, wanted - step * loader.batch_size)
        batch = slice_tasks(loader.batch_at(step), 0, keep)
        sha.update(digest(batch).encode())
        tasks = precision.prepare(batch)
        mask = tasks.target_mask
        judged = slice(None) if mask is None else mask.any(dim=1).cpu()
        with precision.autocast():
            own = learner.score(tasks)
        best = loader.dataset.oracle(tasks) or {}  # type: ignore[arg-type] # a ragged set takes it
        pairs = [(own, scores.own), (best, scores.oracle)]
        for baseline, found in loader.dataset.baselines(tasks).items():
            pairs.append((found, scores.baselines.setdefault(baseline, {})))
        for found, kept in pairs:
            for name, values in found.items():
                fresh = values.cpu().double()[judged]
                kept[name] = torch.cat([kept[name], fresh]) if name in kept else fresh
    return scores, sha.hexdigest()


def monitored(metric: Metric, monitor: str | None) -> Metric:
    """The metric that picks the best checkpoint: the learner's own, or the one asked for."""
    if monitor is None or monitor == metric.name:
        return metric
    name = monitor.removeprefix("val/")
    lower = ("loss", "mse", "rmse", "error")  # of what is not known better, more is better
    return Metric(name, not name.partition("@")[0].endswith(lower))


def _parts(name: str) -> tuple[str, set[str]]:
    base, _, qualifiers = name.partition("@")
    return base, {part for part in qualifiers.split(",") if part}


def _matches(name: tuple[str, set[str]], wanted: tuple[str, set[str]]) -> bool:
    return name[0] == wanted[0] and wanted[1] <= name[1]
