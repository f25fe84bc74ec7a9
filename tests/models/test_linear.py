"""Linear layers say what torch's do, by whichever library they multiply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from metabatch_cli.models import linear as module
from metabatch_cli.models.linear import Linear, gradient_of_weight, linear, product

SHAPES = [(5, 9), (33, 16), (3, 25, 12), (1000, 40)]
needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no MKL or no oneDNN to choose from",
)


@pytest.fixture
def by_onednn(monkeypatch):
    """Whatever may be is multiplied by oneDNN; the sizes `(points, inputs, outputs)` it was."""
    sizes = []

    def multiplied(x, weight, *more):
        sizes.append((*x.shape, len(weight)))
        return real(x, weight, *more)

    real = module._multiplied
    monkeypatch.setattr(module, "_multiplied", multiplied)
    monkeypatch.setattr(module, "_mkl_is_behind", lambda: True)
    monkeypatch.setattr(module, "MANY", 0)
    return sizes


def case(shape, outputs=11, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = [shape, (outputs, shape[-1]), *([(outputs,)] if bias else [])]
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def by_torch(x, weight, bias=None, relu=False):
    y = F.linear(x, weight, bias)
    return y.relu() if relu else y


@needs_onednn
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [8, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_onednn_multiplies_as_torch_forth_and_back(by_onednn, shape, outputs, bias, relu):
    parts = case(shape, outputs, bias)
    found, expected = linear(*parts, relu=relu), by_torch(*parts, relu=relu)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, parts, direction),
        torch.autograd.grad(expected, parts, direction),
        rtol=1e-4,
        atol=1e-4,
    )
    assert len(by_onednn) == 3


@needs_onednn
@pytest.mark.parametrize("relu", [False, True])
def test_so_it_does_for_operations_with_gradients_of_their_own(by_onednn, relu):
    x, weight, bias = (part.detach() for part in case((77, 20), 30))
    close = {"rtol": 1e-4, "atol": 1e-4}
    found = product(x, weight, bias, relu=relu)
    torch.testing.assert_close(found, by_torch(x, weight, bias, relu), **close)
    torch.testing.assert_close(gradient_of_weight(found, x), found.t() @ x, **close)
    assert len(by_onednn) == 2


@needs_onednn
def test_weights_and_gradients_may_lie_in_memory_as_they_like(by_onednn):
    x, weight = case((40, 10), 22, bias=False)
    for part in (weight[:, 1:9], weight[::2], weight.t()[:, :10]):
        points = x[:, : part.shape[1]]
        found, expected = linear(points, part), F.linear(points, part)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), [x, weight]),  # a gradient that is one number
            torch.autograd.grad(expected.sum(), [x, weight]),
            rtol=1e-4,
            atol=1e-4,
        )
    assert by_onednn


@needs_onednn
def test_a_bias_may_lie_apart_in_memory(by_onednn):
    x, weight, bias = (part.detach() for part in case((40, 10), 22))
    for own in (bias.repeat_interleave(2)[::2], bias[:1].expand(22)):
        torch.testing.assert_close(
            linear(x, weight, own), F.linear(x, weight, own), rtol=1e-4, atol=1e-4
        )
    assert by_onednn


@needs_onednn
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_so_through_a_relu(by_onednn, wrong):
    x, weight, bias = case((33, 16))
    with torch.no_grad():
        x[3, 2] = wrong
    found, expected = (layer(x, weight, bias, relu=True) for layer in (linear, by_torch))
    assert found[3].isnan().any() or found[3].isinf().any()
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), bias),
        torch.autograd.grad(expected.sum(), bias),
        equal_nan=True,
    )


@needs_onednn
@pytest.mark.parametrize("shape", [(77, 9), (7, 11, 9)])
def test_what_comes_may_be_changed_in_place(by_onednn, shape):
    parts = case(shape)
    found, expected = linear(*parts).mul_(2).relu_(), (by_torch(*parts) * 2).relu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), parts),
        torch.autograd.grad(expected.sum(), parts),
        rtol=1e-4,
        atol=1e-4,
    )


@needs_onednn
def test_many_gradients_at_once_are_those_one_by_one(by_onednn):
    parts = case((77, 9))
    y = linear(*parts, relu=True)
    directions = torch.randn(2, *y.shape)
    found = torch.autograd.grad(y, parts, directions, is_grads_batched=True, retain_graph=True)
    for number, direction in enumerate(directions):
        alone = torch.autograd.grad(y, parts, direction, retain_graph=True)
        torch.testing.assert_close(
            tuple(part[number] for part in found), alone, rtol=1e-4, atol=1e-4
        )
    assert by_onednn


def test_a_compiler_is_not_interrupted(by_onednn):
    network = nn.Sequential(Linear(16, 32), nn.Tanh(), Linear(32, 8))
    found = torch._dynamo.explain(network)(torch.randn(3, 7, 16))
    assert found.graph_break_count == 0


@needs_onednn
def test_what_onednn_multiplied_can_be_differentiated_twice(by_onednn):
    parts = case((37, 9))

    def twice(layer):
        once = torch.autograd.grad(layer(*parts, relu=True).pow(3).sum(), parts, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in once), parts)

    torch.testing.assert_close(twice(linear), twice(by_torch), rtol=1e-4, atol=1e-4)
    assert by_onednn


@needs_onednn
def test_there_are_few_numbers_of_points_that_onednn_makes_kernels_for(by_onednn):
    x, weight = (part.detach() for part in case((2000, 8), 8, bias=False))
    for n_points in range(500, 2000):
        assert len(product(x[:n_points], weight)) == n_points
        gradient_of_weight(x[:n_points], x[:n_points])
    points, inputs, _ = zip(*by_onednn, strict=True)
    assert len(set(points)) < 80
    assert len(set(inputs)) < 80


@needs_onednn
@pytest.mark.parametrize("why", ["float64", "autocast", "vmap", "grad", "few inputs", "small"])
def test_torch_multiplies_what_is_not_for_onednn(by_onednn, monkeypatch, why):
    parts = case((4, 6, 2 if why == "few inputs" else 9), dtype=torch.float64)
    if why != "float64":
        parts = [part.detach().float() for part in parts]
    x, weight, bias = parts
    if why == "small":
        monkeypatch.setattr(module, "MANY", 10**9)
    if why == "vmap":
        weights = torch.stack([weight, -weight, weight, weight])
        found = vmap(linear)(x, weights, bias.expand(4, -1))
        torch.testing.assert_close(found, vmap(F.linear)(x, weights, bias.expand(4, -1)))
    elif why == "grad":
        found, expected = (
            grad(lambda w, layer=layer: layer(x, w).square().sum())(weight)
            for layer in (linear, F.linear)
        )
        torch.testing.assert_close(found, expected)
    else:
        with torch.autocast("cpu", enabled=why == "autocast"):
            found = linear(x, weight, bias)
            assert found.dtype == (torch.bfloat16 if why == "autocast" else x.dtype)
            torch.testing.assert_close(found, F.linear(x, weight, bias))
    assert not by_onednn


@needs_onednn
@pytest.mark.parametrize(
    ("facts", "behind"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", False),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 26\nmodel\t\t: 2\n", False),
        ("", False),
        (None, False),
    ],
)
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_mkl_is_left_only_where_it_is_known_to_be_behind(monkeypatch, capability, facts, behind):
    def read(path):
        if facts is None:
            raise FileNotFoundError(path)
        return facts

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert module._mkl_is_behind.__wrapped__() == (behind and capability == "AVX512")


@pytest.mark.parametrize("inputs", [1, 2, 7, 8])
@pytest.mark.parametrize("relu", [False, True])
def test_a_layer_is_a_linear_layer_whatever_its_inputs(inputs, relu):
    torch.manual_seed(0)
    ours, plain = Linear(inputs, 8), nn.Linear(inputs, 8)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 9, inputs, requires_grad=True)
    for points in (x, x.flatten(0, 1)):
        found = ours(points, relu=relu)
        expected = plain(points).relu() if relu else plain(points)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, [x, *ours.parameters()], direction),
            torch.autograd.grad(expected, [x, *plain.parameters()], direction),
        )
