"""A run: from a configuration to a trained and tested learner, and back from its directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metabatch_cli.batching.taskset import Split, TaskSet
from metabatch_cli.config import build, choices
from metabatch_cli.config.check import check
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.config.schema import Config
from metabatch_cli.engine import checkpoint, random_states
from metabatch_cli.engine.evaluator import Evaluation
from metabatch_cli.engine.parts import Parts, describe
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.same_run import flatten, has_nothing_to_do
from metabatch_cli.engine.stop import Interrupted, Stopped
from metabatch_cli.engine.trainer import Trainer
from metabatch_cli.learners.learner import Learner
from metabatch_cli.report.console import Reporter, clock
from metabatch_cli.report.loggers import JsonlLogger, Logger
from metabatch_cli.report.sheltered import Sheltered

log = logging.getLogger("metabatch")


def train(
    config: DictConfig | Mapping[str, Any],
    directory: str | Path | None = None,
    *,
    overrides: list[str] | None = None,
    reporter: Reporter | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Train what a configuration declares, in a directory, or go on with the run that it holds.

    Args:
        config: from `compose(...)`, or a mapping of the same keys.
        directory: of the run; None for a new one, `outputs/DATE/TIME`. A run of the same
            configuration is resumed there, a completed one only read; `fresh: true` starts anew.
        overrides: what was typed, for `overrides.yaml`.
        loggers: further ones, beside those of the configuration.

    Returns:
        `result.json`.

    Raises:
        UserError: a configuration that cannot be; another run in the directory, or somebody at
            work in it; a loss that is not finite. Nothing in the directory is lost by any.
        Interrupted: SIGINT or SIGTERM came, and the run is saved.
        Stopped: a logger said so.
    """
    reporter = reporter or Reporter()
    run = RunDirectory(directory or datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-%f"))
    composed = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    fresh = bool(OmegaConf.select(composed, "fresh"))
    saved = run.read_config() if run.holds_run and not fresh else None
    plain = choices.resolve(composed, saved)
    plain["fresh"] = False
    checked = check(plain)
    if saved is not None and has_nothing_to_do(run, saved, plain, checked):
        return already_completed(run, reporter)
    begun = saved is not None and run.last_checkpoint.exists()
    parts = Parts(checked, begun, reporter.say)
    parts.build()
    with run.lock():
        # building took its time: another process may have begun, or even completed, a run here
        now = run.read_config() if run.holds_run and not fresh else None
        if now is not None and has_nothing_to_do(run, now, plain, checked):
            return already_completed(run, reporter)
        if fresh:
            run.clear()
        for key, value in parts.chosen.items():
            section, name = key.split(".")
            plain[section][name] = value
        run.write_config(plain, overrides)
        with logged_to(run.log_file), ExitStack() as afterwards, recorded(run, checked):
            announce(run, parts, reporter, resumes=saved is not None)
            return _train(run, parts, reporter, afterwards, loggers)


def is_completed(config: DictConfig, directory: str | Path) -> bool:
    """Whether a directory holds this training's run, and it has nothing left to do.

    Raises:
        UserError: a completed run of another configuration.
    """
    run = RunDirectory(directory)
    if not run.holds_run or OmegaConf.select(config, "fresh") or status_of(run) != "completed":
        return False
    saved = run.read_config()
    plain = choices.resolve(config, saved)
    plain["fresh"] = False
    return has_nothing_to_do(run, saved, plain, check(plain))


def _train(
    run: RunDirectory,
    parts: Parts,
    reporter: Reporter,
    afterwards: ExitStack,
    further: Sequence[Logger] = (),
) -> dict[str, Any]:
    config = parts.config
    loggers: list[Logger] = [JsonlLogger(run.path)]
    for name, node in config.logger.items():
        key = f"logger.{name}"
        logger = build.build(key, node, directory=run.path)
        loggers.append(Sheltered(key, logger, reporter.say))
    loggers += further
    for logger in loggers:
        afterwards.callback(logger.close)  # when result.json says how it ended
    trainer = Trainer(
        config.trainer,
        run,
        parts.learner,
        parts.optimizer,
        parts.scheduler,
        parts.loader,
        parts.evaluation_loaders("val"),
        loggers,
        reporter,
        parts.compute_loss,
    )
    try:
        with trainer.stop:
            trainer.restore()
            if trainer.step:
                reporter.say(f"resumed from step {trainer.step:,}")
            trainer.fit()
            return finish(run, parts, trainer)
    except Interrupted:
        run.write_result(status="interrupted", step=trainer.step, seconds=trainer.elapsed)
        reporter.say(f"stopped at step {trainer.step:,}; go on with: metabatch resume {run.path}")
        raise
    except Stopped as stopped:
        run.write_result(
            status="interrupted", step=trainer.step, seconds=trainer.elapsed, error=str(stopped)
        )
        raise
    finally:
        parts.loader.close()


def finish(run: RunDirectory, parts: Parts, trainer: Trainer) -> dict[str, Any]:
    """Test the trained learner, draw figures and write the result.

    Raises:
        Interrupted: a signal came while training, or comes now; all of the training is saved.
    """
    if trainer.stop.received is not None:
        raise Interrupted(trainer.stop.received)
    trainer.stop.at_once = True
    best = parts.config.trainer.test_on == "best" and run.best_checkpoint.exists()
    weights = run.best_checkpoint if best else run.last_checkpoint
    trainer.learner.load_state_dict(checkpoint.load(weights, trainer.device)["learner"])
    evaluation = parts.score()
    if parts.config.evaluation.figures:
        draw(run, parts, trainer, evaluation)
    trainer.stop.at_once = False
    result = run.write_result(
        status="completed",
        step=trainer.step,
        seconds=trainer.elapsed,
        error=None,
        metrics=evaluation.metrics,
        calibration=evaluation.calibration,
        digests=evaluation.digests,
        note=parts.taskset.note,
        monitor={
            "metric": f"val/{trainer.metric.name}",
            "best": trainer.best,
            "higher_is_better": trainer.metric.higher_is_better,
        },
    )
    trainer.reporter.result(f"test, {'best' if best else 'last'} weights", evaluation.metrics)
    for warning in evaluation.warnings:
        trainer.reporter.say(f"warning: {warning}")
    trainer.reporter.say(f"completed, {clock(trainer.seconds)} of training: {run.path}")
    return result


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
        raise UserError(f"run={directory}: has no checkpoint yet (status: {status_of(run)})")
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


def already_completed(run: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    """Print the result of a completed run."""
    result = run.read_result()
    reporter.result("test", result.get("metrics", {}))
    reporter.say(f"completed before, at step {result['step']:,}: {run.path}")
    return result


def status_of(run: RunDirectory) -> str:
    """What `result.json` says of the run."""
    return run.read_result().get("status", "not begun")


# --- around a training ---------------------------------------------------------------------


@contextmanager
def recorded(run: RunDirectory, config: Config) -> Iterator[None]:
    """Keep `result.json` true while a training goes on, however it ends."""
    began = time.monotonic()
    before = run.read_result()
    run.write_result(
        status="running",
        step=before.get("step", 0),
        seconds=before.get("seconds", 0.0),
        seed=config.seed,
        error=None,
        metrics={},
    )
    try:
        yield
    except (Interrupted, Stopped):
        raise
    except KeyboardInterrupt:  # the second one: somebody did not want to wait
        run.write_result(status="interrupted")
        raise
    except BaseException as error:
        log.exception("failed after %.1f s", time.monotonic() - began)
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        run.write_result(status="failed", error=message)
        raise


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Everything that is logged meanwhile, in train.log."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # the reporter tells the terminal
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        handler.close()


def announce(run: RunDirectory, parts: Parts, reporter: Reporter, *, resumes: bool) -> None:
    """Print what the training will do."""
    reporter.plan("resuming" if resumes else "training", [*describe(parts), ("run", str(run.path))])


def draw(run: RunDirectory, parts: Parts, trainer: Trainer, evaluation: Evaluation) -> None:
    """Predictions, calibration and learning curves, in figures/; a failure is only said."""
    taskset = next(iter(parts.evaluation_loaders("test").values())).dataset
    try:
        from metabatch_cli.report.calibration_figure import draw_calibration
        from metabatch_cli.report.curves import draw_learning_curves
        from metabatch_cli.report.figures import draw_predictions
        from metabatch_cli.report.steps_figure import draw_inner_steps

        with parts.precision.autocast():
            draw_predictions(
                parts.deployed,
                taskset,
                run.figures / "predictions.png",
                device=parts.device,
                dtype=parts.precision.dtype,
                seed=parts.config.evaluation.seed,
                spec=parts.spec,
            )
        draw_calibration(evaluation.calibration, run.figures / "calibration.png")
        draw_inner_steps(evaluation.metrics, run.figures / "inner_steps.png")
        draw_learning_curves(
            run.metrics_file,
            run.figures / "learning_curves.png",
            metric=trainer.metric.name,
            higher_is_better=trainer.metric.higher_is_better,
        )
    except Exception as error:  # hours of training are not lost to a picture
        log.exception("no figures")
        trainer.reporter.say(f"no figures: {type(error).__name__}: {error} (see train.log)")
