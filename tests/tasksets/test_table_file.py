"""Tables in files: groups, times, splits, what is dropped, and columns that cannot be."""

from __future__ import annotations

import datetime
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import csv, parquet

from tasksets.images import DataError
from tasksets.table_file import TableFile

SPLITS = ("train", "val", "test")
FORMS = ["t.csv", "t.tsv", "t.csv.gz", "t.parquet"]


def save(path: Path, columns: dict[str, list[Any]]) -> Path:
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return path
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    delimiter = "\t" if plain.suffix == ".tsv" else ","
    csv.write_csv(table, plain, csv.WriteOptions(delimiter=delimiter))
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def people(path: Path, groups: int = 10, rows: int = 4) -> Path:
    """Group `p3` has the x 300 … 303 and y = 2x, its rows among those of the others."""
    ids = [(g, r) for r in range(rows) for g in range(groups)]
    return save(
        path,
        {
            "who": [f"p{g}" for g, _ in ids],
            "number": [g for g, _ in ids],
            "x": [100 * g + r for g, r in ids],
            "y": [2.0 * (100 * g + r) for g, r in ids],
            "kind": ["wet" if r else "dry" for _, r in ids],
            "wet": [r > 0 for _, r in ids],
        },
    )


def rows_of(table: TableFile) -> dict[str, list[list[float]]]:
    """The rows of every group, x and y together."""
    both = np.concatenate([table.x, table.y], axis=1).tolist()
    return {
        name: both[start : start + count]
        for name, start, count in zip(table.group_names, table.starts, table.counts, strict=True)
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_row_lies_in_its_group_in_the_order_of_the_file(tmp_path, form):
    table = TableFile(people(tmp_path / form), "who", "x", ["y", "wet"])
    assert table.x.dtype == table.y.dtype == np.float32
    assert table.y.shape == (40, 2)
    assert table.dropped_rows == 0
    for g in range(10):
        expected = [[100 * g + r, 2 * (100 * g + r), float(r > 0)] for r in range(4)]
        assert rows_of(table)[f"p{g}"] == expected


def test_several_columns_name_a_group(tmp_path):
    table = TableFile(people(tmp_path / "t.csv"), ["kind", "number"], "x", "y", val=0)
    assert len(table.group_names) == 20
    assert rows_of(table)["dry, 3"] == [[300, 600]]
    assert rows_of(table)["wet, 3"] == [[301, 602], [302, 604], [303, 606]]


def test_a_file_lies_below_data_dir_or_anywhere(tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    path = people(tmp_path / "tables" / "t.csv")
    below = TableFile("tables/t.csv", "who", "x", "y", data_dir=tmp_path)
    anywhere = TableFile(str(path), "who", "x", "y", data_dir="/nowhere")
    monkeypatch.setenv("METABATCH_DATA", str(tmp_path))
    named = TableFile("tables/t.csv", "who", "x", "y")
    assert below.path == anywhere.path == named.path == path


# --- splits ----------------------------------------------------------------------------------


def test_every_group_lies_in_one_split(tmp_path):
    table = TableFile(people(tmp_path / "t.csv"), "who", "x", "y", val=0.1, test=0.3)
    parts = [table.select(split).tolist() for split in SPLITS]
    assert [len(part) for part in parts] == [6, 1, 3]
    assert sorted(group for part in parts for group in part) == list(range(10))


def test_splits_depend_on_the_seed_and_on_no_other_column_order_or_size(tmp_path):
    path = people(tmp_path / "t.csv", rows=2)
    turned = tmp_path / "turned.csv"
    head, *lines = path.read_text().splitlines()
    turned.write_text("\n".join([head, *reversed(lines)]))

    def names(*arguments: Any, **more: Any) -> list[str]:
        table = TableFile(*arguments, **more)
        return [table.group_names[group] for group in table.select("test")]

    one = names(path, "who", "x", "y")
    assert names(turned, "who", "x", "y") == one
    assert names(path, "who", "y", "wet", min_rows=3) == one
    assert len({tuple(names(path, "who", "x", "y", seed=seed)) for seed in range(8)}) > 4


def test_too_few_groups_to_split_are_refused(tmp_path):
    table = TableFile(people(tmp_path / "t.csv", groups=2), "who", "x", "y")
    with pytest.raises(DataError, match=r"has 2 groups: too few for val=0.1 and test=0.2"):
        table.select("train")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"val": 0.5, "test": 0.5}, "val=0.5 and test=0.5"),
        ({"min_rows": 1}, "min_rows=1"),
        ({"gap": 3.0}, "gap=3.0 .* needs time"),
        ({"missing": "guess"}, "missing='guess': choose from drop, error"),
        ({"x": []}, r"x=\[\] must name a column"),
        ({"x": ["x", "x"]}, "has 'x' twice"),
        ({"y": ["y", "x"]}, "y='x' is in x too"),
        ({"time": {"month": "x"}}, "time.year is missing"),
        ({"time": {"yeer": "x"}}, r"time.yeer: .*did you mean 'year'"),
    ],
)
def test_arguments_that_cannot_be_are_named(tmp_path, wrong, message):
    given = {"group": "who", "x": "x", "y": "y", **wrong}
    with pytest.raises(ValueError, match=message):
        TableFile(people(tmp_path / "t.csv"), **given)


# --- what is missing, what is no number ------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_an_empty_cell_that_is_asked_for_are_dropped_and_counted(tmp_path, form):
    path = save(
        tmp_path / form,
        {
            "who": ["a", "a", "a", "b", "b", None, "b"],
            "x": [1, None, 3, 4, 5, 6, 7],
            "y": [1.0, 2.0, None, 4.0, float("nan"), 6.0, 7.0],
            "other": [None] * 6 + [1],
        },
    )
    table = TableFile(path, "who", "x", "y")
    assert rows_of(table) == {"a": [[1, 1]], "b": [[4, 4], [7, 7]]}
    assert table.dropped_rows == 4
    with pytest.raises(DataError, match=r"4 of 7 rows have an empty cell.*missing=drop"):
        TableFile(path, "who", "x", "y", missing="error")


@pytest.mark.parametrize("form", ["t.csv", "t.parquet"])
def test_a_column_of_categories_is_refused_with_a_value_of_it(tmp_path, form):
    with pytest.raises(DataError, match=r"^y='kind': .*text there \('dry' in row 1\).*categories"):
        TableFile(people(tmp_path / form), "who", "x", "kind")


def test_the_one_cell_that_is_no_number_is_shown(tmp_path):
    path = save(tmp_path / "t.csv", {"who": list("aabb"), "x": list("123?"), "y": [1, 2, 3, 4]})
    with pytest.raises(DataError, match=r"^x='x': .*'\?' in row 4"):
        TableFile(path, "who", "x", "y")


def test_dates_are_no_numbers_but_times(tmp_path):
    path = save(
        tmp_path / "t.csv",
        {"who": list("aabb"), "x": [datetime.date(2020, 1, d) for d in (1, 2, 3, 5)], "y": [1] * 4},
    )
    with pytest.raises(DataError, match=r"^x='x': .*dates.*let time name it, and take 'elapsed'"):
        TableFile(path, "who", "x", "y")
    assert rows_of(TableFile(path, "who", "elapsed", "y", "x")) == {
        "a": [[0, 1], [24, 1]],
        "b": [[0, 1], [48, 1]],
    }


def test_an_infinite_number_is_refused(tmp_path):
    path = save(tmp_path / "t.csv", {"who": ["a", "a"], "x": [1.0, float("inf")], "y": [1, 2]})
    with pytest.raises(DataError, match=r"x='x': .*infinite number in row 2"):
        TableFile(path, "who", "x", "y")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ({"x": "numbre"}, "x='numbre'.*did you mean 'number'"),
        ({"y": ["y", "wett"]}, "y='wett'.*did you mean 'wet'"),
        ({"group": "hwo"}, "group='hwo'.*did you mean 'who'"),
        ({"time": "x2"}, "time='x2'.*did you mean 'x'"),
        ({"x": "elapsed"}, "x='elapsed'.*time would add it"),
        ({"x": "elapse", "time": "number"}, "x='elapse'.*did you mean 'elapsed'"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path, form, wrong, near):
    given = {"group": "who", "x": "x", "y": "y", **wrong}
    with pytest.raises(ValueError, match=f"^{near}"):
        TableFile(people(tmp_path / form), **given)


def test_a_file_that_is_missing_or_no_table_is_named(tmp_path):
    with pytest.raises(DataError, match=r"file: .*t\.csv does not exist.*data_dir"):
        TableFile("t.csv", "who", "x", "y", data_dir=tmp_path)
    for name, content in (("t.csv", b""), ("t.csv", b"a,b\n1\n1,2,3\n"), ("t.parquet", b"PAR?")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"file: .*{name} cannot be read"):
            TableFile(tmp_path / name, "a", "a", "b")
    with pytest.raises(DataError, match="must end in"):
        TableFile(tmp_path / "t.xlsx", "who", "x", "y")
    (tmp_path / "t.csv").write_bytes(b"who,x,y\n")
    with pytest.raises(DataError, match="no rows"):
        TableFile(tmp_path / "t.csv", "who", "x", "y")


# --- times -----------------------------------------------------------------------------------

PARTS = {"year": "year", "month": "month", "day": "day", "hour": "hour"}


def sightings(path: Path, *when: tuple[str, str]) -> Path:
    moments = [datetime.datetime.fromisoformat(moment) for _, moment in when]
    return save(
        path,
        {
            "name": [name for name, _ in when],
            **{part: [getattr(m, part) for m in moments] for part in (*PARTS, "minute")},
            "moment": moments,
            "days": [(m - datetime.datetime(2000, 1, 1)).total_seconds() / 86400 for m in moments],
            "y": list(range(len(when))),
        },
    )


NEW_YEAR = (
    ("Zeta", "2006-01-01T06:00"),  # the rows are in disorder, and the year turns
    ("Zeta", "2005-12-31T18:00"),
    ("Eta", "2004-02-28T12:00"),
    ("Eta", "2004-03-01T12:00"),  # over a leap day
    ("Zeta", "2020-06-01T00:00"),
    ("Zeta", "2020-06-01T06:00"),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("time", [PARTS, "moment"])
def test_elapsed_counts_hours_and_a_pause_tells_bearers_of_a_name_apart(tmp_path, form, time):
    path = sightings(tmp_path / form, *NEW_YEAR)
    assert rows_of(TableFile(path, "name", "elapsed", "y", time, gap=240)) == {
        "Eta": [[0, 2], [48, 3]],
        "Zeta, 2005-12-31 18:00": [[0, 1], [12, 0]],
        "Zeta, 2020-06-01 00:00": [[0, 4], [6, 5]],
    }


def test_a_pause_within_the_gap_divides_nothing(tmp_path):
    path = sightings(tmp_path / "t.csv", *NEW_YEAR)
    assert len(TableFile(path, "name", "elapsed", "y", PARTS).group_names) == 2
    assert len(TableFile(path, "name", "elapsed", "y", PARTS, gap=12).group_names) == 4
    assert len(TableFile(path, "name", "elapsed", "y", PARTS, gap=11.9).group_names) == 5


def test_numbers_are_times_in_their_own_unit(tmp_path):
    path = sightings(tmp_path / "t.csv", *NEW_YEAR)
    rows = rows_of(TableFile(path, "name", ["elapsed", "hour"], "y", "days", gap=10))
    assert rows["Eta"] == [[0, 12, 2], [2, 12, 3]]
    assert [name for name in rows if "Zeta" in name] == ["Zeta, 2191.75", "Zeta, 7457"]


def test_minutes_count_and_missing_parts_are_the_first(tmp_path):
    path = sightings(tmp_path / "t.csv", ("a", "2001-01-01T01:30"), ("a", "2001-01-01T03:15"))
    assert TableFile(path, "name", "elapsed", "y", {**PARTS, "minute": "minute"}).x[1, 0] == 1.75
    path = sightings(tmp_path / "t.csv", ("a", "2003-07-01T01:30"), ("a", "2004-07-01T01:30"))
    assert TableFile(path, "name", "elapsed", "y", {"year": "year"}).x[1, 0] == 24 * 365


def test_time_begins_with_the_first_row_whatever_is_empty_in_it(tmp_path):
    columns = {"who": list("aaa"), "t": [5, 7, 8], "y": [None, 1, 2]}
    path = save(tmp_path / "t.csv", columns)
    assert TableFile(path, "who", "elapsed", "y", "t").x[:, 0].tolist() == [2, 3]


def test_a_month_that_does_not_exist_is_named(tmp_path):
    path = save(tmp_path / "t.csv", {"who": list("aa"), "m": [12, 13], "y": [2000, 2000]})
    with pytest.raises(DataError, match=r"time.month='m': .* 13 in row 2, which is no month"):
        TableFile(path, "who", "elapsed", "y", {"year": "y", "month": "m"})


def test_a_day_that_its_month_has_not_is_named(tmp_path):
    columns = {"who": list("aaa"), "d": [29, 29, 1], "m": [2, 2, 3], "y": [2000, 2001, 2001]}
    path = save(tmp_path / "t.csv", columns)
    with pytest.raises(DataError, match=r"time.day='d': .* 29 in row 2, which 2001-02 has not"):
        TableFile(path, "who", "elapsed", "y", {"year": "y", "month": "m", "day": "d"})


# --- normalisation ---------------------------------------------------------------------------


def test_normalisation_is_measured_on_the_rows_of_the_training_groups_alone(tmp_path):
    table = TableFile(people(tmp_path / "t.csv"), "who", ["x", "wet"], "y", val=0.2)
    rows = np.concatenate([np.arange(4) + table.starts[g] for g in table.select("train")])
    found = table.normalisation
    np.testing.assert_allclose(found["x_mean"], table.x[rows].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["x_std"], table.x[rows].std(0), rtol=1e-5)
    np.testing.assert_allclose(found["y_mean"], table.y[rows].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["y_std"], table.y[rows].std(0), rtol=1e-5)


def test_a_column_that_never_changes_has_a_deviation_of_one(tmp_path):
    path = save(tmp_path / "t.csv", {"who": list("aabbcc"), "x": [7] * 6, "y": list(range(6))})
    assert TableFile(path, "who", "x", "y").normalisation["x_std"] == [1.0]


def test_numbers_that_rounding_would_make_equal_are_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    seconds = [1_700_000_000 + 86_400 * g + 5 * r for g in range(10) for r in range(4)]
    columns = {
        "g": [f"p{g}" for g in range(10) for _ in range(4)],
        "unix": seconds,
        "year": [2023.1 + g for g in range(10) for _ in range(4)],  # the same in a whole group
        "y": [0.1 * r for _ in range(10) for r in range(4)],
    }
    path = save(tmp_path / "t.parquet", columns)
    with pytest.raises(DataError, match=r"x='unix'.* 1700777615, .*time=unix and x=elapsed do"):
        TableFile(path, "g", "unix", "y")
    with pytest.raises(DataError, match=r"y='unix'.*what they have in common$"):
        TableFile(path, "g", "year", "unix")
    file = TableFile(path, "g", ["elapsed", "year"], "y", time="unix")
    assert file.x[:4, 0].tolist() == [0, 5, 10, 15]


def test_columns_that_hardly_change_within_groups_are_none_of_those(tmp_path: Path) -> None:
    n = 200
    steady, moved = np.full(n, 72.3), np.full(n, 72.3)
    steady[::2] += 1e-14  # the last bits of float64
    moved[-1] += 0.01
    path = save(tmp_path / "t.parquet", {"g": ["a", "b"] * (n // 2), "x": steady, "y": moved})
    assert len(TableFile(path, "g", "x", "y", val=0, test=0).x) == n
