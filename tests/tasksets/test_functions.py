"""Random functions: points where they are said to be, on the functions that they are said to be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching import Task, TaskLoader, digest
from metabatch_cli.config.build import build_taskset
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.compose import compose
from tasksets.functions import Family, Functions, Sawtooth, Sine

FAMILIES = [Sine, Sawtooth]
seeds = st.integers(0, 2**63 - 1)
bounds = st.tuples(st.floats(-5, 5, width=32), st.floats(0, 5, width=32)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)


def functions(family: Family | None = None, **changes: object) -> Functions:
    sizes = {"min_pts": 1, "max_ctx_pts": 8, "max_tgt_pts": 12}
    return Functions(family or Sine(), **{**sizes, **changes})


def make(
    taskset: Functions, indices: object, n_context: int = 6, n_target: int = 9, seed: int = 0
) -> Task:
    generator = torch.Generator().manual_seed(seed % 2**32)
    return taskset.__gettasks__(torch.as_tensor(indices), n_context, n_target, generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_tasks", [None, 100])
@given(seed=seeds)
def test_every_parameter_lies_in_its_range(family, n_tasks, seed):
    drawn = family()
    tasks = make(functions(drawn, n_tasks=n_tasks), range(100), seed=seed)
    parameters = tasks.aux["parameters"]
    assert parameters.shape == (100, len(drawn.names))
    assert (parameters >= drawn.low).all()
    assert (parameters <= drawn.low + drawn.width).all()
    varying = drawn.width > 0
    assert (parameters[:, varying].std(0) > 0).all()
    assert (parameters[:, ~varying] == drawn.low[~varying]).all()


@given(bounds, seeds)
def test_points_lie_in_x_range_contexts_and_targets_alike(x_range, seed):
    tasks = make(functions(x_range=x_range), range(20), seed=seed)
    for x in (tasks.context_x, tasks.target_x):
        assert x.min() >= x_range[0] - 1e-5
        assert x.max() <= x_range[1] + 1e-5
    assert tasks.context_x.shape == (20, 6, 1)
    assert tasks.target_x.shape == (20, 9, 1)


def test_points_fill_all_of_x_range():
    tasks = make(functions(x_range=(-2.0, 6.0)), range(100), 50, 50)
    for x in (tasks.context_x, tasks.target_x):
        counts = torch.histc(x, bins=8, min=-2.0, max=6.0)
        assert (counts > 400).all()  # 625 in expectation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_tasks", [None, 50])
@given(seed=seeds)
def test_without_noise_the_targets_are_the_truth(family, n_tasks, seed):
    taskset = functions(family(), n_tasks=n_tasks)
    tasks = make(taskset, range(10), seed=seed)
    torch.testing.assert_close(taskset.truth(tasks, tasks.target_x), tasks.target_y)
    torch.testing.assert_close(taskset.truth(tasks, tasks.context_x), tasks.context_y)


def test_noise_is_normal_of_the_given_spread_on_contexts_and_targets():
    taskset = functions(noise=0.3)
    tasks = make(taskset, range(500), 40, 40)
    for x, y in ((tasks.context_x, tasks.context_y), (tasks.target_x, tasks.target_y)):
        noise = (y - taskset.truth(tasks, x)) / 0.3
        # 20,000 normal draws: bounds of about seven standard errors
        assert abs(noise.mean()) < 0.05
        assert abs(noise.std() - 1) < 0.035
        assert abs((noise.abs() < 1).double().mean() - 0.6827) < 0.025


def test_a_sine_is_a_sine():
    family = Sine(amplitude=2.0, phase=0.5, frequency=3.0, offset=-1.0)
    tasks = make(functions(family), [0])
    by_hand = 2 * torch.sin(3 * tasks.target_x + 0.5) - 1
    torch.testing.assert_close(tasks.target_y, by_hand)


@pytest.mark.parametrize("both_directions", [True, False])
@given(seed=seeds)
def test_a_sawtooth_has_ramps_of_its_height_and_its_frequency(both_directions, seed):
    family = Sawtooth(amplitude=2.0, offset=1.0, both_directions=both_directions)
    taskset = functions(family)
    tasks = make(taskset, range(20), seed=seed)
    assert tasks.target_y.min() >= 1.0 - 1e-5
    assert tasks.target_y.max() <= 3.0 + 1e-5
    parameters = dict(zip(family.names, tasks.aux["parameters"].T, strict=True))
    period = (1 / parameters["frequency"])[:, None, None]
    later = taskset.truth(tasks, tasks.target_x + period)
    apart = (later - tasks.target_y).abs()  # at a fall, rounding decides between top and bottom
    assert (torch.minimum(apart, 2.0 - apart) < 1e-3).all()
    if not both_directions:
        assert (parameters["direction"] == 1).all()


def test_about_every_other_sawtooth_falls():
    parameters = make(functions(Sawtooth()), range(1000)).aux["parameters"]
    falling = (parameters[:, Sawtooth().names.index("direction")] < 0).double().mean()
    assert 0.4 < falling < 0.6


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8), seeds)
def test_in_a_finite_set_an_index_is_a_function_whose_points_are_drawn_anew(indices, seed):
    taskset = functions(n_tasks=100)
    one, other = make(taskset, indices, seed=seed), make(taskset, indices, seed=seed + 1)
    assert torch.equal(one.aux["parameters"], other.aux["parameters"])
    assert not torch.equal(one.context_x, other.context_x)
    alone = make(taskset, indices[-1:], seed=seed)
    assert torch.equal(alone.aux["parameters"], one.aux["parameters"][-1:])


def test_different_indices_are_different_functions():
    parameters = make(functions(n_tasks=1000), range(1000)).aux["parameters"]
    assert len(parameters.unique(dim=0)) == 1000


def test_the_splits_of_a_finite_set_are_different_functions():
    splits = [functions(n_tasks=50, split=split) for split in ("train", "val", "test")]
    drawn = torch.cat([make(taskset, range(50)).aux["parameters"] for taskset in splits])
    assert len(drawn.unique(dim=0)) == 150


def test_in_an_infinite_set_every_step_has_fresh_functions():
    loader = TaskLoader(functions(), 8)
    drawn = torch.cat([loader.batch_at(step).aux["parameters"] for step in range(5)])
    assert len(drawn.unique(dim=0)) == 40


def test_the_splits_of_an_infinite_set_are_different_streams():
    batches = [
        digest(TaskLoader(functions(split=split), 4).batch_at(0))
        for split in ("train", "val", "test")
    ]
    assert len(set(batches)) == 3


def test_an_infinite_set_has_no_length_and_a_finite_one_its_own():
    with pytest.raises(TypeError, match="infinite"):
        len(functions())
    assert len(functions(n_tasks=7)) == 7


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    make(functions(noise=0.1), range(10))
    assert torch.equal(before, torch.get_rng_state())


def test_the_spec_fits_the_tasks():
    taskset = functions()
    tasks = make(taskset, range(3))
    assert tasks.context_x.shape[2:] == taskset.spec.x_shape
    assert tasks.context_y.shape[2:] == taskset.spec.y_shape
    assert (taskset.spec.dim_x, taskset.spec.dim_y, taskset.spec.ways) == (1, 1, None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x_range": (1.0, -1.0)}, r"x_range"),
        ({"x_range": (1.0, 2.0, 3.0)}, r"x_range"),
        ({"noise": -0.1}, r"noise=-0\.1"),
        ({"n_tasks": 0}, r"n_tasks=0"),
        ({"split": "valid"}, r"split='valid'.*train, val, test"),
        ({"max_ctx_pts": 12}, r"max_tgt_pts=12"),
        ({"sizes": "metabtch"}, r"metabatch"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        functions(**arguments)


@pytest.mark.parametrize("name", ["amplitude", "frequency", "phase", "offset"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_range_the_wrong_way_round_is_named(family, name):
    with pytest.raises(ValueError, match=rf"{name}=\(2\.0, 1\.0\).*\[low, high\]"):
        family(**{name: (2.0, 1.0)})


def test_the_default_sine_is_that_of_maml():
    family = Sine()
    ranges = dict(
        zip(family.names, zip(family.low, family.low + family.width, strict=True), strict=True)
    )
    assert ranges["amplitude"] == pytest.approx((0.1, 5.0))
    assert ranges["phase"] == pytest.approx((0.0, math.pi))
    assert ranges["frequency"] == (1.0, 1.0)


@pytest.mark.parametrize("name", ["sine", "sawtooth"])
def test_the_yaml_builds_the_set_with_the_defaults_of_the_class(name):
    built = build_taskset(
        check(resolve(compose(f"taskset={name}", "model=cnp", "learner=neural_process"))), "train"
    )
    defaults = type(built.dataset)()
    assert built.dataset.names == defaults.names
    assert torch.equal(built.dataset.low, defaults.low)
    assert torch.equal(built.dataset.width, defaults.width)
