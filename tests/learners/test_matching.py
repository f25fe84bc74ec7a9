"""Matching networks: attention of classes, temperatures, and full context embeddings by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from metabatch_cli.learners.embedding import membership
from metabatch_cli.learners.matching import FullContext, MatchingNet, attention_of_classes
from tests.learners.examples import IMAGE, classification, conv

seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matching(**more: object) -> MatchingNet:
    torch.manual_seed(0)
    return MatchingNet(nn.Flatten(), IMAGE, **more).double().eval()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), seeds)
def test_a_class_has_the_attention_of_its_points_together(ways, shots, targets, seed):
    labels = torch.arange(ways).repeat_interleave(shots)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    similarities = normal(2, targets, len(labels), seed=seed)
    attention = similarities.softmax(dim=-1)
    by_hand = torch.stack([attention[..., labels == k].sum(-1) for k in range(ways)], dim=-1)
    members = membership(labels.expand(2, -1), None, torch.float64)
    found = attention_of_classes(similarities, members)
    torch.testing.assert_close(found.softmax(dim=-1), by_hand)


def test_a_class_without_attention_has_a_finite_logarithm_and_gradient():
    similarities = torch.tensor([[[0.0, -1e4, -2e4]]], requires_grad=True)
    members = F.one_hot(torch.tensor([[0, 0, 1]])).float()
    logits = attention_of_classes(similarities, members)
    assert logits.log_softmax(-1)[0, 0, 1] == -2e4
    logits.log_softmax(-1)[0, 0, 1].backward()
    torch.testing.assert_close(similarities.grad, torch.tensor([[[-1.0, 0.0, 1.0]]]))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_similarities_are_divided_by_the_temperature(distance):
    tasks = classification(shots=1)
    tasks = tasks._replace(context_x=tasks[0] / 255.0, target_x=tasks[2] / 255.0)
    model = matching(distance=distance, temperature=0.5)
    context, target = (x.flatten(2).double() for x in (tasks.context_x, tasks.target_x))
    if distance == "cosine":
        by_hand = F.cosine_similarity(target[:, :, None], context[:, None], dim=-1)
    else:
        by_hand = -torch.cdist(target, context).square()
    by_hand = (2 * by_hand).softmax(dim=-1).take_along_dim(tasks.context_y.argsort()[:, None], 2)
    found = model.predict(tasks.context_x.double(), tasks.context_y, tasks.target_x.double())
    torch.testing.assert_close(found.probs, by_hand)


def test_the_temperature_is_learned_or_kept_and_saved_in_both_cases():
    for learned in (True, False):
        model = matching(temperature=0.3, learn_temperature=learned)
        assert len(list(model.parameters())) == learned
        torch.testing.assert_close(model.state_dict()["log_temperature"].exp().item(), 0.3)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", 0), ("temperature", -1.0), ("fce_steps", 0)]
)
def test_numbers_that_cannot_be_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"{key}={value}"):
        matching(**{key: value})
    with pytest.raises(ValueError, match=r"distance='cosin'.*did you mean 'cosine'"):
        matching(distance="cosin")


def cell(x, h, c, weights):
    """One step of an LSTM, in the order of torch: input, forget, candidate, output."""
    w_x, w_h, b_x, b_h = weights
    i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def test_full_context_embeddings_are_those_of_the_appendix():
    torch.manual_seed(0)
    model = FullContext(3, steps=2).double()
    context, target = normal(1, 4, 3), normal(1, 2, 3, seed=1)
    found_context, found_target = model(context, target)
    lstm = model.over_context
    by_hand = context[0].clone()
    for suffix, order in (("", range(4)), ("_reverse", reversed(range(4)))):
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        weights = [getattr(lstm, name + suffix) for name in names]
        h = c = torch.zeros(3, dtype=torch.float64)
        for place in order:
            h, c = cell(context[0, place], h, c, weights)
            by_hand[place] = by_hand[place] + h
    torch.testing.assert_close(found_context[0], by_hand)
    steps = model.over_steps
    weights = [steps.weight_ih, steps.weight_hh, steps.bias_ih, steps.bias_hh]
    for place in range(2):
        h = c = read = torch.zeros(3, dtype=torch.float64)
        for _ in range(2):
            h, c = cell(torch.cat([target[0, place], read]), h, c, weights)
            h = h + target[0, place]
            read = (by_hand @ h).softmax(0) @ by_hand
        torch.testing.assert_close(found_target[0, place], h)


def test_full_context_embeddings_skip_padding_wherever_it_stands():
    torch.manual_seed(0)
    model = FullContext(3, steps=2).double()
    context, target = normal(2, 5, 3), normal(2, 2, 3, seed=1)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    of_context, of_target = model(context.masked_fill(~mask[..., None], 0), target, mask)
    for task in range(2):
        one = model(context[task, mask[task]][None], target[task][None])
        torch.testing.assert_close(of_context[task, mask[task]], one[0][0])
        torch.testing.assert_close(of_target[task], one[1][0])


def test_full_context_embeddings_are_learned_too():
    torch.manual_seed(0)
    model = MatchingNet(conv("batch"), IMAGE, fce=True).double()
    model(classification()).backward()
    assert all(p.grad.any() for p in model.full_context.parameters())
