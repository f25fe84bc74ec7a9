"""The figure of rates is drawn from the JSON alone."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from metabatch_cli.report import rates_figure
from metabatch_cli.report.rates_figure import _three_digits, draw_rates


def cell(work: str, rival: str, workers: int | None, rate: float, batch_size: int = 16) -> Any:
    spread = {"median": rate, "min": rate * 0.9, "max": rate * 1.1}
    return {
        "work": work, "batch_size": batch_size, "rival": rival, "label": rival,
        "workers": workers, "tasks_per_second": spread,
    }  # fmt: skip


FOUND: dict[str, Any] = {
    "machine": {"cpu": "a processor", "cores": 2, "torch": "2.13"},
    "works": {"sine": {"summary": "sine waves"}, "python": {"summary": "pure Python"}},
    "cells": [
        cell("sine", "bare", None, 300_000),
        cell("sine", "naive", None, 30_000),
        *(cell("sine", "dataloader", workers, 10_000 + workers) for workers in (0, 1, 2)),
        *(cell("sine", "ours_whole", workers, 200_000 + workers) for workers in (0, 1, 2)),
        cell("sine", "ours_whole", 0, 10**9, batch_size=128),
        cell("python", "bare", None, 500),
        cell("python", "dataloader", 2, 900),
    ],
}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []
    save = rates_figure.save
    monkeypatch.setattr(
        rates_figure, "save", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    return figures


def test_there_is_a_panel_for_each_work_and_a_bar_for_fewest_and_most_workers(tmp_path, drawn):
    found = json.loads(json.dumps(FOUND))
    path = draw_rates(found, tmp_path / "rates.png")
    assert Image.open(path).width == 1440
    sine, python = drawn[0].axes
    assert [label.get_text() for label in sine.get_yticklabels()] == [
        "naive", "dataloader", "ours_whole",
    ]  # fmt: skip
    widths = [round(bar.get_width()) for bar in sine.patches]
    assert widths == [30_000, 10_000, 10_002, 200_000, 200_002]  # of the smallest batch only
    assert [round(bar.get_width()) for bar in python.patches] == [900]
    assert sine.get_xscale() == python.get_xscale() == "log"


def test_drawing_changes_nothing_and_gives_the_same_bytes_again(tmp_path):
    before = copy.deepcopy(FOUND)
    first = draw_rates(FOUND, tmp_path / "a.png").read_bytes()
    assert draw_rates(FOUND, tmp_path / "b.png").read_bytes() == first
    assert before == FOUND


@pytest.mark.parametrize("rivals", [{"bare"}, {"naive"}, {"ours_whole"}])
def test_one_rival_alone_is_drawn_too(tmp_path, rivals):
    cells = [cell for cell in FOUND["cells"] if cell["rival"] in rivals]
    assert draw_rates({**FOUND, "cells": cells}, tmp_path / "rates.png").exists()


@pytest.mark.parametrize(
    ("rate", "text"),
    [(3.14159, "3.14"), (99.96, "100"), (531.2, "531"), (999.7, "1.00k"), (30_940, "30.9k"),
     (172_400, "172k"), (1_073_553, "1.07M")],
)  # fmt: skip
def test_rates_have_three_digits(rate, text):
    assert _three_digits(rate) == text
