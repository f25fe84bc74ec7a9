"""The terminal: tables, a progress bar where somebody looks, plain sparse lines elsewhere."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

BASELINE_WIDTH = 13  # columns of a baseline's name, which may go over two lines
LINE_EVERY = 10.0  # seconds between two progress lines where there is no terminal

log = logging.getLogger("metabatch")


def make_console() -> Console:
    """Standard output; where it is no terminal, lines are as long as they are."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 160))
    return console


def silent() -> Console:
    """A console that nobody sees."""
    return Console(file=open(os.devnull, "w"), highlight=False, width=160)


class Reporter:
    """Says what a training is about to do, how far it is, and what came out."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._started_at = (0.0, 0)
        self._validation = ""

    def say(self, text: str) -> None:
        """One line for the terminal and for train.log."""
        self.console.print(text, markup=False, soft_wrap=True)
        log.info(text)

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """What the training will do, a row for each part."""
        table = Table(
            title=title, title_justify="left", show_header=False, box=None, pad_edge=False
        )
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(name, text)
            log.info("%-12s %s", name, text)
        self.console.print(table)

    def _progress(self, title: str, **more: bool) -> Progress:
        return Progress(
            TextColumn(f"[bold]{title}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            **more,  # type: ignore[arg-type]
        )

    @contextmanager
    def training(self, start: int, total: int) -> Iterator[None]:
        """While a training of `total` steps goes on from `start`."""
        self._started_at = (time.monotonic(), start)
        self._last_line = time.monotonic()
        if not self.console.is_terminal:
            yield
            return
        self._bar = self._progress("train")
        self._task = self._bar.add_task("train", total=total, completed=start, status="")
        with self._bar:
            try:
                yield
            finally:
                self._bar = None

    @contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[str], None]]:
        """While `total` things are done; what it gives is told what is done next, each time."""
        done, last_line = -1, time.monotonic()
        bar = self._progress(title, transient=True, disable=not self.console.is_terminal)
        task = bar.add_task(title, total=total, status="")

        def advance(status: str) -> None:
            nonlocal done, last_line
            done += 1
            bar.update(task, completed=done, status=status)
            if bar.disable and time.monotonic() - last_line >= LINE_EVERY:
                last_line = time.monotonic()
                self.say(f"{title} {done}/{total}  {status}")

        with bar:
            yield advance

    def advance(self, step: int, total: int, loss: float | None) -> None:
        """One more step is done; shown ten times a second, or a line every ten seconds."""
        now = time.monotonic()
        if now - self._last_line < (0.1 if self._bar is not None else LINE_EVERY):
            return
        self._last_line = now
        began, start = self._started_at
        rate = (step - start) / max(now - began, 1e-9)
        loss_text = f"loss {loss:.4g}" if loss is not None else ""
        parts = [loss_text, self._validation, f"{rate:.3g} steps/s"]
        status = "  ".join(part for part in parts if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
            return
        left = clock((total - step) / max(rate, 1e-9))
        self.say(f"step {step:,}/{total:,} ({step / total:.0%})  {status}  {left} left")

    def validated(self, step: int, metric: str, score: float | None, best: bool) -> None:
        """A validation is done; stands beside the loss until the next one."""
        shown = "–" if score is None else f"{score:.4g}"
        self._validation = f"val {metric} {shown}{' (best)' if best else ''}"
        if self._bar is not None:  # lines above the bar; elsewhere the next line has it
            self.console.print(f"step {step:,}  {self._validation}", markup=False)
        log.info("step %d: %s", step, self._validation)

    def result(self, title: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """A table of metrics: mean, 95% interval, tasks; the oracle and baselines where known.

        Last comes what else an entry says in words, such as `scoring=marginal`, unless its name
        says so already.
        """
        with_oracle = any(entry.get("oracle") is not None for entry in metrics.values())
        baselines = list(dict.fromkeys(b for e in metrics.values() for b in e.get("baselines", {})))
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("metric", style="bold cyan", no_wrap=True)
        for name in ("mean", "± 95%", "tasks", *(["oracle"] if with_oracle else [])):
            table.add_column(name, justify="right", no_wrap=True)
        for name in baselines:
            table.add_column(name.replace("_", " "), justify="right", max_width=BASELINE_WIDTH)
        facts = {name: _facts(name, entry) for name, entry in metrics.items()}
        if any(facts.values()):
            table.add_column("", overflow="fold")  # the only one that may go over two lines
        for name, entry in metrics.items():
            cells = [number(entry["mean"]), number(entry["ci95"]), f"{entry['tasks']:,}"]
            if with_oracle:
                cells.append(number(entry.get("oracle")))
            cells += [number(entry.get("baselines", {}).get(baseline)) for baseline in baselines]
            table.add_row(name, *cells, *([facts[name]] if any(facts.values()) else []))
            log.info("%s = %s ± %s (%s tasks)", name, *cells[:3])
        self.console.print(table)


def _facts(name: str, entry: Mapping[str, Any]) -> str:
    words = [f"{key}={value}" for key, value in entry.items() if isinstance(value, str)]
    said = name.partition("@")[2].split(",")
    return ", ".join(word for word in words if word not in said)


def number(value: float | None) -> str:
    """Four decimals, or four digits where they would not show."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
