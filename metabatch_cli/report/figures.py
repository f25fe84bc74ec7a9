"""Figures of what a learner predicts: functions, completed images, classified episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path

import torch
from matplotlib.figure import Figure

from metabatch_cli.batching.taskset import TaskSet, TaskSpec
from metabatch_cli.learners.learner import Learner
from metabatch_cli.report.episode_figure import draw_episodes
from metabatch_cli.report.function_figure import draw_functions
from metabatch_cli.report.image_figure import draw_images
from metabatch_cli.report.scene import Scene, at_rest
from metabatch_cli.report.style import house_style, save

_DRAWINGS: dict[str, Callable[[Scene], Figure | None]] = {
    "regression": draw_functions,
    "image": draw_images,
    "classification": draw_episodes,
}


def draw_predictions(
    learner: Learner,
    taskset: TaskSet,
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    context_sizes: Sequence[int] | None = None,
    spec: TaskSpec | None = None,
) -> Path | None:
    """Draw what a learner predicts on a few tasks of a set, as the set's kind asks for.

    Functions of one variable and images are shown for contexts that grow along the columns, the
    small ones being the beginnings of the large ones; classification as episodes. The learner
    is put into evaluation mode meanwhile; its modes and all global random states come back as
    they were. The same weights and seed give the same file.

    Where a learner predicts targets jointly (a `Predictive`), some functions drawn from that are
    shown too, and where the task set knows its exact `posterior`, its mean ± 2σ, both with the
    noise of observations. A learner with `has_spread = False` is drawn without σ: it predicts a
    value, no distribution.

    Args:
        learner: predicts; its weights lie on `device`.
        taskset: makes the tasks; of sizes within its law where it refuses the ones asked for.
        path: the PNG to write; replaced atomically, its folder made where it is missing.
        device, dtype: of the tasks that the learner sees; integers keep their type.
        seed: chooses the tasks, their points and what the learner itself draws.
        context_sizes: points in the contexts; None for four, geometrically from the law's
            smallest to its largest. Classification has the sizes of its law.
        spec: of a task set that says nothing about itself.

    Returns:
        `path`, or None where nothing can be drawn: an unknown kind, a function of several
        variables, images that the set does not give as a whole, a classification of what are
        not images, tasks without any target. Of functions of unequal sizes the points that all
        of them have are shown.

    Raises:
        ValueError: `context_sizes` that are no numbers of points.
    """
    spec = spec or taskset.spec
    draw = None if spec is None else _DRAWINGS.get(spec.kind)
    if spec is None or draw is None:
        return None
    if context_sizes is not None:
        _check_context_sizes(context_sizes)
    device = torch.device(device)
    scene = Scene(learner, taskset, spec, device, dtype, seed, context_sizes)
    with house_style(), at_rest(learner, device, seed):
        figure = draw(scene)
        return None if figure is None else save(figure, path)


def _check_context_sizes(sizes: Sequence[int]) -> None:
    counts = [size for size in sizes if isinstance(size, Integral) and size >= 0]
    if not counts or len(counts) < len(sizes):
        raise ValueError(f"context_sizes={list(sizes)} must be one or more numbers of points")
