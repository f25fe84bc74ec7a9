"""Meta-steps of all rivals are the same steps, or they are not reported; the command beside it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from metabatch_cli.bench.learner import CHECKED, compared, distance, reference
from metabatch_cli.bench.meta_rivals import META_RIVALS, InTorch, Setting, conventional
from metabatch_cli.bench.meta_work import META_WORKS
from metabatch_cli.report.console import Reporter
from tests.cli.program import metabatch, only_message

# a training this short is not worth compiling
SETTINGS = {
    "sine_mlp": Setting(META_WORKS["sine_mlp"](2, 2), training=1),
    "omniglot_conv4": Setting(META_WORKS["omniglot_conv4"](2, 1), training=1),
}
# in bfloat16 it is near them only where there are many tasks
EAGER = [name for name in META_RIVALS if name not in ("ours_compiled", "ours_bf16", "jax")]
with_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="no JAX here")


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    "work", ["sine_mlp", pytest.param("omniglot_conv4", marks=pytest.mark.slow)]
)
def test_all_rivals_take_the_steps_of_the_reference(work, first_order):
    setting = replace(SETTINGS[work], first_order=first_order)
    names = [name for name in EAGER if META_RIVALS[name].does(setting.work)]
    rows, refused = compared(setting, names, 0.001, 1, Reporter())
    assert refused == []
    assert [row["rival"] for row in rows] == names
    for row in rows:
        assert row["steps_per_second"]["median"] > 0
        assert row["over_conventional"] > 0
        assert row["over_jax"] is None


@with_jax
@pytest.mark.parametrize("work", SETTINGS)
def test_jax_takes_the_steps_of_the_reference(work):
    rows, refused = compared(SETTINGS[work], ["jax"], 0.001, 1, Reporter())
    assert (len(rows), refused) == (1, [])


def test_who_takes_other_steps_is_not_reported(monkeypatch):
    setting = SETTINGS["sine_mlp"]
    # first order where second is asked for: other gradients, nearly the same losses
    right = META_RIVALS["ours_eager"]
    wrong = replace(right, make=lambda asked: right.make(replace(asked, first_order=True)))
    monkeypatch.setitem(META_RIVALS, "ours_eager", wrong)
    rows, refused = compared(setting, ["ours_eager", "ours_loop"], 0.001, 1, Reporter())
    assert [row["rival"] for row in rows] == ["ours_loop"]
    (said,) = refused
    assert "ours, eager at sine_mlp: other steps than the reference's" in said


def test_who_learns_at_another_rate_is_not_reported(monkeypatch):
    def slow(setting: Setting) -> InTorch:
        stepper = conventional(setting)
        assert isinstance(stepper, InTorch)
        stepper.optimizer.param_groups[0]["lr"] = 0.1
        return stepper

    wrong = replace(META_RIVALS["conventional"], make=slow)
    monkeypatch.setitem(META_RIVALS, "conventional", wrong)
    rows, refused = compared(SETTINGS["sine_mlp"], ["conventional"], 0.001, 1, Reporter())
    assert (rows, len(refused)) == ([], 1)


def test_every_kind_of_work_is_tried_here():
    assert SETTINGS.keys() == META_WORKS.keys()


@pytest.mark.parametrize("work", META_WORKS)
def test_ours_and_the_plain_network_are_the_same_function(work):
    setting = META_WORKS[work](2)
    ours, plain = setting.network().double(), setting.plain().double()
    batch = setting.batches()[0]
    x = batch.context_x[0].double()
    torch.testing.assert_close(ours(x), plain(x))


def test_the_reference_is_in_64_bits():
    losses, gradients = reference(SETTINGS["sine_mlp"])
    assert len(losses) == CHECKED
    assert all(gradient.dtype == torch.float64 for gradient in gradients)
    assert distance(gradients, gradients) == 0


@pytest.mark.slow
def test_the_command_measures_shows_and_writes(tmp_path):
    words = ("bench", "learner", "tasks=2", "training=1", "seconds=0.001", "repeats=1")
    more = ("work=sine_mlp", "rivals=[conventional,ours]", "threads=[1,2]")
    said = metabatch(*words, *more, cwd=tmp_path).stdout
    assert "sine_mlp: MLP 1-40-40-1, 10 shots, 10 targets, 1 thread" in said
    assert "10 targets, 2 threads" in said
    found = json.loads((tmp_path / "bench-learner.json").read_text())
    assert found["benchmark"] == "learner"
    assert [(r["threads"], r["rival"]) for r in found["rows"]] == [
        (count, rival) for count in (1, 2) for rival in ("conventional", "ours")
    ]
    assert found["works"]["sine_mlp"]["inner_steps"] == 5
    for row in found["rows"]:
        assert row["gradient_error"] < 1e-3
        assert row["over_conventional"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["work=sine"], ["work=sine", "did you mean 'sine_mlp'?"]),
        (["rivals=ours_bf16", "work=sine_mlp"], ["rivals=ours_bf16", "none of them does sine_mlp"]),
        (["tasks=0"], ["tasks=0"]),
    ],
)
def test_a_mistake_is_one_message(tmp_path, words, said):
    message = only_message(metabatch("bench", "learner", *words, cwd=tmp_path, code=1))
    assert all(part in message for part in said), message
    assert list(tmp_path.iterdir()) == []
