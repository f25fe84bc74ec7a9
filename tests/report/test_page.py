"""Tables as files, and the page: opened and clicked in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from metabatch_cli.report.page import POINTS, as_html
from metabatch_cli.report.table import summarise
from metabatch_cli.report.table_files import as_csv, as_latex
from tests.report.browser import CHROMIUM, Browser
from tests.report.examples import model, write


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three widths with two seeds, of which one failed; the score is what width and seed say."""
    for width in (0.5, 0.25, 16):
        for seed in (0, 1):
            failed = (width, seed) == (16, 1)
            run = write(
                tmp_path / f"width={width},seed={seed}",
                seed,
                typed=(f"model.width={width}",),
                status="failed" if failed else "completed",
                error="loss < 0, <!-- <script> & no </script> number" if failed else None,
                metrics={
                    "test/accuracy@ways=5": width / 20 + seed / 100,
                    "test/mse": 5e-6 / width,
                },
                **model(width),
            )
            rows = [{"step": s, "loss": 1 / s, "val/accuracy": s / 1000} for s in range(1, 1001)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_csv_has_every_digit(sweep):
    summary = summarise([sweep], ["*"])
    rows = list(csv.DictReader(io.StringIO(as_csv(summary))))
    assert [row["model.width"] for row in rows] == ["0.5", "0.25", "16"]
    assert [(row["completed"], row["runs"]) for row in rows] == [("2", "2"), ("2", "2"), ("1", "2")]
    for row, group in zip(rows, summary.groups, strict=True):
        score = group.score("test/accuracy@ways=5")
        assert float(row["test/accuracy@ways=5"]) == score.mean
        assert float(row["test/accuracy@ways=5 ci95"]) == score.ci95
        assert row["test/accuracy@ways=5 over"] == score.over
        assert float(row["test/mse"]) == group.score("test/mse").mean


def test_the_latex_table_is_one_with_the_best_in_bold(sweep):
    lines = as_latex(summarise([sweep], ["*"])).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}"
    assert lines[2:4] == [r"model.width & accuracy & mse \\", r" & ways=5 &  \\"]
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert [line.count("&") for line in body] == [2, 2, 2]
    assert [r"\mathbf{0.8000" in line for line in body] == [False, False, True]
    assert r"3.125 \cdot 10^{-7}" in body[2]
    assert body[2].count("mathbf") == 2  # the least error is the best


def test_what_latex_would_read_otherwise_is_escaped(tmp_path):
    for number, path in enumerate(("a_b%", r"[c]\d{}~^")):
        write(tmp_path / f"{number}", typed=(f"data_dir={path}",), model={"name": path})
    text = as_latex(summarise([tmp_path]))
    assert r"a\_b\%" in text
    assert r"{[}c{]}\textbackslash{}d\{\}\textasciitilde{}\textasciicircum{}" in text


def test_what_was_measured_otherwise_is_not_compared_but_told(tmp_path):
    for number, way in enumerate(("marginal", "joint")):
        write(tmp_path / f"{number}", number, how={"scoring": way}, **model(8 + number))
    summary = summarise([tmp_path])
    assert summary.best("test/accuracy") == []
    row, _ = csv.DictReader(io.StringIO(as_csv(summary)))
    assert row["scoring"] == "marginal"
    assert "& marginal " in as_latex(summary)
    assert '"how": ["scoring"]' in as_html(summary)


def test_without_a_direction_nothing_is_best(tmp_path):
    for number, width in enumerate((8, 16)):
        write(tmp_path / f"{number}", metrics={"test/oddity": float(width)}, **model(width))
    summary = summarise([tmp_path])
    assert summary.best("test/oddity") == []
    assert "mathbf" not in as_latex(summary)


def test_the_page_needs_nothing_beside_itself(sweep):
    page = as_html(summarise([sweep]))
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|@import", page)
    assert page.count("<script") == page.count("</script>") == 2  # an error's text is none
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    curve = data["runs"][0]["curves"]["val/accuracy"]
    assert len(curve) <= POINTS
    assert curve[-1][0] == 1000
    assert data["curves"][0] == "val/accuracy"


@pytest.fixture
def browser(sweep: Path, tmp_path_factory) -> Iterator[Browser]:
    page = sweep / "report.html"
    page.write_text(as_html(summarise([sweep], ["*"])))
    opened = Browser(page, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def column(browser: Browser, table: str, number: int) -> list[str]:
    rows = f"document.querySelectorAll('#{table} tbody tr')"
    return browser.run(f"[...{rows}].map((row) => row.cells[{number}].textContent)")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page in")
def test_the_page_sorts_filters_and_draws_where_it_is_clicked(browser):
    assert column(browser, "table", 0) == ["0.5", "0.25", "16"]
    heading = "#table th:nth-child(2)"
    browser.click(f"{heading} button")
    assert column(browser, "table", 0) == ["0.25", "0.5", "16"]
    assert browser.run(f"document.querySelector('{heading}').ariaSort") == "ascending"
    browser.click(f"{heading} button")
    assert column(browser, "table", 0) == ["16", "0.5", "0.25"]
    browser.click("#table th:nth-child(1) button")  # numbers as numbers
    assert column(browser, "table", 0) == ["0.25", "0.5", "16"]
    marks = "[...document.querySelectorAll('#effects text[text-anchor=middle]')]"
    assert browser.run(f"{marks}.map((mark) => mark.textContent)") == ["0.25", "0.5", "16"]
    assert browser.run("document.querySelectorAll('#table [aria-sort]').length") == 1

    lines = "document.querySelectorAll('#curves .curve').length"
    assert browser.run(lines) == 6
    browser.click("#legend button:nth-child(1)")
    assert browser.run(lines) == 4
    browser.click("#legend button:nth-child(1)")
    assert browser.run(lines) == 6

    assert browser.run("document.querySelectorAll('#effects figure').length") == 1
    assert browser.run("document.querySelectorAll('#effects circle').length") == 3
    assert column(browser, "runs", 0).count("failed") == 1
    assert "loss < 0, <!-- <script> & no </script> number" in column(browser, "runs", 5)
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.run(wide)
