"""Embedding learners: whose moments normalise, and what that lets a target see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metabatch_cli.batching import Task
from metabatch_cli.learners.embedding import embedded_shape
from metabatch_cli.learners.protomaml import ProtoMAML
from metabatch_cli.learners.protonet import ProtoNet
from tests.learners.examples import classification, conv, embedding_learners, one_task

MODES = ["running", "support", "transductive"]
every_learner = pytest.mark.parametrize("name", embedding_learners())
every_mode = pytest.mark.parametrize("mode", MODES)


def learner(name: str, mode: str = "running", norm: str = "batch"):
    return scale_running_variances(embedding_learners(norm, normalisation=mode)[name])


def scale_running_variances(model: nn.Module):
    """By another number for each channel."""
    for name, part in model.named_buffers():
        if name.endswith("running_var"):
            part.mul_(torch.linspace(0.3, 0.9, len(part)))
    return model


def probabilities(model, tasks: Task) -> torch.Tensor:
    return model.predict(*tasks[:3]).probs


@every_learner
@every_mode
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_is_its_tasks_one_by_one(name, mode, training):
    model, tasks = learner(name, mode).train(training), classification(4)
    together = probabilities(model, tasks)
    alone = [probabilities(model, one_task(tasks, i)) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


@every_learner
@every_mode
def test_in_evaluation_a_target_sees_others_only_under_transductive(name, mode):
    model, tasks = learner(name, mode).eval(), classification()
    together = probabilities(model, tasks)
    fewer = tasks._replace(target_x=tasks.target_x[:, :2], target_y=tasks.target_y[:, :2])
    alone = probabilities(model, fewer)
    assert torch.allclose(together[:, :2], alone) == (mode != "transductive")


@every_learner
@every_mode
def test_only_running_asks_the_running_averages(name, mode):
    model, tasks = learner(name, mode).eval(), classification()
    before = probabilities(model, tasks)
    scale_running_variances(model)
    assert torch.allclose(probabilities(model, tasks), before) == (mode != "running")


@every_learner
@every_mode
def test_only_training_under_running_writes_them(name, mode):
    model, tasks = learner(name, mode), classification()
    for training in (False, True):
        before = [part.clone() for part in model.buffers()]
        model.train(training)(tasks)
        same = all(map(torch.equal, before, model.buffers()))
        assert same == (not training or mode != "running")


@every_learner
@every_mode
def test_what_normalises_stands_beside_every_score(name, mode):
    for norm, said in (("batch", mode), ("none", None)):
        model = learner(name, mode, norm)
        if norm == "none" and name == "relation":
            said = mode  # its relation module normalises too
        for metric in model.score(classification()):
            assert model.about(metric).get("normalisation") == said


def test_a_network_without_running_averages_is_said_to_be_transductive():
    model = learner("protonet", "running", "transductive").eval()
    assert model.about("accuracy") == {"normalisation": "transductive"}
    other = learner("protonet", "transductive").eval()
    other.model.load_state_dict(model.model.state_dict(), strict=False)
    tasks = classification()
    torch.testing.assert_close(probabilities(model, tasks), probabilities(other, tasks))


def test_a_network_of_ones_own_works_with_running_statistics_and_says_why_not_with_others():
    def own(**more: object) -> ProtoNet:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))
        return ProtoNet(model, **more).double()

    tasks = classification()
    tasks = tasks._replace(context_x=tasks[0] / 255.0, target_x=tasks[2] / 255.0)
    tasks = Task(*(p.double() if p.is_floating_point() else p for p in tasks[:4]))
    model = own()
    model(tasks)
    assert model.model[2].running_mean.any()
    alone = [probabilities(model.eval(), one_task(tasks, i)) for i in range(3)]
    torch.testing.assert_close(probabilities(model, tasks), torch.cat(alone))
    with pytest.raises(ValueError, match=r"normalisation='support'.*'2' is torch's BatchNorm1d"):
        own(normalisation="support")
    with pytest.raises(ValueError, match=r"normalisation='suport'.*did you mean 'support'"):
        own(normalisation="suport")


@pytest.mark.parametrize("mode", ["support", "transductive"])
def test_gradients_flow_through_the_moments(mode):
    model, tasks = learner("protonet", mode).train(), classification(1)
    weight = model.model.blocks[0].weight
    loss = model(tasks)
    (gradient,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():  # a small step along one weight
        losses = []
        for step in (1e-6, -2e-6):
            weight[0, 0, 1, 1] += step
            losses.append(model(tasks))
    torch.testing.assert_close(
        (losses[0] - losses[1]) / 2e-6, gradient[0, 0, 1, 1], rtol=1e-5, atol=1e-8
    )


def test_the_shape_of_an_embedding_is_found_without_a_trace():
    model = conv("batch").train()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    assert embedded_shape(model, (1, 8, 8)) == (16,)
    assert model.training
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())
    with pytest.raises(ValueError, match="x_shape=None"):
        embedded_shape(model, None)


@pytest.mark.parametrize("kind", [ProtoNet, ProtoMAML])
def test_a_network_that_ends_in_scores_of_classes_is_refused(kind):
    options = {"ways": 3} if kind is ProtoMAML else {}
    with pytest.raises(ValueError, match=f"{kind.__name__} compares embeddings.*head=false"):
        kind(conv("batch", 3), **options)
