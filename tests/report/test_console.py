"""The terminal: a bar where somebody looks, sparse plain lines where nobody does."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from metabatch_cli.report.console import Reporter, clock, make_console, number


class Clock:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        "metabatch_cli.report.console.time", SimpleNamespace(monotonic=clock.monotonic)
    )
    return clock


def reporter(terminal: bool = False) -> Reporter:
    return Reporter(
        Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
    )


def text(of: Reporter) -> str:
    return of.console.file.getvalue()


def control_characters(of: str) -> set[str]:
    return {character for character in of if ord(character) < 32 and character != "\n"}


# --- off a terminal --------------------------------------------------------------------------


def test_off_a_terminal_a_line_comes_every_ten_seconds_however_many_steps_there_are(time):
    plain = reporter()
    with plain.training(0, 10_000):
        for step in range(1, 10_001):
            time.now += 0.01  # a hundred seconds in all
            plain.advance(step, 10_000, 0.5)
    lines = text(plain).splitlines()
    assert len(lines) in (9, 10)  # whether the last one comes is up to rounding
    assert all(line.startswith("step ") for line in lines)


def test_a_line_says_how_far_how_well_how_fast_and_how_long_still(time):
    plain = reporter()
    with plain.training(100, 1100):
        plain.validated(100, "mse", 0.25, best=True)
        time.now += 20
        plain.advance(600, 1100, 0.123456)
    (line,) = text(plain).splitlines()
    assert "step 600/1,100 (55%)" in line
    assert "loss 0.1235" in line
    assert "val mse 0.25 (best)" in line
    assert "25 steps/s" in line
    assert "0:20 left" in line


def test_off_a_terminal_there_is_no_control_character(time):
    plain = reporter()
    plain.plan("training", [("task set", "Functions"), ("sizes", "x" * 300)])
    with plain.training(0, 10):
        for step in range(1, 11):
            time.now += 11
            plain.advance(step, 10, float("nan"))
    plain.result("test", {"test/mse": {"mean": 1.0, "ci95": None, "tasks": 1}})
    plain.say("done [bold]not markup[/bold]")
    assert control_characters(text(plain)) == set()
    assert "[bold]not markup[/bold]" in text(plain)


def test_lines_off_a_terminal_are_as_long_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/rather/long/path" * 20
    Reporter(make_console()).say(path)
    assert capsys.readouterr().out == path + "\n"


def test_on_a_terminal_there_is_a_bar_that_ends_with_the_training(time):
    drawn = reporter(terminal=True)
    with drawn.training(0, 10):
        time.now += 1
        drawn.advance(10, 10, 0.5)
    assert "10/10" in text(drawn)
    assert "\x1b" in text(drawn)
    time.now += 60
    drawn.advance(11, 20, 0.5)  # after it, plain lines again
    assert "step 11/20" in text(drawn)


def test_a_bar_ends_with_an_error_too(time):
    drawn = reporter(terminal=True)
    with pytest.raises(ZeroDivisionError), drawn.training(0, 10):
        raise ZeroDivisionError
    with drawn.training(0, 10):
        pass


# --- tables ----------------------------------------------------------------------------------


def test_a_result_has_a_line_for_each_metric_with_mean_interval_and_tasks():
    plain = reporter()
    plain.result("test", {"test/mse@shots=5": {"mean": 0.12345, "ci95": 0.01, "tasks": 1000}})
    assert "oracle" not in text(plain)
    line = text(plain).splitlines()[-1]
    assert line.split() == ["test/mse@shots=5", "0.1235", "0.0100", "1,000"]


def test_an_oracle_has_a_column_where_one_metric_has_it():
    plain = reporter()
    entry = {"mean": 1.0, "ci95": 0.5, "tasks": 3}
    plain.result("test", {"test/a": {**entry, "oracle": 2.0}, "test/b": entry})
    lines = text(plain).splitlines()
    assert "oracle" in lines[1]
    assert lines[2].split()[-1] == "2.0000"
    assert lines[3].split()[-1] == "–"


def test_baselines_have_columns_behind_the_oracles_and_a_narrow_terminal_holds_them():
    plain = reporter()
    plain.console.width = 80
    entry = {"mean": 1.0, "ci95": 0.5, "tasks": 1000}
    both = {"context_mean": 2.0, "linear_interpolation": 3.0}
    plain.result(
        "test",
        {"test/log_likelihood": {**entry, "baselines": both}, "test/mse": {**entry, "oracle": 4.0}},
    )
    *_, header, first, second = text(plain).splitlines()
    assert "context mean" in text(plain)
    assert "interpolation" in header
    assert first.split()[-3:] == ["–", "2.0000", "3.0000"]
    assert second.split()[-3:] == ["4.0000", "–", "–"]


def test_words_of_an_entry_stand_behind_it_unless_its_name_says_them():
    plain = reporter()
    plain.console.width = 80
    entry = {"mean": 1.0, "ci95": 0.5, "tasks": 1000}
    metrics = {
        "test/mse": {**entry, "over_points": entry},
        "test/log_likelihood": {**entry, "scoring": "marginal", "normalised": "by task"},
        "test/log_likelihood@scoring=joint": {**entry, "scoring": "joint"},
    }
    plain.result("test", metrics)
    said = text(plain)
    assert "…" not in said
    assert "scoring=marginal" in said
    assert said.count("joint") == 1
    assert "by task" in " ".join(said.split())


def test_a_result_without_metrics_is_no_error():
    reporter().result("test", {})


def test_everything_that_is_said_is_logged(caplog):
    plain = reporter()
    with caplog.at_level(logging.INFO, "metabatch"):
        plain.say("one")
        plain.plan("title", [("name", "value")])
        plain.validated(3, "mse", 0.5, best=False)
        plain.result("test", {"test/mse": {"mean": 1.0, "ci95": 0.5, "tasks": 3}})
    logged = [record.getMessage() for record in caplog.records]
    assert logged[0] == "one"
    assert logged[1].split() == ["name", "value"]
    assert logged[2] == "step 3: val mse 0.5"
    assert logged[3].startswith("test/mse = 1.0000 ± 0.5000 (3 tasks)")


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.0000"),
        (0.98765, "0.9877"),
        (-1.5, "-1.5000"),
        (0.001, "0.0010"),
        (0.0004321, "4.321e-04"),
        (99999.0, "99999.0000"),
        (123456.0, "1.235e+05"),
        (None, "–"),
    ],
)
def test_a_number_has_four_decimals_or_four_digits(value, shown):
    assert number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_a_number_is_never_shown_as_another_one(value):
    assert float(number(value)) == pytest.approx(value, rel=1e-3, abs=5e-5)
    if value:
        assert float(number(value)) != 0 or abs(value) < 1e-300


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.6, "1:00:00"),
        (3661, "1:01:01"),
        (90061, "25:01:01"),
    ],
)
def test_seconds_are_shown_as_a_clock_shows_them(seconds, shown):
    assert clock(seconds) == shown


@given(st.integers(0, 10**7))
def test_a_clock_can_be_read_back(seconds):
    read = 0
    for part in clock(seconds).split(":"):
        read = read * 60 + int(part)
    assert read == seconds
