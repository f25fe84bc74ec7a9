"""Loggers: what was written is there after a kill, and forgotten beyond a step."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.report.loggers import (
    CsvLogger,
    JsonlLogger,
    final_scores,
    read_rows,
    run_name,
    shown,
)

rows = st.lists(
    st.tuples(
        st.sampled_from(["loss", "val/mse", "lr"]),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    max_size=12,
).map(lambda pairs: [{"step": n // 2, name: value} for n, (name, value) in enumerate(pairs)])


def written(directory, of: list[dict]) -> JsonlLogger:
    logger = JsonlLogger(directory)
    for row in of:
        logger.log(row)
    return logger


@given(rows)
def test_rows_are_read_back_in_order_and_to_the_bit(tmp_path_factory, found):
    logger = written(tmp_path_factory.mktemp("run"), found)
    assert read_rows(logger.file) == found


def test_a_row_is_on_disk_once_it_is_logged(tmp_path):
    written(tmp_path, [{"step": 1, "loss": 0.5}])  # not closed
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_what_is_no_number_is_null(tmp_path):
    logger = written(tmp_path, [{"step": 1, "loss": float("nan"), "best": float("-inf")}])
    assert read_rows(logger.file) == [{"step": 1, "loss": None, "best": None}]


@given(rows, st.integers(-1, 7))
def test_rewinding_forgets_the_rows_beyond_a_step_and_no_others(tmp_path_factory, found, step):
    logger = written(tmp_path_factory.mktemp("run"), found)
    logger.rewind(step)
    assert read_rows(logger.file) == [row for row in found if row["step"] <= step]
    logger.log({"step": step + 1})
    assert read_rows(logger.file)[-1] == {"step": step + 1}


@given(rows.filter(bool), st.data())
def test_a_line_that_a_kill_cut_short_is_left_out_wherever_it_was_cut(
    tmp_path_factory, found, data
):
    logger = written(tmp_path_factory.mktemp("run"), found)
    content = logger.file.read_bytes()
    last = len(json.dumps(found[-1])) + 1
    cut = data.draw(st.integers(2, last))
    logger.file.write_bytes(content[:-cut])
    assert read_rows(logger.file) == found[:-1]
    logger.rewind(100)
    logger.log({"step": 100})
    assert read_rows(logger.file) == [*found[:-1], {"step": 100}]


def test_there_are_no_rows_where_there_is_no_file(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []
    JsonlLogger(tmp_path).rewind(0)
    assert read_rows(tmp_path / "metrics.jsonl") == []


@given(rows.filter(bool))
def test_the_table_has_a_line_for_each_row_and_a_column_for_each_metric(tmp_path_factory, found):
    directory = tmp_path_factory.mktemp("run")
    written(directory, found)
    CsvLogger(directory).close()
    with (directory / "metrics.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == len(found)
    for line, row in zip(table, found, strict=True):
        assert set(line) == {name for row in found for name in row}
        assert {name: float(value) for name, value in line.items() if value} == row


def test_the_table_holds_what_the_rows_hold_after_a_rewind(tmp_path):
    rows_logger = written(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
    table = CsvLogger(tmp_path)
    table.log({"step": 2, "loss": 2.0})
    table.close()
    rows_logger.rewind(1)
    table.rewind(1)
    table.close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,loss", "1,1.0"]


@pytest.mark.parametrize("found", [[], None])
def test_a_table_of_nothing_is_no_error(tmp_path, found):
    if found is not None:
        written(tmp_path, found)
    CsvLogger(tmp_path).close()
    assert (tmp_path / "metrics.csv").read_text().strip() == ""


# --- what dashboards show ----------------------------------------------------------------------


def test_what_is_no_finite_number_is_not_shown_and_the_trainings_own_has_a_section():
    row = {"step": 3, "loss": 0.5, "val/mse": float("nan"), "val/rmse": None, "val/mse/ci95": 1.0}
    assert shown(row) == {"train/loss": 0.5, "val/mse/ci95": 1.0}


def test_final_scores_are_means_intervals_and_oracles():
    entries = {
        "test/mse@shots=1": {"mean": 0.5, "ci95": 0.1, "tasks": 8, "over_points": {"mean": 0.4}},
        "test/log_likelihood": {"mean": 1.0, "ci95": None, "oracle": 2.0, "scoring": "marginal"},
    }
    assert final_scores({"status": "completed", "metrics": entries}) == {
        "test/mse@shots=1": 0.5,
        "test/mse@shots=1/ci95": 0.1,
        "test/log_likelihood": 1.0,
        "test/log_likelihood/oracle": 2.0,
    }
    assert final_scores({"status": "failed"}) == {}


def test_a_run_is_called_as_its_directory_and_the_sweep_above():
    assert run_name(Path("/data/runs/width/model.width=8,seed=0")) == "width/model.width=8,seed=0"
