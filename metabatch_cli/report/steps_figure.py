"""The figure of adaptation: a score after ever more steps of the inner loop."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from metabatch_cli.report.style import COLOURS, INK, METRIC_LABELS, house_style, save

LEAST = 3  # numbers of steps: two points are no curve


def draw_inner_steps(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Draw a curve for each test set, a panel for each score that is given after several steps.

    Args:
        metrics: as in `result.json`: by `SPLIT/METRIC@…,steps=K`, with `mean` and `ci95`, which
            is drawn as a band.
        path: the PNG to write; replaced atomically.

    Returns:
        `path`, or None where no score is given after three numbers of steps or more.
    """
    curves = {key: curve for key, curve in curves_of(metrics).items() if len(curve) >= LEAST}
    scores = list(dict.fromkeys(score for score, _ in curves))
    if not scores:
        return None
    with house_style():
        figure = Figure(figsize=(4.6 * len(scores), 3.4), layout=ConstrainedLayoutEngine())
        panels = figure.subplots(1, len(scores), squeeze=False)[0]
        for panel, score in zip(panels, scores, strict=True):
            own = {of: curve for (name, of), curve in curves.items() if name == score}
            for (label, curve), colour in zip(own.items(), itertools.cycle(COLOURS), strict=False):
                steps = sorted(curve)
                means, widths = ([curve[k][part] for k in steps] for part in (0, 1))
                low, high = (
                    [m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1)
                )
                panel.plot(steps, means, color=colour, marker="o", ms=3, lw=1.6, label=label)
                panel.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
            panel.set(
                title="After ever more inner steps",
                xlabel="gradient steps on the context",
                ylabel=METRIC_LABELS.get(score, score.replace("_", " ")),
            )
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(color=INK, alpha=0.08, lw=0.7)
            if any(own):
                panel.legend(handlelength=1.6)
        return save(figure, path)


def curves_of(
    metrics: Mapping[str, Mapping[str, Any]],
) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """By score and the rest of its qualifiers: mean and half-width after each number of steps."""
    curves: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for name, entry in metrics.items():
        score, _, qualifiers = name.partition("/")[2].partition("@")
        parts = [part for part in qualifiers.split(",") if part]
        steps = [part.removeprefix("steps=") for part in parts if part.startswith("steps=")]
        if steps and steps[0].isdigit():
            of = ", ".join(part for part in parts if not part.startswith("steps="))
            point = entry["mean"], entry["ci95"] or 0.0
            curves.setdefault((score, of), {})[int(steps[0])] = point
    return curves
