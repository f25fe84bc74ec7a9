"""The summary of runs as files for others to read: CSV for programs, LaTeX for papers."""

from __future__ import annotations

import csv
import io
import re

from metabatch_cli.report.console import number
from metabatch_cli.report.table import Group, Score, Summary

_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "[": "{[}",  # behind the end of a line it would begin an option
    "]": "{]}",
    "–": "--",
    "−": "$-$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def as_csv(summary: Summary) -> str:
    """A row for each configuration: its columns, each metric's mean and interval, its runs.

    Numbers have all their digits. `METRIC over` says what the interval is over, `seeds` or `tasks`.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    of_metrics = [f"{name}{part}" for name in summary.metrics for part in ("", " ci95", " over")]
    how = summary.how()
    writer.writerow([*summary.columns, *of_metrics, *how, "completed", "runs", "seconds"])
    for group, *ways in zip(summary.groups, *how.values(), strict=True):
        scores: list[object] = []
        for name in summary.metrics:
            score = group.score(name)
            scores += ["", "", ""] if score is None else [score.mean, score.ci95, score.over]
        runs = [len(group.counted), len(group.runs), group.seconds]
        writer.writerow([*summary.raw_values(group), *scores, *ways, *runs])
    return text.getvalue()


def as_latex(summary: Summary) -> str:
    """A `tabular` for the package booktabs: means and intervals, the best of each metric bold."""
    unlike = summary.unlike()
    heads = [*summary.columns, *(name.removeprefix("test/") for name in summary.metrics), *unlike]
    split = [head.partition("@") for head in heads]
    rows = [
        [_escaped(_short(name)) for name, _, _ in split],
        [_escaped(qualifiers.replace(",", ", ")) for _, _, qualifiers in split],
    ]
    columns = "l" * len(summary.columns) + "r" * len(summary.metrics) + "l" * len(unlike)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [f"{' & '.join(row)} \\\\" for row in rows if any(row)]
    lines.append(r"\midrule")
    for group, *ways in zip(summary.groups, *unlike.values(), strict=True):
        cells = [_escaped(value) for value in summary.values(group)]
        cells += [_cell(summary, group, name) for name in summary.metrics]
        cells += map(_escaped, ways)
        lines.append(f"{' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _cell(summary: Summary, group: Group, metric: str) -> str:
    score = group.score(metric)
    if score is None or score.mean is None:
        return "--"
    text = _numbers(score)
    return rf"$\mathbf{{{text}}}$" if group in summary.best(metric) else f"${text}$"


def _numbers(score: Score) -> str:
    text = _power(number(score.mean))
    return text if score.ci95 is None else rf"{text} \pm {_power(number(score.ci95))}"


def _power(text: str) -> str:
    digits, e, exponent = text.partition("e")
    return rf"{digits} \cdot 10^{{{int(exponent)}}}" if e else text


def _short(key: str) -> str:
    return key.removesuffix("._target_")


def _escaped(text: str) -> str:
    return re.sub(r"[&%$#_{}~^\\–−<>\[\]]", lambda found: _LATEX[found.group()], text)
