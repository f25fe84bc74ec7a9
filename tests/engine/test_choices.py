"""What is left to the machine is measured, said, written down, and kept by a resumed run."""

from __future__ import annotations

import functools

import pytest
import torch
import yaml

from metabatch_cli.engine.parts import is_worth_compiling
from metabatch_cli.engine.run import train
from metabatch_cli.learners.inner_loop import GradientBased
from metabatch_cli.learners.learner import CompileCost
from tests.composed import composed
from tests.engine.examples import (
    Killed,
    Watcher,
    assert_same_run,
    differences,
    kill_at,
    learner,
    result,
    run,
    settings,
    state,
)


def maml(directory, *overrides, after_step=None):
    """A short training, and what was said."""
    watcher = Watcher(after_step)
    short = ("+experiment=maml_sine", "+debug=short", "loader.batch_size=4", "loader.device=cpu")
    train(composed(*short, "evaluation.figures=false", *overrides), directory, reporter=watcher)
    return watcher.text


def config_of(directory):
    return yaml.safe_load((directory / "config.yaml").read_text())


def choosing(**arguments):
    return learner("Choosing", **arguments)


@pytest.mark.parametrize(("seconds", "compiles"), [(0.001, True), (100.0, False)])
def test_a_step_is_compiled_where_the_training_is_long_enough(tmp_path, seconds, compiles):
    """Ten steps, of which each would be 10 ms shorter."""
    watcher = Watcher()
    train(settings(*choosing(seconds=seconds)), tmp_path, reporter=watcher)
    assert config_of(tmp_path)["trainer"]["compile"] is compiles
    assert ("compiled in" in watcher.text) is compiles
    assert (", compiled" in watcher.text) is compiles
    calls = result(tmp_path)["metrics"]["test/compiled_calls"]["mean"]
    assert calls >= 10 if compiles else calls == 0


@pytest.mark.parametrize(("asked", "compiles"), [("true", True), ("false", False)])
def test_what_is_asked_for_is_not_chosen(tmp_path, asked, compiles):
    run(tmp_path, *choosing(seconds=1.0), f"trainer.compile={asked}")
    assert config_of(tmp_path)["trainer"]["compile"] is compiles


@pytest.mark.slow
def test_a_neural_process_learns_the_same_compiled(tmp_path, monkeypatch):
    traced = functools.partial(torch.compile, backend="eager")  # all but the compiler itself
    monkeypatch.setattr(torch, "compile", traced)
    few = ("trainer.precision=64", "trainer.max_steps=3", "scheduler=none")
    for compiles in ("true", "false"):
        run(tmp_path / compiles, f"trainer.compile={compiles}", *few)
    compiled, plain = (state(tmp_path / name)["learner"] for name in ("true", "false"))
    torch.testing.assert_close(compiled, plain)


def test_a_learner_that_says_nothing_of_compiling_is_not_compiled(tmp_path):
    run(tmp_path)
    assert config_of(tmp_path)["trainer"]["compile"] is False


def test_compiling_has_to_be_earned_back_twice():
    cost = CompileCost(seconds=10.0, saved_per_step=0.001)
    assert not is_worth_compiling(cost, 20_000)
    assert is_worth_compiling(cost, 20_001)
    assert not is_worth_compiling(None, 10**9)


def test_what_a_learner_chose_is_written_and_taken_by_a_resumed_run(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, *choosing(way="auto"), after_step=kill_at(7))
    assert config_of(tmp_path)["learner"]["way"] == "first"
    run(tmp_path, *choosing(way="auto"))
    assert config_of(tmp_path)["learner"]["way"] == "first"
    assert result(tmp_path)["metrics"]["test/chosen"]["mean"] == 0  # it was not asked again


def test_choosing_leaves_no_trace_in_weights_or_random_numbers(tmp_path):
    run(tmp_path / "plain", *choosing(seconds=100.0, way="first"), "trainer.compile=false")
    run(tmp_path / "chosen", *choosing(seconds=100.0, way="auto"))
    assert differences(state(tmp_path / "plain"), state(tmp_path / "chosen")) == []


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_maml_resumes_to_the_bit_in_the_way_it_began(tmp_path, way):
    forced = f"learner.inner_loop={way}"
    maml(tmp_path / "through", forced)
    with pytest.raises(Killed):
        maml(tmp_path / "killed", forced, after_step=kill_at(7))
    maml(tmp_path / "killed", forced)
    assert_same_run(tmp_path / "through", tmp_path / "killed")


@pytest.mark.parametrize("faster", ["vmap", "loop"])
def test_the_faster_way_of_maml_is_in_its_configuration(tmp_path, monkeypatch, faster):
    def seconds(self: GradientBased, at_once: bool, tasks: object) -> float:
        return 1.0 if at_once == (faster == "vmap") else 2.0

    monkeypatch.setattr(GradientBased, "_seconds", seconds)
    said = maml(tmp_path)
    assert config_of(tmp_path)["learner"]["inner_loop"] == faster
    assert f"MAML, inner_loop {faster}" in said
