"""The summary of runs as one page for a browser, which needs nothing beside itself.

The page itself is page.html: a table that sorts, the effect of each key, learning curves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metabatch_cli.report.console import clock
from metabatch_cli.report.files import finite
from metabatch_cli.report.loggers import read_rows
from metabatch_cli.report.table import RunRecord, Summary
from metabatch_cli.report.terminal_table import caption, counted, counts

POINTS = 300  # of a curve: more than that nobody sees


def as_html(summary: Summary) -> str:
    """The page."""
    template = (Path(__file__).parent / "page.html").read_text()
    tree = json.dumps(finite(_data(summary)), ensure_ascii=False)
    return template.replace("__DATA__", tree.replace("<", "\\u003c"))  # no tag in a text is one


def _data(summary: Summary) -> dict[str, Any]:
    of_groups = [(n, run) for n, group in enumerate(summary.groups) for run in group.runs]
    of_groups += [(len(summary.groups), run) for run in summary.unreadable]
    runs = [_run(run, number) for number, run in of_groups]
    unlike = summary.unlike()
    best = {name: summary.best(name) for name in summary.metrics}
    return {
        "about": counts(summary),
        "caption": caption(summary),
        "columns": list(summary.columns),
        "metrics": list(summary.metrics),
        "how": list(unlike),
        "curves": _curve_names(summary, runs),
        "groups": [
            {
                "values": summary.values(group),
                "scores": {
                    name: {"mean": score.mean, "ci95": score.ci95, "best": group in best[name]}
                    for name in summary.metrics
                    if (score := group.score(name)) is not None
                },
                "how": [ways[number] for ways in unlike.values()],
                "counted": counted(group),
                "completed": len(group.counted),
                "seconds": group.seconds,
                "time": "–" if group.seconds is None else clock(group.seconds),
            }
            for number, group in enumerate(summary.groups)
        ],
        "runs": runs,
    }


def _run(run: RunRecord, group: int) -> dict[str, Any]:
    return {
        "group": group,
        "directory": run.directory.as_posix(),
        "status": run.status,
        "seed": run.seed,
        "step": run.step,
        "seconds": run.seconds,
        "time": "–" if run.seconds is None else clock(run.seconds),
        "error": run.error,
        "curves": _curves(run.directory),
    }


def _curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Of every metric that was logged, steps and values."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(directory / "metrics.jsonl"):
        for name, value in row.items():
            if (
                name not in ("step", "seconds")
                and not name.endswith(("/ci95", "/oracle"))
                and value is not None
            ):
                curves.setdefault(name, []).append((row["step"], value))
    return {name: _thinned(points) for name, points in curves.items()}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over neighbours, where there are more points than a screen shows."""
    size = -(-len(points) // POINTS)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [
        (part[-1][0], sum(value for _, value in part) / len(part)) if size > 1 else part[0]
        for part in parts
    ]


def _curve_names(summary: Summary, runs: list[dict[str, Any]]) -> list[str]:
    """The metrics that have curves, the one that chose the weights first."""
    names = dict.fromkeys(name for run in runs for name in run["curves"])
    chosen = {f"val/{run.monitor}" for run in summary.runs if run.monitor is not None}
    return sorted(names, key=lambda name: (name not in chosen, not name.startswith("val/"), name))
