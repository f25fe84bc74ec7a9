"""Checkpoints and random states: read back to the bit, or refused by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine import checkpoint
from metabatch_cli.engine.random_states import (
    preserved,
    random_states,
    restore_random_states,
    seed_everything,
)
from tests.engine.examples import as_bytes, differences, parts, run, state


def draws() -> list[object]:
    """What all generators give next, in odd numbers: normal ones are made in pairs."""
    return [
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(()).item(),
    ]


@given(st.integers(-(2**70), 2**70), st.integers(0, 3))
def test_random_states_survive_a_checkpoint(tmp_path_factory, seed, before):
    file = tmp_path_factory.mktemp("checkpoints") / "state.pt"
    with preserved(seed):
        for _ in range(before):
            draws()
        checkpoint.save(file, {"learner": {}, "random": random_states()})
        expected = draws()
        seed_everything(0)
        restore_random_states(checkpoint.load(file)["random"])
        assert draws() == expected


@given(st.integers(0, 2**32 - 1))
def test_generators_that_are_lent_out_come_back_as_they_were(seed):
    states = random_states()
    with preserved(seed):
        inside = draws()
    with pytest.raises(ZeroDivisionError), preserved():
        1 / (len(draws()) * 0)
    with preserved(seed):
        assert draws() == inside
    assert differences(random_states(), states) == []


DRAWS = [random.random, np.random.rand, lambda: torch.rand(()).item()]


def drawn_under(seeds: list[int], draw) -> list[float]:
    with preserved():
        found = []
        for seed in seeds:
            seed_everything(seed)
            found.append(draw())
    return found


@pytest.mark.parametrize("draw", DRAWS, ids=["random", "numpy", "torch"])
def test_a_seed_is_the_same_numbers_and_another_seed_others(draw):
    found = drawn_under([3, 3, 4, 0, 2**31], draw)
    assert found[0] == found[1]
    assert len(set(found[1:])) == 4


@pytest.mark.parametrize(
    ("draw", "other"),
    [(DRAWS[0], -3), (DRAWS[1], -3), (DRAWS[2], 3 + 2**32)],
    ids=["random", "numpy", "torch"],
)
def test_any_other_integer_is_another_seed(draw, other):
    one, another = drawn_under([3, other], draw)
    assert one != another


def test_tensors_are_read_back_to_the_bit(tmp_path):
    tensors = {
        "float32": torch.randn(3, 4),
        "float64": torch.randn(2, dtype=torch.float64),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "int": torch.arange(5),
    }
    checkpoint.save(tmp_path / "last.pt", {"learner": tensors, "step": 3})
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["step"] == 3
    for name, tensor in tensors.items():
        assert as_bytes(loaded["learner"][name]) == as_bytes(tensor), name


def test_a_checkpoint_of_a_run_is_read_without_trusting_it(tmp_path):
    run(tmp_path)
    for name in ("last", "best"):
        loaded = torch.load(tmp_path / "checkpoints" / f"{name}.pt", weights_only=True)
        assert loaded["learner"]
        assert loaded["step"] in (5, 10)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path, keep):
    file = tmp_path / "last.pt"
    checkpoint.save(file, {"learner": {"weight": torch.randn(100)}})
    content = file.read_bytes()
    size = keep if isinstance(keep, int) else int(len(content) * keep)
    file.write_bytes(content[:size])
    with pytest.raises(UserError, match=r"last\.pt: is no checkpoint, or a damaged one"):
        checkpoint.load(file)


def test_a_run_with_a_damaged_checkpoint_says_which_file_it_is(tmp_path):
    run(tmp_path, "trainer.max_steps=5", "scheduler=none")
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last\.pt"):
        run(tmp_path, "scheduler=none")


def test_other_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "nothing.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt: .*no entry 'learner'"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt"):
        checkpoint.load(tmp_path / "list.pt")
    checkpoint.save(tmp_path / "future.pt", {"learner": {}, "format": 99})
    with pytest.raises(UserError, match=r"future.pt: has checkpoint format 99"):
        checkpoint.load(tmp_path / "future.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("evil",))

    torch.save({"learner": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt"):
        checkpoint.load(tmp_path / "evil.pt")


# --- weights of another run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    run(directory)
    return directory


def test_a_training_begins_with_the_best_weights_of_a_run(trained):
    learner = parts(f"trainer.init_from={trained}", "seed=9").learner
    best = state(trained, "best")["learner"]
    assert differences(dict(learner.state_dict()), dict(best)) == []


def test_a_training_begins_with_the_weights_of_a_checkpoint(trained):
    file = trained / "checkpoints" / "last.pt"
    learner = parts(f"trainer.init_from={file}").learner
    assert differences(dict(learner.state_dict()), dict(state(trained)["learner"])) == []


def test_only_weights_are_taken(trained, tmp_path):
    steps = []
    run(tmp_path, f"trainer.init_from={trained}", after_step=steps.append)
    assert steps == list(range(1, 11))


@pytest.mark.parametrize(
    ("override", "name"),
    [("model.width=12", "model."), ("model.encoder_depth=3", "model.encoders.0.points.4")],
)
def test_weights_of_another_shape_are_refused_by_the_tensors_name(trained, override, name):
    with pytest.raises(UserError) as caught:
        parts(f"trainer.init_from={trained}", override).learner  # noqa: B018
    said = str(caught.value)
    assert said.startswith(f"trainer.init_from={trained}: {name}")
    assert " there and " in said


def test_of_several_that_differ_the_first_is_named(tmp_path):
    def network(width: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(50)))

    file = tmp_path / "weights.pt"
    checkpoint.save(file, {"learner": network(2).state_dict()})
    with pytest.raises(UserError, match=r": 0\.weight is 2×2 there and 3×3 here"):
        checkpoint.load_weights(network(3), str(file))


@pytest.mark.parametrize(
    "source",
    [
        "empty",
        ("nowhere"),
    ],
)
def test_a_source_that_is_no_run_is_named_under_its_key(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"trainer\.init_from=.*{source}: "):
        parts(f"trainer.init_from={tmp_path / source}").learner  # noqa: B018
