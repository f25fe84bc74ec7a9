"""The figure of how fast loaders are: a panel for each work, a bar for each rival and workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator

from metabatch_cli.report.style import BLUE, GREY, INK, WIDTH, house_style, save

Cells = list[dict[str, Any]]
_THICK = 0.72  # of the distance between two rivals


def draw_rates(found: dict[str, Any], path: Path) -> Path:
    """Draw tasks a second from the results of `metabatch bench loader`; measures nothing.

    Of every work its smallest batch is drawn, with the fewest and the most workers, and with the
    lowest and the highest rate of the rounds as a line. A dashed line marks the bare work.

    Args:
        found: the JSON that it wrote.
        path: the PNG to write; replaced atomically.
    """
    cells: Cells = found["cells"]
    works = [name for name in found["works"] if any(cell["work"] == name for cell in cells)]
    labels = list(dict.fromkeys(c["label"] for c in cells if c["rival"] != "bare"))
    workers = sorted({cell["workers"] for cell in cells if cell["workers"] is not None})
    ends = list(dict.fromkeys([*workers[:1], *workers[-1:]]))
    with house_style():
        figure = Figure(
            figsize=(WIDTH, 1.3 + 0.42 * max(len(labels), 3)),
            layout=ConstrainedLayoutEngine(wspace=0.04, h_pad=0.08),
        )
        panels = figure.subplots(1, len(works), squeeze=False, sharey=True)[0]
        for panel, name in zip(panels, works, strict=True):
            of_work = [cell for cell in cells if cell["work"] == name]
            size = min(cell["batch_size"] for cell in of_work)
            smallest = [cell for cell in of_work if cell["batch_size"] == size]
            _draw_work(panel, smallest, labels, ends)
            panel.set_title(f"{found['works'][name]['summary']}\n{size} tasks a batch")
            panel.set_xlabel("tasks a second")
        panels[0].set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.45, -0.55)
        handles = [
            Patch(color=GREY, alpha=_alpha(number, ends), label=_workers(number)) for number in ends
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
        on = found["machine"]
        figure.text(
            0.99, 0.03, f"{on['cpu']}, {on['cores']} cores, torch {on['torch']}",
            ha="right", color=GREY, size=7.5,
        )  # fmt: skip
        return save(figure, path)


def _draw_work(panel: Axes, cells: Cells, labels: list[str], ends: list[int]) -> None:
    rates = [cell["tasks_per_second"] for cell in cells]
    low = min(rate["min"] for rate in rates) / 3
    high = max(rate["max"] for rate in rates) * 6  # room for the number behind the longest bar
    for row, label in enumerate(labels):
        bars = [c for c in cells if c["label"] == label and c["workers"] in (None, *ends)]
        if not bars:
            note = "–"
            panel.annotate(note, (0, row), xycoords=("axes fraction", "data"), xytext=(4, 0),
                           textcoords="offset points", va="center", color=GREY)  # fmt: skip
        height = _THICK / max(len(bars), 2)
        for number, cell in enumerate(bars):
            _draw_bar(panel, cell, row + (number - (len(bars) - 1) / 2) * height, height, ends)
    for cell in cells:
        if cell["rival"] == "bare":
            rate = cell["tasks_per_second"]["median"]
            panel.axvline(rate, color=INK, lw=1.0, ls=(0, (4, 2)), zorder=0)
            panel.annotate(
                "bare work", (rate, 1), xycoords=("data", "axes fraction"), xytext=(-3, -1),
                textcoords="offset points", ha="right", va="top", size=7.5, color=INK,
            )  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_major_locator(LogLocator(numticks=5))
    panel.tick_params(axis="y", length=0)
    panel.minorticks_off()
    panel.grid(axis="x", color=INK, alpha=0.08, lw=0.7)


def _draw_bar(panel: Axes, cell: dict[str, Any], y: float, height: float, ends: list[int]) -> None:
    rate = cell["tasks_per_second"]
    colour = BLUE if cell["rival"].startswith("ours") else GREY
    alpha = _alpha(cell["workers"] or 0, ends)
    panel.barh(y, rate["median"], height * 0.92, color=colour, alpha=alpha, lw=0)
    panel.plot([rate["min"], rate["max"]], [y, y], color=INK, lw=0.8)
    panel.annotate(
        _three_digits(rate["median"]),
        (rate["max"], y), xytext=(3, 0), textcoords="offset points", va="center",
        size=7.5, color=INK, bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8},
    )  # fmt: skip


def _three_digits(rate: float) -> str:
    factor, unit = next(
        (of for of in ((1e6, "M"), (1e3, "k")) if rate >= 0.9995 * of[0]), (1.0, "")
    )
    return f"{rate / factor:#.3g}{unit}".replace(".k", "k").replace(".M", "M").rstrip(".")


def _alpha(workers: int, ends: list[int]) -> float:
    return 1.0 if len(ends) < 2 or workers == ends[-1] else 0.5


def _workers(number: int) -> str:
    return "no workers" if number == 0 else f"{number} worker{'s' * (number > 1)}"
