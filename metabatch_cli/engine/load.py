"""A run, read back from its directory: its configuration and its trained learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metabatch_cli.batching.taskset import Split, TaskSet
from metabatch_cli.config import build, choices
from metabatch_cli.config.check import check
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.config.schema import Config
from metabatch_cli.engine import checkpoint, random_states
from metabatch_cli.engine.evaluator import Evaluation
from metabatch_cli.engine.parts import Parts
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.same_run import flatten
from metabatch_cli.learners.learner import Learner


@dataclass
class Run:
    """A run that was read back from its directory.

    Attributes:
        directory: its files.
        config: its configuration.
        learner: with the best weights, or the last ones where none were validated yet; in
            evaluation mode.
        parts: task sets and loaders, built when asked for.
    """

    directory: RunDirectory
    config: Config
    learner: Learner
    parts: Parts
    step: int

    @property
    def device(self) -> torch.device:
        """Where the learner lives."""
        return self.parts.device

    def score(self) -> Evaluation:
        """Scores on the test tasks of `config.evaluation`."""
        return self.parts.score()

    @property
    def result(self) -> dict[str, Any]:
        """`result.json` as it is now."""
        return self.directory.read_result()

    def taskset(self, split: Split = "test") -> TaskSet:
        """The task set of a split."""
        return build.build_taskset(self.config, split)


def load_run(
    directory: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    weights: str = "best",
    device: str | None = None,
) -> Run:
    """Rebuild a finished or interrupted run.

    Args:
        directory: of the run.
        config: a resolved configuration to use instead of the run's own.
        weights: `best` or `last`; where the one is not there yet, the other is taken.
        device: where the learner shall live; default: where it was trained, else the CPU.

    Raises:
        UserError: no run, or one without a checkpoint yet.
    """
    run = RunDirectory.existing(directory)
    plain = dict(config or run.read_config())
    wanted = device or plain["loader"]["device"]
    try:
        choices.check_device(wanted)
    except ConfigError:
        if device is not None:
            raise
        wanted = "cpu"
    plain["loader"] = {**plain["loader"], "device": wanted}
    plain["trainer"] = {**plain["trainer"], "init_from": None}
    parts = Parts(check(plain))
    files = [run.best_checkpoint, run.last_checkpoint]
    files = [file for file in (files if weights == "best" else files[::-1]) if file.exists()]
    if not files:
        raise UserError(f"run={directory}: has no checkpoint yet (status: {run.status})")
    state = checkpoint.load(files[0], wanted)
    with random_states.preserved():
        learner = parts.learner
    if unlike := _unlike(state["learner"], learner.state_dict()):
        raise UserError(
            f"{files[0]}: does not fit the network that the configuration describes: {unlike}"
            + _changed(run.read_config(), plain)
        )
    learner.load_state_dict(state["learner"])
    return Run(run, parts.config, parts.learner.eval(), parts, int(state["step"]))


def _unlike(saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str:
    """The first weight of which one of both has none, or another shape; empty if there is none."""
    for name in (*here, *saved):
        if name not in saved:
            return f"it has {name}, which was not trained"
        if name not in here:
            return f"it lacks {name}, which was trained"
        if saved[name].shape != here[name].shape:
            shapes = list(here[name].shape), list(saved[name].shape)
            return "{} is {} in it, and {} was trained".format(name, *shapes)
    return ""


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a configuration has of tasks, network and learner that the run's own has not."""
    before = flatten(saved)
    changed = [
        f"{key}={value}"
        for key, value in flatten(now).items()
        if key.partition(".")[0] in ("taskset", "model", "learner") and before.get(key) != value
    ]
    return f"\n  changed since: {', '.join(changed)}" if changed else ""
