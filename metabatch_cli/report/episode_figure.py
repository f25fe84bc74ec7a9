"""The figure of episodes: what was learnt from, what was asked, what was guessed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from metabatch_cli.batching.ragged import Tasks
from metabatch_cli.report.pixels import PixelScale
from metabatch_cli.report.scene import Scene
from metabatch_cli.report.style import (
    FAINT,
    GREEN,
    GREY,
    VERMILLION,
    WIDTH,
    Inches,
    counted,
    numbers,
)

_WAYS, _SHOTS, _QUERIES = 6, 5, 6  # at most so many are shown


def draw_episodes(scene: Scene) -> Figure | None:
    """A row for each class: what was learnt from on the left, what was asked on the right."""
    if len(scene.spec.x_shape) != 3:
        return None
    tasks = scene.create(2)
    _, height, width = scene.spec.x_shape
    prediction = scene.learner.predict(
        tasks.context_x, tasks.context_y, tasks.target_x, **tasks.masks
    )
    guesses = prediction.logits.argmax(dim=-1)  # type: ignore[attr-defined]
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
    place = Inches(figure)
    mask = tasks.context_mask
    shown = tasks.context_x if mask is None else tasks.context_x[mask]
    scale = PixelScale.of(shown)

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
    def of(cls, tasks: Tasks, guesses: Tensor, number: int) -> _Episode:
        # no class is −1: padding is drawn nowhere
        support_y, query_y = (
            labels[number] if mask is None else labels[number].masked_fill(~mask[number], -1)
            for labels, mask in (
                (tasks.context_y, tasks.context_mask),
                (tasks.target_y, tasks.target_mask),
            )
        )
        ways = int(support_y.max()) + 1
        shown = range(min(ways, _WAYS))

        def of_class(labels: Tensor, way: int, most: int) -> list[int]:
            return (labels == way).nonzero()[:most, 0].tolist()

        def image(x: Tensor, point: int) -> np.ndarray:
            return numbers(x[number, point].permute(1, 2, 0))

        support = [
            [image(tasks.context_x, point) for point in of_class(support_y, way, _SHOTS)]
            for way in shown
        ]
        queries = [
            [
                (image(tasks.target_x, point), int(guesses[number, point]))
                for point in of_class(query_y, way, _QUERIES)
            ]
            for way in shown
        ]
        right, asked = int((guesses[number] == query_y).sum()), int((query_y >= 0).sum())
        return cls(support, queries, right, asked, ways)

    def title(self, number: int) -> str:
        asked = counted(self.asked, "query", "queries")
        return f"Episode {number + 1}: {self.right} of {asked} right"


def _letter(way: int) -> str:
    return chr(ord("A") + way) if way < 26 else str(way)
