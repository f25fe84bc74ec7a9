"""`metabatch bench loader`: tasks a second of several loaders over the same work."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from metabatch_cli.bench import machine, results
from metabatch_cli.bench.measure import WARM_UP, Cell
from metabatch_cli.bench.rivals import PREFETCH, RIVALS, missing
from metabatch_cli.bench.table import tables
from metabatch_cli.bench.work import WORKS, Work, mebibytes
from metabatch_cli.config.check import check_fields
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.config.schema import BenchLoaderConfig
from metabatch_cli.report.console import Reporter, clock
from metabatch_cli.report.rates_figure import draw_rates

if TYPE_CHECKING:
    from omegaconf import DictConfig


def job(config: DictConfig) -> None:
    """Measure, or read what was measured; show, write and draw it."""
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    checked = check_fields(BenchLoaderConfig, plain)
    figure = results.writable("figure", checked.figure)
    reporter = Reporter()
    if checked.read is not None:
        found = results.read("read", checked.read, "loader")
    else:
        out = results.writable("out", checked.out)
        found = measured(checked, reporter)
        if out is not None:
            results.write(out, "loader", found)
    for table in tables(found):
        reporter.console.print()
        reporter.console.print(table)
    for note in notes(found):
        reporter.say(note)
    if checked.read is None and checked.out is not None:
        reporter.say(f"written: {checked.out}")
    if figure is not None:
        draw_rates(found, figure)
        reporter.say(f"drawn: {checked.figure}")


def measured(config: BenchLoaderConfig, reporter: Reporter) -> dict[str, Any]:
    """Measure every cell of the grid, round by round."""
    works = [WORKS[name]() for name in dict.fromkeys(config.work)]
    absent = {str(name): why for name in config.rivals if (why := missing(name)) is not None}
    groups, left_out = grid(config, works, absent)
    about = facts(config, works)
    reporter.plan("measuring", [*describe(config, groups, about), *announced(config, groups)])
    for name, why in absent.items():
        reporter.say(f"{RIVALS[name].label}: {why}")
    disturbed = machine.disturbance()
    if disturbed is not None:
        reporter.say(f"warning: the machine is not idle ({disturbed}): rates will be off")
    rates = in_rounds(groups, config, reporter)
    return {
        **about,
        "disturbed_by": disturbed,
        "missing": absent,
        "left_out": left_out,
        "cells": results.rows(rates),
    }


def grid(
    config: BenchLoaderConfig, works: list[Work], absent: dict[str, str]
) -> tuple[list[list[Cell]], list[str]]:
    """The cells of each work and batch size, and what is left out, in words.

    Raises:
        ConfigError: nothing is left to be measured.
    """
    groups, left_out = [], []
    for work in works:
        for size in dict.fromkeys(config.batch_sizes):
            if (mib := mebibytes(work, size)) > config.max_batch_mib:
                limit = f"max_batch_mib={config.max_batch_mib:g}"
                left_out.append(f"{work.name} at {size} tasks: {mib:,.0f} MiB a batch ({limit})")
                continue
            cells = [
                Cell(work, size, name, RIVALS[name], workers)
                for name in dict.fromkeys(config.rivals)
                if name not in absent and RIVALS[name].does(work)
                for workers in dict.fromkeys(config.workers if RIVALS[name].has_workers else [0])
            ]
            if cells:
                groups.append(cells)
    if not groups:
        wanted = ", ".join(dict.fromkeys(config.rivals))
        why = [*left_out, *(f"{RIVALS[name].label} is {why}" for name, why in absent.items())]
        raise ConfigError(
            "rivals",
            "nothing can be measured of these: "
            + ("; ".join(why) or f"tasks of {', '.join(config.work)} are made one at a time"),
            value=wanted,
        )
    return groups, left_out


def in_rounds(
    groups: list[list[Cell]], config: BenchLoaderConfig, reporter: Reporter
) -> dict[Cell, list[float]]:
    """The rates of all cells; those that are compared with each other are measured in turn.

    Every other round goes backwards, so that what slowly changes meets all alike.
    """
    rates: dict[Cell, list[float]] = {cell: [] for cells in groups for cell in cells}
    with reporter.counting("measure", len(rates) * config.repeats) as next_is:
        for cells in groups:
            for number in range(config.repeats):
                for cell in cells if number % 2 == 0 else reversed(cells):
                    work = f"{cell.work.name}, {cell.batch_size} tasks, {cell.workers} workers"
                    next_is(f"{cell.rival.label}: {work}")
                    rates[cell].append(cell.measure(config.seconds))
    return rates


def facts(config: BenchLoaderConfig, works: list[Work]) -> dict[str, Any]:
    """What the rates were measured on, of and how."""
    return {
        "machine": machine.facts(),
        "method": {
            "seconds": config.seconds,
            "repeats": config.repeats,
            "warm_up_seconds": config.seconds * WARM_UP,
            "prefetch_factor": PREFETCH,
            "threads": "torch's default in the main process, one in workers and for the bare work",
            "start_method": multiprocessing.get_start_method(),
            "garbage_collection": "before the clock starts, and left to Python meanwhile",
        },
        "works": {
            work.name: {
                "summary": work.summary,
                "n_context": work.n_context,
                "n_target": work.n_target,
                "mib_a_task": mebibytes(work, 1),
                **({"steps": work.steps} if hasattr(work, "steps") else {}),
            }
            for work in works
        },
    }


def describe(
    config: BenchLoaderConfig, groups: list[list[Cell]], about: dict[str, Any]
) -> list[tuple[str, str]]:
    """What will be measured, a row for each part."""
    on = about["machine"]
    rivals = {cell.rival.label: cell.rival.summary for cells in groups for cell in cells}
    return [
        ("machine", f"{on['cpu']}, {on['cores']} cores, load {on['load']}"),
        ("versions", f"torch {on['torch']}, Python {on['python']}, numpy {on['numpy']}"),
        *((name, work["summary"]) for name, work in about["works"].items()),
        *rivals.items(),
    ]


def announced(config: BenchLoaderConfig, groups: list[list[Cell]]) -> list[tuple[str, str]]:
    """How long it will take."""
    cells = [cell for cells in groups for cell in cells]
    total = config.repeats * sum(cell.expected(config.seconds) for cell in cells)
    times = (
        f"{config.repeats} × {config.seconds:g} s"
        if config.repeats > 1
        else (f"{config.seconds:g} s")
    )
    return [("time", f"about {clock(total)}: {len(cells)} rates of {times}, and warming up")]


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader of the tables has to know."""
    said = [f"{RIVALS[name].label}: {why}" for name, why in found["missing"].items()]
    said += [f"left out: {text}" for text in found["left_out"]]
    if found["disturbed_by"]:
        said.append(f"warning: the machine was not idle: {found['disturbed_by']}")
    return said
