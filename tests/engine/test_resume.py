"""Resuming: however a training was ended and taken up again, as if nothing had happened."""

from __future__ import annotations

import functools
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabatch_cli import mkl
from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.parts import Parts
from metabatch_cli.engine.stop import Interrupted
from metabatch_cli.engine.trainer import Trainer
from tests.engine.examples import (
    HERE,
    Killed,
    assert_same_run,
    differences,
    kill_at,
    learner,
    new_directory,
    result,
    rows,
    run,
    state,
)

STEPS = 10
NOISY = learner("Noisy")
UNEVEN = ("trainer.log_every=3", "trainer.eval_every=4", "trainer.checkpoint_every=3")


@functools.cache
def uninterrupted(*overrides: str) -> Path:
    """The directory of a run that nobody disturbed."""
    directory = new_directory()
    assert run(directory, *overrides)["status"] == "completed"
    return directory


@pytest.fixture(autouse=True)
def other_global_states():
    """Resuming must not live on what this process happens to have drawn before."""
    random.seed()
    np.random.seed()
    torch.seed()


def disturb(directory: Path, step: int, how: str, *overrides: str) -> None:
    """Train until a step and end there, one way or the other."""
    if how == "killed after the step":
        with pytest.raises(Killed):
            run(directory, *overrides, after_step=kill_at(step))
        assert result(directory)["status"] == "failed"
    elif how == "killed after a row":
        logger = f"+logger.kill={{_target_: {HERE}.KillAtRow, step: {step}, key: loss}}"
        with pytest.raises(Killed):
            run(directory, *overrides, logger)
    else:

        def after_step(now: int) -> None:
            if now == step:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(Interrupted):
            run(directory, *overrides, after_step=after_step)
        assert state(directory)["step"] == step
    random.seed()
    np.random.seed()
    torch.seed()


HOW = ["killed after the step", "interrupted"]


@settings(max_examples=6)
@given(
    stops=st.lists(
        st.tuples(st.integers(1, STEPS - 1), st.sampled_from(HOW)), min_size=1, max_size=3
    ).map(sorted),
    every=st.sampled_from([1, 3, 4, 20]),
)
def test_a_run_stopped_up_to_three_times_anywhere_equals_an_undisturbed_one(stops, every):
    overrides = (*NOISY, *UNEVEN, f"trainer.checkpoint_every={every}")
    directory = new_directory()
    for step, how in stops:
        done = state(directory)["step"] if (directory / "checkpoints" / "last.pt").exists() else 0
        if step > done:
            disturb(directory, step, how, *overrides)
    run(directory, *overrides)
    assert_same_run(directory, uninterrupted(*overrides))


@pytest.mark.parametrize(
    ("network", "objective"),
    [("np", "iwae"), ("anp", "elbo"), ("bnp", "bootstrap"), ("banp", "likelihood")],
)
def test_networks_that_draw_go_on_drawing(tmp_path, network, objective):
    own = f"model={network}", "model.encoder_depth=3", f"learner.objective={objective}"
    overrides = (*own, *UNEVEN)
    disturb(tmp_path, 5, "killed after the step", *overrides)
    run(tmp_path, *overrides)
    assert_same_run(tmp_path, uninterrupted(*overrides))


@pytest.mark.parametrize("step", [1, 5, 10])
def test_rows_that_were_logged_beyond_the_checkpoint_are_cut_off(tmp_path, step):
    disturb(tmp_path, step, "killed after a row", "trainer.checkpoint_every=4")
    assert rows(tmp_path)[-1]["step"] == step
    run(tmp_path, "trainer.checkpoint_every=4")
    assert_same_run(tmp_path, uninterrupted("trainer.checkpoint_every=4"))


@pytest.mark.parametrize("step", [5, 10])
def test_a_kill_between_validation_and_checkpoint_changes_nothing(tmp_path, step):
    # best.pt may be ahead of last.pt then
    logger = f"+logger.kill={{_target_: {HERE}.KillAtRow, step: {step}, key: val/mse}}"
    with pytest.raises(Killed):
        run(tmp_path, *NOISY, logger)
    run(tmp_path, *NOISY)
    assert_same_run(tmp_path, uninterrupted(*NOISY))


@pytest.mark.parametrize("step", [5, 10])
def test_a_kill_between_best_and_last_changes_nothing(tmp_path, monkeypatch, step):
    save = Trainer.save

    def killed(self):
        if self.step == step:
            raise Killed
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(Killed):
            run(tmp_path, *NOISY)
    assert state(tmp_path, "best")["step"] == 5 or step == 10
    run(tmp_path, *NOISY)
    assert_same_run(tmp_path, uninterrupted(*NOISY))


@pytest.mark.parametrize("how", ["killed in the test", "interrupted in the last step"])
def test_a_run_that_was_stopped_after_its_last_step_only_has_its_test_to_do(
    tmp_path, monkeypatch, how
):
    if how == "killed in the test":

        def killed(self):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Parts, "score", killed)
            with pytest.raises(Killed):
                run(tmp_path, *NOISY)
    else:
        disturb(tmp_path, STEPS, "interrupted", *NOISY)
    before = state(tmp_path)
    run(tmp_path, *NOISY)
    assert differences(before, state(tmp_path)) == []
    assert_same_run(tmp_path, uninterrupted(*NOISY))


@pytest.mark.parametrize("before", [False, True, None])
@pytest.mark.parametrize("now", [False, True])
def test_a_run_says_when_mkl_goes_on_otherwise(tmp_path, monkeypatch, before, now):
    monkeypatch.setattr(mkl, "avx512_enabled", lambda: bool(before))
    disturb(tmp_path, 5, "interrupted")
    if before is None:  # a run older than the entry
        file = tmp_path / "checkpoints" / "last.pt"
        saved = torch.load(file)
        del saved["mkl_avx512"]
        torch.save(saved, file)
    monkeypatch.setattr(mkl, "avx512_enabled", lambda: now)
    run(tmp_path)
    said = (tmp_path / "train.log").read_text()
    assert ("MKL now uses AVX-512" in said) == (now and not before)
    assert ("MKL no longer uses AVX-512" in said) == (before is True and not now)
    assert state(tmp_path)["mkl_avx512"] == now


@pytest.mark.parametrize("before", [0, 1])
def test_a_run_is_taken_up_with_another_number_of_workers(tmp_path, before):
    disturb(tmp_path, 7, "killed after the step", *NOISY, f"loader.workers={before}")
    run(tmp_path, *NOISY, f"loader.workers={1 - before}")
    assert_same_run(tmp_path, uninterrupted(*NOISY))


def test_a_set_of_single_tasks_is_resumed_exactly_in_the_middle_of_an_epoch(tmp_path):
    # 50 tasks in batches of 16: three steps an epoch, a task set of one task at a time
    overrides = ("loader.batch_size=16", "trainer.checkpoint_every=2")
    run(tmp_path / "whole", *overrides, taskset="OldStyle")
    with pytest.raises(Killed):
        run(
            tmp_path / "stopped",
            *overrides,
            "loader.workers=1",
            after_step=kill_at(5),
            taskset="OldStyle",
        )
    run(tmp_path / "stopped", *overrides, taskset="OldStyle")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_more_steps_go_on_where_the_schedule_allows_it(tmp_path):
    constant = (*NOISY, "scheduler=none")
    run(tmp_path, *constant, "trainer.max_steps=5")
    assert result(tmp_path)["step"] == 5
    run(tmp_path, *constant)
    assert_same_run(tmp_path, uninterrupted(*constant))


@settings(max_examples=4)
@given(first=st.integers(1, STEPS - 1))
def test_weights_after_more_steps_do_not_depend_on_where_they_were_counted_to(first):
    constant = (*NOISY, "scheduler=none")
    directory = new_directory()
    run(directory, *constant, f"trainer.max_steps={first}")
    run(directory, *constant)
    whole = state(uninterrupted(*constant))
    for key in ("learner", "optimizer", "loader", "random"):
        assert differences(state(directory)[key], whole[key]) == [], key


@pytest.mark.parametrize("step", [5, 7, 8])
def test_the_best_so_far_and_the_patience_left_are_remembered(tmp_path, step):
    patient = (*learner("Scripted", best_at=4), "trainer.eval_every=1", "trainer.patience=5")
    overrides = (*patient, "trainer.checkpoint_every=1")
    disturb(tmp_path, step, "killed after the step", *overrides)
    run(tmp_path, *overrides)
    assert state(tmp_path, "best")["step"] == 4
    assert result(tmp_path)["step"] == 9
    assert_same_run(tmp_path, uninterrupted(*overrides))


def test_a_kill_before_the_first_checkpoint_begins_anew(tmp_path):
    disturb(tmp_path, 3, "killed after the step", *NOISY, "trainer.checkpoint_every=20")
    assert not (tmp_path / "checkpoints" / "last.pt").exists()
    run(tmp_path, *NOISY, "trainer.checkpoint_every=20")
    assert_same_run(tmp_path, uninterrupted(*NOISY, "trainer.checkpoint_every=20"))


@pytest.mark.parametrize("precision", [64, "bf16"])
def test_other_precisions_are_resumed_exactly_too(tmp_path, precision):
    overrides = (*NOISY, f"trainer.precision={precision}")
    disturb(tmp_path, 7, "killed after the step", *overrides)
    run(tmp_path, *overrides)
    assert_same_run(tmp_path, uninterrupted(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [("optimizer=sgd", "optimizer.lr=0.01"), ("optimizer=adamw",), ("trainer.accumulate=2",)],
    ids=" ".join,
)
def test_other_optimizers_and_accumulation_are_resumed_exactly_too(tmp_path, overrides):
    disturb(tmp_path, 7, "killed after the step", *NOISY, *overrides)
    run(tmp_path, *NOISY, *overrides)
    assert_same_run(tmp_path, uninterrupted(*NOISY, *overrides))


def test_other_optimizers_are_resumed_exactly_with_a_restarting_schedule(tmp_path):
    schedule = (
        "scheduler=step",
        "scheduler.step_size=3",
    )
    disturb(tmp_path, 7, "killed after the step", *schedule)
    run(tmp_path, *schedule)
    assert_same_run(tmp_path, uninterrupted(*schedule))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 6])
def test_a_signal_ends_the_training_after_its_step_and_everything_is_saved(tmp_path, signum, step):
    def after_step(now: int) -> None:
        if now == step:
            signal.raise_signal(signum)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, after_step=after_step)
    assert caught.value.code == 128 + signum
    assert result(tmp_path)["status"] == "interrupted"
    assert result(tmp_path)["step"] == state(tmp_path)["step"] == step
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    run(tmp_path)
    assert_same_run(tmp_path, uninterrupted())


def test_signals_are_received_in_the_final_test_as_well(tmp_path, monkeypatch):
    handlers = []
    score = Parts.score

    def watched(self):
        handlers.append(signal.getsignal(signal.SIGTERM))
        return score(self)

    monkeypatch.setattr(Parts, "score", watched)
    run(tmp_path)
    assert handlers != [signal.SIG_DFL]


def test_a_run_that_began_from_another_can_be_resumed_without_it(tmp_path):
    run(tmp_path / "first")
    overrides = (f"trainer.init_from={tmp_path / 'first'}", "seed=1")
    run(tmp_path / "whole", *overrides)
    disturb(tmp_path / "second", 7, "killed after the step", *overrides)
    shutil.rmtree(tmp_path / "first")
    run(tmp_path / "second", *overrides)
    assert_same_run(tmp_path / "second", tmp_path / "whole")


def test_weights_that_this_version_has_not_are_refused_and_kept(tmp_path):
    disturb(tmp_path, 5, "interrupted")
    file = tmp_path / "checkpoints" / "last.pt"
    older = torch.load(file, weights_only=True)
    weights = older["learner"]
    weights["by another name"] = weights.pop(next(iter(weights)))
    torch.save(older, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"last\.pt: does not fit this version of the code"):
        run(tmp_path)
    assert file.read_bytes() == before
