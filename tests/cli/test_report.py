"""`metabatch report`: one table, from the command line, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metabatch_cli.engine.run_directory import RunDirectory
from tests.cli.program import metabatch, only_message
from tests.report.examples import model, write


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds of two widths; one of them failed."""
    for number, (width, seed) in enumerate([(8, 0), (8, 1), (16, 0), (16, 1)]):
        failed = (width, seed) == (16, 1)
        write(
            tmp_path / "sweep" / f"{number}",
            seed,
            status="failed" if failed else "completed",
            error="the loss is not finite at step 3" if failed else None,
            metrics={"test/accuracy": seed / 10, "test/mse": 2.0},
            typed=(f"model.width={width}",),
            **model(width),
        )
    return tmp_path


def test_a_sweep_is_one_table_and_its_failed_job_is_named(sweep):
    said = metabatch("report", "sweep", cwd=sweep).stdout
    lines = [line.split() for line in said.splitlines()]
    assert ["model.width", "accuracy", "runs", "time"] in lines
    assert ["8", "0.0500", "±", "0.6353", "2", "1:00"] in lines  # 12.706 · 0.0707 / √2
    assert ["16", "0.0000", "(±", "0.2500)", "1", "of", "2", "1:00"] in lines
    assert "failed      sweep/3  seed 1: the loss is not finite at step 3" in said
    assert "not shown: mse" in said


def test_the_json_has_all_metrics_or_those_asked_for(sweep):
    metabatch("report", "sweep", "--json", "all.json", cwd=sweep)
    metabatch("report", "sweep", "--metrics", "mse", "--json", "some.json", cwd=sweep)
    for name, metrics in (("all", {"test/accuracy", "test/mse"}), ("some", {"test/mse"})):
        tree = json.loads((sweep / f"{name}.json").read_text())
        assert [set(group["metrics"]) for group in tree["groups"]] == [metrics, metrics]
        statuses = [run["status"] for group in tree["groups"] for run in group["runs"]]
        assert statuses == ["completed"] * 3 + ["failed"]


def test_a_run_that_another_process_works_on_is_running(sweep):
    with RunDirectory(write(sweep / "now", status="running")).lock():
        assert "running     now" in metabatch("report", "now", cwd=sweep).stdout
    assert "killed      now" in metabatch("report", "now", cwd=sweep).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["swep"], ["there is no such directory", "sweep"]),
        (["sweep", "--metrics", "acuracy"], ["--metrics=acuracy", "did you mean 'accuracy'?"]),
        (["sweep", "--json", "."], ["--json=.", "cannot be written"]),
    ],
)
def test_a_mistake_is_one_message(sweep, words, expected):
    message = only_message(metabatch("report", *words, cwd=sweep, code=1))
    assert all(part in message for part in expected), message


def test_no_heavy_library_is_imported(sweep):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "metabatch_cli", "report", "sweep"],
        cwd=sweep,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "metabatch_cli.report.table" in imported
    assert not {"torch", "numpy", "matplotlib", "hydra", "omegaconf"} & imported
