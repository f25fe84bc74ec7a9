"""MAML against its definition: a plain loop over tasks, and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metabatch_cli.batching import Task
from metabatch_cli.learners.maml import MAML
from tests.learners.examples import classification, conv, mlp, regression

seeds = st.integers(0, 2**31)


def plain_loop(
    model: nn.Module,
    tasks: Task,
    inner_lr: float,
    inner_steps: int,
    first_order: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Algorithm 1 or 2 of the paper, one task after the other: loss, meta-gradients, outputs."""
    loss_of = F.mse_loss if tasks.context_y.is_floating_point() else F.cross_entropy
    start = dict(model.named_parameters())
    losses, outputs = [], []
    for cx, cy, tx, ty in zip(*tasks[:4], strict=True):
        weights = start
        for _ in range(inner_steps):
            inner = loss_of(functional_call(model, weights, (cx,)), cy)
            gradients = torch.autograd.grad(
                inner, list(weights.values()), create_graph=not first_order
            )
            weights = {
                name: weight - inner_lr * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        output = functional_call(model, weights, (tx,))
        outputs.append(output.detach())
        losses.append(loss_of(output, ty))
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, list(start.values()))
    return loss.detach(), list(gradients), torch.stack(outputs)


def meta_gradients(learner: MAML, tasks: Task) -> list[Tensor]:
    learner.zero_grad()
    learner(tasks).backward()
    return [parameter.grad.clone() for parameter in learner.model.parameters()]


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(1, 2), seeds)
def test_all_tasks_at_once_are_a_loop_over_the_tasks(
    n_tasks, inner_steps, first_order, dim_y, seed
):
    tasks = regression(n_tasks, dim_y=dim_y, seed=seed)
    learner = MAML(
        mlp(dim_y, seed), inner_lr=0.05, inner_steps=inner_steps, first_order=first_order
    )
    loss, gradients, _ = plain_loop(learner.model, tasks, 0.05, inner_steps, first_order)
    torch.testing.assert_close(learner(tasks).detach(), loss)
    torch.testing.assert_close(meta_gradients(learner, tasks), gradients)


# torch 2.13: under vmap, second derivatives through batch_norm, layer_norm and instance_norm that
# are given weight and bias are silently wrong (group_norm, and a scale applied outside, are right)
@pytest.mark.parametrize(
    ("norm", "first_order", "inner_steps"),
    [
        ("none", False, 1),
        ("none", True, 2),
        ("transductive", True, 1),
        ("transductive", True, 2),
        ("transductive", False, 1),
        ("transductive", False, 2),
    ],
)
def test_classification_is_a_loop_over_the_tasks_too(norm, first_order, inner_steps):
    tasks = classification()
    learner = MAML(
        conv(norm, 3, channels_last=False),
        ways=3,
        inner_lr=0.4,
        inner_steps=inner_steps,
        first_order=first_order,
    )
    loss, gradients, outputs = plain_loop(learner.model, tasks, 0.4, inner_steps, first_order)
    torch.testing.assert_close(learner(tasks).detach(), loss)
    torch.testing.assert_close(meta_gradients(learner, tasks), gradients)
    accuracy = (outputs.argmax(-1) == tasks.target_y).double().mean(1)
    torch.testing.assert_close(learner.score(tasks)[f"accuracy@steps={inner_steps}"], accuracy)


def test_a_users_network_with_a_layer_norm_gets_the_true_gradient_too():
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(1, 6), nn.Tanh(), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)
        ).double()

    tasks = regression()
    learner = MAML(network(), inner_lr=0.1)
    _, gradients, _ = plain_loop(learner.model, tasks, 0.1, 1)
    torch.testing.assert_close(meta_gradients(learner, tasks), gradients)


def test_the_shipped_conv4_adapts_whatever_its_memory_layout():
    tasks = classification()
    one, other = (
        MAML(conv("transductive", 3, channels_last=flag), ways=3, inner_lr=0.4)
        for flag in (False, True)
    )
    torch.testing.assert_close(one(tasks), other(tasks))
    torch.testing.assert_close(meta_gradients(one, tasks), meta_gradients(other, tasks))


def test_meta_gradients_are_finite_differences_of_the_loss_after_several_steps():
    tasks = regression()
    learner = MAML(mlp(), inner_lr=0.1, inner_steps=3)
    gradients = meta_gradients(learner, tasks)
    generator = torch.Generator().manual_seed(1)
    for parameter, gradient in zip(learner.model.parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * direction
                losses.append(learner(tasks))
                parameter -= sign * 1e-5 * direction
        slope = (losses[0] - losses[1]) / 2e-5
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-6, atol=1e-8)


def test_first_order_has_the_same_loss_and_another_gradient():
    tasks = regression()
    second, first = (MAML(mlp(), inner_lr=0.1, first_order=flag) for flag in (False, True))
    torch.testing.assert_close(first(tasks), second(tasks))
    pairs = zip(meta_gradients(first, tasks), meta_gradients(second, tasks), strict=True)
    assert not any(torch.allclose(one, other, rtol=1e-3) for one, other in pairs)


def test_first_order_is_the_gradient_at_the_adapted_weights():
    """§5.2: the target's gradient at the adapted weights, applied to the initial ones."""
    tasks = regression(n_tasks=1)
    learner = MAML(mlp(), inner_lr=0.1, inner_steps=2, first_order=True)
    adapted = mlp()
    for _ in range(2):
        loss = F.mse_loss(adapted(tasks.context_x[0]), tasks.context_y[0])
        gradients = torch.autograd.grad(loss, list(adapted.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(adapted.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    F.mse_loss(adapted(tasks.target_x[0]), tasks.target_y[0]).backward()
    by_hand = [parameter.grad for parameter in adapted.parameters()]
    torch.testing.assert_close(meta_gradients(learner, tasks), by_hand)


def test_scores_at_each_number_of_steps_are_those_of_the_plain_loop():
    tasks = regression()
    learner = MAML(mlp(), inner_lr=0.1, inner_steps=1, eval_steps=[5, 0, 1, 5])
    scores = learner.score(tasks)
    assert list(scores) == ["mse@steps=0", "mse@steps=1", "mse@steps=5"]
    for steps in (0, 1, 5):
        _, _, outputs = plain_loop(learner.model, tasks, 0.1, steps)
        errors = (outputs - tasks.target_y).square().mean(dim=(1, 2))
        torch.testing.assert_close(scores[f"mse@steps={steps}"], errors)


def test_without_inner_steps_the_score_is_that_of_the_model_as_it_is():
    tasks = regression()
    learner = MAML(mlp(), eval_steps=[0])
    errors = (learner.model(tasks.target_x) - tasks.target_y).square().mean(dim=(1, 2))
    torch.testing.assert_close(learner.score(tasks)["mse@steps=0"], errors.detach())


@pytest.mark.parametrize(
    ("eval_steps", "ways", "name"),
    [
        ([0, 1, 5], None, "mse@steps=1"),
        ([0], None, "mse@steps=0"),
        (None, None, "mse@steps=2"),
        ([0, 10, 5], 3, "accuracy@steps=10"),
    ],
)
def test_the_positive_number_of_steps_that_is_listed_first_is_monitored(eval_steps, ways, name):
    learner = MAML(mlp(), ways=ways, inner_steps=2, eval_steps=eval_steps)
    assert learner.metric.name == name
    assert learner.metric.higher_is_better == (ways is not None)


def test_predictions_are_made_after_the_monitored_number_of_steps():
    tasks = regression()
    learner = MAML(mlp(), inner_lr=0.1, eval_steps=[0, 3])
    _, _, outputs = plain_loop(learner.model, tasks, 0.1, 3)
    torch.testing.assert_close(learner.predict(*tasks[:3]).mean, outputs)


def test_running_averages_are_refused_and_the_remedy_named():
    with pytest.raises(ValueError, match=r"running averages .* choose from transductive, support"):
        MAML(conv("batch", 3), ways=3, normalisation="running")
    torchs = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"layer '2' is torch's BatchNorm1d.*BatchNorm there"):
        MAML(torchs, ways=3)


@pytest.mark.parametrize("normalisation", ["transductive", "support"])
def test_no_running_average_is_touched_by_training_or_scoring(normalisation):
    learner = MAML(conv("batch", 3), ways=3, inner_steps=2, normalisation=normalisation).train()
    before = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    assert before
    learner(classification()).backward()
    learner.score(classification())
    for name, buffer in learner.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_nothing_to_report_is_refused():
    with pytest.raises(ValueError, match="eval_steps"):
        MAML(mlp(), eval_steps=[])
