"""Learning curves: the training loss and the validation scores of a run over its steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter

from metabatch_cli.report.loggers import read_rows
from metabatch_cli.report.style import (
    BLUE,
    COLOURS,
    INK,
    METRIC_LABELS,
    WIDTH,
    house_style,
    save,
)

_DECADES = 1.5  # positive losses that span more are drawn on a logarithmic scale


def draw_learning_curves(
    metrics_file: Path, path: Path, *, metric: str, higher_is_better: bool
) -> Path | None:
    """Draw the curves of a run: the training loss on the left, validation on the right.

    Args:
        metrics_file: a run's `metrics.jsonl`; a last line that a kill cut short is left out, and
            of two rows of a step the later one counts.
        path: the PNG to write; replaced atomically.
        metric: `log_likelihood`, `mse@steps=1`, …: every entry `val/METRIC` is drawn, also with
            further qualifiers (`val/mse@shots=10,steps=1`), with the band of its `…/ci95` and a
            dashed line at its `…/oracle`.
        higher_is_better: which end of a curve is its best.

    Returns:
        `path`, or None where there is nothing to draw.
    """
    rows = [row for row in read_rows(metrics_file) if _is_number(row.get("step"))]
    loss = _Curve("loss")
    for row in rows:
        loss.add(row["step"], row.get("loss"))
    curves = [curve for curve in _validation_curves(rows, metric) if curve.points]
    drawings = [bool(loss.points), bool(curves)]
    if not any(drawings):
        return None
    with house_style():
        figure = Figure(figsize=(WIDTH, 3.3), layout=ConstrainedLayoutEngine(wspace=0.06))
        panels = iter(figure.subplots(1, sum(drawings), squeeze=False)[0])
        if loss.points:
            _draw_loss(next(panels), loss)
        if curves:
            _draw_validation(next(panels), curves, metric, higher_is_better)
        return save(figure, path)


# --- reading ---------------------------------------------------------------------------------


@dataclass
class _Curve:
    """Values by step, with the half-widths of their intervals and the best possible score."""

    name: str
    points: dict[int, float] = field(default_factory=dict)
    widths: dict[int, float] = field(default_factory=dict)
    oracle: float | None = None

    def add(self, step: int, value: Any, width: Any = None, oracle: Any = None) -> None:
        """Note what a row says; what is missing or not finite leaves a gap."""
        if _is_number(value):
            self.points[step] = float(value)
            self.widths[step] = float(width) if _is_number(width) else 0.0
        if _is_number(oracle):
            self.oracle = float(oracle)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps in order, values and half-widths."""
        steps = sorted(self.points)
        values = [self.points[step] for step in steps]
        widths = [self.widths[step] for step in steps]
        return np.array(steps), np.array(values), np.array(widths)


def _validation_curves(rows: list[dict[str, Any]], metric: str) -> list[_Curve]:
    curves: dict[str, _Curve] = {}
    for row in rows:
        for key, value in row.items():
            qualifiers = _qualifiers_beyond(metric, key)
            if qualifiers is not None:
                curve = curves.setdefault(key, _Curve(qualifiers))
                curve.add(row["step"], value, row.get(f"{key}/ci95"), row.get(f"{key}/oracle"))
    return list(curves.values())


def _qualifiers_beyond(metric: str, key: str) -> str | None:
    """What `val/NAME@a=1,b=2` says beyond the metric; None if it is another metric."""
    split, _, rest = key.partition("/")
    name, _, qualifiers = rest.partition("@")
    wanted, _, required = metric.partition("@")
    given, needed = ([q for q in text.split(",") if q] for text in (qualifiers, required))
    if split != "val" or name != wanted or not set(needed) <= set(given):
        return None
    if key.endswith(("/ci95", "/oracle")):  # they belong to a curve and are none themselves
        return None
    return ", ".join(qualifier for qualifier in given if qualifier not in needed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- drawing ---------------------------------------------------------------------------------


def _draw_loss(panel: Axes, loss: _Curve) -> None:
    steps, values, _ = loss.arrays()
    smooth = _smoothed(values)
    if smooth is None:
        panel.plot(steps, values, color=BLUE, lw=1.6, marker="o" if len(steps) == 1 else None)
    else:
        panel.plot(steps, values, color=BLUE, lw=0.7, alpha=0.3, label="as logged")
        panel.plot(steps, smooth, color=BLUE, lw=1.7, label="moving average")
        panel.legend(loc="best")
    _scale(panel, values, values, logarithmic=True)
    panel.set(title="Training", xlabel="step", ylabel="loss")


def _draw_validation(
    panel: Axes, curves: list[_Curve], metric: str, higher_is_better: bool
) -> None:
    seen: list[np.ndarray] = []
    banded: list[np.ndarray] = []
    for curve, colour in zip(curves, itertools.cycle(COLOURS), strict=False):
        steps, values, widths = curve.arrays()
        best = int(values.argmax() if higher_is_better else values.argmin())
        label = f"best {values[best]:.3g} at step {steps[best]:,}".replace("-", "−")
        label = f"{curve.name}: {label}" if curve.name else label
        if widths.any():
            band = (values - widths, values + widths)
            panel.fill_between(steps, *band, color=colour, alpha=0.2, lw=0)
            banded.extend(band)
        panel.plot(steps, values, color=colour, lw=1.6, marker="o", ms=2.5)
        panel.plot(
            steps[best], values[best], "*", color=colour, ms=11, mec="white", mew=0.8,
            label=label, zorder=5, clip_on=False,
        )  # fmt: skip
        seen.append(values)
        if curve.oracle is not None:
            panel.axhline(curve.oracle, color=colour, lw=1.2, ls=(0, (4, 2)),
                          label=f"best possible {curve.oracle:.3g}".replace("-", "−"))  # fmt: skip
            seen.append(np.array([curve.oracle]))
    values = np.concatenate(seen)
    _scale(panel, values, np.concatenate([values, *banded]), logarithmic=not higher_is_better)
    name, _, qualifiers = metric.partition("@")
    panel.set(
        title="Validation" + (", with 95% intervals" if banded else ""),
        xlabel="step",
        ylabel=METRIC_LABELS.get(name, name.replace("_", " "))
        + (f", {qualifiers.replace(',', ', ')}" if qualifiers else ""),
    )
    panel.legend(loc="best")


def _smoothed(values: np.ndarray) -> np.ndarray | None:
    """A centred moving average over some 4% of the values; None where there are too few."""
    window = 2 * (len(values) // 50) + 1
    if window < 3:
        return None
    kernel = np.ones(window)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    return np.convolve(values, kernel, mode="same") / counts


def _scale(
    panel: Axes, values: np.ndarray, values_and_bands: np.ndarray, *, logarithmic: bool
) -> None:
    """Limits that a few spikes do not stretch; logarithmic for positive values over decades."""
    low, high = (float(end) for end in np.quantile(values, (0.0, 0.995)))
    if logarithmic and low > 0 and high / low > 10**_DECADES:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.3, high * 1.3)
    else:
        low, high = (float(end) for end in np.quantile(values_and_bands, (0.0, 0.995)))
        margin = 0.08 * (high - low or abs(high) or 1.0)
        panel.set_ylim(low - margin, high + margin)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.locator_params(axis="x", nbins=6)
    panel.grid(axis="y", color=INK, alpha=0.08, lw=0.7)
