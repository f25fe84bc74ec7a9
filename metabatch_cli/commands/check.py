"""`metabatch check`: build everything, make batches twice, take one step, leave nothing behind."""

from __future__ import annotations

import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(words: list[str]) -> None:
    """A Hydra application like `train`, whose directories are nowhere."""
    from metabatch_cli.commands.hydra_app import launch, nowhere

    launch("train", __name__, "metabatch check", words=[*words, *nowhere()])


def job(config: DictConfig) -> None:
    """Check one configuration and report."""
    import torch

    from metabatch_cli.batching.strict import NotReproducible, check_strictly
    from metabatch_cli.batching.task import as_task
    from metabatch_cli.config import build, choices
    from metabatch_cli.config.check import check
    from metabatch_cli.config.errors import UserError
    from metabatch_cli.engine.parts import Parts, describe
    from metabatch_cli.report.console import Reporter, clock

    reporter = Reporter()
    parts = Parts(check(choices.resolve(config)))
    parts.build()
    reporter.plan("checking", describe(parts))

    try:
        check_strictly(parts.loader, build.build_taskset(parts.config, "train"))
    except NotReproducible as error:
        raise UserError(f"taskset: {error}") from error
    with parts.loader as loader:
        batches = loader.stream()
        first, second = next(batches), next(batches)
        rate = _rate(lambda: next(batches))
    task = as_task(first)
    shapes = [(name, _outline(getattr(task, name))) for name in task._fields if name != "aux"]
    reporter.plan("batch", [*shapes, *((f"aux.{k}", _outline(v)) for k, v in task.aux.items())])

    from metabatch_cli.engine.evaluator import evaluate
    from metabatch_cli.engine.run_directory import RunDirectory
    from metabatch_cli.engine.trainer import Trainer

    nowhere = RunDirectory(tempfile.gettempdir())
    trainer = Trainer(
        parts.config.trainer,
        nowhere,
        parts.learner,
        parts.optimizer,
        parts.scheduler,
        parts.loader,
        {},
        [],
        reporter,
    )
    loss = trainer.update(trainer.precision.prepare(first))
    if not torch.isfinite(loss):
        raise UserError(f"the loss of the first step is {loss.item()}")
    without = [name for name, p in parts.learner.named_parameters() if p.grad is None]
    steps = _rate(lambda: trainer.update(trainer.precision.prepare(second)))
    for split in ("val", "test"):
        evaluate(
            parts.learner,
            parts.evaluation_loaders(split),
            parts.precision,
            split=split,
            n_tasks=parts.config.evaluation.batch_size,
        )
    size, total = parts.config.loader.batch_size, parts.config.trainer.max_steps
    speed = min(rate, steps) if loader.num_workers else 1 / (1 / rate + 1 / steps)
    rows = [
        ("loss", f"{loss.item():.4g} at the first step"),
        ("creation", f"{rate:,.0f} batches/s, {rate * size:,.0f} tasks/s"),
        ("step", f"{steps:,.0f} steps/s"),
        ("waiting", f"for tasks: {_waiting(rate, steps, loader.num_workers):.0%} of a step"),
        ("training", f"about {clock(total / speed)} for {total:,} steps, without validation"),
        ("evaluation", f"val and test scored, {parts.config.evaluation.batch_size} tasks each"),
    ]
    if without:
        rows.append(("no gradient", ", ".join(without)))
    reporter.plan("report", rows)
    reporter.say("all is well")


def _rate(action: Any, seconds: float = 0.5) -> float:
    """How often a second something can be done, over half a second or ten times."""
    action()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or count < 3:
        action()
        count += 1
    return count / (time.perf_counter() - began)


def _waiting(rate: float, steps: float, workers: int) -> float:
    """The part of a training's time in which it waits for tasks."""
    if workers:  # creation and steps go on side by side
        return max(0.0, 1 - rate / steps)
    return steps / (steps + rate)


def _outline(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
