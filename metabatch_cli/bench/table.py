"""Rates as tables for the terminal, one for each work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from metabatch_cli.bench.rivals import RIVALS


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """A table for each work in the results of `metabatch bench loader`."""
    for name, work in found["works"].items():
        cells = [cell for cell in found["cells"] if cell["work"] == name]
        if cells:
            yield _table(f"{name}: {work['summary']}", cells, found["missing"])


def _table(title: str, cells: list[dict[str, Any]], missing: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("rival", style="bold cyan", no_wrap=True)
    for column in ("workers", "tasks/s", "lowest – highest", "batches/s", "of bare", "ours / it"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = None
    for cell in cells:
        size = cell["batch_size"]
        if shown not in (None, size):
            table.add_section()
        tasks, batches = cell["tasks_per_second"], cell["batches_per_second"]
        table.add_row(
            "" if size == shown else f"{size:,}",
            cell["label"],
            "" if cell["workers"] is None else str(cell["workers"]),
            rounded(tasks["median"]),
            f"{rounded(tasks['min'])} – {rounded(tasks['max'])}",
            rounded(batches["median"]),
            share(cell["share_of_bare"]),
            times(cell.get("ours_over_it", {})),
        )
        shown = size
    for name in missing:
        table.add_row("", RIVALS[name].label, "", "not installed")
    return table


def times(ours: dict[str, float]) -> str:
    """How many times as fast as this rival the faster of ours is, with as many workers."""
    if not ours:
        return ""
    best = max(ours.values())
    return f"{best:.1f} ×" if best < 10 else f"{best:,.0f} ×"


def share(of_bare: float | None) -> str:
    """A part of the bare work's rate."""
    if of_bare is None:
        return ""
    return f"{of_bare:.0%}" if of_bare >= 0.095 else f"{of_bare:.1%}"


def rounded(rate: float) -> str:
    """Three digits, or all before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
