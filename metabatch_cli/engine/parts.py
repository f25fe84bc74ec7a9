"""Everything that a configuration declares, built in the order in which it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metabatch_cli.batching.loader import TaskLoader
from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.batching.task import slice_tasks
from metabatch_cli.batching.taskset import Split, TaskSet, TaskSpec
from metabatch_cli.config import build
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.config.schema import Config
from metabatch_cli.engine import checkpoint, random_states
from metabatch_cli.engine.evaluator import Evaluation, evaluate, monitored
from metabatch_cli.engine.precision import Precision
from metabatch_cli.engine.processor import settle
from metabatch_cli.engine.ranks import Ranks
from metabatch_cli.engine.trial import left_as_it_was, measure_step, try_out
from metabatch_cli.learners.autoregressive import AutoregressiveDeployment
from metabatch_cli.learners.learner import CompileCost, Learner
from metabatch_cli.learners.meta_gradient import Differentiated
from metabatch_cli.report.console import clock


@dataclass
class Parts:
    """Everything that a configuration declares, built in the order in which it is needed."""

    config: Config
    begun: bool = False
    """Whether there is a checkpoint to go on from, so that `init_from` is no longer needed."""

    say: Callable[[str], None] = lambda text: None
    """Tells a person what takes a while."""

    ranks: Ranks = field(default_factory=Ranks)
    """Who shares the training."""

    def build(self) -> None:
        """Build all that training needs, so that what cannot be built says so before it begins."""
        for name, node in self.config.logger.items() if self.ranks.leads else ():
            build.refuse_missing(f"logger.{name}", node)
        if not self.begun:  # an older run may say so, and never heeded it
            build.refuse_other_splits(self.config)
        settle(int(self.config.trainer.threads))
        self.loader, self.scheduler  # noqa: B018 (the last links of the chains)
        self.evaluation_loaders("val")
        self.evaluation_loaders("test")
        self.deployed  # noqa: B018 (refused before a training, not after it)
        try_out(self)
        if self.config.trainer.monitor is not None:
            self.check_monitor()
        size, parts = self.config.loader.batch_size, self.config.trainer.accumulate
        shared = f" / {self.ranks.size} processes" if self.ranks.size > 1 else ""
        if (size := size // self.ranks.size) % parts:
            raise ConfigError(
                "trainer.accumulate",
                f"does not divide loader.batch_size={self.config.loader.batch_size}{shared}",
                value=parts,
                allowed=", ".join(str(k) for k in range(1, size + 1) if size % k == 0),
            )
        self.choose()

    def choose(self) -> None:
        """Measure what the configuration leaves to the machine, and decide it: see `chosen`."""
        trainer, chosen = self.config.trainer, self.chosen

        def part(step: int) -> Tasks:
            tasks = self.precision.prepare(self.loader.batch_at(step))
            return slice_tasks(tasks, 0, len(tasks.target_x) // trainer.accumulate)

        tasks = part(0)
        with left_as_it_was(self.learner), self.precision.autocast():
            for key, value in self.learner.choose(tasks).items():
                chosen[f"learner.{key}"] = value
            if trainer.compile == "auto":
                cost = self.learner.cost_of_compiling(tasks)
                parts = trainer.max_steps * trainer.accumulate
                trainer.compile = is_worth_compiling(cost, parts)
            if trainer.compile:
                self.say("compiling the step: a minute or two at first, seconds the next time")
                began = time.monotonic()
                for each in (tasks, part(1)):  # of another size, where sizes vary
                    self.compute_loss(each).backward()  # gradients are compiled, too
                self.say(f"compiled in {time.monotonic() - began:.1f} s")
        if self.config.loader.workers == "auto":
            self.loader.choose_workers(**measure_step(self))
        chosen["trainer.compile"] = trainer.compile
        chosen["loader.workers"] = self.loader.num_workers

    @cached_property
    def compute_loss(self) -> Callable[[Tasks], Tensor | Differentiated]:
        """The learner's loss of tasks, compiled where that is wanted."""
        if self.config.trainer.compile:
            return self.learner.compiled(self.sizes_vary)
        return self.learner

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """What was decided when all was built, by dotted keys of the configuration."""
        return {}

    @cached_property
    def sizes_vary(self) -> bool:
        """Whether batches have other numbers of points from step to step."""
        specs = [self.loader.plan.spec(step) for step in range(64)]
        sizes = {(spec.n_context, spec.n_target) for spec in specs}
        return len(sizes) > 1 or self.taskset.ragged

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
        return build.build_loader(self.config, self.taskset, self.ranks.rank, self.ranks.size)

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
    def deployed(self) -> Learner:
        """The learner as it is tested: as it is, or predicting one target after the other."""
        evaluation = self.config.evaluation
        if evaluation.predict == "once":
            return self.learner
        try:
            return AutoregressiveDeployment(self.learner, evaluation.order)
        except ValueError as error:
            raise ConfigError(
                "evaluation.predict", str(error), value=evaluation.predict, allowed="once"
            ) from error

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
        """The learner's scores on the test tasks, and its calibration there."""
        return evaluate(
            self.deployed,
            self.evaluation_loaders("test"),
            self.precision,
            split="test",
            n_tasks=self.config.evaluation.tasks,
            calibrated=True,
            ranks=self.ranks,
        )

    @cached_property
    def _evaluation(self) -> dict[str, dict[str, TaskLoader]]:
        return {}


def is_worth_compiling(cost: CompileCost | None, steps: int) -> bool:
    """Whether so many steps earn back, twice over, what compiling takes."""
    return cost is not None and cost.saved_per_step * steps > 2 * cost.seconds


def describe(parts: Parts) -> list[tuple[str, str]]:
    """What a configuration amounts to, a row for each part."""
    config, plan = parts.config, parts.loader.plan
    kind = type(parts.taskset).__name__
    dataset = getattr(parts.taskset, "dataset", None)
    drawn_from = f" of {type(dataset).__name__}" if dataset is not None else ""
    count = "endless" if plan.n_tasks is None else f"{plan.n_tasks:,} tasks"
    note = f" ({parts.taskset.note})" if parts.taskset.note else ""
    parameters = sum(parameter.numel() for parameter in parts.learner.parameters())
    model = config.model["_target_"].rpartition(".")[2]
    optimizer = type(parts.optimizer).__name__
    schedule = type(parts.scheduler).__name__ if parts.scheduler else "constant rate"
    workers, choice = parts.loader.num_workers, parts.loader.choice
    ranks = parts.ranks.size
    shared = f" over {ranks} processes" if ranks > 1 else ""
    made = f"{workers} worker{'s' * (workers > 1)}" if workers else "created in this process"
    if choice is not None:
        made = f"{made} ({choice.reason})"
    trainer = config.trainer
    decided = [
        f"{key.removeprefix('learner.')} {value}"
        for key, value in parts.chosen.items()
        if key.startswith("learner.")
    ]
    if trainer.compile or decided:
        decided.append("compiled" if trainer.compile else "not compiled")
    of_learner = f" ({parts.learner.note})" if parts.learner.note else ""
    limit = f", at most {clock(trainer.max_time)}" if trainer.max_time else ""
    return [
        ("task set", f"{kind}{drawn_from}, {count}{note}"),
        ("sizes", plan.law.describe() + (", or fewer" if parts.taskset.ragged else "")),
        ("loader", f"{plan.batch_size} tasks a batch{shared}, {made}"),
        ("model", f"{model}, {parameters:,} parameters"),
        ("learner", ", ".join([type(parts.learner).__name__, *decided]) + of_learner),
        ("optimizer", f"{optimizer}, lr {config.optimizer.get('lr', 'default')}, {schedule}"),
        ("trainer", f"{trainer.max_steps:,} steps{limit}, precision {trainer.precision}"),
        ("device", f"{parts.device}, {trainer.threads} thread{'s' * (int(trainer.threads) > 1)}"),
        ("seed", str(config.seed)),
    ]
