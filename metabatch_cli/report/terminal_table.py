"""The summary of runs in a terminal: a row for each configuration, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from metabatch_cli.report.console import clock, number
from metabatch_cli.report.table import Group, RunRecord, Score, Summary, base_name

_COLOURS = {"completed": "green", "running": "cyan", "not begun": "dim"}


def render(summary: Summary, console: Console, *, every_run: bool = False) -> None:
    """Print a summary.

    Args:
        every_run: whether to list the completed runs too.
    """
    console.print(counts(summary))
    if summary.groups:
        for table in _fitting(summary, summary.metrics, console):
            console.print(table)
        console.print(Text(caption(summary), style="dim"), soft_wrap=True)
    if summary.also_typed:
        console.print(f"also different: {', '.join(summary.also_typed)}", soft_wrap=True)
    listed = [run for run in summary.runs if every_run or run.status != "completed"]
    if listed:
        console.print()
    for run in listed:
        console.print(_line(run), soft_wrap=True)
    if summary.others:
        names = list(dict.fromkeys(base_name(name) for name in summary.others))
        console.print(f"\nnot shown: {', '.join(names)} (--metrics NAME, or '*')", soft_wrap=True)


def _fitting(
    summary: Summary, metrics: Sequence[str], console: Console, narrow: bool = False
) -> Iterator[Table]:
    """One table; where it would be too wide, several with a part of the metrics each."""
    table = _table(summary, metrics, narrow)
    needed = Measurement.get(console, console.options.update(width=10_000), table).maximum
    if needed <= console.width or (narrow and len(metrics) < 2):
        yield table
    elif not narrow:
        yield from _fitting(summary, metrics, console, narrow=True)
    else:
        half = (len(metrics) + 1) // 2
        yield from _fitting(summary, metrics[:half], console, narrow=True)
        yield from _fitting(summary, metrics[half:], console, narrow=True)


def _table(summary: Summary, metrics: Sequence[str], narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for key in summary.columns:
        name = key.removesuffix("._target_")
        heading = name.replace(".", ".\n") if narrow else name
        table.add_column(heading, style="bold cyan", overflow="fold")
    for name in metrics:
        table.add_column(_heading(name), justify="right", no_wrap=True)
    ways, best = summary.unlike(), {name: summary.best(name) for name in metrics}
    for key in ways:
        table.add_column(key, overflow="fold")
    for name in ("runs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, *how in zip(summary.groups, *ways.values(), strict=True):
        cells = [
            Text(_cell(group.score(name)), style="bold" if group in best[name] else "")
            for name in metrics
        ]
        seconds = "–" if group.seconds is None else clock(group.seconds)
        table.add_row(*summary.values(group), *cells, *how, counted(group), seconds)
    return table


def _heading(metric: str) -> str:
    """A metric's name over its column, what qualifies it below."""
    name, _, qualifiers = metric.removeprefix("test/").partition("@")
    return f"{name}\n{qualifiers.replace(',', ', ')}" if qualifiers else name


def _cell(score: Score | None) -> str:
    if score is None or score.mean is None:
        return "–"
    if score.ci95 is None:
        return number(score.mean)
    interval = f"± {number(score.ci95)}"
    return f"{number(score.mean)} " + (interval if score.over == "seeds" else f"({interval})")


def counted(group: Group) -> str:
    """How many runs count, and of how many if that is not all."""
    return str(len(group.counted)) + (
        f" of {len(group.runs)}" if len(group.counted) < len(group.runs) else ""
    )


def counts(summary: Summary) -> str:
    """How many runs of how many configurations."""
    runs, configurations = len(summary.runs), len(summary.groups)
    return f"{_number_of(runs, 'run')} of {_number_of(configurations, 'configuration')}"


def caption(summary: Summary) -> str:
    """What the intervals are, of those that are there."""
    scores = [group.score(name) for group in summary.groups for name in summary.metrics]
    over = {score.over for score in scores if score is not None and score.ci95 is not None}
    words = {"seeds": "± 95% over seeds (Student's t)", "tasks": "(± 95%) of one run, over tasks"}
    said = "; ".join(text for name, text in words.items() if name in over)
    repeated = sum(
        sum(run.status == "completed" for run in group.runs) - len(group.counted)
        for group in summary.groups
    )
    unlike = summary.unlike()
    for key, ways in summary.how().items():
        if key not in unlike:
            said += f"; {key} {next(way for way in ways if way != '–')}"
    if repeated:
        said += f"; of {_number_of(repeated, 'repeated run')} of a seed the last one counts"
    return said.removeprefix("; ")


def _line(run: RunRecord) -> Text:
    """A run, and what became of it."""
    words = [run.directory.as_posix()]
    if run.seed is not None:
        words.append(f"seed {run.seed}")
    if run.status in ("interrupted", "killed", "running") and run.step is not None:
        words.append(f"step {run.step:,}")
    if run.status == "completed" and run.seconds is not None:
        words.append(clock(run.seconds))
    line = Text(f"{run.status:11} ", style=_COLOURS.get(run.status, "red"))
    line.append("  ".join(words), style="default")
    if run.error and run.status in ("failed", "unreadable"):
        line.append(f": {run.error.strip().splitlines()[0]}", style="default")
    if run.status in ("interrupted", "killed"):
        line.append(f"; go on with: metabatch resume {run.directory}", style="default")
    return line


def _number_of(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
