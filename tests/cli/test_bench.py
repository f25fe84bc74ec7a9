"""Benchmarks as processes: what they say, write and refuse; no speed is promised."""

from __future__ import annotations

import json
import math
import os
import re

import pytest
from PIL import Image

from tests.cli.program import TINY, metabatch, only_message

FAST = ("seconds=0.02", "repeats=1", "batch_sizes=[4]")


@pytest.fixture
def without_original(tmp_path_factory) -> dict[str, str]:
    """An environment in which MetaBatch 0.9.1 is not to be found."""
    folder = tmp_path_factory.mktemp("shadow")
    (folder / "metabatch").mkdir()
    (folder / "metabatch" / "__init__.py").touch()
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


# --- loader ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loaders_are_compared_and_the_absent_original_is_named(tmp_path, without_original):
    words = ("bench", "loader", *FAST, "workers=[0,1]", "figure=rates.png", "rivals=[bare,naive,"
             "dataloader,metabatch,ours,ours_whole]")  # fmt: skip
    said = metabatch(*words, cwd=tmp_path, **without_original).stdout
    assert re.search(r"^time +about \d+:\d\d: \d+ rates of 0.02 s", said, re.MULTILINE)
    assert "metabatch 0.9.1: not installed: pip install metabatch==0.9.1" in said
    assert re.search(r"^ +metabatch 0\.9\.1 +not installed *$", said, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-loader.json", "rates.png"]
    assert Image.open(tmp_path / "rates.png").format == "PNG"

    found = json.loads((tmp_path / "bench-loader.json").read_text())
    assert (found["benchmark"], found["version"]) == ("loader", 1)
    assert {"cpu", "cores", "threads", "python", "torch", "numpy", "date", "load"} <= set(
        found["machine"]
    )
    assert found["method"]["seconds"] == 0.02
    assert list(found["works"]) == ["sine", "python", "images"]
    assert list(found["missing"]) == ["metabatch"]
    cells = {
        (c["work"], c["rival"], c["workers"]): c for c in found["cells"] if c["batch_size"] == 4
    }
    assert len(cells) == len(found["cells"]) == 3 * (2 + 2 + 2) + 2 + 2
    for (_, rival, _), row in cells.items():
        for of in ("batches_per_second", "tasks_per_second"):
            assert 0 < row[of]["min"] <= row[of]["median"] <= row[of]["max"]
        assert math.isclose(
            row["tasks_per_second"]["median"], 4 * row["batches_per_second"]["median"]
        )
        assert len(row["batches_per_second"]["rounds"]) == 1
        assert row["share_of_bare"] > 0
        assert ("ours_over_it" in row) == (rival in ("naive", "dataloader"))
    assert cells["sine", "bare", None]["share_of_bare"] == 1
    assert cells["sine", "dataloader", 1]["ours_over_it"].keys() == {"ours", "ours_whole"}
    assert cells["python", "dataloader", 0]["ours_over_it"].keys() == {"ours"}


def test_an_earlier_run_is_shown_and_drawn_again_without_measuring(tmp_path):
    first = metabatch("bench", "loader", *FAST, "work=sine", "rivals=[bare,naive]", cwd=tmp_path)
    table = first.stdout[first.stdout.index("sine: ") : first.stdout.index("written")]
    before = (tmp_path / "bench-loader.json").read_bytes()
    again = metabatch(
        "bench", "loader", "read=bench-loader.json", "figure=again.png", cwd=tmp_path
    ).stdout
    assert table.split() == again[again.index("sine: ") : again.index("drawn")].split()
    assert "measuring" not in again
    assert (tmp_path / "again.png").exists()
    assert (tmp_path / "bench-loader.json").read_bytes() == before


def test_nothing_is_written_where_nothing_shall_be(tmp_path):
    words = ("work=sine", "rivals=bare", "out=null")
    metabatch("bench", "loader", *FAST, *words, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loadr", ["bench=loadr", "did you mean 'loader'?"]),
        ("work=sine", ["bench", "allowed: learner, loader, train"]),
        ("loader sceonds=1", ["sceonds", "did you mean 'seconds'?"]),
        ("loader work=sinus", ["work=sinus", "did you mean 'sine'?"]),
        ("loader work=python rivals=ours_whole", ["rivals=ours_whole", "made one at a time"]),
        ("loader figure=nowhere/x.png", ["figure=nowhere/x.png", "there is no folder"]),
        ("loader read=other.json", ["read=other.json", "what `metabatch bench loader` wrote"]),
        ("train", ["taskset", "+experiment=NAME"]),
        ("train +experiment=cnp_sine bench.second=1", ["did you mean 'seconds'?"]),
        ("train +experiment=cnp_sine bench.warm_up=0", ["bench.warm_up=0", "at least 1"]),
        ("train +experiment=cnp_sine bench.out=nowhere/x", ["bench.out=nowhere/x", "no folder"]),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(tmp_path, words, said):
    (tmp_path / "other.json").write_text("[]")
    message = only_message(metabatch("bench", *words.split(), cwd=tmp_path, code=1))
    assert all(part in message for part in said), message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json"]


# --- train -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_steps_of_a_training_are_watched(tmp_path, workers):
    words = (*TINY, "bench.seconds=0.05", "bench.warm_up=2", f"loader.workers={workers}")
    said = metabatch("bench", "train", *words, cwd=tmp_path).stdout
    assert re.search(r"^waiting +\S+% of the time; .* at the 95th percentile$", said, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["bench-train.json"]
    found = json.loads((tmp_path / "bench-train.json").read_text())
    assert (found["benchmark"], found["device"], found["workers"]) == ("train", "cpu", workers)
    assert (found["threads"], found["batch_size"]) == (1, 4)
    assert found["steps"] >= 10
    assert found["steps_per_second"] > 0
    assert found["loader_alone"]["batches_per_second"] > 0
    assert found["excluded"] == ["logging", "validation", "checkpoints"]
    for key in ("step_ms", "waiting_ms", "working_ms", "waiting_percent"):
        assert found[key].keys() >= {"mean", "median", "p95"}
    parts = found["waiting_ms"]["mean"] + found["working_ms"]["mean"]
    assert math.isclose(parts, found["step_ms"]["mean"])
    assert 0 < found["waiting_percent"]["of_all"] < 100


@pytest.mark.slow
def test_a_training_that_is_watched_writes_only_what_it_is_told(tmp_path):
    words = (*TINY, "bench.seconds=0.05", "bench.warm_up=2", "bench.out=null")
    metabatch("bench", "train", *words, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
