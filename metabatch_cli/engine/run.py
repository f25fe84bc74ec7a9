"""A training: from a configuration to a trained and tested learner, on one process or several."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metabatch_cli import mkl
from metabatch_cli.batching import denormals
from metabatch_cli.config import build, choices
from metabatch_cli.config.check import check
from metabatch_cli.config.errors import UserError
from metabatch_cli.config.schema import Config, TrainerConfig
from metabatch_cli.engine.evaluator import Evaluation
from metabatch_cli.engine.parts import Parts, describe
from metabatch_cli.engine.ranks import Ranks
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.same_run import flatten, has_nothing_to_do
from metabatch_cli.engine.stop import Interrupted, Stopped
from metabatch_cli.engine.together import joined, started
from metabatch_cli.engine.trainer import Trainer
from metabatch_cli.report.console import Reporter, clock, silent
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

    Over several processes, if `trainer.processes` says so, or if torchrun started this one among
    others: all of them then call this, with the same configuration.

    Args:
        config: from `compose(...)`, or a mapping of the same keys.
        directory: of the run; None for a new one, `outputs/DATE/TIME`. A run of the same
            configuration is resumed there, a completed one only read; `fresh: true` starts anew.
        overrides: what was typed, for `overrides.yaml`.
        loggers: further ones, beside those of the configuration.

    Returns:
        `result.json`; nothing where torchrun's rank zero is another process.

    Raises:
        UserError: a configuration that cannot be; another run in the directory, or somebody at
            work in it; a loss that is not finite; another process of this training that is gone.
            Nothing in the directory is lost by any.
        Interrupted: SIGINT or SIGTERM came, and the run is saved.
        Stopped: a logger said so.
    """
    composed = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    timeout = OmegaConf.select(composed, "trainer.timeout")
    patience = timeout if isinstance(timeout, int | float) else TrainerConfig().timeout
    with denormals.as_before(), joined(patience) as ranks:
        if not ranks.leads:
            return follow(ranks, composed)
        return _lead(composed, directory, overrides, reporter or Reporter(), loggers, ranks)


def _lead(
    composed: DictConfig,
    directory: str | Path | None,
    overrides: list[str] | None,
    reporter: Reporter,
    loggers: Sequence[Logger],
    ranks: Ranks,
) -> dict[str, Any]:
    """The training as rank zero."""
    run = RunDirectory(directory or datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-%f"))
    fresh = bool(OmegaConf.select(composed, "fresh"))
    if run.last_checkpoint.exists() and not run.holds_run:
        raise UserError(
            f"{run.path}: holds checkpoints/{run.last_checkpoint.name}, but no config.yaml that "
            "says what it is of: take it away, or train elsewhere, with trainer.init_from="
            f"{run.last_checkpoint} to begin with its weights"
        )
    saved = run.read_config() if run.holds_run and not fresh else None
    plain = choices.resolve(composed, saved)
    plain["fresh"] = False
    checked = check(plain)
    if saved is not None and has_nothing_to_do(run, saved, plain, checked):
        ranks.from_leader(None)
        return already_completed(run, reporter)
    begun = saved is not None and run.last_checkpoint.exists()
    with ExitStack() as stack:
        if ranks.size == 1 and checked.trainer.processes > 1:
            ranks = stack.enter_context(started(checked.trainer.processes, checked.trainer.timeout))
        checked.loader.device = ranks.own_device(checked.loader.device)
        parts = Parts(checked, begun, reporter.say, ranks)
        parts.build()
        stack.enter_context(run.lock())
        # building took its time: another process may have begun, or even completed, a run here
        now = run.read_config() if run.holds_run and not fresh else None
        if now is not None and has_nothing_to_do(run, now, plain, checked):
            ranks.from_leader(None)
            return already_completed(run, reporter)
        if fresh:
            run.clear()
        for key, value in parts.chosen.items():
            section, name = key.split(".")
            plain[section][name] = value
        run.write_config(plain, overrides)
        with logged_to(run.log_file), ExitStack() as afterwards, recorded(run, checked):
            announce(run, parts, reporter, resumes=saved is not None)
            asked = OmegaConf.to_container(composed)
            ranks.from_leader({"asked": asked, "config": plain, "run": run.path})
            every = [*own_loggers(run, checked, reporter), *loggers]
            for logger in every:
                afterwards.callback(logger.close)  # when result.json says how it ended
            return _train(run, parts, reporter, every, ranks)


def follow(ranks: Ranks, composed: DictConfig | None = None) -> dict[str, Any]:
    """The training as another rank: as rank zero has decided, without writing anything.

    Args:
        composed: what this process was asked for; None where nobody asked.

    Raises:
        UserError: rank zero was asked for something else.
    """
    order: dict[str, Any] | None = ranks.from_leader()
    if order is None:
        return {}
    if composed is not None:
        asked, here = flatten(order["asked"]), flatten(OmegaConf.to_container(composed))
        differing = [
            f"  {key}: {here.get(key, 'not set')} here, {asked.get(key, 'not set')} of rank 0"
            for key in sorted(asked.keys() | here.keys())
            if asked.get(key) != here.get(key)
        ]
        if differing:
            raise UserError("started with another configuration\n" + "\n".join(differing))
    config = check(order["config"])
    config.loader.device = ranks.own_device(config.loader.device)
    parts = Parts(config, begun=True, ranks=ranks)  # rank zero sends the weights
    parts.build()
    _train(RunDirectory(order["run"]), parts, Reporter(silent()), [], ranks)
    return {}


def is_completed(config: DictConfig, directory: str | Path) -> bool:
    """Whether a directory holds this training's run, and it has nothing left to do.

    Raises:
        UserError: a completed run of another configuration.
    """
    run = RunDirectory(directory)
    if not run.holds_run or OmegaConf.select(config, "fresh") or run.status != "completed":
        return False
    saved = run.read_config()
    plain = choices.resolve(config, saved)
    plain["fresh"] = False
    return has_nothing_to_do(run, saved, plain, check(plain))


def own_loggers(run: RunDirectory, config: Config, reporter: Reporter) -> list[Logger]:
    """The loggers of a configuration, and the one that every run has."""
    loggers: list[Logger] = [JsonlLogger(run.path)]
    for name, node in config.logger.items():
        key = f"logger.{name}"
        logger = build.build(key, node, directory=run.path)
        loggers.append(Sheltered(key, logger, reporter.say))
    return loggers


def _train(
    run: RunDirectory, parts: Parts, reporter: Reporter, loggers: Sequence[Logger], ranks: Ranks
) -> dict[str, Any]:
    ranks.compute_on(parts.device)
    if len(set(ranks.gather(mkl.avx512_enabled()))) > 1:
        reporter.say(
            "warning: MKL uses AVX-512 in some of the processes only: last digits will differ from "
            f"those of one process (import metabatch_cli before torch in all, or {mkl.SWITCH}=0)"
        )
    trainer = Trainer(
        parts.config.trainer,
        run,
        parts.learner,
        parts.optimizer,
        parts.scheduler,
        parts.loader,
        parts.evaluation_loaders("val"),
        loggers,
        reporter,
        parts.compute_loss,
        ranks,
    )
    try:
        with trainer.stop:
            trainer.restore()
            if trainer.step:
                reporter.say(f"resumed from step {trainer.step:,}")
            trainer.fit()
            return finish(run, parts, trainer)
    except (Interrupted, Stopped) as stopped:
        if ranks.leads:
            why = str(stopped) if isinstance(stopped, Stopped) else None
            run.write_result(
                status="interrupted", step=trainer.step, seconds=trainer.elapsed, error=why
            )
        if isinstance(stopped, Interrupted):
            further = f"go on with: metabatch resume {run.path}"
            reporter.say(f"stopped at step {trainer.step:,}; {further}")
        raise
    finally:
        parts.loader.close()


def finish(run: RunDirectory, parts: Parts, trainer: Trainer) -> dict[str, Any]:
    """Test the trained learner, draw figures and write the result.

    Raises:
        Interrupted: a signal came while training, or comes now; all of the training is saved.
    """
    if trainer.stopped_by or trainer.has_been_told_to_stop():
        raise Interrupted(trainer.stopped_by)
    trainer.stop.at_once = trainer.ranks.leads  # the others end as it does
    best = parts.config.trainer.test_on == "best" and run.best_checkpoint.exists()
    weights = run.best_checkpoint if best else run.last_checkpoint
    trainer.load_learner(weights)
    evaluation = parts.score()
    if not trainer.ranks.leads:
        return {}
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


def already_completed(run: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    """Print the result of a completed run."""
    result = run.read_result()
    reporter.result("test", result.get("metrics", {}))
    reporter.say(f"completed before, at step {result['step']:,}: {run.path}")
    return result


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
