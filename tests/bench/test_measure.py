"""What a rate is: which batches count, and what is compared with what."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from metabatch_cli.bench import measure, results
from metabatch_cli.bench.loader import grid, in_rounds
from metabatch_cli.bench.measure import Cell, rate, read
from metabatch_cli.bench.rivals import RIVALS
from metabatch_cli.bench.table import rounded, share, times
from metabatch_cli.bench.work import PythonWork, SineWork
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.config.schema import BenchLoaderConfig
from metabatch_cli.report.console import Reporter

SINE, PYTHON = SineWork(), PythonWork(steps=40)


class Clock:
    """Time that goes on by what a batch takes, and not otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def batches(self, *seconds: float):
        for taken in seconds:
            self.now += taken
            yield None


def test_what_was_prefetched_and_what_starting_took_do_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    stock = [5.0, 0.0, 0.0, 0.0, 0.0]  # the first one waits for its worker, four lie ready
    batches = clock.batches(*stock, *itertools.repeat(0.5, 100))
    assert rate(batches, seconds=4.0, ahead=4) == pytest.approx(2.0)


def test_three_batches_count_however_slow_they_are(monkeypatch):
    clock = Clock(monkeypatch)
    assert read(clock.batches(*[10.0] * 9), seconds=0.1, least=3) == (3, 30.0)


def test_as_many_batches_count_of_every_worker(monkeypatch):
    clock = Clock(monkeypatch)
    in_pairs = itertools.chain.from_iterable(itertools.repeat((1.0, 0.0), 50))
    assert rate(clock.batches(*in_pairs), seconds=3.0, ahead=4, workers=2) == pytest.approx(2.0)


def cell(name: str, workers: int = 0) -> Cell:
    return Cell(SINE, 16, name, RIVALS[name], workers)


def test_ratios_compare_what_was_measured_in_the_same_round():
    rates = {
        cell("bare"): [100.0, 10.0, 100.0],  # the second round was disturbed, for all alike
        cell("dataloader", 2): [20.0, 2.0, 20.0],
        cell("ours", 2): [40.0, 4.0, 40.0],
        cell("ours", 0): [80.0, 8.0, 80.0],
    }
    bare, theirs, ours, _ = results.rows(rates)
    assert theirs["share_of_bare"] == pytest.approx(0.2)
    assert theirs["ours_over_it"] == {"ours": pytest.approx(2.0)}  # with as many workers
    assert ours["share_of_bare"] == pytest.approx(0.4)
    assert "ours_over_it" not in ours
    assert "ours_over_it" not in bare
    assert theirs["batches_per_second"]["median"] == 20.0
    assert theirs["tasks_per_second"] == {"median": 320.0, "min": 32.0, "max": 320.0}


def test_rivals_take_turns_and_every_other_round_goes_backwards(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(Cell, "measure", lambda self, seconds: order.append(self.name) or 1.0)
    cells = [cell("bare"), cell("naive"), cell("ours")]
    rates = in_rounds([cells], BenchLoaderConfig(repeats=3), Reporter())
    names = ["bare", "naive", "ours"]
    assert order == [*names, *names[::-1], *names]
    assert [len(measured) for measured in rates.values()] == [3, 3, 3]


def test_the_grid_has_workers_only_for_those_who_have_some():
    config = BenchLoaderConfig(batch_sizes=[4], workers=[0, 2])
    (sine, python), left_out = grid(config, [SINE, PYTHON], {"metabatch": "not installed"})
    assert left_out == []
    assert [(c.name, c.workers) for c in sine] == [
        ("bare", 0), ("naive", 0), ("dataloader", 0), ("dataloader", 2),
        ("ours", 0), ("ours", 2), ("ours_whole", 0), ("ours_whole", 2),
    ]  # fmt: skip
    assert "ours_whole" not in {c.name for c in python}


def test_batches_that_are_too_large_are_left_out_and_named():
    config = BenchLoaderConfig(batch_sizes=[4, 4096], max_batch_mib=1.0)
    groups, left_out = grid(config, [SINE], {})
    assert {c.batch_size for cells in groups for c in cells} == {4}
    assert left_out == ["sine at 4096 tasks: 1 MiB a batch (max_batch_mib=1)"]


def test_nothing_left_to_measure_is_an_error_that_says_why():
    with pytest.raises(ConfigError, match="made one at a time"):
        grid(BenchLoaderConfig(work=["python"], rivals=["ours_whole"]), [PYTHON], {})
    with pytest.raises(ConfigError, match="not installed"):
        grid(BenchLoaderConfig(rivals=["metabatch"]), [SINE], {"metabatch": "not installed"})
    with pytest.raises(ConfigError, match="max_batch_mib"):
        grid(BenchLoaderConfig(max_batch_mib=1e-6), [SINE], {})


def test_numbers_are_shown_with_three_digits():
    assert [rounded(value) for value in (123456.7, 42.66, 3.104)] == ["123,457", "42.7", "3.1"]
    assert [share(value) for value in (None, 1.0, 0.0031)] == ["", "100%", "0.3%"]
    assert [times(ratios) for ratios in ({}, {"ours": 2.0, "ours_whole": 36.4})] == ["", "36 ×"]
