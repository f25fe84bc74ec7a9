"""Figures of what a learner predicts: functions, completed images, classified episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from metabatch_cli.batching.create import BatchMaker
from metabatch_cli.batching.plan import BatchSpec
from metabatch_cli.batching.sizes import WORDS
from metabatch_cli.batching.streams import (
    Stream,
    borrowed_global_generators,
    seed_global_generators,
)
from metabatch_cli.batching.task import Task, as_task, to_device
from metabatch_cli.batching.taskset import TaskSet, TaskSpec, n_tasks
from metabatch_cli.engine.run_directory import write_atomically
from metabatch_cli.learners.learner import Learner

WIDTH = 9.0  # inches: at a README's 900 pixels, 9-point type is 12 pixels high
DPI = 160
# Okabe & Ito's palette, which the colour-blind tell apart
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
INK, GREY, FAINT = "#222222", "#6E6E6E", "#C4C4C4"
UNKNOWN = "#8FAAC8"  # a pixel that the context does not hold: no grey, so no shade of an image
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

_GRID = 300  # x at which a predictive curve is drawn
_HELD_OUT = 100  # target points of a function: enough dots to guess it where it is not known
_COLUMNS = 4  # context sizes, where none are given
_LOWEST, _HIGHEST = (0,) * WORDS, (2**64 - 1,) * WORDS  # words of a law's smallest, largest sizes


def draw_predictions(
    learner: Learner,
    taskset: TaskSet,
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    context_sizes: Sequence[int] | None = None,
) -> Path | None:
    """Draw what a learner predicts on a few tasks of a set, as the set's kind asks for.

    Functions of one variable and images are shown for contexts that grow along the columns, the
    small ones being the beginnings of the large ones; classification as episodes. The learner
    is put into evaluation mode meanwhile; its modes and all global random states come back as
    they were. The same weights and seed give the same file.

    A learner with `has_spread = False` is drawn without σ: it predicts a value, no distribution.

    Args:
        learner: predicts; its weights lie on `device`.
        taskset: makes the tasks; of sizes within its law where it refuses the ones asked for.
        path: the PNG to write; replaced atomically, its folder made where it is missing.
        device, dtype: of the tasks that the learner sees; integers keep their type.
        seed: chooses the tasks, their points and what the learner itself draws.
        context_sizes: points in the contexts; None for four, geometrically from the law's
            smallest to its largest. Classification has the sizes of its law.

    Returns:
        `path`, or None where nothing can be drawn: an unknown kind, a function of several
        variables, a classification of what are not images.

    Raises:
        ValueError: `context_sizes` that are no numbers of points.
    """
    spec = taskset.spec
    draw = None if spec is None else _DRAWINGS.get(spec.kind)
    if spec is None or draw is None:
        return None
    if context_sizes is not None:
        _check_context_sizes(context_sizes)
    device = torch.device(device)
    scene = _Scene(learner, taskset, spec, device, dtype, seed, context_sizes)
    with house_style(), _at_rest(learner, device, seed):
        figure = draw(scene)
        return None if figure is None else save(figure, path)


def house_style() -> AbstractContextManager[None]:
    """matplotlib's own defaults and `STYLE` while figures are made: no user's settings."""
    return style.context(["default", STYLE])


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically: a reader finds the old file or the new one."""
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no window system asked
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=DPI))
    return path


# --- the scene: tasks, contexts, predictions -------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    """Who predicts what: all that a drawing asks for."""

    learner: Learner
    taskset: TaskSet
    spec: TaskSpec
    device: torch.device
    dtype: torch.dtype
    seed: int
    wanted: Sequence[int] | None

    @property
    def shows_spread(self) -> bool:
        return bool(getattr(self.learner, "has_spread", True))

    def context_sizes(self) -> list[int]:
        """The sizes of the nested contexts, ascending."""
        if self.wanted is not None:
            return sorted(set(self.wanted))
        law = self.taskset.law
        ends = sorted(law.draw(words)["n_context"] for words in (_LOWEST, _HIGHEST))
        low, high = max(ends[0], 1), max(ends[1], 1)
        return sorted({round(size) for size in np.geomspace(low, high, _COLUMNS).tolist()})

    def create(self, count: int, **wanted: int) -> Task:
        """Some tasks `[tasks, points, …]` of the law's sizes, except for those wanted."""
        stream = Stream(self.seed, self.taskset.split, "figure")
        drawn = self.taskset.law.draw([int(word) for word in stream.words(WORDS, 0)])
        smallest, largest = (self.taskset.law.draw(words) for words in (_LOWEST, _HIGHEST))
        indices = self._choose(count, stream)
        maker = BatchMaker(self.taskset, self.seed, self.taskset.split)
        attempts = [drawn | wanted, largest, drawn, smallest]
        for number, sizes in enumerate(attempts, start=1):
            try:
                batch = maker[BatchSpec(0, 0, sizes, indices, 0, len(indices))]
            except Exception:
                # a table has no more rows than it has: its own sizes are the next best
                if number == len(attempts):
                    raise
            else:
                break
        tasks = to_device(as_task(batch), self.device)
        return tasks._replace(
            context_x=self._cast(tasks.context_x),
            context_y=self._cast(tasks.context_y),
            target_x=self._cast(tasks.target_x),
            target_y=self._cast(tasks.target_y),
        )

    def spread(self, prediction: torch.distributions.Distribution, like: Tensor) -> Tensor | None:
        """The standard deviations of a prediction, in the shape of `like`; None without any."""
        return prediction.stddev.reshape(like.shape) if self.shows_spread else None

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _choose(self, count: int, stream: Stream) -> np.ndarray:
        length = n_tasks(self.taskset)
        if length is None:
            return np.arange(count, dtype=np.int64)
        # at random: neighbours are often alike, such as the images of one class
        chosen = np.random.default_rng(stream.words(4, 1))
        return chosen.choice(length, min(count, length), replace=False).astype(np.int64)


@contextmanager
def _at_rest(learner: Learner, device: torch.device, seed: int) -> Iterator[None]:
    """Evaluation without gradients, on borrowed random generators; all is given back."""
    modes = {module: module.training for module in learner.modules()}
    cards = [device] if device.type == "cuda" else []
    try:
        learner.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=cards),
            borrowed_global_generators(),
        ):
            # latent-variable learners draw from the global generators
            seed_global_generators(Stream(seed, "figure"), 0, 0)
            for card in cards:
                with torch.cuda.device(card):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_context_sizes(sizes: Sequence[int]) -> None:
    counts = [size for size in sizes if isinstance(size, Integral) and size >= 0]
    if not counts or len(counts) < len(sizes):
        raise ValueError(f"context_sizes={list(sizes)} must be one or more numbers of points")


# --- functions -------------------------------------------------------------------------------


def _draw_functions(scene: _Scene) -> Figure | None:
    """A row for each function, a column for each context size; a single size in one row."""
    if scene.spec.dim_x != 1:
        return None
    sizes = scene.context_sizes()
    one_size = len(sizes) == 1
    tasks = scene.create(4 if one_size else 3, n_context=max(sizes), n_target=_HELD_OUT)
    sizes = _within(sizes, tasks.context_x.shape[1])
    grid = _dense_grid(tasks)
    truth = scene.taskset.truth(tasks, grid)
    count = len(grid)
    shape = (1, count) if one_size else (count, len(sizes))
    figure = Figure(
        figsize=(WIDTH, 0.75 + 1.4 * shape[0] + 0.5 * one_size),
        layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04),
    )
    panels = figure.subplots(*shape, squeeze=False)
    by_task = panels.T if one_size else panels

    known = tasks.target_y if truth is None else truth
    heights = [
        _Heights(_numbers(tasks.context_y[row, :, 0]), _numbers(known[row, :, 0]))
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
            panel = by_task[row, column]
            x = _numbers(grid[row, :, 0])
            if truth is not None:
                y = _numbers(truth[row, :, 0])
                panel.plot(x, y, color=GREY, lw=1.2, ls=(0, (4, 2)), label="true function")
            else:
                held_out = (_numbers(part[row, :, 0]) for part in (tasks.target_x, tasks.target_y))
                panel.plot(*held_out, ".", color=GREY, ms=4.5, alpha=0.5, mew=0, label="held out")
            middle = _numbers(mean[row, :, 0])
            if sigma is not None:
                two_sigma = 2 * _numbers(sigma[row, :, 0])
                below, above = middle - two_sigma, middle + two_sigma
                panel.fill_between(x, below, above, color=BLUE, alpha=0.2, lw=0, label="± 2σ")
                heights[row].may_show(below, above, beyond=0.75 * heights[row].span)
            panel.plot(x, middle, color=BLUE, lw=1.7, label="prediction")
            heights[row].may_show(middle, beyond=widest)
            points = (_numbers(part[row, :, 0]) for part in context)
            panel.plot(*points, "o", color=INK, ms=4, mec="white", mew=0.5, label="context")
            margin = 0.02 * (x[-1] - x[0]) or 1.0
            panel.set_xlim(x[0] - margin, x[-1] + margin)
            if row == 0 or one_size:
                panel.set_title(_counted(size, "context point"))
            if scores is not None:
                panel.set_title(_short(scores[row]), loc="right", fontsize=7.5, color=GREY)
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
            panel.locator_params(nbins=5, steps=(1, 2, 5, 10))
            if row == last:
                panel.set_xlabel("x")
            elif share_x:
                panel.tick_params(labelbottom=False)
            if column == 0:
                panel.set_ylabel(y)
            elif share_y:
                panel.tick_params(labelleft=False)


# --- images ----------------------------------------------------------------------------------


def _draw_images(scene: _Scene) -> Figure | None:
    """A block for each image: a column for each context size; context, mean and σ below it."""
    if scene.spec.image_shape is None:
        return None
    _, height, width = scene.spec.image_shape
    sizes = [min(size, height * width) for size in scene.context_sizes()]
    count = 4 if len(sizes) <= 5 else 2
    tasks = scene.create(count, n_context=max(sizes), n_target=height * width)
    if tasks.target_x.shape[1] != height * width:
        return None
    sizes = _within(sizes, tasks.context_x.shape[1])
    count = len(tasks.target_x)
    scale = _PixelScale.of(tasks.target_y, scene.spec)
    rows = 3 if scene.shows_spread else 2

    across = min(count, 2 if len(sizes) <= 5 else 1)
    left, right, between, before_truth, title = 0.72, 0.12, 0.3, 0.12, 0.24
    cells = across * (len(sizes) + 1)
    gaps = left + right + (across - 1) * between + across * before_truth
    cell = min((WIDTH - gaps) / cells, 1.6)
    tall = cell * height / width
    block = (len(sizes) + 1) * cell + before_truth
    blocks_down = -(-count // across)
    figure = Figure(
        figsize=(WIDTH, title + blocks_down * (rows * tall + between) + 0.42 - 0.5 * between)
    )
    place = _Inches(figure)

    pictures = [_complete(scene, tasks, image, sizes) for image in range(count)]
    deviations = [s for picture in pictures for s in picture.sigmas if s is not None]
    most = _sensible_maximum(deviations) * scale.std
    for image, picture in enumerate(pictures):
        corner_x = left + (image % across) * (block + between)
        corner_y = title + (image // across) * (rows * tall + between)
        for column, size in enumerate(sizes):
            x = corner_x + column * cell
            shown = place.image(x, corner_y, cell, tall)
            shown.imshow(scale.masked(picture.truth, picture.known[:size]), aspect="auto")
            if image < across:
                shown.set_title(_counted(size, "pixel"), loc="center", fontsize=8, pad=4)
            mean = place.image(x, corner_y + tall, cell, tall)
            mean.imshow(scale.shade(picture.means[column]), aspect="auto")
            sigma = picture.sigmas[column]
            if sigma is not None:
                deviation = place.image(x, corner_y + 2 * tall, cell, tall)
                drawn = deviation.imshow(
                    scale.std * sigma.mean(axis=-1), cmap="magma", vmin=0, vmax=most, aspect="auto"
                )
        x = corner_x + len(sizes) * cell + before_truth
        truth = place.image(x, corner_y + tall, cell, tall)
        truth.imshow(scale.shade(picture.truth), aspect="auto")
        truth.set_title("truth", loc="center", fontsize=8, pad=4)
        if image % across == 0:
            for row, label in enumerate(["context", "mean", "σ"][:rows]):
                place.text(left - 0.1, corner_y + (row + 0.5) * tall, label, ha="right")

    foot = place.height - 0.2
    figure.legend(
        handles=[Patch(color=UNKNOWN, label="pixel that is not in the context")],
        loc="center left",
        bbox_to_anchor=(left / WIDTH - 0.01, 1 - (foot - 0.07) / place.height),
        handlelength=1.0,
        handleheight=1.0,
    )
    if deviations:
        long = 2.2
        scale_axes = place.axes(WIDTH - right - long, foot - 0.12, long, 0.1)
        bar = figure.colorbar(drawn, cax=scale_axes, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.locator_params(nbins=5)
        bar.ax.tick_params(length=2, pad=2, labelsize=7.5)
        place.text(WIDTH - right - long - 0.12, foot - 0.07, "predicted σ", ha="right", size=8.5)
    return figure


@dataclass(frozen=True)
class _Completion:
    """One image `[H, W, C]`, its context's pixels in raster order, a mean and σ for each size."""

    truth: np.ndarray
    known: np.ndarray
    means: list[np.ndarray]
    sigmas: list[np.ndarray | None]


def _complete(scene: _Scene, tasks: Task, image: int, sizes: list[int]) -> _Completion:
    assert scene.spec.image_shape is not None
    channels, height, width = scene.spec.image_shape
    one = slice(image, image + 1)  # one at a time: attention over all pixels of all images is much
    pixels, target = tasks.target_x[one], tasks.target_y[one]

    def as_image(values: Tensor) -> np.ndarray:
        return _numbers(values.reshape(height, width, channels))

    # wherever pixel centres lie, a context point is the pixel that is nearest to it
    known = torch.cdist(tasks.context_x[one], pixels)[0].argmin(dim=-1)
    means: list[np.ndarray] = []
    sigmas: list[np.ndarray | None] = []
    for size in sizes:
        context = (tasks.context_x[one, :size], tasks.context_y[one, :size])
        prediction = scene.learner.predict(*context, pixels)
        sigma = scene.spread(prediction, target)
        means.append(as_image(prediction.mean))
        sigmas.append(None if sigma is None else as_image(sigma))
    return _Completion(as_image(target), known.cpu().numpy(), means, sigmas)


@dataclass(frozen=True)
class _PixelScale:
    """From the y of pixels, or the bytes of images, to shades of [0, 1]."""

    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def of(cls, y: Tensor, spec: TaskSpec) -> _PixelScale:
        """Back to what the images were before they were normalised, then black to white."""
        if not y.is_floating_point():
            return cls(0.0, 1.0, 0.0, 255.0)
        mean = float(spec.normalisation.get("mean", 0.0))
        std = float(spec.normalisation.get("std", 1.0))
        values = _numbers(y) * std + mean
        low, high = float(values.min()), float(values.max())
        if low >= -1e-3 and high <= 1 + 1e-3:
            low, high = 0.0, 1.0
        return cls(mean, std, low, high if high > low else low + 1.0)

    def shade(self, values: np.ndarray) -> np.ndarray:
        """`[H, W, C]` in y's units → `[H, W, 3]`; else than 3 channels: the first."""
        shades = (values * self.std + self.mean - self.low) / (self.high - self.low)
        shades = np.nan_to_num(shades).clip(0, 1)
        return shades if shades.shape[-1] == 3 else shades[..., :1].repeat(3, axis=-1)

    def masked(self, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        """As `shade`, with all pixels but the known ones, in raster order, in another colour."""
        shades = self.shade(values).reshape(-1, 3)
        picture = np.tile(to_rgb(UNKNOWN), (len(shades), 1))
        picture[known] = shades[known]
        return picture.reshape(*values.shape[:2], 3)


def _sensible_maximum(deviations: list[np.ndarray]) -> float:
    finite = [sigma[np.isfinite(sigma)] for sigma in deviations]
    values = np.concatenate(finite) if finite else np.zeros(0)
    # a few wild pixels must not darken all others
    return float(np.quantile(values, 0.995)) or 1.0 if values.size else 1.0


# --- episodes --------------------------------------------------------------------------------

_WAYS, _SHOTS, _QUERIES = 6, 5, 6  # at most so many are shown


def _draw_episodes(scene: _Scene) -> Figure | None:
    """A row for each class: what was learnt from on the left, what was asked on the right."""
    if len(scene.spec.x_shape) != 3:
        return None
    tasks = scene.create(2)
    _, height, width = scene.spec.x_shape
    guesses = scene.learner.predict(*tasks[:3]).logits.argmax(dim=-1)  # type: ignore[attr-defined]
    episodes = [_Episode.of(tasks, guesses, number) for number in range(len(guesses))]
    ways = max(len(episode.support) for episode in episodes)
    shots = max(len(row) for episode in episodes for row in episode.support)
    queries = max(len(row) for episode in episodes for row in episode.queries)
    if shots + queries > 8:  # two of them side by side would be stamps
        episodes = episodes[:1]

    across = len(episodes)
    left, right, between, gap, head, foot = 0.28, 0.12, 0.55, 0.28, 0.62, 0.34
    space = WIDTH - right - across * (left + gap) - (across - 1) * between
    pitch = min(space / (across * (shots + queries)), 1.0)
    episode_width = left + (shots + queries) * pitch + gap
    side, label = pitch * 0.88, 0.17
    tall = side * height / width
    line = tall + label + 0.07
    wide = across * episode_width + (across - 1) * between + right
    figure = Figure(figsize=(max(wide, 5.0), head + ways * line + foot))  # room for the legend
    place = _Inches(figure)
    scale = _PixelScale.of(tasks.context_x, scene.spec)

    for number, episode in enumerate(episodes):
        corner = number * (episode_width + between) + left
        right_side = corner + shots * pitch + gap
        place.text(corner, 0.16, episode.title(number), size=9.5, weight="bold")
        place.text(corner, 0.42, "support", color=GREY)
        place.text(right_side, 0.42, "queries", color=GREY)
        for way, (support, asked) in enumerate(zip(episode.support, episode.queries, strict=True)):
            y = head + way * line + label
            place.text(corner - 0.1, y + tall / 2, _letter(way), ha="right", weight="bold")
            for column, image in enumerate(support):
                panel = place.image(corner + column * pitch, y, side, tall, frame=FAINT)
                panel.imshow(scale.shade(image), aspect="auto")
            for column, (image, guess) in enumerate(asked):
                colour = GREEN if guess == way else VERMILLION
                x = right_side + column * pitch
                panel = place.image(x, y, side, tall, frame=colour, line=2.2)
                panel.imshow(scale.shade(image), aspect="auto")
                verdict = f"{'✓' if guess == way else '✗'} {_letter(guess)}"
                place.text(x + side / 2, y - 0.09, verdict, ha="center", color=colour, size=8)
    handles = [
        Patch(fill=False, ec=GREEN, lw=2, label="✓ right"),
        Patch(fill=False, ec=VERMILLION, lw=2, label="✗ wrong, and the class it was taken for"),
    ]
    most = max(episode.ways for episode in episodes)
    if most > ways:
        note = f"({ways} of {most} classes are shown)"
        handles.append(Patch(fill=False, ec="none", label=note))
    figure.legend(handles=handles, loc="lower center", ncols=3, handlelength=1, handleheight=1)
    return figure


@dataclass(frozen=True)
class _Episode:
    """What is shown of an episode, by class: images `[H, W, C]`, queries with their guesses."""

    support: list[list[np.ndarray]]
    queries: list[list[tuple[np.ndarray, int]]]
    right: int
    asked: int
    ways: int

    @classmethod
    def of(cls, tasks: Task, guesses: Tensor, number: int) -> _Episode:
        ways = int(tasks.context_y[number].max()) + 1
        shown = range(min(ways, _WAYS))

        def of_class(labels: Tensor, way: int, most: int) -> list[int]:
            return (labels[number] == way).nonzero()[:most, 0].tolist()

        def image(x: Tensor, point: int) -> np.ndarray:
            return _numbers(x[number, point].permute(1, 2, 0))

        support = [
            [image(tasks.context_x, point) for point in of_class(tasks.context_y, way, _SHOTS)]
            for way in shown
        ]
        queries = [
            [
                (image(tasks.target_x, point), int(guesses[number, point]))
                for point in of_class(tasks.target_y, way, _QUERIES)
            ]
            for way in shown
        ]
        hits = guesses[number] == tasks.target_y[number]
        return cls(support, queries, int(hits.sum()), len(hits), ways)

    def title(self, number: int) -> str:
        asked = _counted(self.asked, "query", "queries")
        return f"Episode {number + 1}: {self.right} of {asked} right"


def _letter(way: int) -> str:
    return chr(ord("A") + way) if way < 26 else str(way)


# --- paper and pencil ------------------------------------------------------------------------


class _Inches:
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


def _numbers(tensor: Tensor) -> np.ndarray:
    """A tensor of any device and precision as float64."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def _within(sizes: Sequence[int], available: int) -> list[int]:
    """The sizes that a context of `available` points holds; its own instead of larger ones."""
    return sorted({min(size, available) for size in sizes})


def _counted(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _short(number: float) -> str:
    text = f"{number:.2f}" if 0.01 <= abs(number) < 1000 else f"{number:.2g}"
    return text.replace("-", "−")


_DRAWINGS: dict[str, Callable[[_Scene], Figure | None]] = {
    "regression": _draw_functions,
    "image": _draw_images,
    "classification": _draw_episodes,
}
