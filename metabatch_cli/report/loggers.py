"""Loggers: rows of metrics on their way to files; a row is a dict with a `step`."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, Protocol

from metabatch_cli.report.files import finite, write_text


class Logger(Protocol):
    """Takes rows of metrics.

    What else there is to show lies in the run's directory, which a constructor with an argument
    `directory` is given: the configuration from the beginning, `metrics.jsonl` up to date whenever
    a logger is called, `result.json` and figures once it is closed. A class whose attribute `needs`
    names a package is refused, before a training, where that is not installed.
    """

    def log(self, row: dict[str, Any]) -> None:
        """Write one row."""

    def rewind(self, step: int) -> None:
        """Begin, once, before the first row: forget the rows beyond a step, 0 in a new run."""

    def close(self) -> None:
        """Finish what is being written, however the training ended; maybe without a beginning."""


class JsonlLogger:
    """One JSON object a line, in `metrics.jsonl`."""

    def __init__(self, directory: str | Path) -> None:
        self.file = Path(directory) / "metrics.jsonl"

    def log(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as stream:  # opened for each row: nothing waits in a buffer
            stream.write(json.dumps(finite(row)) + "\n")

    def rewind(self, step: int) -> None:
        rows = [row for row in read_rows(self.file) if row["step"] <= step]
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        pass


class CsvLogger:
    """All rows as one table, `metrics.csv`, with a column for each metric."""

    def __init__(self, directory: str | Path) -> None:
        self.file = Path(directory) / "metrics.csv"
        self.source = Path(directory) / "metrics.jsonl"

    def log(self, row: dict[str, Any]) -> None:
        pass  # columns are known once all rows are

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        rows = read_rows(self.source)
        columns = dict.fromkeys(name for row in rows for name in row)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(columns))
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.file, table.getvalue())


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


# --- what dashboards show ----------------------------------------------------------------------


def shown(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, those of the training under `train/`; not what is no number."""
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def final_scores(result: dict[str, Any]) -> dict[str, float]:
    """The test metrics of a `result.json`: means, and beside them intervals and oracles."""
    scores = {}
    for name, entry in result.get("metrics", {}).items():
        scores[name] = entry["mean"]
        scores |= {f"{name}/{part}": entry.get(part) for part in ("ci95", "oracle")}
    return shown(scores)


def run_name(directory: Path) -> str:
    """What a run is called among others: the last two parts of its directory."""
    return "/".join(directory.absolute().parts[-2:])
