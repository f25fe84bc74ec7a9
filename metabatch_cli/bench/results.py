"""The JSON of a benchmark: what it holds, and how it is compared, written and read."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from metabatch_cli.bench.measure import Cell, spread
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.report.files import write_json

VERSION = 1
OURS = ("ours", "ours_whole")


def rows(rates: dict[Cell, list[float]]) -> list[dict[str, Any]]:
    """A row for each cell: its rates, and how they compare.

    Shares and ratios are medians over rounds of what was measured within one round, seconds
    apart: how fast the machine was at the moment cancels out.

    Args:
        rates: batches a second, in order of the rounds.
    """
    found = []
    for cell, measured in rates.items():
        bare = rates.get(_beside(rates, cell, "bare", 0))  # type: ignore[arg-type]
        row: dict[str, Any] = {
            "work": cell.work.name,
            "batch_size": cell.batch_size,
            "rival": cell.name,
            "label": cell.rival.label,
            "workers": cell.workers if cell.rival.has_workers else None,
            "batches_per_second": {**spread(measured), "rounds": measured},
            "tasks_per_second": spread([rate * cell.batch_size for rate in measured]),
            "share_of_bare": None if bare is None else _ratio(measured, bare),
        }
        if cell.name not in (*OURS, "bare"):
            row["ours_over_it"] = {
                name: _ratio(rates[ours], measured)
                for name in OURS
                if (ours := _beside(rates, cell, name, cell.workers)) is not None
            }
        found.append(row)
    return found


def _beside(rates: dict[Cell, list[float]], cell: Cell, name: str, workers: int) -> Cell | None:
    """The cell of another rival at the same work, batch size and so many workers."""
    for other in rates:
        same = (other.work, other.batch_size) == (cell.work, cell.batch_size)
        if same and other.name == name and other.workers == workers:
            return other
    return None


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def writable(key: str, path: str | None) -> Path | None:
    """The file of that name, once it is sure that it can be written: better now than at the end.

    Raises:
        ConfigError: it cannot.
    """
    if path is None:
        return None
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        raise ConfigError(key, "is a folder", value=path, allowed="a file, or null for none")
    if not file.parent.is_dir():
        raise ConfigError(key, f"there is no folder {file.parent}", value=path)
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(key, f"the folder {file.parent} cannot be written to", value=path)
    return file


def write(file: Path, benchmark: str, results: dict[str, Any]) -> None:
    """Write results with the name and version of what they are."""
    write_json(file, {"benchmark": benchmark, "version": VERSION, **results})


def read(key: str, path: str, benchmark: str) -> dict[str, Any]:
    """Results of an earlier run.

    Raises:
        ConfigError: no such file, or one that holds something else.
    """
    file = Path(path).expanduser()
    try:
        results = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(key, f"cannot be read: {error.strerror}", value=path) from error
    except ValueError as error:
        raise ConfigError(key, f"is no JSON: {error}", value=path) from error
    kind = results.get("benchmark") if isinstance(results, dict) else None
    if kind != benchmark or results.get("version") != VERSION:
        raise ConfigError(
            key,
            "is something else",
            value=path,
            allowed=f"what `metabatch bench {benchmark}` wrote, version {VERSION}",
        )
    return results
