"""A table in a file, CSV or Parquet, as numbers in groups of rows, such as storms or patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from annotated_types import Ge, Gt, Lt

from metabatch_cli.batching.arguments import choose_from, one_of
from metabatch_cli.batching.streams import Stream, permutation
from metabatch_cli.batching.taskset import SPLITS, Split
from tasksets.images import DataError
from tasksets.omniglot import data_folder

TimePart = Literal["year", "month", "day", "hour", "minute", "second"]
ELAPSED = "elapsed"  # the column that `time` adds

_LIMITS = {"month": (1, 12), "day": (1, 31), "hour": (0, 24), "minute": (0, 60), "second": (0, 60)}
_HOURS = {"hour": 1.0, "minute": 60.0, "second": 3600.0}  # of each, in an hour


class TableFile:
    """Columns of a CSV or Parquet file, whose rows come in groups; read when it is made.

    Rows belong together where all `group` columns agree. Where names recur, `time` and `gap`
    tell one bearer from the next: a pause longer than `gap` begins another group. A storm that
    crosses the new year stays one storm then, which grouping by a column `year` would cut in two.

    `time` says when a row was, and adds the column `elapsed`: hours since the first row of its
    group, whatever is empty in that row. It maps parts of a date to columns,
    `{year: year, month: month, day: day, hour: hour}` (where only year must be there), or it is
    the name of one column: of dates or timestamps, or of numbers, in whose unit `elapsed` and
    `gap` are then. Rows with an empty cell (or NaN) in any column that is asked for are dropped.

    Whole groups are held out, chosen by their names: neither the order of the rows nor the
    columns of x and y change the splits.

    Args:
        file: its path below `data_dir`, or an absolute one: `.csv`, `.tsv`, either with `.gz`
            behind it, or `.parquet`.
        group: the columns whose values name a group; one may be given without a list.
        x, y: columns of numbers, likewise (truth values count as 0 and 1).
        time: see above; None where rows have none.
        gap: the longest pause within a group, in hours; None for any.
        data_dir: by default `$METABATCH_DATA`, else `data` in the user's cache folder.
        val, test: fractions of the groups that are held out; at least one group where the
            fraction is not 0.
        seed: which they are.
        min_rows: groups of fewer rows are left out of all splits, once these are made.
        missing: "error" refuses a table in which rows would be dropped.

    Attributes:
        x, y: float32 arrays `[rows, dim_x]` and `[rows, dim_y]` in the columns' own units,
            group after group, each group in the order of time, else of the file.
        starts, counts: int64 arrays `[groups]`: group g has the rows
            `starts[g] … starts[g] + counts[g] − 1`, which may be none.
        group_names: what each group is called: its values, and where a pause began it or ended
            it, the date (or number) of its first row.
        dropped_rows: how many rows were dropped.

    Raises:
        ValueError: an argument that cannot be, or names a column that is not there.
        DataError: a file that is missing or broken, or has no such numbers in it.
    """

    def __init__(
        self,
        file: str | Path,
        group: str | Sequence[str],
        x: str | Sequence[str],
        y: str | Sequence[str],
        time: str | Mapping[TimePart, str] | None = None,
        gap: Annotated[float, Gt(0)] | None = None,
        data_dir: str | Path | None = None,
        val: Annotated[float, Ge(0), Lt(1)] = 0.1,
        test: Annotated[float, Ge(0), Lt(1)] = 0.2,
        seed: int = 0,
        min_rows: Annotated[int, Ge(2)] = 2,
        missing: Literal["drop", "error"] = "drop",
    ) -> None:
        one_of("missing", missing, ("drop", "error"))
        if val < 0 or test < 0 or val + test >= 1:
            raise ValueError(f"val={val} and test={test} must be fractions that sum to less than 1")
        if min_rows < 2:
            raise ValueError(
                f"min_rows={min_rows} must be at least 2: one to learn from, one to judge"
            )
        if gap is not None and (time is None or gap <= 0):
            raise ValueError(f"gap={gap} must be more than 0, and needs time: it is a pause")
        self.path = data_folder(data_dir) / Path(file).expanduser()
        self.val = val
        self.test = test
        self.seed = seed
        self.min_rows = min_rows

        group, x, y = (_as_list(k, v) for k, v in (("group", group), ("x", x), ("y", y)))
        twice = next((name for name in y if name in x), None)
        if twice is not None:
            raise ValueError(f"y={twice!r} is in x too")
        columns = _Columns(self.path, {"group": group, "x": x, "y": y}, _as_time(time))
        names, group_of = columns.groups(group)
        when = columns.times()
        rows, names, group_of, elapsed = _in_order(names, group_of, when, gap, columns.dated)
        cells: dict[str, np.ndarray] = {}
        for key, wanted in (("x", x), ("y", y)):
            for name in wanted:
                if name == ELAPSED and elapsed is not None:
                    cells[name] = elapsed
                else:
                    cells[name] = columns.numbers(key, name)[rows]
        both = np.stack([cells[name] for name in (*x, *y)], axis=1)
        whole = ~np.isnan(both).any(axis=1)
        self.dropped_rows = columns.rows - int(whole.sum())
        if self.dropped_rows and missing == "error":
            raise DataError(
                f"{self.path}: {self.dropped_rows:,} of {columns.rows:,} rows have an empty cell "
                "in a column that is asked for; missing=drop drops them"
            )
        rounded = both[whole].astype(np.float32)
        for name, exact, short in zip((*x, *y), both[whole].T, rounded.T, strict=True):
            if _lost(exact, short, group_of[whole]):
                raise DataError(
                    f"{'x' if name in x else 'y'}={name!r}: {self.path} has numbers as large as "
                    f"{np.abs(exact).max():.10g}, and float32 keeps too few digits to tell those "
                    "of a group apart: subtract what they have in common"
                    + (f" (of times, time={name} and x={ELAPSED} do)" if name in x else "")
                )
        self.x = np.ascontiguousarray(rounded[:, : len(x)])
        self.y = np.ascontiguousarray(rounded[:, len(x) :])
        self.counts = np.bincount(group_of[whole], minlength=len(names)).astype(np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.group_names = tuple(names)

    def select(self, split: Split) -> np.ndarray:
        """The numbers of a split's groups, int64 `[groups]`, those of too few rows too.

        Raises:
            DataError: too few groups to split.
        """
        one_of("split", split, SPLITS)
        total = len(self.group_names)
        n_val, n_test = (max(1, round(f * total)) if f else 0 for f in (self.val, self.test))
        if n_val + n_test >= total:
            raise DataError(
                f"{self.path} has {total} groups: too few for val={self.val} and "
                f"test={self.test} ({n_val} and {n_test}) and any to train on"
            )
        order = permutation(Stream(self.seed, "table", "groups").words(total, 0))
        parts = np.split(order, [n_val, n_val + n_test])
        return np.sort(dict(zip(("val", "test", "train"), parts, strict=True))[split])

    @cached_property
    def normalisation(self) -> dict[str, list[float]]:
        """`x_mean`, `x_std`, `y_mean`, `y_std`, each a number for each dimension.

        Over the rows of the training groups that have `min_rows`; a standard deviation of 0
        (a column that never changes) is given as 1.
        """
        groups = self.select("train")
        trained = np.zeros(len(self.counts), dtype=bool)
        trained[groups] = self.counts[groups] >= self.min_rows
        rows = np.repeat(trained, self.counts)
        if not rows.any():
            raise DataError(f"{self.path}: no training group has min_rows={self.min_rows} rows")
        found = {}
        for name, values in (("x", self.x), ("y", self.y)):
            mine = values[rows].astype(np.float64)
            std = mine.std(axis=0)
            found[f"{name}_mean"] = mine.mean(axis=0).tolist()
            found[f"{name}_std"] = np.where(std > 0, std, 1.0).tolist()
        return found


def _lost(exact: np.ndarray, rounded: np.ndarray, group_of: np.ndarray) -> bool:
    """Whether rounding moves numbers, `[rows]` group by group, by a hundredth of what rows of a
    group differ by, where they do."""
    if not len(exact):
        return False
    apart = np.abs(exact - exact[np.searchsorted(group_of, group_of)])  # from the group's first
    apart = apart[apart > 1e-12 * np.abs(exact).max()]
    return bool(len(apart)) and bool(np.abs(rounded - exact).max() > 0.01 * apart.mean())


def _in_order(
    names: Sequence[str],
    group_of: np.ndarray,
    when: np.ndarray | None,
    gap: float | None,
    dated: bool,
) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray | None]:
    """Rows group by group and in the order of time; groups cut at their pauses.

    Args:
        names: of the groups, before any is cut.
        group_of: int64 `[rows]`, −1 for a row that has none.
        when: `[rows]`, NaN where it is not known; None where there are no times.
        dated: whether `when` is in hours since 1970.

    Returns:
        The rows that belong to a group, in order; the names of the groups; the group of each of
        these rows; the time since the beginning of its group.
    """
    known = group_of >= 0
    if when is None:
        rows = np.flatnonzero(known)
        rows = rows[np.argsort(group_of[rows], kind="stable")]
        return rows, list(names), group_of[rows], None
    rows = np.flatnonzero(known & ~np.isnan(when))
    rows = rows[np.lexsort((when[rows], group_of[rows]))]
    named, when = group_of[rows], when[rows]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = named[1:] != named[:-1]
    if gap is not None:
        begins[1:] |= np.diff(when) > gap
    cut = np.cumsum(begins) - 1
    bearers = np.bincount(named[begins], minlength=len(names))
    called = [
        names[group] if bearers[group] == 1 else f"{names[group]}, {_shown(start, dated)}"
        for group, start in zip(named[begins].tolist(), when[begins].tolist(), strict=True)
    ]
    return rows, called, cut, when - when[begins][cut]


def _shown(when: float, dated: bool) -> str:
    if not dated:
        return f"{when:g}"
    return str(np.datetime64(round(60 * when), "m")).replace("T", " ")


def _as_list(key: str, value: str | Sequence[str]) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    if not names:
        raise ValueError(f"{key}={value!r} must name a column")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{key}={names!r} has {twice!r} twice")
    return names


def _as_time(time: str | Mapping[TimePart, str] | None) -> dict[str, str]:
    """Columns by what they tell: parts of a date, or "" for all of it."""
    if time is None or isinstance(time, str):
        return {} if time is None else {"": time}
    for part in time:
        if part not in get_args(TimePart):
            raise ValueError(
                f"time.{part}: no part of a date; {choose_from(part, get_args(TimePart))}"
            )
    if "year" not in time:
        raise ValueError("time.year is missing: the other parts count from it")
    return {str(part): column for part, column in time.items()}


class _Columns:
    """The columns of a file that are asked for, read by pyarrow.

    Args:
        asked: names of columns by the argument that asks for them.
        time: columns by what they tell, as `_as_time` has them.
    """

    def __init__(
        self, path: Path, asked: Mapping[str, Sequence[str]], time: Mapping[str, str]
    ) -> None:
        self.path = path
        self.time = time
        wanted = [(key, name) for key, names in asked.items() for name in names]
        wanted += [("time", name) for name in time.values()]
        if time:
            wanted = [(key, name) for key, name in wanted if name != ELAPSED or key == "time"]
        there = _names(path)
        if time and ELAPSED in there:
            raise ValueError(f"time: {path} has a column {ELAPSED!r}, which time would add")
        for key, name in wanted:
            if name not in there:
                offered = [*there, ELAPSED] if time and key in ("x", "y") else there
                hint = "; time would add it" if name == ELAPSED else ""
                raise ValueError(
                    f"{key}={name!r}: {path} has no such column{hint}; {choose_from(name, offered)}"
                )
            if there.count(name) > 1:
                raise DataError(f"{path} has two columns {name!r}")
        self._table = _read(path, list(dict.fromkeys(name for _, name in wanted)))
        self.rows: int = self._table.num_rows
        if not self.rows:
            raise DataError(f"{path} has no rows")
        self.dated = "year" in time or ("" in time and not self._is_number(time[""]))

    def groups(self, names: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """The groups' names, sorted, and the group of each row, −1 where a cell is empty."""
        encoded = [self._table[name].combine_chunks().dictionary_encode() for name in names]
        values = [column.dictionary.to_pylist() for column in encoded]
        codes = np.stack(
            [column.indices.fill_null(-1).to_numpy(zero_copy_only=False) for column in encoded], 1
        )
        for place, of_column in enumerate(values):
            if "" in of_column:
                codes[codes[:, place] == of_column.index(""), place] = -1
        there = (codes >= 0).all(axis=1)
        if not there.any():
            raise DataError(f"{self.path}: no row has a cell in {', '.join(names)}")
        found, of_row = np.unique(codes[there], axis=0, return_inverse=True)
        labels = [
            tuple(str(of_column[code]) for of_column, code in zip(values, row, strict=True))
            for row in found.tolist()
        ]
        order = sorted(range(len(labels)), key=labels.__getitem__)
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        group_of = np.full(self.rows, -1, dtype=np.int64)
        group_of[there] = rank[of_row.reshape(-1)]
        return [", ".join(labels[place]) for place in order], group_of

    def numbers(self, key: str, name: str) -> np.ndarray:
        """A column of numbers, float64 `[rows]`, NaN where it is empty.

        Raises:
            DataError: it is none.
        """
        import pyarrow

        column = self._table[name]
        if pyarrow.types.is_boolean(column.type):
            column = column.cast(pyarrow.uint8())
        elif not self._is_number(name):
            raise DataError(f"{key}={name!r}: {self.path} has {self._example(name)}")
        values = column.cast(pyarrow.float64(), safe=False).to_numpy()
        if np.isinf(values).any():
            raise DataError(
                f"{key}={name!r}: {self.path} has an infinite number in row "
                f"{1 + int(np.isinf(values).argmax()):,}"
            )
        return values

    def times(self) -> np.ndarray | None:
        """When each row was, float64 `[rows]`: hours since 1970, or numbers as they are."""
        if not self.time:
            return None
        if "" in self.time:
            return self._moments(self.time[""])
        parts = {part: self.numbers("time", name) for part, name in self.time.items()}
        known = ~np.isnan(np.stack(list(parts.values()))).any(axis=0)
        for part, values in parts.items():
            low, high = _LIMITS.get(part, (1, 9999))
            wrong = known & ~((low <= values) & (values <= high))
            if part not in _HOURS:
                wrong |= known & (values != np.floor(values))
            if wrong.any():
                row = int(wrong.argmax())
                raise DataError(
                    f"time.{part}={self.time[part]!r}: {self.path} has {values[row]:g} in row "
                    f"{row + 1:,}, which is no {part} of a date"
                )
        whole = {
            part: np.where(known, parts.get(part, np.ones(self.rows)), 1).astype(np.int64)
            for part in ("year", "month", "day")
        }
        months = (whole["year"] - 1970).astype("datetime64[Y]").astype("datetime64[M]")
        months += whole["month"] - 1
        days = months.astype("datetime64[D]") + (whole["day"] - 1)
        late = days.astype("datetime64[M]") != months
        if late.any():
            row = int(late.argmax())
            raise DataError(
                f"time.day={self.time['day']!r}: {self.path} has {whole['day'][row]} in row "
                f"{row + 1:,}, which {months[row]} has not"
            )
        hours = 24.0 * days.astype(np.int64)
        for part, of_an_hour in _HOURS.items():
            hours = hours + parts.get(part, np.zeros(self.rows)) / of_an_hour
        return np.where(known, hours, np.nan)

    def _moments(self, name: str) -> np.ndarray:
        import pyarrow

        if self._is_number(name):
            return self.numbers("time", name)
        column = self._table[name]
        if not (pyarrow.types.is_timestamp(column.type) or pyarrow.types.is_date(column.type)):
            raise DataError(
                f"time={name!r}: {self.path} has {_kind(column.type)} there, not dates, "
                "timestamps or numbers"
            )
        moments = column.cast(pyarrow.timestamp("us"), safe=False)
        return moments.cast(pyarrow.int64()).cast(pyarrow.float64()).to_numpy() / 3.6e9

    def _is_number(self, name: str) -> bool:
        from pyarrow import types

        kind = self._table[name].type
        return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)

    def _example(self, name: str) -> str:
        """What a column holds that is no numbers, for a message."""
        kind = self._table[name].type
        cells = self._table[name].to_pylist()
        row, cell = next(
            ((n, c) for n, c in enumerate(cells, 1) if c is not None and not _reads_as_number(c)),
            (0, None),
        )
        if cell is None:
            return "nothing there" if _kind(kind) == "null" else f"{_kind(kind)} there, not numbers"
        advice = {
            "text": "a column of categories cannot be x or y until it is written as numbers",
            "dates": f"let time name it, and take {ELAPSED!r}",
        }
        what = _kind(kind)
        return f"{what} there ({cell!r} in row {row:,}), not numbers; " + advice.get(
            what, "x and y are numbers"
        )


def _reads_as_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _kind(kind: Any) -> str:
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind):
        return "text"
    if types.is_temporal(kind):
        return "dates"
    return str(kind)


# --- files -------------------------------------------------------------------------------------


def _names(path: Path) -> list[str]:
    """The names of a file's columns."""
    from pyarrow import ArrowException, csv, parquet

    delimiter = _delimiter(path)
    if not path.is_file():
        raise DataError(
            f"file: {path} does not exist; put it there, or let data_dir (or $METABATCH_DATA) name "
            "the folder that it is below"
        )
    try:
        if delimiter is None:
            return parquet.read_schema(path).names
        with csv.open_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter)) as opened:
            return opened.schema.names
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path, names: list[str]) -> Any:
    """Columns of a file, as a `pyarrow.Table`."""
    from pyarrow import ArrowException, csv, parquet

    delimiter = _delimiter(path)
    try:
        if delimiter is None:
            return parquet.read_table(path, columns=names)
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter=delimiter),
            convert_options=csv.ConvertOptions(include_columns=names),
        )
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _delimiter(path: Path) -> str | None:
    """What is between the cells of a text file; None for Parquet."""
    name = path.name.lower()
    if name.endswith((".parquet", ".pq")):
        return None
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        if name.removesuffix(".gz").endswith(suffix):
            return delimiter
    raise DataError(f"file: {path} must end in .csv, .tsv (either with .gz behind it) or .parquet")


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"file: {path} cannot be read as a table ({str(error).splitlines()[0]})")
