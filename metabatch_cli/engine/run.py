"""A run: from a configuration to a trained and tested learner, and back from its directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metabatch_cli.batching.loader import TaskLoader
from metabatch_cli.batching.task import slice_tasks
from metabatch_cli.batching.taskset import Split, TaskSet, TaskSpec
from metabatch_cli.config import build, choices
from metabatch_cli.config.check import check
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.config.schema import Config
from metabatch_cli.engine import checkpoint, random_states
from metabatch_cli.engine.evaluator import Evaluation, evaluate, monitored
from metabatch_cli.engine.precision import Precision
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.stop import Interrupted
from metabatch_cli.engine.trainer import Trainer
from metabatch_cli.learners.learner import Learner
from metabatch_cli.report.console import Reporter, clock
from metabatch_cli.report.loggers import JsonlLogger, Logger

log = logging.getLogger("metabatch")

# what may differ from the configuration of a run that is resumed: nothing that its numbers
# depend on
FREE_TO_CHANGE = (
    "fresh",
    "logger",
    "launcher",
    "loader.workers",
    "loader.prefetch_factor",
    "loader.persistent_workers",
    "loader.pin_memory",
    "loader.timeout",
    "trainer.log_every",
    "trainer.max_steps",
    "trainer.max_time",
)


def train(
    config: DictConfig | Mapping[str, Any],
    directory: str | Path | None = None,
    *,
    overrides: list[str] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train what a configuration declares, in a directory, or go on with the run that it holds.

    Args:
        config: from `compose(...)`, or a mapping of the same keys.
        directory: of the run; None for a new one, `outputs/DATE/TIME`. A run of the same
            configuration is resumed there, a completed one only read; `fresh: true` starts anew.
        overrides: what was typed, for `overrides.yaml`.

    Returns:
        `result.json`.

    Raises:
        UserError: a configuration that cannot be; another run in the directory, or somebody at
            work in it; a loss that is not finite. Nothing in the directory is lost by any.
        Interrupted: SIGINT or SIGTERM came, and the run is saved.
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
    parts = Parts(checked, begun=saved is not None and run.last_checkpoint.exists())
    parts.build()
    with run.lock():
        # building took its time: another process may have begun, or even completed, a run here
        now = run.read_config() if run.holds_run and not fresh else None
        if now is not None and has_nothing_to_do(run, now, plain, checked):
            return already_completed(run, reporter)
        if fresh:
            run.clear()
        plain["loader"]["workers"] = parts.loader.num_workers
        run.write_config(plain, overrides)
        with logged_to(run.log_file), recorded(run, checked):
            announce(run, parts, reporter, resumes=saved is not None)
            return _train(run, parts, reporter)


def _train(run: RunDirectory, parts: Parts, reporter: Reporter) -> dict[str, Any]:
    config = parts.config
    loggers: list[Logger] = [JsonlLogger(run.path)]
    loggers += [
        build.build(f"logger.{name}", node, directory=run.path)
        for name, node in config.logger.items()
    ]
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
    finally:
        parts.loader.close()
        for logger in loggers:
            logger.close()


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
        draw(run, parts, trainer)
    trainer.stop.at_once = False
    result = run.write_result(
        status="completed",
        step=trainer.step,
        seconds=trainer.elapsed,
        error=None,
        metrics=evaluation.metrics,
        digests=evaluation.digests,
        monitor={"metric": f"val/{trainer.metric.name}", "best": trainer.best},
    )
    trainer.reporter.result(f"test, {'best' if best else 'last'} weights", evaluation.metrics)
    trainer.reporter.say(f"completed in {clock(trainer.seconds)}: {run.path}")
    return result


@dataclass
class Parts:
    """Everything that a configuration declares, built in the order in which it is needed."""

    config: Config
    begun: bool = False
    """Whether there is a checkpoint to go on from, so that `init_from` is no longer needed."""

    def build(self) -> None:
        """Build all that training needs, so that what cannot be built says so before it begins."""
        torch.set_num_threads(int(self.config.trainer.threads))
        self.loader, self.scheduler  # noqa: B018 (the last links of the chains)
        self.evaluation_loaders("val")
        self.evaluation_loaders("test")
        self.try_out()
        if self.config.trainer.monitor is not None:
            self.check_monitor()
        size, parts = self.config.loader.batch_size, self.config.trainer.accumulate
        if size % parts:
            raise ConfigError(
                "trainer.accumulate",
                f"does not divide loader.batch_size={size}",
                value=parts,
                allowed=", ".join(str(k) for k in range(1, size + 1) if size % k == 0),
            )

    def try_out(self) -> None:
        """Let the learner look at two tasks: what does not fit together says so before a run."""
        tasks = slice_tasks(self.precision.prepare(self.loader.batch_at(0)), 0, 2)
        learner = deepcopy(self.learner).eval()  # which may count, or keep running statistics
        try:
            with random_states.preserved(), torch.no_grad(), self.precision.autocast():
                learner(tasks)
                scores = learner.score(tasks)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            model = self.config.model["_target_"].rpartition(".")[2]
            raise ConfigError(
                "learner",
                f"{type(learner).__name__} around {model} cannot learn from these tasks: "
                f"{type(error).__name__}: {error}",
            ) from error
        if learner.metric.name not in scores:
            raise ConfigError(
                "learner",
                f"its metric {learner.metric.name!r} is not among its scores",
                allowed=scores,
                wrong_name=learner.metric.name,
            )

    def check_monitor(self) -> None:
        """Raise ConfigError now, not at the first validation, if nothing has that name."""
        loaders = self.evaluation_loaders("val")
        evaluation = evaluate(self.learner, loaders, self.precision, split="val", n_tasks=1)
        metric = monitored(self.learner.metric, self.config.trainer.monitor)
        if evaluation.find("val", metric.name) is None:
            raise ConfigError(
                "trainer.monitor",
                "there is no such validation metric",
                value=metric.name,
                allowed=[name.removeprefix("val/") for name in evaluation.metrics],
                wrong_name=metric.name,
            )

    @cached_property
    def device(self) -> torch.device:
        """Where the learner lives."""
        return torch.device(self.config.loader.device)

    @cached_property
    def precision(self) -> Precision:
        """What it computes in."""
        return Precision(self.config.trainer.precision, self.device)

    @cached_property
    def taskset(self) -> TaskSet:
        """Training tasks."""
        return build.build_taskset(self.config, "train")

    @cached_property
    def loader(self) -> TaskLoader:
        """Batches of them."""
        return build.build_loader(self.config, self.taskset)

    @cached_property
    def spec(self) -> TaskSpec:
        """Shapes and kinds, from the task set or from its first batch."""
        first = self.loader.batch_at(0) if self.taskset.spec is None else None
        return build.spec_of(self.taskset, first)

    @cached_property
    def learner(self) -> Learner:
        """The learner, initialised by the seed or from another run."""
        spec = self.spec
        random_states.seed_everything(self.config.seed)
        learner = build.build_learner(self.config, spec)
        if self.config.trainer.init_from is not None and not self.begun:
            checkpoint.load_weights(learner, self.config.trainer.init_from)
        return self.precision.convert(learner)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over the learner's parameters."""
        return build.build_optimizer(self.config, self.learner)

    @cached_property
    def scheduler(self) -> Any:
        """Of the learning rate, or None."""
        return build.build_scheduler(self.config, self.optimizer)

    def evaluation_loaders(self, split: Split) -> dict[str, TaskLoader]:
        """Held-out tasks by the names of their sets."""
        if split not in self._evaluation:
            self._evaluation[split] = build.build_evaluation_loaders(self.config, split)
        return self._evaluation[split]

    def score(self) -> Evaluation:
        """The learner's scores on the test tasks."""
        return evaluate(
            self.learner,
            self.evaluation_loaders("test"),
            self.precision,
            split="test",
            n_tasks=self.config.evaluation.tasks,
        )

    @cached_property
    def _evaluation(self) -> dict[str, dict[str, TaskLoader]]:
        return {}


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
    try:
        with random_states.preserved():
            parts.learner.load_state_dict(state["learner"])
    except RuntimeError as error:
        raise UserError(f"{files[0]}: does not fit the model: {error}") from error
    return Run(run, parts.config, parts.learner.eval(), parts, int(state["step"]))


# --- decisions about a directory -----------------------------------------------------------


def has_nothing_to_do(
    run: RunDirectory, saved: Mapping[str, Any], wanted: Mapping[str, Any], config: Config
) -> bool:
    """Whether the run of a directory is complete; UserError if it is another run."""
    refuse_other_configuration(run, saved, wanted)
    return is_complete(run, config)


def refuse_other_configuration(
    run: RunDirectory, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raise UserError if the run that the directory holds has another configuration."""
    before, now = flatten(saved), flatten(wanted)
    differing = []
    for key in sorted(before.keys() | now.keys()):
        was, is_now = before.get(key, "not set"), now.get(key, "not set")
        if was != is_now and not _free(key):
            steps = "trainer.max_steps"
            follows = was == before.get(steps) and is_now == now.get(steps)
            why = f" (it follows {steps}: another schedule is another training)" if follows else ""
            differing.append(f"  {key}: {was} in the run, {is_now} asked for{why}")
    if differing:
        raise UserError(
            f"{run.path}: holds a run of another configuration\n"
            + "\n".join(differing)
            + "\n  allowed: the same configuration, another hydra.run.dir, or fresh=true, which "
            "deletes the run"
        )


def is_complete(run: RunDirectory, config: Config) -> bool:
    """Whether a run has nothing left to do."""
    result = run.read_result()
    if result.get("status") != "completed":
        return False
    before = flatten(run.read_config())
    ended_early = result["step"] < (before.get("trainer.max_steps") or 0)
    same_end = all(
        before.get(f"trainer.{key}") == getattr(config.trainer, key)
        for key in ("max_steps", "max_time")
    )
    return result["step"] >= config.trainer.max_steps or (ended_early and same_end)


def already_completed(run: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    """Print the result of a completed run."""
    result = run.read_result()
    reporter.result("test", result.get("metrics", {}))
    reporter.say(f"completed before, at step {result['step']:,}: {run.path}")
    return result


def status_of(run: RunDirectory) -> str:
    """What `result.json` says of the run."""
    return run.read_result().get("status", "not begun")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)


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
    except Interrupted:
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


def describe(parts: Parts) -> list[tuple[str, str]]:
    """What a configuration amounts to, a row for each part."""
    config, plan = parts.config, parts.loader.plan
    kind = type(parts.taskset).__name__
    dataset = getattr(parts.taskset, "dataset", None)
    drawn_from = f" of {type(dataset).__name__}" if dataset is not None else ""
    count = "endless" if plan.n_tasks is None else f"{plan.n_tasks:,} tasks"
    parameters = sum(parameter.numel() for parameter in parts.learner.parameters())
    model = config.model["_target_"].rpartition(".")[2]
    optimizer = type(parts.optimizer).__name__
    schedule = type(parts.scheduler).__name__ if parts.scheduler else "constant rate"
    workers = parts.loader.num_workers
    made = f"{workers} worker{'s' * (workers > 1)}" if workers else "created in this process"
    trainer = config.trainer
    limit = f", at most {clock(trainer.max_time)}" if trainer.max_time else ""
    return [
        ("task set", f"{kind}{drawn_from}, {count}"),
        ("sizes", plan.law.describe()),
        ("loader", f"{plan.batch_size} tasks a batch, {made}"),
        ("model", f"{model}, {parameters:,} parameters"),
        ("learner", type(parts.learner).__name__),
        ("optimizer", f"{optimizer}, lr {config.optimizer.get('lr', 'default')}, {schedule}"),
        ("trainer", f"{trainer.max_steps:,} steps{limit}, precision {trainer.precision}"),
        ("device", f"{parts.device}, {trainer.threads} threads"),
        ("seed", str(config.seed)),
    ]


def draw(run: RunDirectory, parts: Parts, trainer: Trainer) -> None:
    """Predictions on test tasks and learning curves, in figures/; a failure is only said."""
    taskset = next(iter(parts.evaluation_loaders("test").values())).dataset
    try:
        from metabatch_cli.report.curves import draw_learning_curves
        from metabatch_cli.report.figures import draw_predictions

        with parts.precision.autocast():
            draw_predictions(
                trainer.learner,
                taskset,
                run.figures / "predictions.png",
                device=parts.device,
                dtype=parts.precision.dtype,
                seed=parts.config.evaluation.seed,
                spec=parts.spec,
            )
        draw_learning_curves(
            run.metrics_file,
            run.figures / "learning_curves.png",
            metric=trainer.metric.name,
            higher_is_better=trainer.metric.higher_is_better,
        )
    except Exception as error:  # hours of training are not lost to a picture
        log.exception("no figures")
        trainer.reporter.say(f"no figures: {type(error).__name__}: {error} (see train.log)")
