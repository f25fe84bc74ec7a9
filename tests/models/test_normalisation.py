"""Normalisation: torch's layer until a mode is chosen, then the moments of the chosen points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from metabatch_cli.models.conv4 import Conv4
from metabatch_cli.models.normalisation import (
    BatchNorm,
    by_moments,
    check_mode,
    normalised,
    what_normalises,
)

MODES = ["running", "support", "transductive"]
OURS_OR_TORCHS = st.sampled_from([(5, 3), (4, 3, 6), (2, 3, 4, 5)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 2


def layer(channels: int = 3, seed: int = 0, **more: object) -> BatchNorm:
    """With a scale, a shift and running averages of its own."""
    made = BatchNorm(channels, **more).double()
    for number, part in enumerate(made.state_dict().values()):
        if part.is_floating_point():
            part.copy_(normal(channels, seed=seed + number).abs())
    return made


def network(**more: object) -> Conv4:
    torch.manual_seed(0)
    return Conv4((1, 8, 8), width=4, depth=2, **more).double()


def by_hand(x: Tensor, moments_of: Tensor, own: BatchNorm) -> Tensor:
    places = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    mean, var = (
        moments_of.mean(places).view(shape),
        moments_of.var(places, correction=0).view(shape),
    )
    standard = (x - mean) / (var + own.eps).sqrt()
    return standard * own.weight.view(shape) + own.bias.view(shape)


def torchs(own: BatchNorm, dimensions: int) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[dimensions]
    made = kind(own.num_features, track_running_stats=own.track_running_stats).double()
    made.load_state_dict(own.state_dict())
    return made


# --- without a choice ---------------------------------------------------------------------------


@given(OURS_OR_TORCHS, st.booleans(), st.booleans())
def test_without_a_choice_it_is_torchs_layer_to_the_bit(shape, training, tracks):
    own = layer(track_running_stats=tracks).train(training)
    other = torchs(own, len(shape)).train(training)
    for seed in range(2):
        assert torch.equal(own(normal(*shape, seed=seed)), other(normal(*shape, seed=seed)))
    ours, theirs = own.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_of_torchs_layer_load_into_it_and_back():
    theirs = nn.BatchNorm2d(3)
    BatchNorm(3).load_state_dict(theirs.state_dict())
    theirs.load_state_dict(BatchNorm(3).state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_running_is_what_it_does_without_a_choice(training):
    chosen, plain = network().train(training), network().train(training)
    images = normal(6, 1, 8, 8)
    with normalised(chosen, "running"):
        found = chosen(images)
    assert torch.equal(found, plain(images))
    assert all(map(torch.equal, chosen.buffers(), plain.buffers()))


# --- whose moments ------------------------------------------------------------------------------


@given(OURS_OR_TORCHS, st.integers(1, 2), st.booleans())
def test_support_normalises_by_the_first_points_transductive_by_all(shape, n_context, training):
    own = layer().train(training)
    x = normal(*shape)
    with normalised(own, "support", n_context):
        torch.testing.assert_close(own(x), by_hand(x, x[:n_context], own))
    with normalised(own, "transductive", n_context):
        torch.testing.assert_close(own(x), by_hand(x, x, own))
    with normalised(own, "support"):
        torch.testing.assert_close(own(x), by_hand(x, x, own))


def test_under_support_a_target_is_normalised_by_itself():
    model, images = network(), normal(9, 1, 8, 8)
    with normalised(model, "support", 4):
        together = model(images)
        alone = torch.cat([model(torch.cat([images[:4], image[None]]))[4:] for image in images[4:]])
    torch.testing.assert_close(together[4:], alone)


@pytest.mark.parametrize("mode", ["support", "transductive"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_written_into_a_buffer(mode, training):
    model = network().train(training)
    before = [buffer.clone() for buffer in model.buffers()]
    with normalised(model, mode, 2):
        model(normal(6, 1, 8, 8)).sum().backward()
    assert before
    assert all(map(torch.equal, before, model.buffers()))


@pytest.mark.parametrize("n_context", [None, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_first_and_second_order_flow_through_the_moments(n_context, layout, affine):
    own = layer(affine=affine) if affine else BatchNorm(3, affine=False).double()
    x = normal(3, 3, 2, 2).to(memory_format=layout)

    def call(x: Tensor, *affine: Tensor) -> Tensor:
        weights = dict(zip(("weight", "bias"), affine, strict=False))
        with normalised(own, "support", n_context):
            return functional_call(own, weights, (x,))

    given = [part.detach().clone().requires_grad_() for part in (x, *own.parameters())]
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


@given(OURS_OR_TORCHS, st.booleans())
def test_first_derivatives_are_the_same_whether_second_ones_may_follow_or_not(shape, affine):
    own = layer() if affine else BatchNorm(3, affine=False).double()
    x = normal(*shape).requires_grad_()
    with normalised(own, "transductive"):
        loss = own(x).sin().sum()
    wanted = [x, *own.parameters()]
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted, create_graph=True), once)


def test_a_choice_ends_with_its_block_whatever_happens_in_it_and_blocks_nest():
    model, images = network().eval(), normal(6, 1, 8, 8)
    plain = model(images)

    def fail() -> None:
        with normalised(model, "transductive"):
            with normalised(model, "running"):
                assert torch.equal(model(images), plain)
            assert not torch.allclose(model(images), plain)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(model(images), plain)


def test_moments_of_half_precision_are_taken_in_32_bits():
    x = (normal(64, 3, 4, 4) + 50).bfloat16()
    with normalised(own := layer().float(), "support", 32):
        found = own(x)
    assert found.dtype == torch.bfloat16
    exact = by_hand(x.double(), x[:32].double(), own)
    torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-2, atol=1e-2)


# --- behind a convolution -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 4, (3, 5)), (1, 12, 2), (1, 12, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"stride": 2}, {"padding_mode": "reflect"}]
)
def test_with_a_convolution_it_is_the_one_behind_the_other(mode, training, shape, options):
    inputs, outputs, kernel = shape
    options = {"padding": 1, "bias": False, **options}
    convolution = nn.Conv2d(inputs, outputs, kernel, **options).double()
    ways = []
    for together in (True, False):
        own = layer(outputs).train(training)
        x = normal(5, inputs, 6, 7).requires_grad_()
        with normalised(own, mode, 3):
            y = own.after(convolution, x) if together else own(convolution(x))
        wanted = [x, *convolution.parameters(), *own.parameters()]
        ways.append([y, *own.buffers(), *torch.autograd.grad(y.sin().sum(), wanted)])
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other)


def test_moments_from_patches_are_cumulative_where_torchs_are():
    convolution = nn.Conv2d(1, 12, 3).double()
    own, other = layer(12, momentum=None), layer(12, momentum=None)
    for seed in range(3):
        x = normal(4, 1, 5, 5, seed=seed)
        own.after(convolution, x)
        other(convolution(x))
    for one, two in zip(own.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_half_precision_loses_nothing_by_it():
    torch.manual_seed(0)
    convolution, own = nn.Conv2d(1, 16, 3, padding=1), BatchNorm(16)
    x = torch.rand(8, 1, 12, 12)
    exact = own(convolution(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ways = [own.after(convolution, x), own(convolution(x))]
    assert all(y.dtype == torch.bfloat16 for y in ways)
    together, apart = ((y.float() - exact).square().mean() for y in ways)
    assert together < 2 * apart


# --- under transforms ---------------------------------------------------------------------------


def inner_step(model: nn.Module, mode: str, n_context: int):
    """The loss of a task after a gradient step on its context, a function of the weights."""

    def loss(weights: dict[str, Tensor], images: Tensor, counted: int) -> Tensor:
        with normalised(model, mode, n_context):
            outputs = functional_call(model, weights, (images[: n_context + counted],))
        return outputs[-1].square().sum() + outputs.sin().sum()

    def after(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        gradient = grad(loss)(weights, images, 0)
        weights = {name: weight - 0.1 * gradient[name] for name, weight in weights.items()}
        return loss(weights, images, 3)

    return after


@pytest.mark.parametrize(
    ("norm", "mode"),
    [
        ("batch", "support"),
        ("batch", "transductive"),
        pytest.param("transductive", "support", marks=pytest.mark.slow),
        pytest.param("transductive", "transductive", marks=pytest.mark.slow),
    ],
)
def test_second_derivatives_under_vmap_are_those_of_a_loop(mode, norm):
    model = network(norm=norm)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    tasks, after = normal(4, 7, 1, 8, 8), inner_step(model, mode, 4)
    at_once = grad(lambda weights: vmap(after, (None, 0))(weights, tasks).sum())(weights)
    traced = make_fx(grad(lambda w, t: vmap(after, (None, 0))(w, t).sum()))(weights, tasks)
    tracked = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    for task in tasks:  # without torch.func: torch's own derivatives
        losses = []
        current = tracked
        for counted in (0, 3):
            with normalised(model, mode, 4):
                outputs = functional_call(model, current, (task[: 4 + counted],))
            losses.append(outputs[-1].square().sum() + outputs.sin().sum())
            if not counted:
                parts = torch.autograd.grad(losses[0], list(tracked.values()), create_graph=True)
                pairs = zip(tracked.items(), parts, strict=True)
                current = {name: weight - 0.1 * part for (name, weight), part in pairs}
        losses[1].backward()
    assert all(
        torch.equal(buffer, fresh)
        for buffer, fresh in zip(model.buffers(), network(norm=norm).buffers(), strict=True)
    )
    for name, weight in tracked.items():
        torch.testing.assert_close(at_once[name], weight.grad)
        torch.testing.assert_close(traced(weights, tasks)[name], weight.grad)


def test_without_buffers_and_without_a_choice_second_derivatives_under_vmap_are_right_too():
    model = network(norm="transductive")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    tasks = normal(3, 5, 1, 8, 8)

    def after(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        gradient = grad(lambda w: functional_call(model, w, (images,)).sin().sum())(weights)
        return torch.stack([part.square().sum() for part in gradient.values()]).sum()

    at_once = grad(lambda w: vmap(after, (None, 0))(w, tasks).sum())(weights)
    one_by_one = [grad(after)(weights, task) for task in tasks]
    for name, found in at_once.items():
        torch.testing.assert_close(found, sum(gradient[name] for gradient in one_by_one))


# --- what cannot be, and what is said -----------------------------------------------------------


def test_torchs_layer_takes_running_statistics_only_and_is_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2)))
    check_mode(model, "running")
    for mode in ("support", "transductive"):
        with pytest.raises(ValueError, match=r"'1\.0' is torch's BatchNorm2d.*running"):
            check_mode(model, mode)
    without = nn.BatchNorm2d(2, track_running_stats=False)
    check_mode(without, "transductive")  # what it always does
    with pytest.raises(ValueError, match="itself"):
        check_mode(without, "support")
    check_mode(nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)), "support")


def test_a_mode_that_does_not_exist_and_an_empty_context_are_refused():
    with pytest.raises(ValueError, match=r"normalisation='suport'.*did you mean 'support'"):
        check_mode(network(), "suport")
    with pytest.raises(ValueError, match="n_context=0"), normalised(network(), "support", 0):
        pass


@pytest.mark.parametrize("mode", MODES)
def test_what_normalises_is_said_as_it_is(mode):
    assert what_normalises(network(), mode) == mode
    assert what_normalises(network(norm="none"), mode) is None
    kept = {"running": "transductive"}  # a network without averages has none to take
    assert what_normalises(network(norm="transductive"), mode) == kept.get(mode, mode)


def test_by_moments_needs_neither_scale_nor_shift():
    x = normal(4, 3, 2)
    torch.testing.assert_close(by_moments(x), by_hand(x, x, BatchNorm(3).double()).detach())
