"""From directories to a table: runs that differ in nothing but their seed share a row.

Imports no torch, so that a report is there at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.engine.run_directory import RunDirectory, no_such_directory
from metabatch_cli.engine.same_run import FREE_TO_CHANGE, defaults, flatten
from metabatch_cli.report.interval import mean_and_interval

VERSION = 1  # of the JSON

# of the metrics that ours have; the run says it of the one that chose its weights
HIGHER_IS_BETTER = {
    "log_likelihood": True,
    "accuracy": True,
    "mse": False,
    "rmse": False,
    "calibration_error": False,
}

# what runs of one row may differ in: nothing that their numbers depend on by more than chance,
# and what is decided for each by measuring (`Parts.choose`), the same but for rounding
OF_A_RUN = {
    "seed",
    "data_dir",
    "loader.device",  # jobs of a sweep are spread over what there is
    "trainer.threads",
    "trainer.compile",
    "learner.inner_loop",
    "evaluation.figures",
    *FREE_TO_CHANGE,
} - {"trainer.max_steps", "trainer.max_time"}


@dataclass(frozen=True)
class RunRecord:
    """What a run's directory says of it.

    Attributes:
        status: that of `result.json`; `killed` where it says that the run goes on, but nobody
            is at work there; `not begun`; `unreadable`.
        error: why it failed, or cannot be read.
        config: by dotted keys.
        typed: the overrides of its command by their keys.
        metrics: as in `result.json`.
        monitor: the metric that chose its weights, without the split.
        higher_is_better: whether more of that is better; None in runs that do not say.
    """

    directory: Path
    status: str
    seed: int | None = None
    step: int | None = None
    seconds: float | None = None
    error: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    typed: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    monitor: str | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Score:
    """A metric of a row: a mean over seeds, or what a single run got.

    Attributes:
        mean: None where a run has a score that is no number.
        ci95: half-width of the 95% interval, over seeds by Student's t; of a single run its own,
            over tasks; None where there is none.
        over: what the interval is over, `seeds` or `tasks`.
        by_seed: the score of each.
        oracle: the mean best possible score, where it is known.
    """

    mean: float | None
    ci95: float | None
    over: str
    by_seed: Mapping[int | None, float | None]
    oracle: float | None = None


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, whatever their seeds."""

    config: Mapping[str, Any]
    runs: Sequence[RunRecord]

    @cached_property
    def counted(self) -> list[RunRecord]:
        """The completed runs, one for each seed: of several the one that comes last."""
        of_seed = {run.seed: run for run in self.runs if run.status == "completed"}
        return list(of_seed.values())

    def how(self, metrics: Iterable[str]) -> dict[str, str]:
        """How metrics were measured, such as `scoring: marginal`; several ways side by side."""
        entries = [
            run.metrics[name] for name in metrics for run in self.counted if name in run.metrics
        ]
        ways: dict[str, dict[str, None]] = {}
        for entry in entries:
            for key, value in entry.items():
                if isinstance(value, str):
                    ways.setdefault(key, {})[value] = None
        return {key: ", ".join(values) for key, values in ways.items()}

    @property
    def seconds(self) -> float | None:
        """The mean time of training of those that count."""
        known = [run.seconds for run in self.counted if run.seconds is not None]
        return sum(known) / len(known) if known else None

    def score(self, metric: str) -> Score | None:
        """A metric over the runs that count; None where none of them has it."""
        entries = {run.seed: run.metrics[metric] for run in self.counted if metric in run.metrics}
        if not entries:
            return None
        by_seed = {seed: entry.get("mean") for seed, entry in entries.items()}
        over = "seeds" if len(entries) > 1 else "tasks"
        values = [value for value in by_seed.values() if value is not None]
        if len(values) < len(by_seed):
            return Score(None, None, over, by_seed)
        mean, ci95 = mean_and_interval(values)
        if over == "tasks":
            (ci95,) = (entry.get("ci95") for entry in entries.values())
        best = [e["oracle"] for e in entries.values() if e.get("oracle") is not None]
        oracle = sum(best) / len(best) if len(best) == len(entries) else None
        return Score(mean, ci95, over, by_seed, oracle)


@dataclass(frozen=True)
class Summary:
    """All that a report shows.

    Attributes:
        groups: in the order in which their first runs were found.
        unreadable: runs whose configuration or result is broken.
        columns: keys that tell the groups apart, see `telling_columns`.
        also_typed: further keys that were typed and differ.
        metrics: the names that are shown.
        others: names that are not.
    """

    groups: Sequence[Group]
    unreadable: Sequence[RunRecord]
    columns: Sequence[str]
    also_typed: Sequence[str]
    metrics: Sequence[str]
    others: Sequence[str]

    @property
    def runs(self) -> list[RunRecord]:
        """Those of all groups, and the unreadable ones."""
        return [run for group in self.groups for run in group.runs] + list(self.unreadable)

    def values(self, group: Group) -> list[str]:
        """What a group has in each column."""
        return [shown(key, _value(group, key)) for key in self.columns]

    def raw_values(self, group: Group) -> list[Any]:
        """The same as they stand in the configuration."""
        return [_value(group, key) for key in self.columns]

    def best(self, metric: str) -> list[Group]:
        """The groups with the best mean of a metric, more than one where they are equal; none
        where there is nothing to compare, not all were measured alike, or nobody knows whether
        more is better."""
        higher = self.higher_is_better(metric)
        scores = [(group, group.score(metric)) for group in self.groups]
        means = [(group, s.mean) for group, s in scores if s is not None and s.mean is not None]
        ways = [group.how([metric]) for group, _ in means]
        if higher is None or len(means) < 2 or any(way != ways[0] for way in ways):
            return []
        best = (max if higher else min)(mean for _, mean in means)
        return [group for group, mean in means if mean == best]

    def higher_is_better(self, metric: str) -> bool | None:
        """Whether more of a metric is better; None where that is not known."""
        base = base_name(metric)
        said = {
            run.higher_is_better
            for run in self.runs
            if run.monitor is not None and base_name(run.monitor) == base
        } - {None}
        return said.pop() if len(said) == 1 else HIGHER_IS_BETTER.get(base)

    def how(self) -> dict[str, list[str]]:
        """How the shown metrics were measured: by key, such as `normalisation`, the way of each
        group, "–" where it has none."""
        ways = [group.how(self.metrics) for group in self.groups]
        keys = dict.fromkeys(key for of in ways for key in of)
        return {key: [of.get(key, "–") for of in ways] for key in keys}

    def unlike(self) -> dict[str, list[str]]:
        """Of `how`, what groups differ in; one without scores has no way."""
        return {key: ways for key, ways in self.how().items() if len({*ways} - {"–"}) > 1}

    def as_json(self, metrics: Iterable[str] | None = None) -> dict[str, Any]:
        """The same as a tree for JSON, with the seeds' scores and every run.

        Args:
            metrics: which ones, if not those that are shown.
        """
        names = list(self.metrics if metrics is None else metrics)
        differing = differing_keys(self.groups)
        return {
            "report": "runs",
            "version": VERSION,
            "columns": list(self.columns),
            "groups": [
                {
                    "columns": {key: _value(group, key) for key in self.columns},
                    "differs_in": {key: group.config.get(key) for key in differing},
                    "seeds": [run.seed for run in group.counted],
                    "seconds": group.seconds,
                    "how": group.how(names),
                    "metrics": {
                        name: vars(score)
                        for name in names
                        if (score := group.score(name)) is not None
                    },
                    "runs": [_outline(run) for run in group.runs],
                }
                for group in self.groups
            ],
            "unreadable": [_outline(run) for run in self.unreadable],
        }


def summarise(directories: Iterable[str | Path], metrics: Sequence[str] = ()) -> Summary:
    """All runs in some directories and below them, grouped.

    Args:
        metrics: names to show, or patterns as of file names; `accuracy` means all that are one,
            `*` all. None given: the metric that chose the weights, of every test set.

    Raises:
        UserError: a directory that is not there, cannot be read or holds no run, or a metric
            that no run has.
    """
    runs = find_runs(directories)
    groups = grouped(run for run in runs if run.status != "unreadable")
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    chosen = chosen_metrics(names, metrics, {run.monitor for run in runs})
    columns = telling_columns(groups)
    return Summary(
        groups=groups,
        unreadable=[run for run in runs if run.status == "unreadable"],
        columns=columns,
        also_typed=[key for key in _typed_keys(groups) if key not in columns],
        metrics=chosen,
        others=[name for name in names if name not in chosen],
    )


# --- reading -----------------------------------------------------------------------------------


def find_runs(directories: Iterable[str | Path]) -> list[RunRecord]:
    """The runs that directories are or hold, each once, in the order of their paths.

    Raises:
        UserError: a directory that is not there, cannot be read or holds no run.
    """
    found: dict[Path, RunRecord] = {}
    for directory in directories:
        root = Path(directory)
        if not root.exists():
            raise no_such_directory(root, "DIR")
        if not root.is_dir():
            raise UserError(f"DIR={directory}: is a file; a report is about directories of runs")
        here = list(_below(root))
        if not here:
            raise UserError(
                f"DIR={directory}: holds no run, nor does any folder below it (a run is a folder "
                "with config.yaml and result.json, which metabatch train writes)"
            )
        for path in here:
            if path.resolve() not in found:
                found[path.resolve()] = read_run(path)
    return list(found.values())


def _below(root: Path) -> Iterator[Path]:
    """The runs that a directory is or holds."""

    def refuse(error: OSError) -> None:
        raise UserError(f"DIR={error.filename}: cannot be read: {error.strerror}") from error

    for folder, below, files in os.walk(root, onerror=refuse):
        here = Path(folder)
        if "result.json" in files or (here == root and "config.yaml" in files):
            yield here
            below.clear()  # a run holds no other
            continue
        below[:] = sorted((name for name in below if not name.startswith(".")), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """The order in which people count: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def read_run(path: Path) -> RunRecord:
    """What the directory of a run says of it; a broken one says that it is."""
    run = RunDirectory(path)
    in_use = run.in_use  # asked first: a run that ends now must not be taken for a killed one
    try:
        result = _read_json(run.result_file)
        typed = _read_typed(run.overrides_file)
        never_began = result.get("status") == "failed" and not run.holds_run
        config = {} if never_began else run.read_config()
    except (UserError, OSError, ValueError, yaml.YAMLError) as error:
        return RunRecord(path, "unreadable", error=str(error).splitlines()[0])
    status = result.get("status", "not begun")
    if status == "running" and not in_use:
        status = "killed"
    return RunRecord(
        directory=path,
        status=status,
        seed=config.get("seed", _number(typed.get("seed"))),
        step=result.get("step"),
        seconds=result.get("seconds"),
        error=result.get("error"),
        # a sweep's job that failed before it had a configuration has what was typed
        config=_with_defaults(flatten(config)) if config else _read_values(typed),
        typed=typed,
        metrics=result.get("metrics") or {},
        monitor=(result.get("monitor") or {}).get("metric", "").partition("/")[2] or None,
        higher_is_better=(result.get("monitor") or {}).get("higher_is_better"),
    )


def _read_values(typed: Mapping[str, str]) -> dict[str, Any]:
    """The values of overrides as a configuration has them."""
    return {key: _read_value(value) for key, value in typed.items()}


def _read_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # Hydra's values are not all YAML's
        return text


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that may be older than a key: it was made by what is the default now."""
    return config | {key: value for key, value in defaults().items() if key not in config}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    result = json.loads(file.read_text())
    if not isinstance(result, dict):
        raise ValueError(f"{file}: is no result of a run")
    return result


def _read_typed(file: Path) -> dict[str, str]:
    """The overrides of a command by their keys."""
    words = (yaml.safe_load(file.read_text()) if file.exists() else None) or []
    pairs = (str(word).lstrip("+").partition("=") for word in words)
    return {key: value for key, equals, value in pairs if equals}


# --- grouping ----------------------------------------------------------------------------------


def grouped(runs: Iterable[RunRecord]) -> list[Group]:
    """Runs of the same configuration together, but for what is a run's own (`OF_A_RUN`).

    A key of which several values were typed, as in `-m loader.workers=0,2`, is not: whoever does
    that wants to compare them.
    """
    runs = list(runs)
    varied = _varied(runs) - {"seed"}
    groups: dict[str, Group] = {}
    for run in runs:
        config = {
            key: value for key, value in run.config.items() if key in varied or not is_of_a_run(key)
        }
        name = json.dumps(config, sort_keys=True, default=str)
        before = groups.get(name)
        groups[name] = Group(config, [*(before.runs if before else []), run])
    return list(groups.values())


def _varied(runs: Iterable[RunRecord]) -> set[str]:
    """The keys that were typed with more than one value."""
    typed: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.typed.items():
            typed.setdefault(key, set()).add(value)
    return {key for key, values in typed.items() if len(values) > 1}


def is_of_a_run(key: str) -> bool:
    """Whether runs of one row may differ in a key."""
    parts = key.split(".")
    return any(".".join(parts[:number]) in OF_A_RUN for number in range(1, len(parts) + 1))


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """The keys of the configuration that are not the same in all groups, in their order."""
    keys = dict.fromkeys(key for group in groups for key in group.config)
    return [key for key in keys if _differs(groups, key)]


def telling_columns(groups: Sequence[Group]) -> list[str]:
    """The keys that tell groups apart.

    Choices come first, such as another `model` or `experiment`, then keys of the configuration:
    where no choice differs, all that were typed and differ, since together they are what
    somebody varied; otherwise, a choice implying many others, only what tells further groups
    apart, typed or not.
    """
    typed = _typed_keys(groups)
    choices = [key for key in typed if not any(key in group.config for group in groups)]
    values = [key for key in typed if key not in choices]
    columns = _telling(groups, choices, [])
    for group in groups:  # one that chose none of these has no name yet
        if columns and all(_value(group, key) is None for key in columns):
            columns += [key for key in choices if _value(group, key) is not None][:1]
    if not columns:
        columns = values
    return _telling(groups, [*values, *differing_keys(groups)], columns)


def _typed_keys(groups: Sequence[Group]) -> list[str]:
    """What was typed and differs."""
    typed = dict.fromkeys(key for group in groups for run in group.runs for key in run.typed)
    compared = {key for group in groups for key in group.config}
    return [
        key for key in typed if (key in compared or not is_of_a_run(key)) and _differs(groups, key)
    ]


def _telling(groups: Sequence[Group], keys: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns, and in their order those of the keys that tell further groups apart."""
    columns = list(columns)
    told_apart = _n_different(groups, columns)
    for key in keys:
        now = _n_different(groups, [*columns, key])
        if now > told_apart:
            columns.append(key)
            told_apart = now
    return columns


def _differs(groups: Sequence[Group], key: str) -> bool:
    return _n_different(groups, [key]) > 1


def _n_different(groups: Sequence[Group], keys: Sequence[str]) -> int:
    return len({json.dumps([_value(group, k) for k in keys], default=str) for group in groups})


def _value(group: Group, key: str) -> Any:
    """What a group has of a key: of its configuration, or, for a choice such as `model`, typed."""
    if key in group.config:
        return group.config[key]
    return next((run.typed[key] for run in group.runs if key in run.typed), None)


def shown(key: str, value: Any) -> str:
    """A value of the configuration in a cell."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "true", False: "false"}[value]
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, (list, dict)):
        return json.dumps(value, default=str)
    return str(value)


# --- metrics -----------------------------------------------------------------------------------


def chosen_metrics(
    names: Sequence[str], patterns: Sequence[str], monitors: Iterable[str | None]
) -> list[str]:
    """The names that patterns ask for; without any, the metrics that chose the runs' weights.

    Raises:
        ConfigError: a pattern that no name fits.
    """
    if not patterns:
        monitored = [monitor for monitor in monitors if monitor is not None]
        chosen = [name for name in names if any(_is_of(name, wanted) for wanted in monitored)]
        return chosen or list(names)
    wanted: dict[str, None] = {}
    for pattern in patterns if names else ():  # where nothing was scored, that is to be shown
        fitting = [name for name in names if _fits(name, pattern)]
        if not fitting:
            raise ConfigError(
                "--metrics",
                "no run has such a metric",
                value=pattern,
                allowed={base_name(name) for name in names},
                wrong_name=base_name(pattern),
            )
        wanted |= dict.fromkeys(fitting)
    return list(wanted)


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern is of a whole name, of one without its split, or of the metric alone."""
    forms = (name, name.partition("/")[2], base_name(name))
    return any(fnmatchcase(form, pattern) for form in forms)


def base_name(name: str) -> str:
    """A metric without its split and qualifiers."""
    return name.rpartition("/")[2].partition("@")[0]


def _is_of(name: str, monitor: str) -> bool:
    """Whether a test metric is the one of a validation: `accuracy@ways=5` is of `accuracy`."""
    base, qualifiers = _parts(name.partition("/")[2])
    wanted, needed = _parts(monitor)
    return base == wanted and needed <= qualifiers


def _parts(name: str) -> tuple[str, set[str]]:
    base, _, qualifiers = name.partition("@")
    return base, {part for part in qualifiers.split(",") if part}


def _outline(run: RunRecord) -> dict[str, Any]:
    return {
        "directory": str(run.directory),
        "status": run.status,
        "seed": run.seed,
        "step": run.step,
        "seconds": run.seconds,
        "error": run.error,
    }
