"""The figure of functions: truth, context, mean and ±2σ, a column for each context size.

Where targets are predicted jointly, a few functions drawn from the prediction; where the task set
knows the exact posterior, that too.
"""

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
from metabatch_cli.models.predictive import Predictive
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
_SAMPLED_EVERY = 3  # points of the grid: one after the other costs a pass of the network each
_SAMPLES = 3
_SAMPLE: dict[str, Any] = {"color": BLUE, "lw": 0.6, "alpha": 0.6}
_POSTERIOR: dict[str, Any] = {"color": GREY, "lw": 0.9, "ls": (0, (3, 2))}
_KEY, _LEGEND_HOLDS = 8, 150  # letters that an entry's line or dot takes, and a legend's row
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
        samples = _samples(scene, context, grid)
        # with the noise, as the learner predicts it
        best = scene.taskset.posterior(
            tasks._replace(context_x=context[0], context_y=context[1]), grid, noisy=True
        )
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
            if best is not None:
                exact, two_sigma = numbers(best[0][row, :, 0]), 2 * numbers(best[1][row, :, 0])
                for number, curve in enumerate((exact, exact - two_sigma, exact + two_sigma)):
                    label = "exact posterior ± 2σ" if number == 0 else None
                    panel.plot(x, curve, label=label, **_POSTERIOR)
                heights[row].may_show(exact - two_sigma, exact + two_sigma, beyond=widest)
            for number, sample in enumerate(samples):
                label = "samples" if number == 0 else None
                panel.plot(x[::_SAMPLED_EVERY], sample[row], label=label, **_SAMPLE)
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


def _samples(scene: Scene, context: tuple[Tensor, Tensor], grid: Tensor) -> list[np.ndarray]:
    """Functions `[tasks, points]` drawn from a joint prediction at some points of the grid.

    None of a learner that predicts each target by itself: there is no function in its noise.
    """
    if not scene.shows_spread:
        return []
    at = grid[:, ::_SAMPLED_EVERY]
    # from left to right, each point would lie beyond all others, and their errors add up
    order = torch.randperm(at.shape[1])
    prediction = scene.learner.predict(*context, at[:, order.to(at.device)])
    if not isinstance(prediction, Predictive):
        return []
    drawn = numbers(prediction.functions(_SAMPLES)[..., 0])
    return list(drawn[..., order.argsort().numpy()])


def _scores(learner: Learner, tasks: Task) -> list[float] | None:
    """The monitored score of each task on its held-out points."""
    score = learner.score(tasks).get(learner.metric.name)
    return None if score is None else score.tolist()


def _legend_of_functions(figure: Figure, panel: Axes, metric: str, scored: bool) -> None:
    order = ["context", "true function", "held out", "prediction", "± 2σ", "samples",
             "exact posterior ± 2σ"]  # fmt: skip
    by_label = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    handles = [by_label[label] for label in order if label in by_label]
    if scored:
        name = METRIC_LABELS.get(metric.partition("@")[0], metric)
        handles.append(Line2D([], [], ls="none", label=f"grey number: held-out {name}"))
    letters = sum(len(str(handle.get_label())) + _KEY for handle in handles)
    columns = len(handles) if letters <= _LEGEND_HOLDS else -(-len(handles) // 2)
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.6
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
