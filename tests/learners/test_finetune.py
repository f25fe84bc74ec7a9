"""Fine-tuning: one head for all training classes, and new heads as torch's SGD would learn them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metabatch_cli.batching import TaskLoader
from metabatch_cli.learners.finetune import Finetune
from tasksets.episodes import Episodes
from tasksets.mixture import Mixture
from tests.learners.examples import CLASSES, IMAGE, classification
from tests.tasksets.test_episodes import SIZES, Numbered


def finetune(head: str = "linear", **more: object) -> Finetune:
    torch.manual_seed(0)
    return Finetune(nn.Flatten(), CLASSES, IMAGE, head, **more).double()


def tasks_of(n_tasks: int = 2):
    tasks = classification(n_tasks, shots=3)
    x = {"context_x": tasks[0].double() / 255, "target_x": tasks[2].double() / 255}
    return tasks._replace(**x)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_training_tells_all_classes_of_the_split_apart(head):
    tasks, model = tasks_of(), finetune(head)
    losses = []
    for task in range(2):
        x = torch.cat([tasks.context_x[task], tasks.target_x[task]]).flatten(1)
        labels = torch.cat([tasks.context_y[task], tasks.target_y[task]])
        if head == "cosine":
            logits = 10 * F.cosine_similarity(x[:, None], model.weight[None], dim=-1)
        else:
            logits = F.linear(x, model.weight, model.bias)
        losses.append(F.cross_entropy(logits, tasks.aux["classes"][task][labels]))
    torch.testing.assert_close(model(tasks), torch.stack(losses).mean())


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_new_heads_are_those_that_sgd_learns_task_by_task(head, steps):
    options = {"momentum": 0.8, "weight_decay": 0.02}
    tasks = tasks_of()
    model = finetune(head, eval_steps=steps, eval_lr=0.3, **options)
    found = model.predict(*tasks[:3]).logits
    start = model._beginning(3, tasks.context_x.flatten(2))
    for task in range(2):
        x, asked = (part[task].flatten(1) for part in (tasks.context_x, tasks.target_x))
        weight = start.clone().requires_grad_()
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)

        def logits(x, weight=weight, bias=bias):
            if head == "linear":
                return F.linear(x, weight, bias)
            return 10 * F.cosine_similarity(x[:, None], weight[None], dim=-1)

        optimizer = torch.optim.SGD([weight, bias], lr=0.3, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(logits(x), tasks.context_y[task]).backward()
            optimizer.step()
        by_hand = logits(asked).log_softmax(dim=-1)
        torch.testing.assert_close(found[task], by_hand.detach())


def test_the_context_is_learned_in_evaluation_and_the_network_is_not_touched():
    torch.manual_seed(0)
    model = finetune(eval_steps=200, eval_lr=0.5).eval()
    tasks = tasks_of()
    on_context = tasks._replace(target_x=tasks.context_x, target_y=tasks.context_y)
    assert model.score(on_context)["accuracy"].tolist() == [1, 1]
    loss = model.predict(*tasks[:3]).logits
    assert not loss.requires_grad


def test_the_head_has_as_many_classes_as_the_training_split():
    taskset = Episodes(Numbered(), ways=3, queries=2)
    assert taskset.spec.classes == len(SIZES)
    classes = TaskLoader(taskset, batch_size=40).batch_at(0).aux["classes"]
    assert sorted(classes.unique().tolist()) == list(range(len(SIZES)))
    mixed = Mixture({"one": taskset, "two": Episodes(Numbered(), ways=4, queries=2)})
    assert mixed.spec.classes is None  # whose classes?


def test_what_it_needs_to_know_is_named():
    with pytest.raises(ValueError, match=r"classes=None.*TaskSpec\.classes"):
        Finetune(nn.Flatten(), None, IMAGE)
    with pytest.raises(ValueError, match='aux has no "classes"'):
        finetune()(tasks_of()._replace(aux={}))
    with pytest.raises(ValueError, match=r"head='cosin'.*did you mean 'cosine'"):
        finetune("cosin")
