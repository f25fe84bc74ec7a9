"""Prototypical networks: distances, means, and what a label or another task may change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from metabatch_cli.batching import Task
from metabatch_cli.learners.embedding import class_means, squared_distances
from metabatch_cli.learners.protonet import ProtoNet
from tests.learners.examples import classification, conv, one_task

seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), seeds)
def test_distances_are_the_squared_euclidean_ones(n_tasks, points, centres, features, seed):
    p = normal(n_tasks, points, features, seed=seed)
    c = normal(n_tasks, centres, features, seed=seed + 1)
    directly = (p[:, :, None] - c[:, None]).square().sum(-1)
    torch.testing.assert_close(squared_distances(p, c), directly)


@given(st.integers(1, 4), st.integers(1, 4), seeds)
def test_a_prototype_is_the_mean_of_its_class_whatever_the_order_and_the_shots(ways, most, seed):
    generator = torch.Generator().manual_seed(seed)
    shots = torch.randint(1, most + 1, (ways,), generator=generator)
    labels = torch.arange(ways).repeat_interleave(shots)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    embedded = normal(2, len(labels), 3, seed=seed)
    means, shots_found = class_means(embedded, labels.expand(2, -1))
    assert shots_found.tolist() == [shots.tolist()] * 2
    by_hand = torch.stack([embedded[:, labels == k].mean(1) for k in range(ways)], dim=1)
    torch.testing.assert_close(means, by_hand)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_cross_entropy_of_minus_the_distances(training):
    tasks = classification()
    learner = ProtoNet(nn.Flatten()).double().train(training)
    scaled = Task(tasks[0] / 2550.0, tasks[1], tasks[2] / 2550.0, tasks[3])
    losses, hits = [], []
    for cx, cy, tx, ty in zip(*scaled[:4], strict=True):
        prototypes = torch.stack([cx[cy == k].flatten(1).mean(0) for k in range(3)])
        logits = -torch.cdist(tx.flatten(1).double(), prototypes.double()).square()
        losses.append(-logits.log_softmax(-1)[range(len(ty)), ty].mean())
        hits.append((logits.argmax(-1) == ty).double().mean())
    double = Task(*(p.double() if p.is_floating_point() else p for p in scaled[:4]))
    torch.testing.assert_close(learner(double), torch.stack(losses).mean())
    scores = learner.score(double)
    torch.testing.assert_close(scores["accuracy"], torch.stack(hits))
    torch.testing.assert_close(scores["log_likelihood"], -torch.stack(losses))


@pytest.mark.parametrize(
    ("norm", "training"),
    [
        ("batch", True),
        ("batch", False),
        ("none", True),
        ("none", False),
        ("transductive", True),
        ("transductive", False),
    ],
)
def test_a_batchs_other_tasks_never_matter(norm, training):
    tasks = classification(n_tasks=4)
    learner = ProtoNet(conv(norm)).train(training)
    together = learner.predict(*tasks[:3]).logits
    alone = [learner.predict(*one_task(tasks, i)[:3]).logits for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


@given(seeds)
def test_renamed_classes_are_predicted_under_their_new_names(seed):
    tasks = classification(ways=4, seed=seed)
    learner = ProtoNet(conv("batch")).eval()
    names = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    before = learner.predict(*tasks[:3]).logits
    after = learner.predict(tasks.context_x, names[tasks.context_y], tasks.target_x).logits
    torch.testing.assert_close(after[..., names], before)


def test_the_order_of_the_context_does_not_matter():
    tasks = classification()
    order = torch.randperm(tasks.context_x.shape[1])
    learner = ProtoNet(conv("batch")).eval()
    one = learner.predict(*tasks[:3]).logits
    other = learner.predict(tasks.context_x[:, order], tasks.context_y[:, order], tasks.target_x)
    torch.testing.assert_close(one, other.logits)


def test_under_bfloat16_distances_are_computed_in_32_bits():
    tasks = classification()
    learner = ProtoNet(conv("batch").float()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert learner.predict(*tasks[:3]).logits.dtype == torch.float32
