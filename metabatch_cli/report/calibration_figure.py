"""The figure of calibration: how often the truth lies in intervals that claim a probability."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from metabatch_cli.report.style import COLOURS, GREY, INK, house_style, save

_SIDE = 4.2  # inches


def draw_calibration(
    calibration: Mapping[str, Mapping[str, Sequence[float]]], path: Path
) -> Path | None:
    """Draw a curve of each set: coverage against level; on the diagonal is what is calibrated.

    Below it, intervals are too narrow: the learner is too sure of itself; above, too wide.

    Args:
        calibration: as in `result.json`: by `test` or `test@QUALIFIERS`, the `levels` of central
            intervals and their `coverage`, numbers from 0 to 1.
        path: the PNG to write; replaced atomically.

    Returns:
        `path`, or None where there is no curve.
    """
    if not calibration:
        return None
    with house_style():
        figure = Figure(figsize=(_SIDE, _SIDE), layout=ConstrainedLayoutEngine())
        panel = figure.subplots()
        panel.plot([0, 1], [0, 1], color=GREY, lw=1.2, ls=(0, (4, 2)), label="calibrated")
        for (name, curve), colour in zip(
            calibration.items(), itertools.cycle(COLOURS), strict=False
        ):
            # of nothing there is nothing, and of everything all
            levels, coverage = ([0.0, *curve[part], 1.0] for part in ("levels", "coverage"))
            label = name.partition("@")[2].replace(",", ", ") or "prediction"
            panel.plot(levels, coverage, color=colour, lw=1.6, label=label)
        panel.text(0.04, 0.96, "intervals too wide", color=GREY, fontsize=8, va="top")
        panel.text(0.96, 0.04, "intervals too narrow", color=GREY, fontsize=8, ha="right")
        panel.set(
            title="Calibration", xlim=(0, 1), ylim=(0, 1), aspect="equal",
            xlabel="probability that a central interval claims",
            ylabel="target points in it",
        )  # fmt: skip
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.grid(color=INK, alpha=0.08, lw=0.7)
        panel.legend(loc="upper left", bbox_to_anchor=(0.02, 0.9), handlelength=1.6)
        return save(figure, path)
