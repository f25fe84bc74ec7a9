"""The report: runs by configuration, means over seeds, and what became of every run."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.report.interval import mean_and_interval, t_quantile, within
from metabatch_cli.report.table import summarise
from metabatch_cli.report.terminal_table import render
from tests.report.examples import model, write


def said(*directories: Path, width: int = 160, metrics: tuple[str, ...] = (), **more: bool) -> str:
    """What is printed."""
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        render(summarise(directories, metrics), console, **more)
    return captured.get()


# --- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(  # any table of Student's distribution
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (29, 2.045)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-4)


def test_many_degrees_of_freedom_are_the_normal_distribution() -> None:
    normal = statistics.NormalDist()
    assert t_quantile(100_000) == pytest.approx(normal.inv_cdf(0.975), rel=1e-4)


@given(degrees=st.integers(1, 40), t=st.floats(0, 8))
def test_the_probability_is_the_integral_of_the_density(degrees: int, t: float) -> None:
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi * degrees)
    density = [
        scale * (1 + (t * k / 400) ** 2 / degrees) ** (-(degrees + 1) / 2) for k in range(401)
    ]
    weights = [1, *[4, 2] * 199, 4, 1]
    simpson = 2 * t / 1200 * sum(w * d for w, d in zip(weights, density, strict=True))
    assert within(t, degrees) == pytest.approx(simpson, abs=1e-6)


def test_the_interval_over_seeds_is_students() -> None:
    mean, ci95 = mean_and_interval([1.0, 2.0, 6.0])
    assert mean == 3
    assert ci95 == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-6)
    assert mean_and_interval([5.0]) == (5.0, None)


# --- rows --------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_share_a_row(tmp_path: Path) -> None:
    for number, (width, seed) in enumerate([(8, 1), (8, 2), (8, 6), (16, 3)]):
        write(tmp_path / f"{number}", seed, **model(width))
    summary = summarise([tmp_path])
    assert list(summary.columns) == ["model.width"]
    assert [summary.values(group) for group in summary.groups] == [["8"], ["16"]]
    wide, narrow = (group.score("test/accuracy") for group in summary.groups)
    assert wide.mean == pytest.approx(0.3)
    assert wide.ci95 == pytest.approx(0.4302653 * math.sqrt(7 / 3), rel=1e-6)
    assert wide.by_seed == {1: 0.1, 2: 0.2, 6: 0.6}
    assert (narrow.mean, narrow.ci95, narrow.over) == (0.3, 0.25, "tasks")
    printed = said(tmp_path)
    assert "4 runs of 2 configurations" in printed
    assert f"0.3000 ± {wide.ci95:.4f}" in printed
    assert "0.3000 (± 0.2500)" in printed
    assert "1:03" in printed  # the mean of 61, 62 and 66 seconds


def test_what_is_a_runs_own_separates_nothing(tmp_path: Path) -> None:
    for seed, device in enumerate(("cpu", "cuda:0", "cuda:1")):
        write(
            tmp_path / device.replace(":", ""),
            seed,
            loader={"device": device, "workers": seed, "batch_size": 4},
            trainer={"threads": seed + 1, "log_every": 10 + seed},
            logger={"csv": {"_target_": f"a.Logger{seed}"}} if seed else {},
            data_dir=f"/data{seed}",
        )
    (group,) = summarise([tmp_path]).groups
    assert len(group.counted) == 3


def test_what_is_a_runs_own_is_compared_where_somebody_typed_several_values(tmp_path: Path) -> None:
    for number, (seed, threads) in enumerate([(0, 1), (1, 1), (0, 2), (1, 2)]):
        typed = (f"trainer.threads={threads}", "loader.workers=0")
        write(
            tmp_path / f"{number}",
            seed,
            typed=typed,
            trainer={"threads": threads},
            loader={"workers": 0},
        )
    summary = summarise([tmp_path])
    assert list(summary.columns) == ["trainer.threads"]
    assert [len(group.counted) for group in summary.groups] == [2, 2]
    assert len(summarise([tmp_path / "0", tmp_path / "1"]).groups) == 1


@pytest.mark.parametrize("key", ["trainer.max_steps", "loader.batch_size", "evaluation.seed"])
def test_what_numbers_depend_on_separates(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    for value in (1, 2):
        write(tmp_path / f"{value}", **{section: {name: value}})
    assert list(summarise([tmp_path]).columns) == [key]


def test_a_run_older_than_a_key_was_made_by_its_default(tmp_path: Path) -> None:
    write(tmp_path / "old", 0, evaluation={"tasks": 1000})
    write(tmp_path / "new", 1, evaluation={"tasks": 1000, "predict": "once"})
    assert len(summarise([tmp_path]).groups) == 1


def test_of_a_seed_that_was_run_twice_the_last_counts(tmp_path: Path) -> None:
    for number, accuracy in enumerate((0.1, 0.5)):
        write(tmp_path / f"{number + 9}", 3, metrics={"test/accuracy": accuracy})  # 9 before 10
    (group,) = summarise([tmp_path]).groups
    score = group.score("test/accuracy")
    assert (score.mean, score.over) == (0.5, "tasks")
    assert "1 repeated run" in said(tmp_path)


def test_a_score_that_is_no_number_leaves_the_mean_unknown(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.5, None)):
        write(tmp_path / f"{seed}", seed, metrics={"test/accuracy": accuracy})
    (group,) = summarise([tmp_path]).groups
    assert group.score("test/accuracy").mean is None
    assert group.score("test/accuracy").by_seed == {0: 0.5, 1: None}
    assert said(tmp_path)


def test_a_run_is_read_once_however_it_is_named(tmp_path: Path) -> None:
    write(tmp_path / "sweep" / "0")
    assert len(summarise([tmp_path, tmp_path / "sweep", tmp_path / "sweep" / "0"]).runs) == 1


def test_what_lies_in_a_run_or_is_hidden_is_no_run(tmp_path: Path) -> None:
    write(tmp_path / "run")
    write(tmp_path / "run" / "evaluations" / "old")
    write(tmp_path / ".trash" / "run")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("a: 1\n")  # somebody's own
    assert [run.directory.name for run in summarise([tmp_path]).runs] == ["run"]


# --- columns -----------------------------------------------------------------------------------


def test_all_that_was_typed_and_differs_is_shown_although_one_key_would_do(tmp_path: Path) -> None:
    for width, lr in ((8, 0.1), (16, 0.2)):
        typed = (f"model.width={width}", f"optimizer.lr={lr}", "trainer.max_steps=5")
        write(tmp_path / f"{width}", typed=typed, **model(width), optimizer={"lr": lr})
    assert list(summarise([tmp_path]).columns) == ["model.width", "optimizer.lr"]


def test_a_choice_stands_for_all_that_comes_with_it(tmp_path: Path) -> None:
    for name, width in (("cnp", 8), ("cnp", 16), ("np", 32)):
        write(
            tmp_path / f"{name}{width}",
            typed=(f"model={name}", f"model.width={width}", f"trainer.max_steps={len(name)}"),
            model={"_target_": f"a.{name.upper()}", "width": width, "depth": len(name)},
            trainer={"max_steps": len(name)},
        )
    summary = summarise([tmp_path])
    assert list(summary.columns) == ["model", "model.width"]
    assert list(summary.also_typed) == ["trainer.max_steps"]
    assert [summary.values(g) for g in summary.groups] == [
        ["cnp", "8"],
        ["cnp", "16"],
        ["np", "32"],
    ]
    assert "also different: trainer.max_steps" in said(tmp_path)


def test_every_row_has_a_name_whichever_kind_of_choice_was_typed(tmp_path: Path) -> None:
    write(tmp_path / "a", typed=("+experiment=protonet_omniglot",), **model(8))
    write(tmp_path / "b", typed=("+setup=omniglot",), **model(16))
    summary = summarise([tmp_path])
    assert list(summary.columns) == ["experiment", "setup"]
    rows = [summary.values(group) for group in summary.groups]
    assert rows == [["protonet_omniglot", "–"], ["–", "omniglot"]]


def test_what_all_scores_have_in_common_stands_below_the_table(tmp_path: Path) -> None:
    for number, width in enumerate((8, 16)):
        write(tmp_path / f"{number}", how={"normalisation": "running"}, **model(width))
    assert "normalisation running" in said(tmp_path)
    assert said(tmp_path).count("normalisation") == 1


def test_scores_of_several_kinds_of_normalisation_have_a_column_for_it(tmp_path: Path) -> None:
    for number, way in enumerate(("running", "transductive", None)):
        how = {"normalisation": way} if way else {}
        write(tmp_path / f"{number}", how=how, **model(8 + number))
    ways = summarise([tmp_path]).how()
    assert ways == {"normalisation": ["running", "transductive", "–"]}
    heading, *rows = [line.split() for line in said(tmp_path).splitlines()[1:5]]
    assert "normalisation" in heading
    place = [row[-3] for row in rows]
    assert place == ["running", "transductive", "–"]


def test_configurations_that_nobody_typed_are_told_apart_too(tmp_path: Path) -> None:
    for name in ("CNP", "ANP"):
        write(tmp_path / name, model={"_target_": f"a.b.{name}", "width": len(name), "head": None})
    summary = summarise([tmp_path])
    assert list(summary.columns) == ["model._target_"]
    assert sorted(summary.values(group) for group in summary.groups) == [["ANP"], ["CNP"]]


# --- metrics -----------------------------------------------------------------------------------

SEVERAL = {
    "test/accuracy@ways=5": 0.9,
    "test/accuracy@ways=20": 0.8,
    "test/log_likelihood@ways=5": -0.1,
    "test/mse": 1.0,
}


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ((), ["test/accuracy@ways=5", "test/accuracy@ways=20"]),
        (("mse",), ["test/mse"]),
        (("mse", "accuracy@ways=20"), ["test/mse", "test/accuracy@ways=20"]),
        (("*@ways=5",), ["test/accuracy@ways=5", "test/log_likelihood@ways=5"]),
        (("*",), list(SEVERAL)),
    ],
)
def test_metrics_are_chosen_by_name_or_pattern(tmp_path: Path, asked, shown) -> None:
    write(tmp_path / "run", metrics=SEVERAL)
    summary = summarise([tmp_path], asked)
    assert list(summary.metrics) == shown
    assert set(summary.metrics) | set(summary.others) == set(SEVERAL)


def test_a_metric_that_no_run_has_is_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "run", metrics=SEVERAL)
    with pytest.raises(UserError, match=r"--metrics=acuracy(.|\n)*did you mean 'accuracy'"):
        summarise([tmp_path], ["acuracy"])


def test_of_inner_steps_the_monitored_one_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "run", metrics={"test/mse@shots=5,steps=0": 2, "test/mse@shots=5,steps=1": 1})
    RunDirectory(tmp_path / "run").write_result(monitor={"metric": "val/mse@steps=1"})
    assert list(summarise([tmp_path]).metrics) == ["test/mse@shots=5,steps=1"]


def test_a_narrow_terminal_gets_several_tables_and_no_number_is_cut(tmp_path: Path) -> None:
    names = [f"test/accuracy@ways={ways}" for ways in range(2, 12)]
    means = dict(zip(names, range(10, 20), strict=True))
    for seed in (0, 1):
        write(tmp_path / f"{seed}", seed, metrics=means)
    printed = said(tmp_path, width=60)
    assert max(map(len, printed.splitlines())) <= 60
    for name, mean in means.items():
        assert name.partition("@")[2] in printed
        assert f"{mean}.0000 ± 0.0000" in printed


# --- what became of the runs -------------------------------------------------------------------


def test_every_run_that_did_not_complete_is_named_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path / "0", 0)
    write(tmp_path / "1", 1, status="failed", error="the loss is nan at step 7\n  more")
    write(tmp_path / "2", 2, status="interrupted")
    write(tmp_path / "3", 3, status="running")
    RunDirectory(tmp_path / "4").write_config({"seed": 4})
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "result.json").write_text("{}")
    write(tmp_path / "6")
    (tmp_path / "6" / "config.yaml").write_text("a: [1\n")
    write(tmp_path / "7")
    (tmp_path / "7" / "result.json").write_text('{"status": ')
    write(tmp_path / "8")
    (tmp_path / "8" / "overrides.yaml").write_text("- [a\n")
    summary = summarise([tmp_path])
    statuses = {run.directory.name: run.status for run in summary.runs}
    broken = dict.fromkeys("5678", "unreadable")
    assert statuses == {"0": "completed", "1": "failed", "2": "interrupted", "3": "killed"} | broken
    printed = said(tmp_path, width=300)
    assert "1 of 4" in printed
    assert f"failed      {tmp_path}/1  seed 1: the loss is nan at step 7\n" in printed
    assert f"step 10; go on with: metabatch resume {tmp_path}/3" in printed
    assert f"unreadable  {tmp_path}/6: " in printed
    assert f"completed   {tmp_path}/0" not in printed
    assert f"completed   {tmp_path}/0  seed 0  1:00" in said(tmp_path, width=300, every_run=True)
    assert [run.status for run in summarise([tmp_path / "4"]).runs] == ["not begun"]


def test_a_run_at_work_is_running(tmp_path: Path) -> None:
    directory = write(tmp_path / "run", status="running")
    with RunDirectory(directory).lock():
        assert [run.status for run in summarise([tmp_path]).runs] == ["running"]
        assert "running " in said(tmp_path)
    assert [run.status for run in summarise([tmp_path]).runs] == ["killed"]


def test_runs_of_which_none_completed_are_shown_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "run", status="failed", error="no")
    assert "0 of 1" in said(tmp_path, metrics=("accuracy",))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swep", r"DIR=.*/swep: there is no such directory\n  did you mean .*/sweep"),
        ("empty", r"DIR=.*/empty: holds no run"),
        ("file", r"DIR=.*/file: is a file"),
    ],
)
def test_a_directory_that_is_none_of_runs_is_one_message(tmp_path: Path, name, words) -> None:
    write(tmp_path / "sweep" / "0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        summarise([tmp_path / "sweep", tmp_path / name])


# --- JSON --------------------------------------------------------------------------------------


def test_the_json_holds_the_same_numbers_and_every_run(tmp_path: Path) -> None:
    write(tmp_path / "0", 1, metrics=SEVERAL)
    write(tmp_path / "1", 2, metrics=SEVERAL)
    write(tmp_path / "2", 2, status="failed", error="why", **model(9))
    summary = summarise([tmp_path])
    tree = json.loads(json.dumps(summary.as_json()))
    assert tree["columns"] == ["model.width"]
    first, second = tree["groups"]
    assert first["differs_in"] == {"model.width": 8}
    assert first["seeds"] == [1, 2]
    assert set(first["metrics"]) == set(summary.metrics)
    assert first["metrics"]["test/accuracy@ways=5"] == {
        "mean": 0.9,
        "ci95": 0.0,
        "over": "seeds",
        "by_seed": {"1": 0.9, "2": 0.9},
        "oracle": None,
    }
    assert second["runs"][0]["status"] == "failed"
    assert second["runs"][0]["error"] == "why"
    assert second["metrics"] == {}
    assert set(summary.as_json(SEVERAL)["groups"][0]["metrics"]) == set(SEVERAL)
