"""`metabatch tune`: trainings whose values a search chooses; several processes share a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from metabatch_cli.sweeps.study import Study


SPACE = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}  # where none is given


def main(words: list[str]) -> None:
    """A Hydra application like `train`, with a section `tune`."""
    from metabatch_cli.commands.hydra_app import launch
    from metabatch_cli.config.beside import refuse_under_torchrun
    from metabatch_cli.config.errors import UserError

    refuse_under_torchrun("tune")
    if {"-m", "--multirun"} & set(words):
        raise UserError(
            "-m: a study chooses values itself; begin it several times with the same hydra.run.dir"
        )
    if removed := next((word for word in words if word.startswith("~")), None):
        raise UserError(
            f"{removed}: what is taken away cannot be written into an experiment\n"
            "  allowed: another choice, such as scheduler=none"
        )
    launch("tune", __name__, "metabatch tune", words=words)


def job(config: DictConfig) -> None:
    """Train until the study has its trials; print them, and write the best as an experiment.

    Raises:
        UserError: a configuration or a space that cannot be; optuna is not installed.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    from metabatch_cli.config import choices
    from metabatch_cli.config.build import build
    from metabatch_cli.config.check import check, check_component, check_fields
    from metabatch_cli.config.errors import UserError
    from metabatch_cli.config.schema import TuneConfig
    from metabatch_cli.engine.parts import Parts, monitored
    from metabatch_cli.report.console import Reporter

    hydra = HydraConfig.get()
    try:
        import optuna
    except ImportError as error:
        raise UserError("optuna is not installed; it comes with: pip install '.[tune]'") from error
    from metabatch_cli.sweeps.space import flat_space, read_space
    from metabatch_cli.sweeps.study import Study

    config = config.copy()
    with open_dict(config):
        section = OmegaConf.to_container(config.pop("tune"), resolve=True)
    tune = check_fields(TuneConfig, cast(dict[str, Any], section))
    plain = choices.resolve(config)
    space = read_space(flat_space(SPACE if tune.space is None else tune.space), plain)
    parts = Parts(check(plain))
    metric = monitored(parts.learner.metric, parts.config.trainer.monitor)

    directory = Path(hydra.runtime.output_dir)
    component = check_component("tune.sampler", tune.sampler)

    def sampler(number: int) -> optuna.samplers.BaseSampler:
        return build("tune.sampler", component, seed=plain["seed"] + number)

    pruner = optuna.pruners.NopPruner()
    if tune.pruner is not None:
        pruner = build("tune.pruner", check_component("tune.pruner", tune.pruner))
    study = Study(directory, space, metric, tune.trials, sampler, pruner)
    study.try_first({key: choices.select(plain, key) for key in space})
    reporter = Reporter()
    while (attempt := study.next()) is not None:
        reporter.say(_outcome(study, attempt, config, list(hydra.overrides.task)))
    _conclude(study, list(hydra.overrides.task), reporter)


def _outcome(study: Study, attempt: Any, config: DictConfig, typed: list[str]) -> str:
    """Train one trial; a line that says what came of it."""
    from omegaconf import OmegaConf

    from metabatch_cli.config.errors import explain
    from metabatch_cli.engine.run import train
    from metabatch_cli.engine.stop import Stopped
    from metabatch_cli.report.console import Reporter, silent
    from metabatch_cli.sweeps.study import Pruning

    own = config.copy()
    for key, value in attempt.values.items():
        OmegaConf.update(own, key, value)
    pruning = Pruning(attempt, study.metric)
    try:
        result = train(
            own,
            attempt.directory,
            overrides=[*typed, *(f"{key}={value}" for key, value in attempt.values.items())],
            reporter=Reporter(silent()),
            loggers=[pruning],
        )
        score = result["monitor"]["best"]
        study.tell(attempt, score, None if score is not None else "no validation was finite")
        said = "no score" if score is None else f"{pruning.name} {score:.4f}"
    except Stopped as stopped:
        study.prune(attempt, str(stopped))
        said = str(stopped)
    except Exception as error:
        said = explain(error).splitlines()[0]
        study.tell(attempt, None, said)
    values = " ".join(f"{key}={_short(value)}" for key, value in attempt.values.items())
    return f"trial {attempt.directory.name}  {values}  {said}"


def _conclude(study: Study, typed: list[str], reporter: Any) -> None:
    """The table of all trials, and the best values as an experiment."""
    from rich.table import Table

    from metabatch_cli.config.errors import UserError
    from metabatch_cli.report.files import write_text
    from metabatch_cli.sweeps.best import as_experiment
    from metabatch_cli.sweeps.study import DIRECTORY, WHY

    table = Table(box=None, pad_edge=False)
    for name in ("trial", *study.space):
        table.add_column(name, style="bold cyan")
    for name in (f"val/{study.metric.name}", "state", "why"):
        table.add_column(name, justify="right" if "/" in name else "left")
    sign = -1 if study.metric.higher_is_better else 1
    ranked = sorted(
        study.trials, key=lambda t: (t.value is None, sign * (t.value or 0.0), t.number)
    )
    for trial in ranked:
        table.add_row(
            trial.user_attrs.get(DIRECTORY, f"{trial.number:04}"),
            *(_short(trial.params.get(key)) for key in study.space),
            "–" if trial.value is None else f"{trial.value:.4f}",
            trial.state.name.lower(),
            trial.user_attrs.get(WHY, ""),
        )
    reporter.console.print()
    reporter.console.print(table)
    best = study.best
    if best is None:
        raise UserError(f"{study.directory}: no trial has completed")
    file = study.directory / "experiment" / "best.yaml"
    write_text(file, as_experiment(typed, best.params, study.metric.name, best.value))
    reporter.say(f"written: {file}")
    command = f"  metabatch train --config-dir {study.directory} +experiment=best"
    reporter.say(" ".join([command, *_further_folders()]))


def _further_folders() -> list[str]:
    """What finds an experiment that was typed where it was: in a folder of the user's own."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    own = [source.path for source in sources if source.provider == "command-line"]
    return [f"'hydra.searchpath=[{','.join(f'file://{path}' for path in own)}]'"] if own else []


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
