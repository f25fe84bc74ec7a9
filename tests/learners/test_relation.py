"""Relation networks: pairs of maps, scores and their squared errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metabatch_cli.learners.relation import RelationModule, RelationNet
from tests.learners.examples import IMAGE, classification, conv, maps


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def relation(**more: object) -> RelationNet:
    torch.manual_seed(0)
    return RelationNet(maps(), IMAGE, width=4, hidden=6, **more).double().eval()


@pytest.mark.parametrize("sides", [(7, 7), (5, 4), (3, 2), (1, 1)])
def test_the_module_sees_every_target_beside_every_class(sides):
    torch.manual_seed(0)
    module = RelationModule((3, *sides), width=4, hidden=5).double().eval()
    points, classes = normal(5, 3, *sides), normal(2, 3, *sides, seed=1)
    found = module(points, classes)
    assert found.shape == (5, 2)
    for i in range(5):
        for k in range(2):
            pair = torch.cat([classes[k], points[i]])[None]
            maps = module.first_norm(module.beside(pair))
            maps = F.relu(F.max_pool2d(maps, 2) if min(sides) >= 2 else maps)
            maps = module.second_norm(module.second(maps))
            maps = F.relu(F.max_pool2d(maps, 2) if min(sides) >= 4 else maps)
            by_hand = module.score(F.relu(module.hidden(maps.flatten(1))))
            torch.testing.assert_close(found[i, k], by_hand[0, 0])


@pytest.mark.parametrize("prototype", ["sum", "mean"])
def test_a_class_is_the_sum_of_its_maps_or_their_mean(prototype):
    tasks = classification(1, ways=2, shots=3)
    model = relation(prototype=prototype)
    embedded = model.embed(tasks.context_x, tasks.target_x)[0]
    of_class = [embedded[:6][tasks.context_y[0] == k] for k in range(2)]
    classes = torch.stack([getattr(own, prototype)(0) for own in of_class])
    scores = torch.sigmoid(model.relation(embedded[6:], classes))
    found = model.predict(*tasks[:3]).probs[0]
    torch.testing.assert_close(found, scores / scores.sum(dim=1, keepdim=True))


def test_the_loss_is_the_squared_error_of_the_scores():
    tasks = classification(1, ways=3)
    model = relation()
    embedded = model.embed(tasks.context_x, tasks.target_x)[0]
    of_class = [embedded[:6][tasks.context_y[0] == k].sum(0) for k in range(3)]
    scores = torch.sigmoid(model.relation(embedded[6:], torch.stack(of_class)))
    wanted = F.one_hot(tasks.target_y[0], 3)
    torch.testing.assert_close(model(tasks), (scores - wanted).square().sum(1).mean())


def test_classes_may_be_named_at_will():
    tasks = classification(ways=3)
    names = torch.tensor([2, 0, 1])
    model = relation()
    before = model.predict(*tasks[:3]).probs
    after = model.predict(tasks.context_x, names[tasks.context_y], tasks.target_x).probs
    torch.testing.assert_close(after[..., names], before)


@pytest.mark.parametrize("model", [conv("batch"), nn.Flatten()])
def test_vectors_are_refused_with_the_remedy(model):
    with pytest.raises(ValueError, match=r"model embeds .*model\.flatten=false"):
        RelationNet(model, IMAGE)
