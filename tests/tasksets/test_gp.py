"""Gaussian processes: exactly drawn, and scored by what nobody can beat."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal

from metabatch_cli.batching import Task, TaskLoader, digest
from metabatch_cli.batching.task import tree_map
from metabatch_cli.config.build import build_evaluation_loaders, build_taskset
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from tasksets.gp import GaussianProcess
from tasksets.kernels import (
    RBF,
    Kernel,
    KernelMixture,
    Matern,
    Periodic,
    SpectralMixture,
    WeaklyPeriodic,
)
from tests.composed import composed

RANGES = {"lengthscale": (0.1, 0.6), "amplitude": (0.1, 1.0)}
TNP = [RBF(**RANGES), Matern(**RANGES), Periodic(**RANGES, period=(0.1, 0.5))]
TO_VARY = ("task", "batch")
seeds = st.integers(0, 2**63 - 1)


def process(kernel: Kernel | None = None, **changes: object) -> GaussianProcess:
    sizes = {"min_pts": 3, "max_ctx_pts": 46, "total_tgt_pts": 49, "sizes": "rest"}
    if changes.get("pool", 49) < 49:  # for tasks of sizes that `make` is told
        sizes |= {"min_pts": 1, "max_ctx_pts": 2, "total_tgt_pts": 4}
    return GaussianProcess(kernel or RBF(**RANGES), **{**sizes, **changes})


def make(
    taskset: GaussianProcess, indices: object, n_context: int = 6, n_target: int = 9, seed: int = 0
) -> Task:
    generator = torch.Generator().manual_seed(seed % 2**32)
    return taskset.__gettasks__(torch.as_tensor(indices), n_context, n_target, generator)


def naively(taskset: GaussianProcess, tasks: Task) -> MultivariateNormal:
    """The targets' distribution given the contexts, by the textbook (R&W eq. 2.22–2.24)."""
    context_x, target_x = tasks.context_x.double(), tasks.target_x.double()
    parameters, kernel = tasks.aux["parameters"].double(), taskset.dataset
    noise = taskset.noise**2
    own = kernel(context_x, context_x, parameters) + noise * torch.eye(context_x.shape[1])
    cross = kernel(target_x, context_x, parameters)
    gain = cross @ torch.linalg.inv(own)
    mean = (gain @ tasks.context_y.double())[..., 0]
    prior = kernel(target_x, target_x, parameters)
    covariance = prior - gain @ cross.mT + noise * torch.eye(target_x.shape[1])
    return MultivariateNormal(mean, covariance)


@pytest.mark.parametrize("kernel", TNP)
@pytest.mark.parametrize("n_context", [0, 1, 7])
@given(seed=seeds)
def test_the_oracle_is_the_posterior_of_the_textbook(kernel, n_context, seed):
    taskset = process(kernel, noise=0.1)
    tasks = make(taskset, range(4), n_context, 5, seed)
    scores, expected = taskset.oracle(tasks), naively(taskset, tasks)
    y = tasks.target_y[..., 0].double()
    joint = expected.log_prob(y) / 5
    single = Normal(expected.mean, expected.stddev).log_prob(y).mean(-1)
    torch.testing.assert_close(scores["log_likelihood@scoring=joint"], joint, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores["log_likelihood"], single, rtol=1e-5, atol=1e-5)
    error = (y - expected.mean).square().mean(-1)
    torch.testing.assert_close(scores["mse"], error, rtol=1e-5, atol=1e-8)


@given(st.integers(0, 10), seeds)
def test_of_a_single_target_the_joint_density_is_the_marginal_one(n_context, seed):
    taskset = process()
    scores = taskset.oracle(make(taskset, range(4), n_context, 1, seed))
    torch.testing.assert_close(
        scores["log_likelihood"], scores["log_likelihood@scoring=joint"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kernel", TNP)
def test_knowing_the_other_targets_never_hurts_on_average(kernel):
    taskset = process(kernel)
    scores = taskset.oracle(make(taskset, range(1000), 10, 20))
    gained = scores["log_likelihood@scoring=joint"] - scores["log_likelihood"]
    assert gained.mean() > 3 * gained.std() / math.sqrt(1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_oracle_takes_tasks_of_any_type_and_answers_in_float64(dtype):
    taskset = process()
    tasks = make(taskset, range(8))
    scores = taskset.oracle(tree_map(lambda leaf: leaf.to(dtype), tasks))
    for name, values in taskset.oracle(tasks).items():
        assert values.shape == (8,)
        assert values.dtype == scores[name].dtype == torch.float64
        torch.testing.assert_close(values, scores[name], rtol=1e-12, atol=1e-12)


# weights as in the paper's evaluation: the mean over points in a batch, then over batches
@pytest.mark.parametrize(
    ("kernel", "marginal", "joint"),
    [
        (TNP[0], 1.53, 1.81),
        pytest.param(TNP[1], 1.10, 1.38, marks=pytest.mark.slow),
        pytest.param(TNP[2], 1.20, 1.50, marks=pytest.mark.slow),
    ],
    ids=["rbf", "matern", "periodic"],
)
def test_the_limits_of_the_benchmark_of_transformer_neural_processes(kernel, marginal, joint):
    taskset = process(kernel)
    loader = TaskLoader(taskset, 16)
    scores = [taskset.oracle(loader.batch_at(step)) for step in range(1000)]
    for name, expected in (("log_likelihood", marginal), ("log_likelihood@scoring=joint", joint)):
        means = torch.stack([batch[name].mean() for batch in scores])
        error = means.std().item() / math.sqrt(len(means))
        assert error < 0.05
        # the expected values are rounded, and known to about 0.01 themselves
        assert abs(means.mean().item() - expected) < 4 * error + 0.02


@pytest.mark.parametrize("kernel", TNP)
@given(seed=seeds)
def test_the_posterior_is_what_the_oracle_judges_by(kernel, seed):
    taskset = process(kernel, noise=0.1)
    tasks = make(taskset, range(4), 8, 5, seed)
    mean, std = taskset.posterior(tasks, tasks.target_x)
    assert mean.shape == std.shape == (4, 5, 1)
    expected = naively(taskset, tasks)
    torch.testing.assert_close(mean[..., 0], expected.mean.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(std[..., 0], expected.stddev.float(), rtol=1e-4, atol=1e-4)
    _, of_function = taskset.posterior(tasks, tasks.target_x, noisy=False)
    torch.testing.assert_close(of_function.square() + 0.01, std.square(), rtol=1e-4, atol=1e-5)
    nothing = tasks._replace(context_x=tasks.context_x[:, :0], context_y=tasks.context_y[:, :0])
    prior_mean, prior_std = taskset.posterior(nothing, tasks.target_x, noisy=False)
    assert (prior_mean == 0).all()
    amplitude = tasks.aux["parameters"][:, 1, None, None].expand_as(prior_std)
    torch.testing.assert_close(prior_std, amplitude)
    of_one = taskset.posterior(tasks, tasks.target_x[:, :1])[0]
    torch.testing.assert_close(of_one, mean[:, :1], rtol=1e-4, atol=1e-4)


# --- creation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tasks", [None, 2000])
def test_values_have_the_covariance_of_the_kernel(n_tasks):
    kernel = Matern(1.5, 0.7, 0.8)
    taskset = process(kernel, noise=0.3, n_tasks=n_tasks, pool=8)
    tasks = make(taskset, range(2000), 3, 3)
    x = torch.cat([tasks.context_x, tasks.target_x], 1).double()
    y = torch.cat([tasks.context_y, tasks.target_y], 1).double()
    expected = kernel(x, x, tasks.aux["parameters"].double()) + 0.09 * torch.eye(6)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(expected), y, upper=False)[..., 0]
    # whitened values are independent and of variance one: six standard errors
    assert (white.mean(0).abs() < 6 / math.sqrt(2000)).all()
    assert ((white.T @ white / 2000 - torch.eye(6)).abs() < 6 * math.sqrt(2 / 2000)).all()
    product = y * y.mT
    assert abs((product - expected).mean()) < 6 * product.mean((1, 2)).std() / math.sqrt(2000)


@pytest.mark.parametrize("dim_x", [1, 2, 3])
@pytest.mark.parametrize("n_tasks", [None, 20])
def test_points_lie_where_they_are_said_to(dim_x, n_tasks):
    changes = {"dim_x": dim_x, "n_tasks": n_tasks, "pool": 64}
    taskset = process(**changes, x_range=(-1.0, 3.0), target_x_range=(4.0, 5.0))
    tasks = make(taskset, range(20), 30, 40)
    assert tasks.context_x.shape == (20, 30, dim_x)
    assert tasks.target_x.shape == (20, 40, dim_x)
    assert tasks.target_y.shape == (20, 40, 1)
    assert taskset.spec.x_shape == (dim_x,)
    assert -1 <= tasks.context_x.min() < -0.8 < 2.8 < tasks.context_x.max() <= 3
    assert 4 <= tasks.target_x.min() < 4.1 < 4.9 < tasks.target_x.max() <= 5
    assert tasks.target_y.isfinite().all()
    alike = make(process(**changes, x_range=(-1.0, 3.0)), range(20), 15, 15)
    assert -1 <= alike.target_x.min() < -0.7 < 2.7 < alike.target_x.max() <= 3


@given(seeds)
def test_the_same_generator_gives_the_same_batch_and_others_give_others(seed):
    taskset = process()
    one, same, other = (make(taskset, range(4), seed=s) for s in (seed, seed, seed + 1))
    assert digest(one) == digest(same) != digest(other)


@pytest.mark.parametrize("n_tasks", [None, 100])
@pytest.mark.parametrize("kernel", [RBF(**RANGES), KernelMixture(TNP)], ids=["rbf", "mixture"])
def test_batches_do_not_depend_on_the_number_of_workers(kernel, n_tasks):
    taskset = process(kernel, n_tasks=n_tasks, pool=64)
    more = {"shuffle": n_tasks is not None, "n_batches": 6 if n_tasks else None}
    reference = TaskLoader(taskset, 8, **more)
    with TaskLoader(process(kernel, n_tasks=n_tasks, pool=64), 8, **more, workers=2) as loader:
        for step, batch in zip(range(6), loader, strict=False):
            assert digest(batch) == digest(reference.batch_at(step))


def test_tasks_of_a_batch_share_their_parameters_if_told_to():
    own, shared = (make(process(vary=vary), range(16)).aux["parameters"] for vary in TO_VARY)
    assert len(own.unique(dim=0)) == 16
    assert len(shared.unique(dim=0)) == 1
    tasks = make(process(vary="batch"), range(16))
    assert len(tasks.target_y.unique(dim=0)) == 16
    another = make(process(vary="batch"), range(16), seed=1)
    assert not torch.equal(tasks.aux["parameters"], another.aux["parameters"])


@pytest.mark.parametrize("kernel", [*TNP, SpectralMixture(3)])
@given(seed=seeds)
def test_without_noise_there_are_values_all_the_same(kernel, seed):
    tasks = make(process(kernel, noise=0.0), range(4), 40, 60, seed)
    assert tasks.target_y.isfinite().all()
    close = make(process(kernel, noise=0.0, x_range=(0.0, 1e-6)), range(4), 40, 60, seed)
    assert close.target_y.isfinite().all()


def test_a_kernel_that_is_none_is_named():
    class Distance(RBF):
        def __call__(self, x1, x2, parameters):
            return (x1 - x2.mT).abs()

    with pytest.raises(ValueError, match=r"dataset=Distance.*15 points.*not positive definite"):
        make(process(Distance()), range(4))


# --- finite sets -------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), seeds)
def test_in_a_finite_set_an_index_is_a_function_whose_points_are_drawn_anew(indices, seed):
    taskset = process(n_tasks=100, pool=32, noise=0.0)
    one, other = make(taskset, indices, seed=seed), make(taskset, indices, seed=seed + 1)
    assert torch.equal(one.aux["parameters"], other.aux["parameters"])
    assert not torch.equal(one.context_x, other.context_x)
    for row in range(len(indices)):
        at = torch.cat([one.context_x[row], one.target_x[row]])[:, 0].tolist()
        values = torch.cat([one.context_y[row], one.target_y[row]])[:, 0].tolist()
        known = dict(zip(at, values, strict=True))
        assert len(known) == 15  # no point twice
        pairs = zip(other.context_x[row, :, 0].tolist(), other.context_y[row], strict=True)
        assert all(known[x] == y for x, y in pairs if x in known)
    alone = make(process(n_tasks=100, pool=32, noise=0.0), indices[-1:], seed=seed)
    assert torch.equal(alone.aux["parameters"], one.aux["parameters"][-1:])
    again = make(taskset, indices[-1:], seed=seed)
    assert torch.equal(again.target_y, alone.target_y)


def test_two_tasks_of_a_function_agree_at_any_points_and_their_noise_does_not():
    taskset = process(RBF(1.0, 1.0), n_tasks=1, pool=200, noise=0.1)
    tasks = make(taskset, [0] * 64, 60, 60)
    x, y = tasks.target_x.flatten(), tasks.target_y.flatten()
    spread = torch.stack([y[x == at].std() for at in x.unique()]).nanmean()
    assert spread.item() == pytest.approx(0.1, rel=0.1)


def test_the_splits_of_a_finite_set_are_different_functions():
    splits = [process(n_tasks=50, pool=16, split=split) for split in ("train", "val", "test")]
    tasks = [make(taskset, range(50)) for taskset in splits]
    assert len(torch.cat([batch.aux["parameters"] for batch in tasks]).unique(dim=0)) == 150


def test_a_pool_that_is_too_small_is_named():
    with pytest.raises(ValueError, match=r"pool=48 .* context and .* target points: at least 49"):
        process(n_tasks=5, pool=48, max_ctx_pts=46, total_tgt_pts=49, min_pts=3)
    process(pool=48, max_ctx_pts=46, total_tgt_pts=49, min_pts=3)  # endless: it has no use for it
    with pytest.raises(ValueError, match=r"pool=14 .* at least 15"):
        make(process(n_tasks=5, pool=14), range(5))
    taskset = process(n_tasks=5, pool=9, target_x_range=(2.0, 3.0))
    assert make(taskset, range(5)).target_x.shape == (5, 9, 1)
    with pytest.raises(ValueError, match=r"pool=9 .* at least 10"):
        make(taskset, range(5), n_target=10)


def test_an_infinite_set_has_no_length_and_a_finite_one_its_own():
    with pytest.raises(TypeError, match="infinite"):
        len(process())
    assert len(process(n_tasks=7)) == 7


# --- arguments and YAML ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x_range": (1.0, -1.0)}, r"x_range"),
        ({"target_x_range": (1.0, 2.0, 3.0)}, r"target_x_range"),
        ({"dim_x": 0}, r"dim_x=0"),
        ({"noise": -0.1}, r"noise=-0\.1"),
        ({"noise": math.inf}, r"noise=inf"),
        ({"noise": math.nan}, r"noise=nan"),
        ({"vary": "tasks"}, r"vary='tasks'.*task, batch"),
        ({"vary": "batch", "n_tasks": 5}, r"vary='batch' with n_tasks=5"),
        ({"n_tasks": 0}, r"n_tasks=0"),
        ({"pool": 0}, r"pool=0"),
        ({"split": "valid"}, r"split='valid'.*train, val, test"),
        ({"max_ctx_pts": 49}, r"total_tgt_pts=49"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        process(**arguments)


def built(*overrides):
    return check(resolve(composed("model=cnp", "learner=neural_process", *overrides)))


def test_test_sets_with_other_kernels_replace_the_kernel_and_nothing_else():
    config = resolve(composed("model=cnp", "learner=neural_process", "taskset=gp"))
    config["evaluation"]["test"] = {
        "kernel=rbf": {},
        "kernel=matern": {
            "dataset": {"_target_": "tasksets.kernels.Matern", "nu": 1.5, "lengthscale": 0.3}
        },
        "kernel=spectral": {
            "dataset": {"_target_": "tasksets.kernels.SpectralMixture", "components": 3},
            "noise": 0.1,
        },
    }
    config = check(config)
    loaders = build_evaluation_loaders(config, "test")
    sets = {name: loader.dataset for name, loader in loaders.items()}
    kinds = {name: type(taskset.dataset) for name, taskset in sets.items()}
    assert kinds == {
        "kernel=rbf": RBF, "kernel=matern": Matern, "kernel=spectral": SpectralMixture
    }  # fmt: skip
    assert sets["kernel=matern"].dataset.nu == 1.5
    assert [taskset.noise for taskset in sets.values()] == [0.02, 0.02, 0.1]
    assert all(taskset.law == sets["kernel=rbf"].law for taskset in sets.values())


@pytest.mark.parametrize(
    ("choice", "kernel", "n_context", "n_target"),
    [
        ("gp", RBF, range(3, 47), range(3, 47)),
        ("gp_eq", RBF, range(31), [50]),
        ("gp_matern", Matern, range(31), [50]),
        ("gp_weakly_periodic", WeaklyPeriodic, range(31), [50]),
        ("gp_kernels", KernelMixture, range(1, 65), [128]),
    ],
)
def test_the_yaml_builds_the_sets_of_the_papers(choice, kernel, n_context, n_target):
    taskset = build_taskset(built(f"taskset={choice}"), "train")
    assert type(taskset.dataset) is kernel
    loader = TaskLoader(taskset, 4)
    for step in range(20):
        tasks = loader.batch_at(step)
        assert tasks.context_x.shape[1] in n_context
        assert tasks.target_x.shape[1] in n_target
        scores = taskset.oracle(tasks)
        assert all(values.isfinite().all() for values in scores.values())
    if choice == "gp_kernels":
        assert len(tasks.aux["parameters"].unique(dim=0)) == 1


def test_the_mixture_of_neuralprocesses_has_batches_of_its_four_components():
    taskset = build_taskset(built("taskset=np_mixture"), "train")
    assert list(taskset.tasksets) == ["eq", "matern", "weakly_periodic", "sawtooth"]
    loader = TaskLoader(taskset, 4)
    batches = [loader.batch_at(step) for step in range(30)]
    assert {int(batch.aux["component"][0]) for batch in batches} == {0, 1, 2, 3}
    assert all(batch.target_x.shape[1] == 100 for batch in batches)
    assert taskset.oracle(batches[0]) is None  # nobody knows it of a sawtooth


def test_the_noise_is_the_standard_deviation_of_y():
    taskset = process(RBF(lengthscale=1.0, amplitude=1e-6), noise=0.3)
    y = make(taskset, range(500), 20, 20).target_y
    assert y.std().item() == pytest.approx(0.3, rel=0.05)
    scores = taskset.oracle(make(taskset, range(500), 20, 20))["log_likelihood"]
    expected = -0.5 * math.log(2 * math.pi * math.e * 0.3**2)
    assert scores.mean().item() == pytest.approx(expected, abs=0.03)
