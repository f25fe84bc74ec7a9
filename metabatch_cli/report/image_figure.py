"""The figure of images: context, predicted mean, deviation and truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from metabatch_cli.batching.task import Task
from metabatch_cli.report.pixels import UNKNOWN, PixelScale
from metabatch_cli.report.scene import Scene, within
from metabatch_cli.report.style import WIDTH, Inches, counted, numbers


def draw_images(scene: Scene) -> Figure | None:
    """A block for each image: a column for each context size; context, mean and σ below it."""
    if scene.spec.image_shape is None:
        return None
    _, height, width = scene.spec.image_shape
    sizes = [min(size, height * width) for size in scene.context_sizes()]
    count = 4 if len(sizes) <= 5 else 2
    tasks = scene.create_alike(count, n_context=max(sizes), n_target=height * width)
    if tasks is None or tasks.target_x.shape[1] != height * width:
        return None
    sizes = within(sizes, tasks.context_x.shape[1])
    count = len(tasks.target_x)
    scale = PixelScale.of(tasks.target_y)
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
    place = Inches(figure)

    pictures = [_complete(scene, tasks, image, sizes) for image in range(count)]
    deviations = [s for picture in pictures for s in picture.sigmas if s is not None]
    most = _sensible_maximum(deviations)
    for image, picture in enumerate(pictures):
        corner_x = left + (image % across) * (block + between)
        corner_y = title + (image // across) * (rows * tall + between)
        for column, size in enumerate(sizes):
            x = corner_x + column * cell
            shown = place.image(x, corner_y, cell, tall)
            shown.imshow(scale.masked(picture.truth, picture.known[:size]), aspect="auto")
            if image < across:
                shown.set_title(counted(size, "pixel"), loc="center", fontsize=8, pad=4)
            mean = place.image(x, corner_y + tall, cell, tall)
            mean.imshow(scale.shade(picture.means[column]), aspect="auto")
            sigma = picture.sigmas[column]
            if sigma is not None:
                deviation = place.image(x, corner_y + 2 * tall, cell, tall)
                drawn = deviation.imshow(
                    sigma.mean(axis=-1), cmap="magma", vmin=0, vmax=most, aspect="auto"
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


def _complete(scene: Scene, tasks: Task, image: int, sizes: list[int]) -> _Completion:
    assert scene.spec.image_shape is not None
    channels, height, width = scene.spec.image_shape
    one = slice(image, image + 1)  # one at a time: attention over all pixels of all images is much
    pixels, target = tasks.target_x[one], tasks.target_y[one]

    def as_image(values: Tensor) -> np.ndarray:
        return numbers(values.reshape(height, width, channels))

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


def _sensible_maximum(deviations: list[np.ndarray]) -> float:
    finite = [sigma[np.isfinite(sigma)] for sigma in deviations]
    values = np.concatenate(finite) if finite else np.zeros(0)
    # a few wild pixels must not darken all others
    return float(np.quantile(values, 0.995)) or 1.0 if values.size else 1.0
