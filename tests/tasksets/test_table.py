"""Tasks of a table: rows of one group, none twice, in own units, beside honest baselines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching import PaddedTask, Task, TaskLoader, check_strictly, digest
from metabatch_cli.config.build import build_taskset
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.compose import compose
from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.evaluator import evaluate
from metabatch_cli.engine.parts import Parts, describe
from metabatch_cli.engine.precision import Precision
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.models.cnp import CNP
from tasksets.images import DataError
from tasksets.table import Table
from tasksets.table_file import TableFile

SPLITS = ("train", "val", "test")
SIZES = {"min_pts": 1, "max_ctx_pts": 6, "max_tgt_pts": 9}
seeds = st.integers(0, 2**31)


def write(path: Path, lengths: list[int]) -> Path:
    """Row r of group g has the x 100 g + r, which tells what it is, and y = (sin r, g)."""
    lines = ["g,r,x,wave,level"]
    for r in range(max(lengths)):  # the groups' rows lie between each other
        for g, length in enumerate(lengths):
            if r < length:
                lines.append(f"g{g:02},{r},{100 * g + r},{np.sin(r) + 0.01 * g},{g}")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("table") / "t.csv", [1 + g % 13 for g in range(40)])


def table(path: Path, columns: dict[str, Any] | None = None, **changes: Any) -> Table:
    asked = {"group": "g", "x": "x", "y": ["wave", "level"], **(columns or {})}
    return Table(TableFile(path, **asked), **{**SIZES, **changes})


def make(
    taskset: Table, indices: Any, n_context: int = 4, n_target: int = 5, seed: int = 0
) -> PaddedTask:
    generator = torch.Generator().manual_seed(seed)
    return taskset.__gettasks__(torch.as_tensor(indices), n_context, n_target, generator)


# --- tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["random", "first"])
@given(n_context=st.integers(0, 14), n_target=st.integers(1, 14), seed=seeds)
def test_rows_are_of_the_tasks_own_group_and_none_comes_twice(
    file, context, n_context, n_target, seed
):
    taskset = table(file, context=context)
    tasks = make(taskset, range(len(taskset)), n_context, n_target, seed)
    assert isinstance(tasks, PaddedTask)
    for place, task in enumerate(tasks.unpad()):
        group = int(tasks.aux["group"][place])
        length = taskset.dataset.counts[group]
        x = torch.cat([task.context_x, task.target_x])[:, 0]
        y = torch.cat([task.context_y, task.target_y])
        assert ((x // 100) == group).all()
        assert (y[:, 1] == group).all()
        torch.testing.assert_close(y[:, 0], torch.sin(x % 100) + 0.01 * group)
        assert len(set(x.tolist())) == len(x)
        assert len(task.context_x) == min(n_context, length - 1)
        assert len(task.target_x) == min(n_target, length - len(task.context_x)) >= 1


@given(n_context=st.integers(0, 14), n_target=st.integers(1, 14))
def test_padding_is_zero_and_stands_behind_the_points(file, n_context, n_target):
    taskset = table(file)
    tasks = make(taskset, range(len(taskset)), n_context, n_target)
    again = tasks.packed().padded()
    assert digest(again) == digest(tasks)


def test_first_is_the_beginning_of_the_group_and_what_follows(file):
    taskset = table(file, context="first")
    for task in make(taskset, range(len(taskset)), 4, 3).unpad():
        x = torch.cat([task.context_x, task.target_x])[:, 0] % 100
        assert x.tolist() == list(range(len(x)))


def test_every_row_is_as_often_context_and_in_every_place(file):
    taskset = table(file)
    group = next(i for i, g in enumerate(taskset.groups) if taskset.dataset.counts[g] == 8)
    tasks = make(taskset, [group] * 4000, 3, 2)
    drawn = torch.cat([tasks.context_x, tasks.target_x], dim=1)[..., 0].long() % 100
    for place in range(5):
        counts = torch.bincount(drawn[:, place], minlength=8)
        assert (counts > 400).all()  # 500 in expectation
        assert (counts < 600).all()


def test_an_index_is_a_group_whose_rows_are_drawn_anew(file):
    taskset = table(file)
    big = [i for i, g in enumerate(taskset.groups) if taskset.dataset.counts[g] > 8]
    one, other = make(taskset, big, seed=0), make(taskset, big, seed=1)
    assert torch.equal(one.aux["group"], other.aux["group"])
    assert one.aux["group"].tolist() == taskset.groups[big].tolist()
    assert not torch.equal(one.context_x, other.context_x)


def test_groups_of_too_few_rows_are_left_out_and_counted(file):
    few, more, most = (table(file, min_pts=n) for n in (1, 3, 6))
    assert few.least == 2
    assert more.least == 4
    for taskset in (few, more, most):
        counts = taskset.dataset.counts[taskset.dataset.select("train")]
        assert (taskset.dataset.counts[taskset.groups] >= taskset.least).all()
        assert len(taskset) == (counts >= taskset.least).sum()
        assert taskset.left_out == len(counts) - len(taskset)
    assert len(few) > len(more) > len(most)
    assert table(file, {"min_rows": 8}).least == 8


def test_what_is_left_out_is_said(file, tmp_path):
    assert table(file, min_pts=6).note.endswith(" groups of fewer than 7 rows left out")
    path = write(tmp_path / "t.csv", [4] * 10)
    assert table(path).note == ""
    path.write_text(path.read_text().replace(",203,", ",,"))
    assert table(path).note == "1 row with an empty cell dropped"


def test_a_split_without_a_large_group_is_refused(file):
    with pytest.raises(DataError, match=r"split 'train' has the 21 rows"):
        table(file, min_pts=20, max_ctx_pts=20, max_tgt_pts=30)


def test_splits_have_groups_of_their_own(file):
    tasksets = {split: table(file, split=split) for split in SPLITS}
    groups = [set(taskset.groups.tolist()) for taskset in tasksets.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert [taskset.eval for taskset in tasksets.values()] == [False, True, True]
    moved = tasksets["train"]
    moved.belong_to("test")
    assert moved.groups.tolist() == tasksets["test"].groups.tolist()


def test_tasks_of_one_size_come_from_groups_that_have_as_many_rows(file):
    taskset = table(file, ragged=False, max_ctx_pts=3, max_tgt_pts=5)
    assert taskset.least == 8
    with TaskLoader(taskset, 4, shuffle=True) as loader:
        for tasks in loader:
            assert isinstance(tasks, Task)
            both = torch.cat([tasks.context_x, tasks.target_x], 1)[..., 0]
            assert all(len(set(x)) == len(x) for x in both.tolist())
    with pytest.raises(ValueError, match=r"more than the 8 rows.*ragged=true"):
        make(taskset, [0], 4, 5)
    assert set(taskset.baselines(make(taskset, [0, 1], 3, 5))) == set(taskset.baseline_sigmas)


def test_a_context_that_is_neither_is_refused(file):
    with pytest.raises(ValueError, match="context='last': choose from random, first"):
        table(file, context="last")


# --- what is known ---------------------------------------------------------------------------


def test_the_spec_has_the_shapes_and_the_training_groups_units_in_every_split(file):
    specs = [table(file, split=split).spec for split in SPLITS]
    assert specs[0] == specs[1] == specs[2]
    assert (specs[0].dim_x, specs[0].dim_y) == (1, 2)
    trained = table(file)
    rows = torch.cat(
        [task.target_y for task in make(trained, range(len(trained)), 0, 99).unpad()]
    ).double()
    torch.testing.assert_close(torch.tensor(specs[0].units["y_mean"]), rows.mean(0).float())
    std = rows.std(0, correction=0)
    torch.testing.assert_close(torch.tensor(specs[0].units["y_std"]), std.float())
    assert all(isinstance(n, float) for values in specs[0].units.values() for n in values)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("context", ["random", "first"])
def test_batches_do_not_depend_on_the_number_of_workers(file, workers, context):
    def digests(loader: TaskLoader) -> list[str]:
        return [digest(batch) for batch in loader]

    with (
        TaskLoader(table(file, context=context), 5, shuffle=True, seed=1) as alone,
        TaskLoader(
            table(file, context=context), 5, shuffle=True, seed=1, workers=workers
        ) as loader,
    ):
        for _ in range(2):
            expected = digests(alone)
            assert digests(loader) == expected
        assert len(set(expected)) == len(expected)


def test_tasks_depend_on_nothing_but_the_loaders_seed(file):
    check_strictly(TaskLoader(table(file), 4, shuffle=True, shards=2, drop_last=True))


# --- baselines -------------------------------------------------------------------------------


def test_lines_are_drawn_over_one_dimension_only(file):
    line = table(file)
    plane = table(file, {"x": ["x", "r"]})
    assert list(line.baselines(make(line, [0, 1]))) == ["context_mean", "linear_interpolation"]
    assert list(plane.baselines(make(plane, [0, 1]))) == ["context_mean"]


def test_no_other_sigma_is_likelier_on_the_training_groups(file):
    sizes = {"sizes": "fixed", "max_ctx_pts": 3, "max_tgt_pts": 4}
    trained, held_out = (table(file, {"y": "wave"}, split=s, **sizes) for s in ("train", "test"))
    tasks = make(trained, list(range(len(trained))) * 200, 3, 4)

    def likelihood(factor: float) -> float:
        held_out.baseline_sigmas = {k: factor * v for k, v in fitted.items()}
        return held_out.baselines(tasks)["linear_interpolation"]["log_likelihood"].mean().item()

    fitted = dict(held_out.baseline_sigmas)
    assert likelihood(1.0) > max(likelihood(0.9), likelihood(1.1))


def test_sigmas_are_the_same_in_every_split_and_every_time(file):
    found = [table(file, split=split, sizes="rest", total_tgt_pts=9) for split in SPLITS]
    for taskset in found:
        for name, sigma in taskset.baseline_sigmas.items():
            assert torch.equal(sigma, found[0].baseline_sigmas[name])


def test_the_evaluation_scores_the_baselines_on_the_learners_tasks(file):
    torch.manual_seed(0)
    taskset = table(file, split="test")
    loader = TaskLoader(taskset, 4, shuffle=True)
    learner = NeuralProcess(CNP(1, 2, width=8))
    precision = Precision(32, torch.device("cpu"))
    metrics = evaluate(learner, {"": loader}, precision, split="test", n_tasks=1000).metrics
    batches = [loader.batch_at(step) for step in range(-(-len(taskset) // 4))]
    for metric in ("mse", "log_likelihood"):
        expected = torch.cat(
            [taskset.baselines(batch)["linear_interpolation"][metric] for batch in batches]
        )
        entry = metrics[f"test/{metric}"]
        assert entry["tasks"] == len(expected) == len(taskset)
        assert entry["baselines"]["linear_interpolation"] == pytest.approx(expected.mean().item())
        assert set(entry["baselines"]) == {"context_mean", "linear_interpolation"}


# --- as configured, real data ----------------------------------------------------------------


def configured(name: str, data: Path, *overrides: str, split: str = "train") -> Table:
    parts = (f"taskset={name}", "model=cnp", "learner=neural_process", f"data_dir={data}")
    return build_taskset(check(resolve(compose(*parts, *overrides))), split)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("taskset.dataset.y=[wnd]", r"taskset\.dataset\.y='wnd': .*did you mean 'wind'"),
        ("taskset.dataset.y=[status]", r"taskset\.dataset\.y='status': .*'tropical depression'"),
        ("taskset.dataset.file=tables/none.csv", r"taskset\.dataset\.file: .*none.csv does not"),
        ("taskset.dataset.time={yeer: year}", r"taskset\.dataset\.time"),
        ("taskset.dataset.min_rows=1", r"taskset\.dataset\.min_rows=1: .*\n.*at least 2"),
    ],
)
def test_mistakes_are_named_by_their_keys(metabatch_data, override, said):
    with pytest.raises(UserError, match=said):
        configured("storms", metabatch_data, override)


def test_storms_are_whole_and_their_hours_begin_with_0(metabatch_data):
    tasksets = {split: configured("storms", metabatch_data, split=split) for split in SPLITS}
    dataset = tasksets["train"].dataset
    assert [len(taskset) for taskset in tasksets.values()] == [485, 69, 138]
    assert [taskset.left_out for taskset in tasksets.values()] == [0, 0, 0]
    assert dataset.counts.sum() == 20_778
    assert dataset.dropped_rows == 0
    assert (dataset.x[dataset.starts] == 0).all()
    # the storm that lived through a new year: 8 rows before it, 28 after
    place = dataset.group_names.index("Zeta, 2005-12-30 00:00")
    rows = slice(dataset.starts[place], dataset.starts[place] + dataset.counts[place])
    assert dataset.x[rows, 0].tolist() == [6.0 * n for n in range(36)]
    longest = max(
        np.diff(dataset.x[start : start + count, 0]).max()
        for start, count in zip(dataset.starts, dataset.counts, strict=True)
    )
    assert longest == 84  # hours between two observations, far from the gap


def test_lines_are_better_than_means_on_storms_and_on_chicks(metabatch_data):
    for name in ("storms", "chickweight"):
        taskset = configured(name, metabatch_data, split="test")
        loader = TaskLoader(taskset, 8, shuffle=True)
        scores = [taskset.baselines(loader.batch_at(step)) for step in range(20)]

        def mean(baseline: str, metric: str, of: list = scores) -> float:
            return torch.cat([score[baseline][metric] for score in of]).mean().item()

        assert mean("linear_interpolation", "mse") < 0.5 * mean("context_mean", "mse")
        lines = mean("linear_interpolation", "log_likelihood")
        assert lines > mean("context_mean", "log_likelihood") + 0.3


def test_empty_diameters_of_storms_are_dropped(metabatch_data):
    taskset = configured("storms", metabatch_data, "taskset.dataset.y=[hurricane_force_diameter]")
    assert taskset.dataset.dropped_rows == 9512
    assert not np.isnan(taskset.dataset.y).any()


def test_chicks_that_died_young_are_left_out(metabatch_data):
    tasksets = [configured("chickweight", metabatch_data, split=split) for split in SPLITS]
    assert sum(map(len, tasksets)) == 49
    assert sum(taskset.left_out for taskset in tasksets) == 1  # two rows, and min_pts is two
    assert tasksets[0].dataset.counts.sum() == 578


def test_the_table_that_opens_a_training_says_what_was_left_out(metabatch_data):
    names = ("taskset=chickweight", "model=cnp", "learner=neural_process")
    given = (*names, f"data_dir={metabatch_data}", "taskset.min_pts=4", "loader.workers=0")
    rows = dict(describe(Parts(check(resolve(compose(*given))))))
    left_out = r"34 tasks \(1 group of fewer than 5 rows left out\)"
    assert re.fullmatch(rf"Table of TableFile, {left_out}", rows["task set"])
