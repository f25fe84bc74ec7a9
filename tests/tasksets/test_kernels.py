"""Kernels: covariances of something, as the books have them, with each task's own parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tasksets.kernels import (
    RBF,
    Kernel,
    KernelMixture,
    Matern,
    Periodic,
    Product,
    SpectralMixture,
    Sum,
    WeaklyPeriodic,
)

R, S = (0.1, 0.6), (0.1, 1.0)
KERNELS = {
    "rbf": RBF(R, S),
    "matern12": Matern(0.5, R, S),
    "matern32": Matern(1.5, R, S),
    "matern52": Matern(2.5, R, S),
    "periodic": Periodic(R, S, (0.1, 0.5)),
    "weakly_periodic": WeaklyPeriodic(R, S, (0.1, 0.5), (0.5, 1.0)),
    "spectral": SpectralMixture(3),
    "sum": Sum([RBF(R, S), Periodic(R, S)]),
    "product": Product([Matern(1.5, R, S), Periodic(R, S)]),
    "mixture": KernelMixture([RBF(R, S), Matern(0.5, R, S), Periodic(R, S)]),
    "nested": Sum([KernelMixture([RBF(R, S), SpectralMixture()]), Product([RBF(), Matern()])]),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
seeds = st.integers(0, 2**32 - 1)


def drawn(
    kernel: Kernel, seed: int, tasks: int = 5, points: int = 12, dim_x: int = 1
) -> tuple[Tensor, Tensor]:
    """Points `[tasks, points, dim_x]` of [−2, 2] and hyper-parameters, float64."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tasks, len(kernel.names), generator=generator)
    x = torch.rand(tasks, points, dim_x, generator=generator) * 4 - 2
    return x.double(), kernel.parameters(uniform).double()


def number(kernel: Kernel, distance: float, **values: float) -> float:
    """The covariance at a distance on the line."""
    assert tuple(values) == kernel.names
    parameters = torch.tensor([list(values.values())], dtype=torch.float64)
    x = torch.tensor([[[0.3]]], dtype=torch.float64)
    return kernel(x, x + distance, parameters).item()


@every_kernel
@pytest.mark.parametrize("dim_x", [1, 2])
@given(seed=seeds)
def test_covariances_are_symmetric_and_positive_semidefinite(kernel, dim_x, seed):
    x, parameters = drawn(kernel, seed, dim_x=dim_x)
    covariance = kernel(x, x, parameters)
    assert covariance.shape == (5, 12, 12)
    torch.testing.assert_close(covariance, covariance.mT, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(covariance)
    assert (values[:, 0] >= -1e-12 * values[:, -1]).all()


@every_kernel
@pytest.mark.parametrize("dim_x", [1, 2])
@given(seed=seeds)
def test_covariances_are_stationary_and_largest_at_no_distance(kernel, dim_x, seed):
    x, parameters = drawn(kernel, seed, dim_x=dim_x)
    covariance = kernel(x, x, parameters)
    torch.testing.assert_close(kernel(x + 7.5, x + 7.5, parameters), covariance)
    variance = covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(variance, variance[:, :1].expand_as(variance))
    assert (covariance <= variance[:, :1, None] * (1 + 1e-12)).all()


@every_kernel
@given(seed=seeds)
def test_a_task_has_its_own_covariances_whatever_is_beside_it(kernel, seed):
    x, parameters = drawn(kernel, seed)
    other = x.flip(0)[:, :4]
    together = kernel(x, other, parameters)
    assert together.shape == (5, 12, 4)
    for task in range(5):
        one = slice(task, task + 1)
        torch.testing.assert_close(together[one], kernel(x[one], other[one], parameters[one]))


@every_kernel
def test_neither_points_nor_parameters_are_changed(kernel):
    x, parameters = drawn(kernel, 0)
    x_before, parameters_before = x.clone(), parameters.clone()
    kernel(x, x, parameters)
    assert torch.equal(x, x_before)
    assert torch.equal(parameters, parameters_before)


@given(st.floats(0, 3), st.floats(0.1, 2), st.floats(0.1, 2))
def test_the_formulas_are_those_of_the_books(d, ell, s):
    own = {"lengthscale": ell, "amplitude": s}
    rbf = s**2 * math.exp(-(d**2) / (2 * ell**2))
    assert number(RBF(), d, **own) == pytest.approx(rbf)
    r = d / ell
    assert number(Matern(0.5), d, **own) == pytest.approx(s**2 * math.exp(-r))
    a = math.sqrt(3) * r
    assert number(Matern(1.5), d, **own) == pytest.approx(s**2 * (1 + a) * math.exp(-a))
    a = math.sqrt(5) * r
    matern52 = s**2 * (1 + a + a**2 / 3) * math.exp(-a)
    assert number(Matern(2.5), d, **own) == pytest.approx(matern52)
    sine = math.sin(math.pi * d / 0.7) ** 2
    periodic = s**2 * math.exp(-2 * sine / ell**2)
    assert number(Periodic(), d, **own, period=0.7) == pytest.approx(periodic)
    weakly = s**2 * math.exp(-(d**2) / (2 * ell**2) - 2 * sine / 0.8**2)
    drawn = number(WeaklyPeriodic(), d, **own, period=0.7, periodic_lengthscale=0.8)
    assert drawn == pytest.approx(weakly)
    spectral = s**2 * math.exp(-2 * (math.pi * d * ell) ** 2) * math.cos(2 * math.pi * d * 1.3)
    names = {"0.frequency": 1.3, "0.bandwidth": ell, "0.amplitude": s}
    assert number(SpectralMixture(1), d, **names) == pytest.approx(spectral, abs=1e-12)


@given(seed=seeds)
def test_sums_and_products_are_sums_and_products(seed):
    parts = [RBF(R, S), Periodic(R, S, (0.1, 0.5)), Matern(1.5)]
    x, parameters = drawn(Sum(parts), seed)
    split = parameters.split([2, 3, 2], dim=1)
    rbf, periodic, matern = (k(x, x, p) for k, p in zip(parts, split, strict=True))
    torch.testing.assert_close(Sum(parts)(x, x, parameters), rbf + periodic + matern)
    torch.testing.assert_close(Product(parts)(x, x, parameters), rbf * periodic * matern)


@given(seed=seeds)
def test_a_mixture_is_the_kernel_that_was_drawn(seed):
    parts = [RBF(R, S), Matern(0.5, R, S)]
    kernel = KernelMixture(parts)
    x, parameters = drawn(kernel, seed)
    covariance = kernel(x, x, parameters)
    for task, which in enumerate(parameters[:, 0].int().tolist()):
        one = slice(task, task + 1)
        own = parameters[one, 1 + 2 * which : 3 + 2 * which]
        torch.testing.assert_close(covariance[one], parts[which](x[one], x[one], own))


def test_a_mixture_draws_its_kernels_by_weight():
    kernel = KernelMixture([RBF(), Matern(), Periodic(), RBF()], [3, 0, 1, 0])
    uniform = torch.linspace(0, 1, 4001)[:-1, None].expand(-1, len(kernel.names))
    counts = kernel.parameters(uniform)[:, 0].long().bincount(minlength=4)
    assert counts.tolist() == [3000, 0, 1000, 0]
    last = kernel.parameters(torch.full((1, len(kernel.names)), 1 - 2**-24))
    assert last[0, 0] == 2


def test_parameters_fill_their_ranges_uniformly_or_in_their_logarithm():
    kernel = RBF(lengthscale=(0.01, 1.0, "log"), amplitude=(1.0, 3.0))
    uniform = torch.linspace(0, 1, 101)[:, None].expand(-1, 2)
    lengthscale, amplitude = kernel.parameters(uniform).T
    torch.testing.assert_close(lengthscale, 10 ** torch.linspace(-2, 0, 101))
    torch.testing.assert_close(amplitude, torch.linspace(1, 3, 101))
    assert (RBF(0.3, 2.0).parameters(uniform) == torch.tensor([0.3, 2.0])).all()


def test_names_say_whose_parameter_it_is():
    assert Sum([RBF(), Periodic()]).names == (
        "0.lengthscale",
        "0.amplitude",
        "1.lengthscale",
        "1.amplitude",
        "1.period",
    )
    assert KernelMixture([RBF()]).names == ("kernel", "0.lengthscale", "0.amplitude")
    assert len(SpectralMixture(3).names) == 9


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RBF(lengthscale=0.0), r"lengthscale=0\.0.*0 < low ≤ high"),
        (lambda: RBF(lengthscale=(2.0, 1.0)), r"lengthscale=\(2\.0, 1\.0\)"),
        (lambda: RBF(lengthscale=(1.0, 2.0, 3.0)), r"lengthscale=.*\[low, high\]"),
        (lambda: RBF(amplitude=(1.0,)), r"amplitude=.*\[low, high\]"),
        (lambda: RBF(amplitude=(1.0, 2.0, "lag")), r"amplitude=.*\[low, high, log\]"),
        (lambda: RBF(amplitude=math.inf), r"amplitude=inf"),
        (lambda: RBF(amplitude=math.nan), r"amplitude=nan"),
        (lambda: SpectralMixture(frequency=(0, 1, "log")), "frequency"),
        (lambda: SpectralMixture(0), r"components=0"),
        (lambda: Matern(nu=2.0), r"nu=2\.0 must be 0\.5, 1\.5 or 2\.5"),
        (lambda: Sum([]), r"kernels=\[\]"),
        (lambda: KernelMixture([RBF()], [1.0, 2.0]), r"weights=\[1\.0, 2\.0\]"),
        (lambda: KernelMixture([RBF(), RBF()], [0.0, 0.0]), r"weights=.*not all 0"),
        (lambda: KernelMixture([RBF(), RBF()], [2.0, -1.0]), r"weights=.*at least 0"),
    ],
)
def test_arguments_that_cannot_be_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()
