"""Trainings with a logger, to be read back: completed ones, killed ones, ones that go on."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from metabatch_cli.report.loggers import read_rows, shown
from tests.engine.examples import Killed, kill_at, run

ROWS = ("trainer.max_steps=10", "trainer.log_every=1", "trainer.eval_every=3")
SAVED_AT_4 = (*ROWS, "trainer.checkpoint_every=4")

Curves = dict[str, list[tuple[int, float]]]


def train(directory: Path, *overrides: str) -> None:
    """Ten steps, a row for each."""
    run(directory, *SAVED_AT_4, *overrides)


def train_and_kill(directory: Path, *overrides: str, at: int = 8) -> None:
    """Killed after step 7 was logged; after a resume the training goes on from step 4."""
    with pytest.raises(Killed):
        run(directory, *SAVED_AT_4, *overrides, after_step=kill_at(at))


def curves(directory: Path) -> Curves:
    """What `metrics.jsonl` holds: steps and values by the names that dashboards show."""
    found = defaultdict(list)
    for row in read_rows(directory / "metrics.jsonl"):
        for name, value in shown(row).items():
            found[name].append((row["step"], value))
    assert {"train/loss", "train/lr", "val/mse"} <= set(found)
    return dict(found)


def without_seconds(found: Curves) -> Curves:
    """All that two runs of the same configuration have in common."""
    return {name: points for name, points in found.items() if name != "train/seconds"}
