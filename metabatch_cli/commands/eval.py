"""`metabatch eval run=DIR`: score a run on held-out tasks, the same or other ones."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """Score a finished or interrupted run on held-out tasks.

usage: metabatch eval run=DIR [KEY=VALUE ...]

  run=DIR                      the run's directory; its own configuration is the basis
  evaluation.tasks=10000       how many test tasks
  taskset.max_ctx_pts=5        other test tasks: any key of the task set
  evaluation.predict=autoregressive   one target after the other, each given those before it
  learner.normalisation=support       by the moments of the context (few-shot classifiers)
  learner.eval_steps=[0,1,20]         after other numbers of gradient steps (MAML and its kin)
  trainer.test_on=last         the last weights instead of the best ones
  -m taskset.max_ctx_pts=1,5   a table for each value
  --cfg job                    the configuration, without scoring

Writes DIR/evaluations/NAME.json, NAME being what was changed."""


_OF_SCORES = {"trainer": ("test_on", "precision", "threads"), "loader": ("device",)}
"""Of sections about training, the keys that scores depend on too."""


def main(words: list[str]) -> None:
    """A Hydra application whose primary configuration is the run's own."""
    from metabatch_cli.config.errors import UserError
    from metabatch_cli.engine.run_directory import RunDirectory

    given = [word for word in words if re.match(r"\+*run=", word)]
    rest = [word for word in words if word not in given]
    if not given or not given[-1].partition("=")[2]:
        if {"-h", "--help"} & set(words):
            print(HELP)
            return
        raise UserError("run=DIR is missing: which run shall be scored?\n" + HELP.splitlines()[2])
    groups = re.compile(r"\+?(taskset|evaluation|learner|model|loader)=(?!\{)")
    if replaced := next((word for word in rest if groups.match(word)), None):
        raise UserError(
            f"{replaced}: a run is scored with its own task set, network and evaluation\n"
            "  allowed: keys of them, such as taskset.max_ctx_pts=5 evaluation.tasks=1000"
        )
    directory = given[-1].partition("=")[2].strip("'\"")
    run = RunDirectory.existing(directory)

    from metabatch_cli.commands.hydra_app import launch

    settings = [
        f"hydra.run.dir={_quoted(run.path)}",
        f"hydra.sweep.dir={_quoted(run.evaluations)}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra.job.name=metabatch",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        f"+run={_quoted(run.path)}",
    ]
    rest = [_added_where_new(word, run.read_config()) for word in rest]
    launch("config", __name__, "metabatch eval", config_path=run.path, words=[*rest, *settings])


def job(config: DictConfig) -> dict[str, Any]:
    """Score the run; print a table and write it as JSON."""
    from hydra.core.hydra_config import HydraConfig

    typed = [word.removeprefix("++") for word in HydraConfig.get().overrides.task]
    overrides = [word for word in typed if not word.startswith("+run=")]
    return evaluate_run(config, overrides)


def evaluate_run(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Score a run under a configuration that may differ from its own in the test tasks.

    Args:
        config: the run's, with overrides, and `run`, its directory.
        overrides: as typed.

    Returns:
        What was written as JSON: `run`, `step`, `weights`, `overrides`, `metrics`, `calibration`,
        `digests`.
    """
    from metabatch_cli.batching import denormals

    with denormals.as_before():
        return _evaluated(config, overrides)


def _evaluated(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    from metabatch_cli.config import choices
    from metabatch_cli.config.check import check, is_several
    from metabatch_cli.config.errors import ConfigError
    from metabatch_cli.engine.load import load_run
    from metabatch_cli.engine.processor import settle
    from metabatch_cli.report.console import Reporter
    from metabatch_cli.report.files import write_json

    typed = dict(word.lstrip("+").partition("=")[::2] for word in overrides)
    for key, value in typed.items():
        _refuse_what_is_of_training(key.lstrip("~"), value)
    plain = choices.resolve(config, fall_back=True)
    directory = plain.pop("run")
    changed = {key: value for key, value in typed.items() if key.startswith("taskset.")}
    if changed:  # what was typed beats the run's own test sets, and names the result
        name = ",".join(f"{key.removeprefix('taskset.')}={value}" for key, value in changed.items())
        kept = plain["evaluation"]["test"] or {}
        kept = {} if is_several(kept, plain["taskset"]) else kept
        plain["evaluation"]["test"] = {name: {**kept, **_below(plain["taskset"], list(changed))}}
    # as a training does: scores are the same to the bit
    checked = check(plain)
    if "evaluation.order" in typed and checked.evaluation.predict == "once":
        raise ConfigError(
            "evaluation.order",
            "is of evaluation.predict=autoregressive only",
            value=typed["evaluation.order"],
        )
    settle(int(checked.trainer.threads))
    run = load_run(directory, config=plain, weights=plain["trainer"]["test_on"])
    for name, instead in run.learner.when_tested.items():
        unheard = instead is None or plain["learner"].get(instead) is not None
        if f"learner.{name}" in typed and unheard:
            goes_by = f"; a test goes by learner.{instead}" if instead else ""
            raise ConfigError(
                f"learner.{name}",
                f"is about training{goes_by}",
                value=typed[f"learner.{name}"],
            )
    evaluation = run.score()
    reporter = Reporter()
    reporter.result(f"test, weights of step {run.step:,}", evaluation.metrics)
    for warning in evaluation.warnings:
        reporter.say(f"warning: {warning}")
    written = {
        "run": str(run.directory.path),
        "step": run.step,
        "weights": plain["trainer"]["test_on"],
        "overrides": overrides,
        "metrics": evaluation.metrics,
        "calibration": evaluation.calibration,
        "digests": evaluation.digests,
    }
    file = run.directory.evaluations / f"{_file_name(overrides)}.json"
    write_json(file, written)
    reporter.say(f"written: {file}")
    return written


def complete(words: list[str]) -> list[str]:
    """`run=` first, then directories."""
    last = words[-1]
    if any(word.startswith("run=") for word in words[:-1]):
        return []
    if not last.startswith("run="):
        return ["run="]
    begun = Path(last.removeprefix("run=") or ".")
    parent = begun if last.endswith("/") or last == "run=" else begun.parent
    folders = sorted(entry for entry in parent.glob("*") if entry.is_dir())
    return [f"run={folder}{os.sep}" for folder in folders if f"run={folder}".startswith(last)]


def _added_where_new(word: str, saved: dict[str, Any]) -> str:
    """An override of a section that a run does not know, being older than the key, is added.

    Whether there is such a key is checked later, with a better message than Hydra's.
    """
    key = word.partition("=")[0]
    section, *names = key.split(".")
    if section not in ("evaluation", "learner", "taskset"):
        return word
    known = saved.get(section) or {}
    for name in names if section == "taskset" else names[:1]:
        if not isinstance(known, dict) or name not in known:
            return f"++{word}"
        known = known[name]
    return word


def _refuse_what_is_of_training(key: str, value: str) -> None:
    """Refuse, with a ConfigError, an override that would change nothing about a score."""
    from metabatch_cli.config.errors import ConfigError

    section, _, name = key.partition(".")
    of_training = ("optimizer", "scheduler", "logger", "seed", "fresh", *_OF_SCORES)
    if section in of_training and name not in _OF_SCORES.get(section, ()):
        how = "as it was trained"
        if section == "loader":
            how = "in batches of evaluation.batch_size, made in its own process"
        others = ", ".join(f"{of}.{name}" for of, names in _OF_SCORES.items() for name in names)
        raise ConfigError(
            key,
            f"is about training; a run is scored {how}",
            value=value,
            allowed=f"keys of taskset, evaluation, learner, and {others}",
        )
    if re.fullmatch(r"(taskset|evaluation\.test(\..+)?)\.(split|eval)", key):
        raise ConfigError(key, "has no effect: scores are on the tasks of 'test'", value=value)
    if key == "evaluation.figures" or key.split(".")[:2] == ["evaluation", "val"]:
        raise ConfigError(key, "has no part in a score on held-out tasks", value=value)


def _below(taskset: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """Of the task set, the top-level entries that the dotted keys are in."""
    names = {key.split(".")[1] for key in keys}
    return {name: taskset[name] for name in names if name in taskset}


def _quoted(path: Path) -> str:
    """A path as a value of an override, whatever characters it has."""
    return "'" + str(path).replace("'", r"\'") + "'"


def _file_name(overrides: list[str]) -> str:
    text = re.sub(r"[^\w.=,-]+", "_", ",".join(overrides))
    return text[:150] or "test"
