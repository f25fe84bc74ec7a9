"""The figure of functions: truth, context, mean and ±2σ, a column for each context size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from torch import Tensor

from metabatch_cli.batching.task import Task
from metabatch_cli.learners.learner import Learner
from metabatch_cli.report.scene import Scene, within
from metabatch_cli.report.style import (
    BLUE,
    GREY,
    INK,
    METRIC_LABELS,
    WIDTH,
    counted,
    numbers,
    short,
)

_GRID = 300  # x at which a predictive curve is drawn
_HELD_OUT = 100  # target points of a function: enough dots to guess it where it is not known
_TRUTH: dict[str, Any] = {"color": GREY, "lw": 1.2, "ls": (0, (4, 2))}
_HELD_OUT_DOTS: dict[str, Any] = {
    "color": GREY, "ls": "none", "marker": ".", "ms": 4.5, "mew": 0, "alpha": 0.5,
}  # fmt: skip
_CONTEXT_DOTS: dict[str, Any] = {
    "color": INK, "ls": "none", "marker": "o", "ms": 4, "mew": 0.5, "mec": "white",
}  # fmt: skip


def draw_functions(scene: Scene) -> Figure | None:
    """A row for each function, a column for each context size; a single size in one row."""
    if scene.spec.dim_x != 1:
        return None
    sizes = scene.context_sizes()
    one_size = len(sizes) == 1
    tasks = scene.create_alike(4 if one_size else 3, n_context=max(sizes), n_target=_HELD_OUT)
    if tasks is None:
        return None
    sizes = within(sizes, tasks.context_x.shape[1])
    grid = _dense_grid(tasks)
    truth = scene.taskset.truth(tasks, grid)
    count = len(grid)
    shape = (1, count) if one_size else (count, len(sizes))
    figure = Figure(
        figsize=(WIDTH, 0.75 + 1.4 * shape[0] + 0.5 * one_size),
        layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05),
    )
    panels = figure.subplots(*shape, squeeze=False)
    by_task = panels.T if one_size else panels

    known = tasks.target_y if truth is None else truth
    heights = [
        _Heights(numbers(tasks.context_y[row, :, 0]), numbers(known[row, :, 0]))
        for row in range(count)
    ]
    widest = max(height.span for height in heights)
    for column, size in enumerate(sizes):
        context = (tasks.context_x[:, :size], tasks.context_y[:, :size])
        prediction = scene.learner.predict(*context, grid)
        mean = prediction.mean.reshape(count, _GRID, -1)
        sigma = scene.spread(prediction, mean)
        scores = _scores(scene.learner, Task(*context, tasks.target_x, tasks.target_y))
        for row in range(count):
            panel, x = by_task[row, column], numbers(grid[row, :, 0])
            if truth is not None:
                panel.plot(x, numbers(truth[row, :, 0]), label="true function", **_TRUTH)
            else:
                held_out = (numbers(part[row, :, 0]) for part in (tasks.target_x, tasks.target_y))
                panel.plot(*held_out, label="held out", **_HELD_OUT_DOTS)
            middle = numbers(mean[row, :, 0])
            if sigma is not None:
                two_sigma = 2 * numbers(sigma[row, :, 0])
                below, above = middle - two_sigma, middle + two_sigma
                panel.fill_between(x, below, above, color=BLUE, alpha=0.2, lw=0, label="± 2σ")
                heights[row].may_show(below, above, beyond=0.75 * heights[row].span)
            panel.plot(x, middle, color=BLUE, lw=1.7, label="prediction")
            heights[row].may_show(middle, beyond=widest)
            panel.plot(
                *(numbers(part[row, :, 0]) for part in context), label="context", **_CONTEXT_DOTS
            )
            margin = 0.02 * (x[-1] - x[0]) or 1.0
            panel.set_xlim(x[0] - margin, x[-1] + margin)
            if row == 0 or one_size:
                panel.set_title(counted(size, "context point"))
            if scores is not None:
                panel.set_title(short(scores[row]), loc="right", fontsize=7.5, color=GREY)
    for row in range(count):
        for panel in by_task[row]:
            panel.set_ylim(*heights[row].limits())
    alike = bool((grid == grid[:1]).all())
    y_label = "y" if scene.spec.dim_y == 1 else "y₁"
    _label_outer(panels, y_label, share_x=alike, share_y=not one_size)
    figure.align_ylabels(panels[:, 0])
    _legend_of_functions(figure, by_task[0, 0], scene.learner.metric.name, scores is not None)
    return figure


class _Heights:
    """The y-range of a row: all data, and predictions as far as they stay near it.

    A diverged learner predicts infinities and an untrained one a band that is far too wide:
    neither may flatten what there is to see.
    """

    def __init__(self, *data: np.ndarray) -> None:
        values = np.concatenate(data)
        values = values[np.isfinite(values)]
        self.data = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        self.low, self.high = self.data

    @property
    def span(self) -> float:
        return (self.data[1] - self.data[0]) or 1.0

    def may_show(self, *predicted: np.ndarray, beyond: float) -> None:
        """Make room for predictions, up to some distance from the data."""
        for values in predicted:
            finite = values[np.isfinite(values)]
            if finite.size:
                self.low = min(self.low, max(float(finite.min()), self.data[0] - beyond))
                self.high = max(self.high, min(float(finite.max()), self.data[1] + beyond))

    def limits(self) -> tuple[float, float]:
        margin = 0.06 * ((self.high - self.low) or 1.0)
        return self.low - margin, self.high + margin


def _dense_grid(tasks: Task) -> Tensor:
    """x `[tasks, 300, 1]` over the drawn points: the same for all tasks if they lie alike."""
    x = torch.cat([tasks.context_x, tasks.target_x], dim=1)[..., 0]
    low, high = x.amin(dim=1), x.amax(dim=1)
    if high.max() - low.min() < 1.5 * (high - low).min():
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    steps = torch.linspace(0, 1, _GRID, dtype=x.dtype, device=x.device)
    return (low[:, None] + (high - low)[:, None] * steps)[..., None]


def _scores(learner: Learner, tasks: Task) -> list[float] | None:
    """The monitored score of each task on its held-out points."""
    score = learner.score(tasks).get(learner.metric.name)
    return None if score is None else score.tolist()


def _legend_of_functions(figure: Figure, panel: Axes, metric: str, scored: bool) -> None:
    order = ["context", "true function", "held out", "prediction", "± 2σ"]
    by_label = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    handles = [by_label[label] for label in order if label in by_label]
    if scored:
        name = METRIC_LABELS.get(metric.partition("@")[0], metric)
        handles.append(Line2D([], [], ls="none", label=f"grey number: held-out {name}"))
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.6
    )
    if scored:
        legend.get_texts()[-1].set_color(GREY)


def _label_outer(panels: np.ndarray, y: str, *, share_x: bool, share_y: bool) -> None:
    """Axis labels at the left and below only, and numbers where neighbours differ."""
    last = len(panels) - 1
    for row, line in enumerate(panels):
        for column, panel in enumerate(line):
            panel.locator_params(axis="x", nbins=6, steps=(1, 2, 5, 10))
            panel.locator_params(axis="y", nbins=5, steps=(1, 2, 5, 10))
            if row == last:
                panel.set_xlabel("x")
            elif share_x:
                panel.tick_params(labelbottom=False)
            if column == 0:
                panel.set_ylabel(y)
            elif share_y:
                panel.tick_params(labelleft=False)
