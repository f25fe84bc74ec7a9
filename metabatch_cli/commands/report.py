"""`metabatch report DIR…`: one table from runs and sweeps, over their seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from metabatch_cli.commands.resume import complete

__all__ = ["complete", "main"]


def main(words: list[str]) -> None:
    """Read the runs, print the table, write the same as JSON where that is asked for."""
    parser = argparse.ArgumentParser(
        prog="metabatch report",
        description="One table from runs and sweeps: a row for each configuration, its scores "
        "over seeds, and what became of every run.",
    )
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", help="runs, or folders with runs below them"
    )
    parser.add_argument(
        "--metrics",
        action="append",
        default=[],
        metavar="NAME",
        help="what to show instead of the metric that chose the weights, such as accuracy, "
        "'mse@*' or '*'; may be given several times",
    )
    parser.add_argument("--runs", action="store_true", help="list every run, completed ones too")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--csv", metavar="FILE", help="write the table for other programs")
    parser.add_argument("--latex", metavar="FILE", help="write the table for a paper (booktabs)")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write a page with the table, learning curves and the effect of each key",
    )
    options = parser.parse_args(words)

    from metabatch_cli.report.console import make_console
    from metabatch_cli.report.files import write_json, write_text
    from metabatch_cli.report.page import as_html
    from metabatch_cli.report.table import summarise
    from metabatch_cli.report.table_files import as_csv, as_latex
    from metabatch_cli.report.terminal_table import render

    summary = summarise(options.directories, options.metrics)
    if options.json is not None:
        everything = [*summary.metrics, *summary.others]
        tree = summary.as_json(summary.metrics if options.metrics else everything)
        _write("--json", options.json, lambda file: write_json(file, tree))
    for option, made in (("csv", as_csv), ("latex", as_latex), ("html", as_html)):
        if (path := getattr(options, option)) is not None:
            _write(f"--{option}", path, partial(write_text, text=made(summary)))
    render(summary, make_console(), every_run=options.runs)


def _write(option: str, path: str, write: Callable[[Path], object]) -> None:
    from metabatch_cli.config.errors import ConfigError

    try:
        write(Path(path).expanduser())
    except OSError as error:
        raise ConfigError(option, f"cannot be written: {error.strerror}", value=path) from error
