"""The inner loop: all tasks at once are each task alone, gradients are what they claim to be."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metabatch_cli.batching import PaddedTask, Task
from metabatch_cli.batching.task import slice_tasks
from metabatch_cli.learners import inner_loop, meta_gradient
from metabatch_cli.learners.anil import ANIL
from metabatch_cli.learners.inner_loop import GradientBased
from metabatch_cli.learners.learner import Learner
from metabatch_cli.learners.maml import MAML
from metabatch_cli.learners.mamlpp import MAMLPlusPlus
from metabatch_cli.learners.metasgd import MetaSGD
from metabatch_cli.learners.protomaml import ProtoMAML
from metabatch_cli.learners.reptile import Reptile
from metabatch_cli.models.conv2d import Conv2d
from tests.learners.examples import classification, conv, mlp, regression

SMOOTH: dict[str, tuple[Callable[..., GradientBased], Callable[[], Task]]] = {
    "maml": (lambda **kw: MAML(mlp(), inner_lr=0.1, inner_steps=2, **kw), regression),
    "metasgd": (lambda **kw: MetaSGD(mlp(), inner_lr=0.1, inner_steps=2, **kw), regression),
    "mamlpp": (lambda **kw: MAMLPlusPlus(mlp(), inner_steps=3, **kw), regression),
    "anil": (lambda **kw: ANIL(mlp(), inner_lr=0.1, inner_steps=2, **kw), regression),
}
"""Their networks are smooth, so that finite differences tell."""

IMAGES: dict[str, tuple[Callable[..., GradientBased], Callable[[], Task]]] = {
    "maml": (lambda **kw: MAML(conv("batch", 3), 3, 0.4, inner_steps=2, **kw), classification),
    "metasgd": (lambda **kw: MetaSGD(conv("batch", 3), 3, **kw), classification),
    "mamlpp": (
        lambda **kw: MAMLPlusPlus(conv("batch", 3), 3, inner_steps=2, **kw),
        classification,
    ),
    "anil": (lambda **kw: ANIL(conv("batch", 3), 3, inner_steps=2, **kw), classification),
    "protomaml": (
        lambda **kw: ProtoMAML(conv("batch"), 3, first_order=False, **kw),
        classification,
    ),
    "reptile": (lambda **kw: Reptile(conv("batch", 3), 3, inner_batch=None, **kw), classification),
}


def loss_and_gradients(learner: Learner, tasks: Task, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    learner.zero_grad()
    loss = learner(tasks)
    loss.backward()
    return [loss.detach(), *(part.grad.clone() for part in learner.parameters())]


def case(table: dict, name: str, **more: object) -> tuple[GradientBased, Task]:
    learner, tasks = table[name]
    torch.manual_seed(1)
    return learner(**more), tasks()


# --- at once is one after the other ------------------------------------------------------------


@pytest.mark.parametrize("normalisation", ["transductive", "support"])
@pytest.mark.parametrize("name", IMAGES)
def test_images_at_once_are_images_task_by_task(name, normalisation):
    found = {}
    for way in ("vmap", "loop"):
        learner, tasks = case(IMAGES, name, inner_loop=way, normalisation=normalisation)
        found[way] = loss_and_gradients(learner.train(), tasks)
        learner.eval()
        found[way] += [value for _, value in sorted(learner.score(tasks).items())]
        found[way].append(learner.predict(*tasks[:3]).logits)
    torch.testing.assert_close(found["vmap"], found["loop"])


@pytest.mark.parametrize("name", SMOOTH)
def test_functions_at_once_are_functions_task_by_task(name):
    ways = [loss_and_gradients(*case(SMOOTH, name, inner_loop=way)) for way in ("vmap", "loop")]
    torch.testing.assert_close(*ways)


def test_support_and_transductive_moments_give_other_predictions():
    logits = [
        case(IMAGES, "maml", normalisation=mode)[0].predict(*classification()[:3]).logits
        for mode in ("transductive", "support")
    ]
    assert not torch.allclose(*logits)


def test_with_support_moments_a_target_is_judged_by_itself():
    learner, tasks = case(IMAGES, "maml", normalisation="support")
    together = learner.predict(*tasks[:3]).logits
    alone = [
        learner.predict(tasks.context_x, tasks.context_y, tasks.target_x[:, i : i + 1]).logits
        for i in range(tasks.target_x.shape[1])
    ]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_finite_differences_of_the_loss(name):
    learner, tasks = case(SMOOTH, name)
    _, *gradients = loss_and_gradients(learner, tasks)
    generator = torch.Generator().manual_seed(1)
    for (which, parameter), gradient in zip(learner.named_parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * direction
                losses.append(learner(tasks))
                parameter -= sign * 1e-5 * direction
        slope = (losses[0] - losses[1]) / 2e-5
        expected = (gradient * direction).sum()
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8, msg=which)


@pytest.mark.parametrize("name", ["maml", "metasgd", "anil"])
def test_first_order_has_the_same_loss_and_another_gradient(name):
    (loss, *second), (other, *first) = (
        loss_and_gradients(*case(SMOOTH, name, first_order=flag)) for flag in (False, True)
    )
    torch.testing.assert_close(loss, other)
    assert not all(torch.allclose(*pair, rtol=1e-3) for pair in zip(first, second, strict=True))


def test_a_loss_can_be_scaled_and_added_up_as_any_other():
    learner, tasks = case(SMOOTH, "maml")
    _, *gradients = loss_and_gradients(learner, tasks)
    learner.zero_grad()
    (3 * learner(tasks)).backward()
    (learner(tasks) / 2).backward()
    for parameter, gradient in zip(learner.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 3.5 * gradient)


def test_anil_adapts_the_head_only():
    learner, tasks = case(SMOOTH, "anil")
    context, _ = inner_loop.points_of(tasks)
    meta = learner._meta()
    one = {name: part[0] for name, part in context.items()}
    seen, _ = learner.seen(meta, one, one)
    weights = learner.adapted(meta, learner.first(meta, seen), seen, range(2))
    assert {tuple(part.shape) for part in weights.values()} == {(1, 6), (1,)}
    with pytest.raises(ValueError, match=r"Sequential has no features.*model\.head=true"):
        ANIL(nn.Sequential(nn.Linear(1, 1)))


class Deep(nn.Module):
    """A body and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(1, 6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_anil_adapts_a_head_of_several_layers():
    learner, tasks = ANIL(Deep().double(), inner_lr=0.1, eval_steps=[0, 5]), regression()
    learner(tasks).backward()
    assert all(weight.grad.any() for weight in learner.model.head.parameters())
    scores = learner.score(tasks)
    assert not torch.equal(scores["mse@steps=0"], scores["mse@steps=5"])


def test_frozen_weights_of_a_norm_stay_frozen_with_one_of_each_step():
    network = conv("batch", 3)
    norm = next(layer for layer in network.modules() if isinstance(layer, _BatchNorm))
    norm.weight.requires_grad_(False)
    learner = MAMLPlusPlus(network, ways=3, inner_steps=2)
    assert [own.requires_grad for own in learner.norms][:2] == [False, True]


def test_a_learned_rate_moves_a_weight_by_rate_times_gradient():
    tasks = regression(n_tasks=1)
    learner = MetaSGD(mlp(), inner_lr=0.1, eval_steps=[1])
    with torch.no_grad():
        for number, rate in enumerate(learner.rates):
            rate.fill_(0.05 * (number + 1))
    by_hand = mlp()
    nn.functional.mse_loss(by_hand(tasks.context_x[0]), tasks.context_y[0]).backward()
    with torch.no_grad():
        for number, weight in enumerate(by_hand.parameters()):
            weight -= 0.05 * (number + 1) * weight.grad
    torch.testing.assert_close(learner.predict(*tasks[:3]).mean[0], by_hand(tasks.target_x[0]))


def test_meta_sgd_begins_with_one_rate_from_its_range():
    learners = [MetaSGD(mlp(seed=seed), inner_lr=(0.005, 0.1)) for seed in range(5)]
    firsts = [torch.cat([rate.detach().flatten() for rate in one.rates]) for one in learners]
    assert all((rates == rates[0]).all() and 0.005 <= rates[0] <= 0.1 for rates in firsts)
    assert len({rates[0].item() for rates in firsts}) == 5
    with pytest.raises(ValueError, match="inner_lr"):
        MetaSGD(mlp(), inner_lr=(0.1, 0.005))


# --- MAML++ --------------------------------------------------------------------------------------


def test_the_losses_of_all_steps_count_alike_at_first_and_then_the_last_alone():
    learner = MAMLPlusPlus(mlp(), inner_steps=4, epoch=10, multi_step_epochs=3)
    seen = []
    for step in (0, 9, 10, 25, 30):
        learner.begin(step)
        seen.append((learner.importance.tolist(), learner.only_last))
    assert seen[0] == seen[1] == ([0.25] * 4, False)
    for weights, _ in seen:
        assert sum(weights) == pytest.approx(1)
    # an epoch takes 1/(4·3) from each of three
    assert seen[2][0] == pytest.approx([0.25 - 1 / 12] * 3 + [0.25 + 3 / 12])
    assert seen[3][0] == pytest.approx([0.25 - 2 / 12] * 3 + [0.25 + 6 / 12])
    assert seen[4][1]


def test_weights_of_steps_do_not_fall_below_their_least():
    from metabatch_cli.learners.mamlpp import importance

    weights = importance(steps=5, epoch=10, epochs=10)
    assert weights == pytest.approx([0.03 / 5] * 4 + [1 - 4 * 0.03 / 5])


def test_where_a_training_was_interrupted_does_not_matter_to_its_weights_of_steps():
    through, resumed = (
        MAMLPlusPlus(mlp(), inner_steps=4, epoch=10, multi_step_epochs=3) for _ in range(2)
    )
    for step in range(14):
        through.begin(step)
    resumed.begin(13)
    assert torch.equal(through.importance, resumed.importance)


def test_maml_plus_plus_with_one_rate_and_the_last_loss_is_maml():
    tasks = regression()
    plus = MAMLPlusPlus(mlp(), inner_lr=0.1, inner_steps=2, multi_step_epochs=0)
    plain = MAML(mlp(), inner_lr=0.1, inner_steps=2)
    loss, *gradients = loss_and_gradients(plain, tasks)
    found = loss_and_gradients(plus, tasks)
    torch.testing.assert_close(found[0], loss)
    of_model = [p.grad for name, p in plus.named_parameters() if name.startswith("model.")]
    torch.testing.assert_close(of_model, gradients)


def test_every_step_has_a_scale_and_a_shift_that_the_inner_loop_leaves_alone():
    learner, tasks = case(IMAGES, "mamlpp")
    assert {tuple(part.shape) for part in learner.norms} == {(2, 4)}
    loss_and_gradients(learner, tasks)
    for part in learner.norms:  # both steps learn, each its own
        assert part.grad.abs().sum(dim=1).all()
    assert not any("1." in name for name in learner.adapting)


# --- Reptile -------------------------------------------------------------------------------------


def test_reptile_moves_to_the_mean_of_where_steps_on_each_task_lead():
    tasks = regression()
    learner = Reptile(mlp(), inner_lr=0.1, inner_steps=3, inner_batch=None)
    ends = []
    for x, y in zip(tasks.context_x, tasks.context_y, strict=True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        ends.append([part.detach() for part in model.parameters()])
    outer = torch.optim.SGD(learner.parameters(), lr=0.5)
    learner(tasks).backward()
    outer.step()
    for begin, now, *end in zip(mlp().parameters(), learner.parameters(), *ends, strict=True):
        expected = begin + 0.5 * (torch.stack(end).mean(0) - begin)
        torch.testing.assert_close(now.detach(), expected.detach())


def test_reptiles_adam_is_torchs_with_its_mean_squares_kept_for_the_next_batch():
    tasks = regression(n_tasks=1)
    learner = Reptile(
        mlp(), inner_lr=0.01, inner_steps=3, inner_batch=None, inner_optimizer="adam"
    ).train()
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.999))
    for _ in range(2):  # the outer rate is 1: both stand where the steps led
        learner.zero_grad()
        learner(tasks).backward()
        torch.optim.SGD(learner.parameters(), lr=1.0).step()
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(tasks.context_x[0]), tasks.context_y[0]).backward()
            optimizer.step()
        torch.testing.assert_close(list(learner.parameters()), list(model.parameters()))
    assert learner.taken == 6


def test_reptiles_small_batches_see_every_point_before_any_one_again():
    tasks = regression(n_context=6)
    learner = Reptile(mlp(), inner_steps=3, inner_batch=4)
    torch.manual_seed(0)
    context, _ = learner.shown(tasks)
    assert context["order"].shape == (3, 12)
    for order in context["order"].tolist():
        assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    orders = {tuple(order[i : i + 6]) for order in context["order"].tolist() for i in (0, 6)}
    assert len(orders) == 6  # each task its own, and each time another one


# --- which way, and compiled -------------------------------------------------------------------


def test_the_faster_way_is_chosen_and_said(monkeypatch):
    learner, tasks = case(SMOOTH, "maml")
    assert learner._seconds(True, tasks) > 0
    monkeypatch.setattr(GradientBased, "_seconds", lambda self, at_once, tasks: 2.0 - at_once)
    assert learner.choose(tasks) == {"inner_loop": "vmap"}
    forced, _ = case(SMOOTH, "maml", inner_loop="loop")
    assert forced.choose(tasks) == {"inner_loop": "loop"}
    assert forced.cost_of_compiling(tasks) is None
    cost = learner.cost_of_compiling(tasks)
    assert cost.seconds > 0
    assert cost.saved_per_step > 0
    monkeypatch.setattr(inner_loop, "LARGE", 1)
    assert learner.cost_of_compiling(tasks) is None  # its operations are large by that measure


def test_the_slower_way_is_not_chosen(monkeypatch):
    learner, tasks = case(SMOOTH, "maml")
    monkeypatch.setattr(GradientBased, "_seconds", lambda self, at_once, tasks: float(at_once))
    assert learner.choose(tasks) == {"inner_loop": "loop"}
    assert not learner._goes_at_once(*inner_loop.points_of(tasks))


def test_a_way_that_would_be_wrong_is_refused():
    model = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"inner_loop='vmap': .*layer_norm are wrong"):
        MAML(model, inner_loop="vmap")(regression())
    assert MAML(model).choose(regression()) == {"inner_loop": "loop"}


def test_torchs_own_convolutions_go_one_by_one_unless_told_otherwise():
    tasks = classification()
    model = conv("none", 3)
    for number, layer in enumerate(model.blocks):
        if isinstance(layer, Conv2d):
            plain = nn.Conv2d(layer.in_channels, 4, 3, padding=1).double()
            plain.load_state_dict(layer.state_dict())
            model.blocks[number] = plain
    ways = {}
    for way in ("auto", "vmap"):
        learner = MAML(model, ways=3, inner_lr=0.1, inner_loop=way)
        ways[way] = loss_and_gradients(learner, tasks)
        assert learner._at_once == (way == "vmap")
    torch.testing.assert_close(ways["auto"], ways["vmap"])


ALL_SIZES = pytest.param(True, ((6, 6), (5, 7), (3, 4), (8, 8), (1, 3)), 2, marks=pytest.mark.slow)


@pytest.mark.parametrize(("varying", "sizes", "graphs"), [(False, ((5, 7),), 1), ALL_SIZES])
def test_compiled_it_is_what_it_was(varying, sizes, graphs):
    """Also with other numbers of points, which one graph is for, and with a single one."""
    learner, tasks = case(SMOOTH, "maml")
    loss_of = learner.compiled(varying)
    compiled = loss_of.args[0]
    for n_context, n_target in sizes:
        tasks = regression(n_context=n_context, n_target=n_target)
        expected = loss_and_gradients(learner, tasks)
        learner.zero_grad()
        loss = loss_of(tasks)
        loss.backward()
        found = [loss.detach(), *(part.grad for part in learner.parameters())]
        torch.testing.assert_close(found, expected)
    assert len(compiled._graphs) == graphs  # one is of a single point
    assert None not in compiled._graphs.values()


def test_where_nothing_can_be_compiled_it_goes_on_and_says_so(monkeypatch, caplog):
    def fails(*args: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(meta_gradient, "compiled", fails)
    learner, tasks = case(SMOOTH, "maml")
    with caplog.at_level(logging.WARNING, "metabatch"):
        found = learner.compiled(varying=False)(tasks)
    assert "no compiler here" in caplog.text
    torch.testing.assert_close(found.detach(), learner(tasks).detach())


def test_a_graph_that_comes_out_otherwise_is_not_used(monkeypatch, caplog):
    def wrong(graph: Callable[..., list[Tensor]], *args: object) -> Callable[..., list[Tensor]]:
        return lambda *leaves: [1.1 * part for part in graph(*leaves)]

    monkeypatch.setattr(meta_gradient, "compiled", wrong)
    learner, tasks = case(SMOOTH, "maml")
    loss_of = learner.compiled(varying=False)
    with caplog.at_level(logging.WARNING, "metabatch"):
        found = [loss_of(tasks).detach(), loss_of(tasks).detach()]
    assert "comes out otherwise" in caplog.text
    torch.testing.assert_close(found, [learner(tasks).detach()] * 2)


def test_gradients_lie_in_memory_as_their_parameters_do():
    """A fused optimizer pairs their numbers in that order: with another it is silently wrong."""
    torch.manual_seed(0)
    first = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    gradient = torch.randn(4, 3, 3, 3)
    found, expected = (nn.Parameter(first.clone()) for _ in range(2))
    meta_gradient.Differentiated(torch.zeros(()), [gradient], [found]).backward()
    expected.grad = gradient.to(memory_format=torch.channels_last)
    for parameter in (found, expected):
        torch.optim.Adam([parameter], fused=True).step()
    assert found.grad.stride() == found.stride()
    torch.testing.assert_close(found.grad, gradient)
    torch.testing.assert_close(found, expected)


def test_what_is_compiled_goes_to_the_users_cache_folder(cache_home, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    learner, tasks = case(SMOOTH, "maml")
    learner.cost_of_compiling(tasks)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_home / "metabatch" / "compiled")


def uncompiled(graph: Callable[..., list[Tensor]], *args: object) -> Callable[..., list[Tensor]]:
    """Stands in for the compiler: the graph as it was traced."""
    return graph


def padded(tasks: Task) -> PaddedTask:
    """The same with a point of padding behind the first task's context and targets."""
    masks = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (tasks[0], tasks[2])]
    for mask in masks:
        mask[0, -1] = False
    return PaddedTask(*tasks[:2], masks[0], *tasks[2:4], masks[1], {})


@pytest.mark.parametrize("chosen_by", ["nothing", "plain tasks", "padded tasks"])
@pytest.mark.parametrize("varying", [True, False])
def test_padded_tasks_are_compiled_with_all_options_given(varying, chosen_by, monkeypatch, caplog):
    """As a resumed training has them; the first tasks may be of one size, and none be asked."""
    monkeypatch.setattr(meta_gradient, "compiled", uncompiled)
    learner, tasks = case(SMOOTH, "maml", inner_loop="vmap")
    if chosen_by != "nothing":
        learner.choose(padded(tasks) if chosen_by == "padded tasks" else tasks)
    tasks = padded(tasks)
    loss_of = learner.compiled(varying)
    with caplog.at_level(logging.WARNING, "metabatch"):
        found = loss_of(tasks)
    assert "not compiled" not in caplog.text
    assert None not in loss_of.args[0]._graphs.values()
    torch.testing.assert_close(found.detach(), learner(tasks).detach())


def test_asking_whether_padding_matters_draws_nothing():
    """It is asked at the first padded batch, after a resume too: steps draw as they did before."""
    drawing = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double().train()
    learner = MAML(drawing, inner_loop="vmap").train()
    tasks = regression()
    learner.choose(tasks)
    states = []
    for _ in range(2):  # with the question and without it
        torch.manual_seed(0)
        learner(padded(tasks))
        states.append(torch.get_rng_state())
    assert learner._points_apart
    assert torch.equal(*states)


def test_a_graph_for_all_sizes_is_for_one_number_of_tasks(monkeypatch):
    monkeypatch.setattr(meta_gradient, "compiled", uncompiled)
    learner, tasks = case(SMOOTH, "maml")
    loss_of = learner.compiled(varying=True)
    for n_context, count in ((6, 3), (5, 3), (5, 2)):
        tasks = slice_tasks(regression(n_context=n_context, n_target=6), 0, count)
        torch.testing.assert_close(loss_of(tasks).detach(), learner(tasks).detach())
    assert len(loss_of.args[0]._graphs) == 2


def test_a_graph_that_fails_at_a_size_is_not_used(monkeypatch, caplog):
    def only_six(graph: Callable[..., list[Tensor]], *args: object) -> Callable[..., list[Tensor]]:
        def run(*leaves: Tensor) -> list[Tensor]:
            if leaves[-1].shape[1] != 6:
                raise RuntimeError("expected size 6")
            return graph(*leaves)

        return run

    monkeypatch.setattr(meta_gradient, "compiled", only_six)
    learner, _ = case(SMOOTH, "maml")
    loss_of = learner.compiled(varying=True)
    with caplog.at_level(logging.WARNING, "metabatch"):
        for n_context in (6, 5, 5):
            tasks = regression(n_context=n_context, n_target=n_context)
            torch.testing.assert_close(loss_of(tasks).detach(), learner(tasks).detach())
    assert caplog.text.count("expected size 6") == 1


@pytest.mark.parametrize("way", ["vmap", "loop"])
@pytest.mark.parametrize(
    "learner_of",
    [
        lambda model, **kw: MAML(model, inner_lr=0.1, **kw),
        lambda model, **kw: MetaSGD(model, inner_lr=0.1, **kw),
        lambda model, **kw: MAMLPlusPlus(model, inner_steps=1, inner_lr=0.1, **kw),
        lambda model, **kw: ANIL(model, inner_lr=0.1, **kw),
        lambda model, **kw: Reptile(model, inner_lr=0.1, inner_batch=None, **kw),
    ],
)
def test_a_frozen_weight_does_not_adapt(learner_of, way):
    model = mlp()
    model.head.bias.requires_grad_(False)
    learner = learner_of(model, inner_loop=way)
    tasks = regression()
    learner(tasks).backward()
    assert model.head.bias.grad is None
    assert model.head.weight.grad.any()
    meta, context = learner._meta(), {"x": tasks.context_x[0], "y": tasks.context_y[0]}
    context, _ = learner.seen(meta, context, context)
    before = learner.first(meta, context)
    after = learner.adapted(meta, before, context, [0])
    assert {"layers.4.weight", "weight"} & set(after)  # ANIL's are by their names in the head
    assert not {"layers.4.bias", "bias"} & set(after)
    assert all(not torch.equal(before[name], after[name]) for name in after)


def test_a_frozen_weight_is_given_no_gradient():
    frozen, free = (nn.Parameter(torch.ones(2), requires_grad=grad) for grad in (False, True))
    given = [torch.ones(2), torch.ones(2)]
    meta_gradient.Differentiated(torch.zeros(()), given, [frozen, free]).backward()
    assert frozen.grad is None
    assert free.grad is not None


@pytest.mark.parametrize("inner_loop", ["vmap", "loop"])
@pytest.mark.parametrize("kind", [MAML, MAMLPlusPlus, MetaSGD, ANIL])
def test_without_any_context_nothing_is_learned_from_it(kind, inner_loop):
    learner = kind(mlp(), inner_loop=inner_loop, eval_steps=[0, 2])
    tasks = regression(n_context=4)
    empty = tasks._replace(context_x=tasks.context_x[:, :0], context_y=tasks.context_y[:, :0])
    learner(empty).backward()
    scores = learner.score(empty)
    torch.testing.assert_close(scores["mse@steps=0"], scores["mse@steps=2"])


def test_a_network_that_draws_does_so_for_every_task():
    torch.manual_seed(0)
    drawing = nn.Sequential(nn.Linear(1, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    tasks = regression()
    same = Task(*(part[:1].expand(4, *part.shape[1:]).float() for part in tasks[:4]), {})
    learner = MAML(drawing, inner_steps=0, inner_loop="vmap")
    learner._decide(*inner_loop.points_of(same))
    context, target = inner_loop.points_of(same)
    outputs = learner._outputs(context, target, [0])[0]
    assert not torch.equal(outputs[0], outputs[1])


def test_accuracy_is_a_fraction_in_32_bits_also_in_bfloat16():
    torch.manual_seed(0)
    tasks = classification(queries=25)
    learner = ProtoMAML(conv("batch").float(), ways=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = learner.score(tasks)
    assert all(score.dtype == torch.float32 for score in scores.values())


def test_reptile_moves_by_the_mean_over_tasks_with_a_context():
    tasks = regression()
    masks = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (tasks[0], tasks[2])]
    masks[0][1:] = False
    padded = PaddedTask(*tasks[:2], masks[0], *tasks[2:4], masks[1], {})
    gradients = []
    for given in (padded, slice_tasks(tasks, 0, 1)):
        learner = Reptile(mlp(), inner_steps=2, inner_batch=None)
        learner(given).backward()
        gradients.append([parameter.grad for parameter in learner.parameters()])
    torch.testing.assert_close(*gradients)
