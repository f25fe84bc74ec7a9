"""The house style of all figures: palette, type, saving, and places in inches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from metabatch_cli.report.files import write_atomically

WIDTH = 9.0  # inches: at a README's 900 pixels, 9-point type is 12 pixels high
DPI = 160
# Okabe & Ito's palette, which the colour-blind tell apart
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)  # of several lines, in this order
INK, GREY, FAINT = "#222222", "#6E6E6E", "#C4C4C4"
STYLE: Any = {  # by type a dict of literal names in some versions of matplotlib
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "legend.facecolor": "white",
    "legend.edgecolor": "white",
    "legend.framealpha": 0.8,
    "image.interpolation": "nearest",
}
METRIC_LABELS = {
    "log_likelihood": "log-likelihood (nats per point)",
    "mse": "mean squared error",
    "accuracy": "accuracy",
}


def house_style() -> AbstractContextManager[None]:
    """matplotlib's own defaults and `STYLE` while figures are made: no user's settings."""
    return style.context(["default", STYLE])


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically: a reader finds the old file or the new one."""
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no window system asked
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=DPI))
    return path


class Inches:
    """Places on a figure in inches from its top left corner: images need exact sizes."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = (float(side) for side in figure.get_size_inches())

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        bottom = self.height - y - height
        return self.figure.add_axes(
            (x / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def image(
        self, x: float, y: float, width: float, height: float,
        *, frame: str = "white", line: float = 0.8,
    ) -> Axes:  # fmt: skip
        panel = self.axes(x, y, width, height)
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set(visible=True, color=frame, linewidth=line)
        return panel

    def text(self, x: float, y: float, text: str, **how: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, **{"va": "center", **how})


def numbers(tensor: Tensor) -> np.ndarray:
    """A tensor of any device and precision as float64."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 pixel, 2 pixels."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def short(number: float) -> str:
    """Two decimals, or two digits where they would not show, with a true minus sign."""
    text = f"{number:.2f}" if 0.01 <= abs(number) < 1000 else f"{number:.2g}"
    return text.replace("-", "−")
