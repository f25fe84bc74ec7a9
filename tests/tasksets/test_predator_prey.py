"""Predators and prey: the equations that are promised, at the times that are promised."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import Task, TaskLoader, digest
from metabatch_cli.config.build import build_taskset
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.compose import compose
from tasksets.predator_prey import LotkaVolterra, PredatorPrey

STILL = {"noise": 0.0, "scale": 1.0}  # no noise: the ordinary differential equations
seeds = st.integers(0, 2**32 - 1)


def populations(family: LotkaVolterra | None = None, **changes: object) -> PredatorPrey:
    sizes = {"min_pts": 1, "max_ctx_pts": 8, "max_tgt_pts": 12}
    short = {"years": 10.0, "forecast_start": (3.0, 7.0), "warm_up": 1.0}
    return PredatorPrey(family or LotkaVolterra(), **{**sizes, **short, **changes})


def make(
    taskset: PredatorPrey, indices: object, n_context: int = 6, n_target: int = 9, seed: int = 0
) -> Task:
    generator = torch.Generator().manual_seed(seed)
    return taskset.__gettasks__(torch.as_tensor(indices), n_context, n_target, generator)


def simulated(family: LotkaVolterra, years: float, tasks: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    parameters = family.parameters(torch.rand(tasks, 8, generator=generator))
    shape = (round(years / 0.025), 2, tasks)
    normal = torch.randn(shape, dtype=torch.float64, generator=generator)
    return parameters, normal, family.simulate(parameters, normal)


@given(seed=seeds)
def test_a_trajectory_follows_the_equations_step_by_step(seed):
    parameters, normal, paths = simulated(LotkaVolterra(), 0.5, tasks=2, seed=seed)
    assert paths.shape == (2, 11, 2)
    for task in range(2):
        birth, predation, death, growth, sigma, scale, x, y = parameters[task].double().tolist()
        for step in range(20):
            if step % 2 == 0:
                kept = paths[task, step // 2].double()
                torch.testing.assert_close(kept, scale * kept.new_tensor([x, y]), rtol=1e-5, atol=0)
            pushes = (sigma * np.sqrt(0.025) * normal[step, :, task]).tolist()
            dx = (birth - predation * y) * x * 0.025 + x ** (1 / 6) * pushes[0]
            dy = (growth * x - death) * y * 0.025 + y ** (1 / 6) * pushes[1]
            x, y = abs(x + dx), abs(y + dy)


def test_without_noise_the_equilibrium_stays_where_it_is():
    family = LotkaVolterra(0.5, 0.05, 1.0, 0.05, 0.0, 1.0, prey=20.0, predators=10.0)
    paths = simulated(family, 20)[2]
    torch.testing.assert_close(paths, torch.tensor([20.0, 10.0]).expand_as(paths))


def test_without_noise_populations_cycle_and_keep_the_constant_of_motion():
    family = LotkaVolterra(0.5, 0.05, 1.0, 0.05, 0.0, 1.0, prey=25.0, predators=10.0)
    prey, predators = simulated(family, 20)[2][0].double().T
    constant = 0.05 * prey - 1.0 * prey.log() + 0.05 * predators - 0.5 * predators.log()
    assert (constant - constant[0]).abs().max() < 0.05 * (constant[0] - 0.5).abs()
    assert prey.max() > 24
    assert prey.min() < 17
    crossings = ((prey[:-1] < 20) & (prey[1:] >= 20)).nonzero()[:, 0]
    period = 2 * np.pi / np.sqrt(0.5 * 1.0)  # of small cycles
    assert crossings.diff()[0].item() * 0.05 == pytest.approx(period, rel=0.1)


@pytest.mark.parametrize("n_tasks", [None, 30])
@given(seed=seeds)
@settings(max_examples=10)
def test_populations_are_positive_numbers_and_parameters_lie_in_their_ranges(n_tasks, seed):
    taskset = populations(n_tasks=n_tasks)
    tasks = make(taskset, range(20), seed=seed)
    assert tasks.context_x.shape == (20, 6, 1)
    assert tasks.target_y.shape == (20, 9, 2)
    for y in (tasks.context_y, tasks.target_y):
        assert y.isfinite().all()
        assert (y > 0).all()
    low, width = taskset.dataset.low, taskset.dataset.width
    assert (tasks.aux["parameters"] >= low).all()
    assert (tasks.aux["parameters"] <= low + width * 1.000001).all()


@pytest.mark.parametrize("n_tasks", [None, 20])
def test_points_lie_in_the_years(n_tasks):
    tasks = make(populations(n_tasks=n_tasks), range(20), 50, 50)
    for x in (tasks.context_x, tasks.target_x):
        assert 0 <= x.min() < 0.2 < 9.8 < x.max() <= 10


@given(seed=seeds)
@settings(max_examples=10)
def test_a_forecast_has_its_targets_after_its_contexts(seed):
    tasks = make(populations(mode="forecasting"), range(10), 20, 20, seed=seed)
    first, last = tasks.target_x.amin((1, 2)), tasks.context_x.amax((1, 2))
    assert (first >= last - 1e-5).all()
    assert (first >= 3 - 1e-5).all()
    assert (last <= 7 + 1e-5).all()


def test_a_point_shows_the_population_at_the_nearest_kept_time():
    family = LotkaVolterra(**STILL, prey=30.0, predators=20.0, birth=0.5, predation=0.05,
                           death=1.0, growth=0.05)  # fmt: skip
    tasks = make(populations(family), range(2), 20, 20)
    path = simulated(family, 11, tasks=1)[2][0, 20:]  # after a year of warm-up
    nearest = (tasks.target_x[..., 0] / 0.05).round().long()
    torch.testing.assert_close(tasks.target_y, path[nearest])


def test_the_same_generator_gives_the_same_batch_and_every_batch_is_fresh():
    taskset = populations()
    one, same, other = (make(taskset, range(4), seed=seed) for seed in (0, 0, 1))
    assert digest(one) == digest(same) != digest(other)


@pytest.mark.parametrize("n_tasks", [None, 100])
def test_batches_do_not_depend_on_the_number_of_workers(n_tasks):
    more = {"shuffle": n_tasks is not None, "n_batches": 4 if n_tasks else None}
    reference = TaskLoader(populations(n_tasks=n_tasks), 8, **more)
    with TaskLoader(populations(n_tasks=n_tasks), 8, **more, workers=2) as loader:
        for step, batch in zip(range(4), loader, strict=False):
            assert digest(batch) == digest(reference.batch_at(step))


def test_in_a_finite_set_an_index_is_a_trajectory_whose_points_are_drawn_anew():
    taskset = populations(n_tasks=100)
    one, other = make(taskset, [3, 70, 3]), make(taskset, [70, 3, 3], seed=1)
    assert torch.equal(one.aux["parameters"][[0, 1]], other.aux["parameters"][[1, 0]])
    assert not torch.equal(one.context_x, other.context_x)
    seen: dict[tuple[int, int], list[float]] = {}
    for tasks, indices in ((one, [3, 70, 3]), (other, [70, 3, 3])):
        for row, index in enumerate(indices):
            for x, y in zip(tasks.target_x[row, :, 0], tasks.target_y[row], strict=True):
                time = round(x.item() / 0.05)
                assert seen.setdefault((index, time), y.tolist()) == y.tolist()
    copy = pickle.loads(pickle.dumps(taskset))
    assert digest(make(copy, [70])) == digest(make(populations(n_tasks=100), [70]))


def test_the_splits_of_a_finite_set_are_different_trajectories():
    splits = [populations(n_tasks=10, split=split) for split in ("train", "val", "test")]
    drawn = torch.cat([make(taskset, range(10)).aux["parameters"] for taskset in splits])
    assert len(drawn.unique(dim=0)) == 30


def test_an_infinite_set_has_no_length_and_a_finite_one_its_own():
    with pytest.raises(TypeError, match="infinite"):
        len(populations())
    assert len(populations(n_tasks=7)) == 7


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "interpolate"}, r"mode='interpolate'.*forecasting"),
        ({"years": 0.5}, r"years=0\.5"),
        ({"warm_up": -1.0}, r"warm_up=-1\.0"),
        ({"forecast_start": (3.0, 11.0)}, r"forecast_start=\(3\.0, 11\.0\).*years=10\.0"),
        ({"forecast_start": (7.0, 3.0)}, r"forecast_start"),
        ({"n_tasks": 0}, r"n_tasks=0"),
        ({"split": "valid"}, r"split='valid'.*train, val, test"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        populations(**arguments)


def test_negative_rates_are_named():
    with pytest.raises(ValueError, match="growth: rates"):
        LotkaVolterra(growth=(-0.1, 0.1))


def test_the_yaml_builds_the_simulations_of_neuralprocesses():
    config = check(resolve(compose("taskset=predator_prey", "model=cnp", "learner=neural_process")))
    taskset = build_taskset(config, "train")
    defaults = LotkaVolterra()
    assert torch.equal(taskset.dataset.low, defaults.low)
    assert torch.equal(taskset.dataset.width, defaults.width)
    tasks = TaskLoader(taskset, 4).batch_at(0)
    assert tasks.target_y.shape == (4, 100, 2)
    assert tasks.target_y.isfinite().all()
