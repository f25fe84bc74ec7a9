"""A trial before a run: a copy of the learner looks at tasks, so that what is wrong says so now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metabatch_cli.batching.auto import measure
from metabatch_cli.batching.ragged import PaddedTask, Tasks
from metabatch_cli.batching.task import POINTS, slice_tasks
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.engine import random_states
from metabatch_cli.learners.learner import Learner

if TYPE_CHECKING:
    from metabatch_cli.engine.parts import Parts


def try_out(parts: Parts) -> None:
    """Let the learner look at two tasks: what does not fit together says so before a run."""
    tasks = slice_tasks(parts.precision.prepare(parts.loader.batch_at(0)), 0, 2)
    for part in ("context", "target"):
        points = {
            name: getattr(tasks, name).shape[1] for name in tasks._fields if name.startswith(part)
        }
        if len(set(points.values())) > 1:
            found = [f"{count} in {name}" for name, count in points.items()]
            raise ConfigError(
                "taskset",
                f"{type(parts.taskset).__name__} makes tasks whose points are "
                f"{', '.join(found[:-1])} and {found[-1]}",
            )
    learner = deepcopy(parts.learner).eval()  # which may count, or keep running statistics
    try:
        with random_states.preserved(), torch.no_grad(), parts.precision.autocast():
            loss = learner(tasks)
            scores = learner.score(tasks)
            _check_numbers(learner, tasks, loss, scores)
        if isinstance(tasks, PaddedTask):
            try_padding(parts, learner, tasks, loss)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        model = parts.config.model["_target_"].rpartition(".")[2]
        raise ConfigError(
            "learner",
            f"{type(learner).__name__} around {model} cannot learn from these tasks: "
            f"{type(error).__name__}: {error}\n  the tasks: {_shapes(tasks)}",
        ) from error
    if learner.metric.name not in scores:
        raise ConfigError(
            "learner",
            f"its metric {learner.metric.name!r} is not among its scores",
            allowed=scores,
            wrong_name=learner.metric.name,
        )


def _shapes(tasks: Tasks) -> str:
    fields = {name: getattr(tasks, name) for name in POINTS}
    return ", ".join(
        f"{name} {str(field.dtype).removeprefix('torch.')} {list(field.shape)}"
        for name, field in fields.items()
        if isinstance(field, Tensor)
    )


def _check_numbers(
    learner: Learner, tasks: Tasks, loss: object, scores: Mapping[str, object]
) -> None:
    """Raise TypeError unless the loss is one number, and each score one of each task."""
    name, n_tasks = type(learner).__name__, len(tasks.target_x)
    for what, found, shape in (
        (f"{name}.forward", loss, []),
        *((f"{name}.score, {metric!r}", values, [n_tasks]) for metric, values in scores.items()),
    ):
        if isinstance(found, Tensor) and list(found.shape) == shape:
            continue
        kind = f"tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        wanted = "of each task one number, [tasks]" if shape else "one number, []"
        raise TypeError(f"{what} gives a {kind}, and should give a tensor: {wanted}")


def measure_step(parts: Parts) -> dict[str, float]:
    """What `TaskLoader.choose_workers` asks for: seconds of a training step and of creating its
    batch, and the CPU cores that the step keeps busy.

    Without a trace in the learner or any random state. Nothing where it fails: what is wrong will
    show, and be recorded, in training.
    """
    learner = parts.learner
    pieces = parts.config.trainer.accumulate
    creation: list[float] = []
    seconds: list[float] = []
    cpu: list[float] = []

    def one_step() -> None:
        times = [time.perf_counter()]
        batch = parts.loader.batch_at(len(seconds))
        times.append(time.perf_counter())
        busy = time.process_time()
        learner.zero_grad(set_to_none=True)
        tasks = parts.precision.prepare(batch)
        size = len(tasks.target_x) // pieces
        for start in range(0, size * pieces, size):  # no more memory than in training
            with parts.precision.autocast():
                part = slice_tasks(tasks, start, start + size) if pieces > 1 else tasks
                loss = parts.compute_loss(part)
            loss.backward()
        loss.item()  # waits for a GPU to get there
        cpu.append(time.process_time() - busy)
        times.append(time.perf_counter())
        creation.append(times[1] - times[0])
        seconds.append(times[2] - times[1])

    try:
        with left_as_it_was(learner):
            measure(one_step)
    except Exception:
        return {}
    step = statistics.median(seconds)
    return {
        "creation": statistics.median(creation),
        "step": step,
        "busy_cores": max(statistics.median(cpu) / step, 1.0),
    }


@contextmanager
def left_as_it_was(learner: Learner) -> Iterator[None]:
    """Meanwhile, it may learn and count: afterwards it has its weights, its buffers and no
    gradients, and the global random generators their states."""
    state, training = deepcopy(learner.state_dict()), learner.training
    learner.train()
    try:
        with random_states.preserved():
            yield
    finally:
        learner.load_state_dict(state)
        learner.train(training)
        learner.zero_grad(set_to_none=True)


def try_padding(parts: Parts, learner: Learner, tasks: PaddedTask, loss: Tensor) -> None:
    """Raise ConfigError if the loss depends on what stands in the padding, or on its length."""
    packed = tasks.packed()
    longer = packed.padded(*(int(lengths.max()) + 1 for lengths in packed.lengths))
    filled = {
        f"{part}_{of}": getattr(longer, f"{part}_{of}").clone()
        for part in ("context", "target")
        for of in "xy"
    }
    for name, values in filled.items():
        values[~getattr(longer, f"{name[:-2]}_mask")] = 100 if values.is_floating_point() else 1
    with random_states.preserved(), torch.no_grad(), parts.precision.autocast():
        other = learner(longer._replace(**filled))
    if not torch.allclose(loss, other, rtol=0.02, equal_nan=True):
        raise ConfigError(
            "learner",
            f"{type(learner).__name__} takes padding for points: with other numbers behind "
            f"the same tasks its loss is {other.item():.4g} instead of {loss.item():.4g}; it "
            "has to heed tasks.context_mask and tasks.target_mask (models/masking.py helps)",
        )
