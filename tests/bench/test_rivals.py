"""Every rival does the same work and gives batches of the same shapes; nothing of it stays."""

from __future__ import annotations

import gc
import importlib.util
import math
import multiprocessing
import sys
import types
from itertools import islice

import pytest
import torch
from torch import Tensor

from metabatch_cli.batching.task import Task, as_task, tree_map
from metabatch_cli.bench.rivals import RIVALS, missing
from metabatch_cli.bench.work import WORKS, ImageWork, PythonWork, SineWork, Work, mebibytes

BATCH = 4
WORK: dict[str, Work] = {
    "sine": SineWork(),
    "python": PythonWork(steps=80),
    "images": ImageWork(pool=8),
}
INSTALLED = importlib.util.find_spec("metabatch") is not None


def rivals_of(work: str) -> list[object]:
    """The rivals that do it; the original where it is installed."""
    without = pytest.mark.skipif(not INSTALLED, reason="metabatch 0.9.1 is not installed")
    return [
        pytest.param(name, marks=[without] if name == "metabatch" else [])
        for name, rival in RIVALS.items()
        if rival.does(WORK[work])
    ]


PAIRS = [
    pytest.param(work, *rival.values, marks=rival.marks)
    for work in WORK
    for rival in rivals_of(work)
]


def read(rival: str, work: Work, workers: int = 0, count: int = 1) -> list[Task]:
    with RIVALS[rival].open(work, BATCH, workers) as batches:
        # copies: what a worker lent may be gone with it
        return [tree_map(torch.clone, as_task(batch)) for batch in islice(batches, count)]


def outline(task: Task) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    leaves: list[Tensor] = [*task[:4], *task.aux.values()]
    return [(leaf.dtype, tuple(leaf.shape)) for leaf in leaves]


def test_every_kind_of_work_is_tried_here():
    assert WORK.keys() == WORKS.keys()


@pytest.mark.parametrize(("work", "rival"), PAIRS)
def test_all_rivals_make_batches_of_the_same_shapes(work, rival):
    expected = WORK[work].batch(BATCH, torch.Generator())
    (batch,) = read(rival, WORK[work])
    assert outline(batch) == outline(expected)
    assert batch.aux.keys() == expected.aux.keys()
    assert batch.context_x.shape[1] == WORK[work].n_context
    assert batch.target_x.shape[1] == WORK[work].n_target


@pytest.mark.parametrize("rival", rivals_of("sine"))
def test_all_rivals_compute_the_same_waves(rival):
    work = WORK["sine"]
    assert isinstance(work, SineWork)
    for batch in read(rival, work, count=2):
        for x, y in ((batch.context_x, batch.context_y), (batch.target_x, batch.target_y)):
            torch.testing.assert_close(y, work.functions.truth(batch, x))


@pytest.mark.parametrize("rival", rivals_of("python"))
def test_all_rivals_simulate_as_long_and_as_often(rival, monkeypatch):
    work = PythonWork(steps=80)
    begun: list[float] = []
    simulate = work._observed
    monkeypatch.setattr(work, "_observed", lambda angle: begun.append(angle) or simulate(angle))
    batches = read(rival, work, count=3)
    assert len(begun) >= 3 * BATCH
    assert len(begun) % BATCH == 0
    for batch in batches:
        assert batch.target_x[:, -1, 0].tolist() == pytest.approx([78 * 0.01] * BATCH)


@pytest.mark.parametrize("rival", rivals_of("images"))
def test_all_rivals_normalise_their_images(rival):
    work = WORK["images"]
    assert isinstance(work, ImageWork)
    (batch,) = read(rival, work)
    raw = batch.context_x * work.std + work.mean
    torch.testing.assert_close(raw, raw.round(), atol=1e-3, rtol=0)
    assert raw.min() >= -1e-3
    assert raw.max() <= 255.001


@pytest.mark.parametrize("rival", rivals_of("python"))
def test_workers_are_gone_when_a_rival_is_closed(rival):
    if not RIVALS[rival].has_workers:
        return
    before = set(multiprocessing.active_children())
    read(rival, WORK["python"], workers=1, count=2)
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


def test_the_bare_work_has_one_thread_and_gives_the_others_back():
    before = torch.get_num_threads()
    with RIVALS["bare"].open(WORK["sine"], BATCH, 0) as batches:
        next(batches)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_pendulum_swings():
    task = PythonWork(steps=4000)._observed(0.1)
    angles = torch.cat([task.context_y, task.target_y]).flatten()
    assert angles.abs().max() < 0.13  # Euler's way gains a little
    assert angles.min() < -0.05 < 0.05 < angles.max()


def test_two_milliseconds_are_found_out_once():
    assert PythonWork().steps > 100


def test_the_memory_of_a_batch_is_known_before_it_is_made():
    work = WORK["images"]
    batch = work.batch(3, torch.Generator())
    assert math.isclose(mebibytes(work, 3), sum(t.nbytes for t in batch[:4]) / 2**20)


# --- the original ------------------------------------------------------------------------------


def test_an_original_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "metabatch", None)
    assert "pip install metabatch==0.9.1" in (missing("metabatch") or "")


def test_a_folder_named_metabatch_is_not_the_original(monkeypatch):
    monkeypatch.setitem(sys.modules, "metabatch", types.ModuleType("metabatch"))
    assert missing("metabatch") is not None


@pytest.mark.parametrize("rival", [name for name in RIVALS if name != "metabatch"])
def test_the_others_are_never_missing(rival):
    assert missing(rival) is None
