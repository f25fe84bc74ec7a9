"""`metabatch bench train`: the steps of a training, and how much of them is waiting for tasks.

Measured is the body of the loop: receive a batch, learn, keep the loss. Logging, validation and
checkpoints are not in it.

On a CPU every step is over when its code is. On another device the code only queues the work, so
that there are two measurements: steps a second without waiting for the device, as in a training;
and the parts of a step with the device awaited after each, as otherwise its time would be seen
somewhere later. What a step waits in the second is more than in the first, where tasks are
created while the device computes.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from metabatch_cli.bench import machine, results
from metabatch_cli.bench.measure import rate
from metabatch_cli.config import choices
from metabatch_cli.config.check import check
from metabatch_cli.config.schema import BenchTrainConfig
from metabatch_cli.engine.parts import Parts, describe
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.trainer import Trainer
from metabatch_cli.report.console import Reporter, clock

if TYPE_CHECKING:
    from omegaconf import DictConfig

LEAST = 10  # steps that count at least, however slow they are
EXCLUDED = ("logging", "validation", "checkpoints")


def job(config: DictConfig) -> None:
    """Build a training, watch some of its steps, and say where their time goes."""
    checked = check(choices.resolve(config), BenchTrainConfig)
    out = results.writable("bench.out", checked.bench.out)
    reporter = Reporter()
    parts = Parts(checked, say=reporter.say)
    parts.build()
    about = clock(checked.bench.seconds * 2.25)
    reporter.plan(
        "measuring",
        [*describe(parts), ("time", f"about {about}, and {checked.bench.warm_up} steps before")],
    )
    disturbed = machine.disturbance()
    if disturbed is not None:
        reporter.say(f"warning: the machine is not idle ({disturbed}): rates will be off")
    found = {
        "machine": machine.facts(),
        "disturbed_by": disturbed,
        **setting(parts),
        **measured(parts, checked.bench.seconds, checked.bench.warm_up),
    }
    reporter.plan("report", report(found))
    if out is not None:
        results.write(out, "train", found)
        reporter.say(f"written: {checked.bench.out}")


def setting(parts: Parts) -> dict[str, Any]:
    """What was watched, and on what."""
    config = parts.config
    cuda = parts.device.type == "cuda"
    return {
        "taskset": type(parts.taskset).__name__,
        "model": config.model["_target_"].rpartition(".")[2],
        "learner": type(parts.learner).__name__,
        "parameters": sum(parameter.numel() for parameter in parts.learner.parameters()),
        "batch_size": config.loader.batch_size,
        "workers": parts.loader.num_workers,
        "device": str(parts.device),
        "device_name": torch.cuda.get_device_name(parts.device) if cuda else None,
        "threads": torch.get_num_threads(),
        "precision": config.trainer.precision,
        "compile": config.trainer.compile,
        "excluded": list(EXCLUDED),
    }


def measured(parts: Parts, seconds: float, warm_up: int) -> dict[str, Any]:
    """The loader alone, then steps."""
    with parts.loader as loader:
        ahead = loader.num_workers * loader.prefetch_factor
        alone = rate(loader.stream(), seconds, ahead, loader.num_workers)
        loader.close()  # the steps begin with nothing in stock
        trainer = silent_trainer(parts)
        trainer.learner.train()
        batches = trainer.batches()
        wait_for_device = synchroniser(parts.device)
        steps(trainer, batches, 0.0, max(warm_up, ahead + 1), wait_for_device)
        gc.collect()
        if parts.device.type == "cpu":
            waiting, working, total = steps(trainer, batches, seconds, LEAST)
            per_second = len(waiting) / total
        else:
            queued, _, total = steps(trainer, batches, seconds / 2, LEAST, at_end=wait_for_device)
            per_second = len(queued) / total
            waiting, working, _ = steps(trainer, batches, seconds / 2, LEAST, wait_for_device)
    whole = waiting + working
    return {
        "seconds": seconds,
        "steps": len(whole),
        "steps_per_second": per_second,
        "tasks_per_second": per_second * parts.config.loader.batch_size,
        "device_awaited_after_each_step": parts.device.type != "cpu",
        "step_ms": statistics_of(whole * 1e3),
        "waiting_ms": statistics_of(waiting * 1e3),
        "working_ms": statistics_of(working * 1e3),
        "waiting_percent": {
            **statistics_of(waiting / whole * 100),
            "of_all": float(waiting.sum() / whole.sum() * 100),
        },
        "loader_alone": {
            "batches_per_second": alone,
            "tasks_per_second": alone * parts.config.loader.batch_size,
        },
    }


def steps(
    trainer: Trainer,
    batches: Iterator[Any],
    seconds: float,
    least: int,
    after_each: Callable[[], None] = lambda: None,
    *,
    at_end: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Take steps for so long and at least so many.

    Returns:
        Seconds of each step in `next(batches)`, seconds of each in all the rest, and in all.
    """
    waiting: list[float] = []
    working: list[float] = []
    at_end()
    began = now = time.perf_counter()
    while now - began < seconds or len(waiting) < least:
        batch = next(batches)
        received = time.perf_counter()
        trainer.observe(trainer.update(trainer.precision.prepare(batch)))
        after_each()
        waiting.append(received - now)
        before, now = received, time.perf_counter()
        working.append(now - before)
    at_end()
    return np.array(waiting), np.array(working), time.perf_counter() - began


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done all that was asked of it."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


def silent_trainer(parts: Parts) -> Trainer:
    """The trainer that `metabatch train` would use, without anybody to report to."""
    return Trainer(
        parts.config.trainer,
        RunDirectory(tempfile.gettempdir()),
        parts.learner,
        parts.optimizer,
        parts.scheduler,
        parts.loader,
        {},
        [],
        Reporter(Console(quiet=True)),
        parts.compute_loss,
    )


def statistics_of(values: np.ndarray) -> dict[str, float]:
    """Mean, median and 95th percentile."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
    }


def report(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The measurement in words."""

    def shown(key: str, unit: str) -> str:
        of = found[key]
        numbers = [f"{of[name]:.3g}{unit} {name}" for name in ("median", "mean")]
        return ", ".join([*numbers, f"{of['p95']:.3g}{unit} at the 95th percentile"])

    alone, percent = found["loader_alone"], found["waiting_percent"]
    awaited = ", device awaited after each" if found["device_awaited_after_each_step"] else ""
    return [
        ("steps", f"{found['steps_per_second']:,.4g} a second, "
                  f"{found['tasks_per_second']:,.4g} tasks a second"),
        ("a step", shown("step_ms", " ms") + awaited),
        ("waiting", f"{percent['of_all']:.3g}% of the time; {shown('waiting_ms', ' ms')}"),
        ("of a step", shown("waiting_percent", "%")),
        ("loader alone", f"{alone['batches_per_second']:,.4g} batches a second"),
        ("left out", ", ".join(found["excluded"])),
    ]  # fmt: skip
