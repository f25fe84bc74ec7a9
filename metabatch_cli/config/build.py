"""From a checked configuration to task sets, loaders and learners: the one caller of Hydra's
instantiate."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

from metabatch_cli.batching.loader import TaskLoader
from metabatch_cli.batching.ragged import PaddedTask
from metabatch_cli.batching.task import as_task
from metabatch_cli.batching.taskset import Split, TaskSet, TaskSpec
from metabatch_cli.config.check import (
    FROM_SPEC,
    constructors,
    is_taskset,
    locate,
    merged,
    test_sets,
)
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.config.schema import Config, EvaluationConfig
from metabatch_cli.learners.learner import Learner

REFUSALS = (ValueError, TypeError, OSError)  # what a constructor says about its arguments


def build(key: str, node: Mapping[str, Any], **extra: Any) -> Any:
    """The object of a component; of `extra` it is given what its constructor asks for.

    Raises:
        ConfigError: the constructor refuses its arguments; its own words behind the key.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    target = locate(f"{key}._target_", node["_target_"])
    asked = accepted(target)
    extra = {name: value for name, value in extra.items() if name in asked and name not in node}
    try:
        # as a partial first: what we add is given as it is, not through OmegaConf
        return instantiate({**node, "_partial_": True}, _convert_="all")(**extra)
    except InstantiationException as error:
        cause = error.__cause__
        text = str(cause) if isinstance(cause, REFUSALS) else str(error).splitlines()[0]
        inner = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
        if inner is not None:  # the constructor of a component in this one
            for name in inner.group(1).split("."):
                key, node = f"{key}.{name}", node[name]
        raise _refused(key, text, node) from error
    except REFUSALS as error:
        raise _refused(key, str(error), node) from error


def refuse_missing(key: str, node: Mapping[str, Any]) -> None:
    """Raise UserError where a component `needs` a package, of an extra of that name, that is not
    installed; without importing it."""
    package = getattr(locate(f"{key}._target_", node["_target_"]), "needs", None)
    if package is None:
        return
    found = find_spec(package)
    if found is None or found.origin is None:  # without origin, it is just a folder of that name
        raise UserError(
            f"{key}: {package} is not installed; it comes with: pip install '.[{package}]'"
        )


def accepted(target: Any) -> set[str]:
    """The names of all arguments that a constructor takes, those behind its **kwargs too."""
    names: set[str] = set()
    for function in constructors(target):
        parameters = inspect.signature(function).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return names - {"self"}


def build_taskset(
    config: Config, split: Split, overrides: Mapping[str, Any] | None = None, key: str = "taskset"
) -> TaskSet:
    """The task set of a split.

    Args:
        overrides: keys of the task set that differ from the training set's.
        key: what a mistake is reported under.
    """
    node = merged(config.taskset, overrides or {})
    node = {name: _of_split(part, split) for name, part in node.items()}
    node.pop("split", None)
    node.pop("eval", None)
    taskset = build(key, node, split=split, eval=split != "train")
    if not isinstance(taskset, TaskSet):
        raise ConfigError(
            f"{key}._target_",
            f"is a {type(taskset).__name__}, not a TaskSet",
            value=node["_target_"],
        )
    taskset.belong_to(split)  # for a set that does not know of splits
    return taskset


def refuse_other_splits(config: Config) -> None:
    """Raise ConfigError where a task set is said to be of a split that it is not built for."""
    sets = {"taskset": (config.taskset, "train")}
    for split in ("val", "test"):
        for name, overrides in test_sets(getattr(config.evaluation, split), config.taskset).items():
            sets[f"evaluation.{split}" + (f".{name}" if name else "")] = overrides, split
    for key, (node, split) in sets.items():
        for name, own in (("split", split), ("eval", split != "train")):
            if node.get(name) not in (None, own):
                raise ConfigError(
                    f"{key}.{name}",
                    "has no effect: training is on the tasks of 'train', validation on those of "
                    "'val', and tests on those of 'test'",
                    value=node[name],
                    allowed=f"{str(own).lower()}, or nothing",
                )


def _of_split(part: Any, split: Split) -> Any:
    """A part of a task set's configuration, the task sets in it being told the split too."""
    if isinstance(part, list):
        return [_of_split(entry, split) for entry in part]
    if not isinstance(part, Mapping):
        return part
    part = {name: _of_split(value, split) for name, value in part.items()}
    if "_target_" not in part:
        return part
    target = locate("taskset", part["_target_"])
    if is_taskset(target):
        facts = {"split": split, "eval": split != "train"}
        part |= {name: fact for name, fact in facts.items() if name in accepted(target)}
    return part


def build_loader(
    config: Config, taskset: TaskSet, rank: int = 0, world_size: int = 1
) -> TaskLoader:
    """The training loader of a rank."""
    fields = dict(vars(config.loader))
    fields["balance"] = None if config.loader.balance is None else vars(config.loader.balance)
    try:
        return TaskLoader(taskset, **fields, seed=config.seed, rank=rank, world_size=world_size)
    except REFUSALS as error:
        raise _refused("loader", str(error), fields) from error


def build_evaluation_loaders(config: Config, split: Split) -> dict[str, TaskLoader]:
    """A loader for each named set of a held-out split; frozen by `evaluation.seed`."""
    evaluation: EvaluationConfig = config.evaluation
    loaders = {}
    for name, overrides in test_sets(getattr(evaluation, split), config.taskset).items():
        key = f"evaluation.{split}" + (f".{name}" if name else "") if overrides else "taskset"
        taskset = build_taskset(config, split, overrides, key)
        try:
            loaders[name] = TaskLoader(
                taskset,
                evaluation.batch_size,
                shuffle=True,
                device=config.loader.device,
                seed=evaluation.seed,
            )
        except REFUSALS as error:
            raise _refused("evaluation", str(error), vars(evaluation)) from error
    return loaders


def build_learner(config: Config, spec: TaskSpec) -> Learner:
    """Network and learner, initialised by the global generator of torch."""
    facts = {name: getattr(spec, name) for name in FROM_SPEC}
    model = build("model", config.model, **facts)
    if not isinstance(model, nn.Module):
        raise ConfigError("model._target_", f"is a {type(model).__name__}, not an nn.Module")
    learner = build("learner", config.learner, model=model, **facts)
    if not isinstance(learner, Learner):
        raise ConfigError("learner._target_", f"is a {type(learner).__name__}, not a Learner")
    if learner.only_classifies and spec.kind != "classification":
        raise ConfigError(
            "learner",
            f"{type(learner).__name__} tells classes apart, and the y of these tasks are no labels",
            allowed="task sets of classes, such as taskset=omniglot_episodes",
        )
    return learner


def build_optimizer(config: Config, learner: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the learner's parameters."""
    optimizer = build("optimizer", config.optimizer, params=list(learner.parameters()))
    _check_step("optimizer", optimizer, "the loss of a step as a function")
    return cast(torch.optim.Optimizer, optimizer)


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer) -> Any:
    """The learning-rate schedule, None for a constant rate."""
    if not config.scheduler:
        return None
    scheduler = build("scheduler", config.scheduler, optimizer=optimizer)
    _check_step("scheduler", scheduler, "a score at every step")
    total = getattr(scheduler, "total_steps", None)
    if isinstance(total, int) and total < config.trainer.max_steps:
        raise ConfigError(
            "scheduler.total_steps",
            "the schedule is over before the training is",
            value=total,
            allowed=f"at least {config.trainer.max_steps}, such as ${{trainer.max_steps}}",
        )
    return scheduler


def _check_step(key: str, part: Any, what: str) -> None:
    """Refuse, before a training begins, what wants something for each of its steps."""
    parameters = inspect.signature(part.step).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]
    if wanted:
        raise ConfigError(
            f"{key}._target_",
            f"its step() wants {', '.join(wanted)}: {what}, which no training here gives",
            value=f"{type(part).__module__}.{type(part).__name__}",
            allowed=f"classes whose step() wants nothing; `metabatch ls {key}` has some",
        )


def _refused(key: str, text: str, node: Mapping[str, Any]) -> UserError:
    """The constructor's own words, behind the dotted key where they begin with an argument."""
    name = re.match(r"\w+", text)
    if name and name.group() in node:
        return UserError(f"{key}.{text}")
    return UserError(f"{key}: {text}")


def spec_of(taskset: TaskSet, batch: Any) -> TaskSpec:
    """What a task set says of itself, or what its first batch shows.

    Args:
        batch: any batch of it.
    """
    if taskset.spec is not None:
        return taskset.spec
    try:
        tasks = as_task(batch)
    except TypeError as error:
        raise ConfigError("taskset", str(error)) from error
    x_shape = tuple(tasks.context_x.shape[2:])
    if tasks.context_y.is_floating_point():
        return TaskSpec(x_shape=x_shape, y_shape=tuple(tasks.context_y.shape[2:]))
    real = tasks.packed() if isinstance(tasks, PaddedTask) else tasks
    ways = 1 + max(int(labels.max()) for labels in (real.context_y, real.target_y) if len(labels))
    return TaskSpec(x_shape=x_shape, y_shape=(), kind="classification", ways=ways)
