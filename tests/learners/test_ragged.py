"""Padding changes neither loss nor gradient nor score: a padded task is the task it was.

In float64. What stands in the padding changes no bit; how long it is, and which tasks share the
batch, changes the order of sums, and so the last digits (1e-12).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F

from metabatch_cli.batching import PaddedTask, Task, pack, pad
from metabatch_cli.batching.task import tree_map
from metabatch_cli.learners.anil import ANIL
from metabatch_cli.learners.at_once import treats_points_apart
from metabatch_cli.learners.learner import Learner
from metabatch_cli.learners.maml import MAML
from metabatch_cli.learners.mamlpp import MAMLPlusPlus
from metabatch_cli.learners.metasgd import MetaSGD
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.learners.protomaml import ProtoMAML
from metabatch_cli.learners.protonet import ProtoNet
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.masking import blank, masked_mean, mean_loss, mean_over_tasks
from metabatch_cli.models.mlp import MLP
from tests.learners.examples import (
    classification,
    conv,
    embedding_learners,
    mlp,
    one_task,
    regression,
)


def functions(*sizes: tuple[int, int]) -> list[Task]:
    """Sizes of their own; one has a single point to learn from."""
    return [
        alone(regression(1, n_context, n_target, dim_y=2, seed=seed))
        for seed, (n_context, n_target) in enumerate([(5, 7), (1, 2), (8, 1), *sizes])
    ]


def with_empty_context() -> list[Task]:
    return functions((0, 4))


def episodes() -> list[Task]:
    """Ways, shots and queries of their own."""
    tasks = [
        alone(classification(1, ways, shots, queries, seed=seed))
        for seed, (ways, shots, queries) in enumerate([(3, 2, 2), (2, 1, 3), (4, 3, 1)])
    ]
    # what they say of themselves needs a common shape: -1 for labels that they do not have
    return [
        task._replace(
            aux={name: F.pad(v, (0, 4 - len(v)), value=-1) for name, v in task.aux.items()}
        )
        for task in tasks
    ]


def points() -> list[Task]:
    """The same with x of two numbers instead of images."""
    return [
        t._replace(
            context_x=t.context_x[:, 0, 0, :2] / 99.0, target_x=t.target_x[:, 0, 0, :2] / 99.0
        )
        for t in map(double, episodes())
    ]


def double(task: Task) -> Task:
    return task._replace(context_x=task.context_x.double(), target_x=task.target_x.double())


def alone(batch: Task) -> Task:
    """The only task of a batch."""
    return tree_map(lambda field: field[0], batch)


def batch_of(task: Task) -> Task:
    """A batch of one task."""
    return tree_map(lambda field: field[None], task)


class SeesAll(nn.Module):
    """A network in which every point sees every other one: only the unpadded task will do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(1, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.tanh(self.inner(x))
        return self.outer(torch.cat([codes, codes.mean(0).expand_as(codes)], dim=-1))


class Attentive(nn.Module):
    """A network whose targets see each other: it asks for both masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.context, self.target = nn.Linear(3, 6), nn.Linear(1, 6)
        self.out = nn.Linear(12, 2)

    def forward(self, context_x, context_y, target_x, context_mask=None, target_mask=None):
        context = torch.tanh(self.context(torch.cat([context_x, context_y], dim=-1)))
        target = torch.tanh(self.target(target_x))
        all_targets = masked_mean(target, target_mask)[:, None] + target
        code = masked_mean(context, context_mask)[:, None].expand_as(target)
        mean = self.out(torch.cat([code, all_targets], dim=-1))
        return Independent(Normal(mean, torch.ones_like(mean)), 1)


def neural_process(seed: int = 0) -> NeuralProcess:
    torch.manual_seed(seed)
    return NeuralProcess(CNP(1, 2, width=8).double())


def plain_mlp(dim_x: int) -> nn.Module:
    torch.manual_seed(0)
    return MLP(dim_x, 4, width=6, activation="tanh").double()


def maml(model: nn.Module, **more: object) -> Callable[[], MAML]:
    return lambda: MAML(deepcopy(model).double(), inner_lr=0.1, **more)


def embedding_learner(name: str, normalisation: str = "running") -> Learner:
    return embedding_learners(normalisation=normalisation)[name]


CASES: dict[str, tuple[Callable[[], Learner], Callable[[], list[Task]]]] = {
    "cnp": (neural_process, with_empty_context),
    "np, targets see each other": (lambda: NeuralProcess(Attentive().double()), functions),
    "maml": (maml(mlp(2), inner_steps=2, eval_steps=[0, 2]), functions),
    "maml, first order": (maml(mlp(2), first_order=True), functions),
    "maml, points see each other": (maml(SeesAll()), functions),
    "maml, classes": (maml(plain_mlp(2), ways=4), points),
    "maml, images": (maml(conv("none", 4), ways=4), episodes),
    "maml, images normalised": (maml(conv("transductive", 4), ways=4), episodes),
    "metasgd": (lambda: MetaSGD(mlp(2), inner_lr=0.1, inner_steps=2), functions),
    "metasgd, images": (lambda: MetaSGD(conv("batch", 4), 4, inner_lr=0.1), episodes),
    "mamlpp": (lambda: MAMLPlusPlus(mlp(2), inner_steps=2), functions),
    "mamlpp, images": (lambda: MAMLPlusPlus(conv("batch", 4), 4, inner_steps=2), episodes),
    "anil": (lambda: ANIL(mlp(2), inner_lr=0.1, inner_steps=2), functions),
    "anil, images": (lambda: ANIL(conv("batch", 4), 4, inner_lr=0.1), episodes),
    "protomaml": (lambda: ProtoMAML(conv("batch"), 4, inner_steps=2), episodes),
    "protonet, mlp": (lambda: ProtoNet(plain_mlp(2)), points),
    "protonet, conv4": (lambda: ProtoNet(conv("batch")), episodes),
    "protonet, conv4 transductive": (lambda: ProtoNet(conv("transductive")), episodes),
    **{
        name: (partial(embedding_learner, name), episodes)
        for name in list(embedding_learners())[1:]
    },
    "protonet, support": (partial(embedding_learner, "protonet", "support"), episodes),
    "relation, support": (partial(embedding_learner, "relation", "support"), episodes),
    "finetune, transductive": (partial(embedding_learner, "finetune", "transductive"), episodes),
}
every_case = pytest.mark.parametrize("name", CASES)
both_modes = pytest.mark.parametrize("training", [True, False])


def case(name: str, training: bool = True) -> tuple[Learner, list[Task]]:
    learner, tasks = CASES[name]
    return learner().train(training), tasks()


def loss_and_gradients(learner: Learner, tasks: Task | PaddedTask) -> list[Tensor]:
    learner.zero_grad()
    loss = learner(tasks)
    loss.backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.parameters()
    ]
    return [loss.detach(), *gradients]


def littered(batch: PaddedTask, fill: float, seed: int = 0) -> PaddedTask:
    """The same tasks with rubbish in the padding: numbers about `fill`, labels within range."""
    generator = torch.Generator().manual_seed(seed)

    def rubbish(values: Tensor, mask: Tensor) -> Tensor:
        if values.is_floating_point():
            noise = torch.rand(values.shape, generator=generator, dtype=values.dtype) * fill
        else:
            most = 256 if values.dtype == torch.uint8 else int(values.max()) + 1
            noise = torch.randint(most, values.shape, generator=generator, dtype=values.dtype)
        return torch.where(mask.reshape(*mask.shape, *[1] * (values.dim() - 2)), values, noise)

    return batch._replace(
        context_x=rubbish(batch.context_x, batch.context_mask),
        context_y=rubbish(batch.context_y, batch.context_mask),
        target_x=rubbish(batch.target_x, batch.target_mask),
        target_y=rubbish(batch.target_y, batch.target_mask),
    )


def longer(tasks: list[Task], more: int) -> PaddedTask:
    packed = pack(tasks)
    n_context, n_target = (int(lengths.max()) + more for lengths in packed.lengths)
    return packed.padded(n_context, n_target)


def assert_same(ones: list[Tensor], others: list[Tensor]) -> None:
    torch.testing.assert_close(ones, others, rtol=1e-12, atol=1e-12)


@every_case
@both_modes
@pytest.mark.parametrize("fill", [1e6, math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_what_stands_in_the_padding_changes_no_bit_of_loss_and_gradient(name, training, fill):
    learner, tasks = case(name, training)
    batch = longer(tasks, 2)
    clean = loss_and_gradients(learner, batch)
    assert all(part.isfinite().all() for part in clean)
    for seed in (0, 1):
        learner, _ = case(name, training)
        found = loss_and_gradients(learner, littered(batch, fill, seed))
        assert all(torch.equal(one, other) for one, other in zip(found, clean, strict=True))


@every_case
@both_modes
@pytest.mark.parametrize("more", [1, 7])
def test_how_long_the_padding_is_changes_neither_loss_nor_gradient(name, training, more):
    learner, tasks = case(name, training)
    short = loss_and_gradients(learner, pad(tasks))
    assert_same(loss_and_gradients(learner, littered(longer(tasks, more), 1e6)), short)


@every_case
@both_modes
def test_without_padding_a_padded_batch_is_the_plain_one(name, training):
    learner, tasks = case(name, training)
    plain = tree_map(lambda field: torch.stack([field] * 3), tasks[0])
    padded = pad([tasks[0]] * 3)
    assert padded.context_mask.all()
    assert_same(loss_and_gradients(learner, padded), loss_and_gradients(learner, plain))


@every_case
def test_the_loss_is_the_mean_of_the_losses_of_the_tasks_alone(name):
    learner, tasks = case(name)
    each = [loss_and_gradients(learner, batch_of(task)) for task in tasks]
    together = loss_and_gradients(learner, pad(tasks))
    assert_same(together, [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)])


@every_case
@both_modes
def test_scores_are_those_of_the_tasks_alone(name, training):
    learner, tasks = case(name, training)
    together = learner.score(littered(longer(tasks, 2), math.nan))
    assert learner.metric.name in together
    for i, task in enumerate(tasks):
        for metric, value in learner.score(batch_of(task)).items():
            assert_same([together[metric][i : i + 1]], [value])


@every_case
def test_predictions_are_those_of_the_tasks_alone(name):
    learner, tasks = case(name, training=False)
    batch = littered(longer(tasks, 2), math.nan)
    with torch.no_grad():
        together = learner.predict(batch.context_x, batch.context_y, batch.target_x, **batch.masks)
        for i, task in enumerate(tasks):
            own = learner.predict(*batch_of(task)[:3])
            values = [d.probs if hasattr(d, "probs") else d.mean for d in (own, together)]
            expected = values[0][0]
            found = values[1][i, : len(expected), : expected.shape[-1]]
            assert_same([found], [expected])


@every_case
@both_modes
def test_a_task_without_targets_counts_nowhere_and_has_no_score(name, training):
    learner, tasks = case(name, training)
    idle = tasks[0]._replace(target_x=tasks[0].target_x[:0], target_y=tasks[0].target_y[:0])
    without = loss_and_gradients(learner, pad(tasks))
    assert_same(loss_and_gradients(learner, pad([idle, *tasks])), without)
    for values in learner.score(pad([idle, *tasks])).values():
        assert values.isnan().tolist() == [True] + [False] * len(tasks)


@every_case
def test_a_batch_without_any_target_has_loss_0_and_gradient_0(name):
    learner, tasks = case(name)
    idle = [t._replace(target_x=t.target_x[:0], target_y=t.target_y[:0]) for t in tasks]
    for batch in (pad(idle), longer(idle, 2)):
        learner.zero_grad()
        loss = learner(batch)
        loss.backward()
        assert loss == 0
        assert not any(p.grad.any() for p in learner.parameters() if p.grad is not None)


@every_case
def test_a_task_that_is_all_padding_does_no_harm(name):
    learner, tasks = case(name)
    nothing = Task(*(field[:0] for field in tasks[0][:4]), tasks[0].aux)
    expected = loss_and_gradients(learner, pad(tasks))
    assert_same(loss_and_gradients(learner, pad([*tasks, nothing])), expected)
    batch = pad([*tasks, nothing])
    learner.predict(batch.context_x, batch.context_y, batch.target_x, **batch.masks)


every_embedding = pytest.mark.parametrize("name", list(embedding_learners()))


@every_embedding
def test_a_task_without_context_is_guessed_at(name):
    tasks = episodes()
    blind = tasks[0]._replace(context_x=tasks[0].context_x[:0], context_y=tasks[0].context_y[:0])
    learner, batch = embedding_learner(name).train(), pad([*tasks, blind])
    assert all(bool(number.isfinite().all()) for number in loss_and_gradients(learner, batch))
    learner.eval()
    *others, own = learner.score(batch)["log_likelihood"].unbind()
    assert own.item() == pytest.approx(-math.log(4))  # of the four classes in the batch
    torch.testing.assert_close(torch.stack(others), learner.score(pad(tasks))["log_likelihood"])


@every_embedding
def test_a_batch_that_is_all_padding_teaches_nothing(name):
    nothing = [Task(*(field[:0] for field in task[:4]), task.aux) for task in episodes()[:2]]
    learner = embedding_learner(name).train()
    before = [buffer.clone() for buffer in learner.buffers()]
    assert not any(number.any() for number in loss_and_gradients(learner, longer(nothing, 3)))
    assert all(map(torch.equal, before, learner.buffers()))


# --- each on its own ---------------------------------------------------------------------------


def test_padded_images_do_not_enter_the_running_statistics():
    found = []
    for batch in (pad(episodes()), littered(longer(episodes(), 5), 1e6)):
        learner = ProtoNet(conv("batch")).train()
        learner(batch)
        found.append([buffer.clone() for buffer in learner.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_class_without_context_has_probability_0():
    learner = ProtoNet(conv("none"))
    batch = pad(episodes())  # of 3, 2 and 4 classes
    probabilities = learner.predict(
        batch.context_x, batch.context_y, batch.target_x, **batch.masks
    ).probs
    assert probabilities.shape[-1] == 4
    for i, ways in enumerate([3, 2, 4]):
        real = probabilities[i, batch.target_mask[i]]
        assert not real[:, ways:].any()
        assert real[:, :ways].all()


def test_plain_tasks_of_the_same_size_may_have_other_classes_too():
    two, three = (alone(classification(1, ways, 6 // ways, 2, seed=ways)) for ways in (2, 3))
    two, three = (
        t._replace(target_x=t.target_x[:4], target_y=t.target_y[:4]) for t in (two, three)
    )
    learner = ProtoNet(conv("none"))
    together = learner(Task(*map(torch.stack, zip(two[:4], three[:4], strict=True))))
    each = [learner(batch_of(task)) for task in (two, three)]
    torch.testing.assert_close(together, torch.stack(each).mean())


def test_maml_leaves_a_task_without_context_as_it_is():
    learner = MAML(mlp(2), inner_lr=0.1)
    scores = learner.score(pad(with_empty_context()))["mse@steps=1"]
    task = with_empty_context()[3]
    as_it_is = (learner.model(task.target_x) - task.target_y).square().mean()
    torch.testing.assert_close(scores[3], as_it_is.detach())


def test_maml_adapts_padded_tasks_at_once_only_where_points_do_not_see_each_other():
    apart, together = MAML(mlp(2)), MAML(SeesAll().double())
    for learner in (apart, together):
        learner(pad(functions()))
        assert learner._at_once  # of plain tasks
    assert (apart._points_apart, together._points_apart) == (True, False)


@pytest.mark.parametrize("dim_x", [1, 3])
def test_outputs_whose_sum_is_constant_hide_no_dependence(dim_x):
    class Share(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum(), -x.sum()]).softmax(0).expand(len(x), 2) + 0 * x[:, :1]

    model = nn.Sequential(nn.Linear(dim_x, 2), Share()).double()
    assert not treats_points_apart(model, torch.zeros(2, 3, dim_x, dtype=torch.float64))
    assert not treats_points_apart(model, torch.zeros(2, 3, dim_x, dtype=torch.uint8))


def test_a_network_without_a_context_mask_is_refused_by_name():
    class Flat(nn.Module):
        def forward(self, context_x, context_y, target_x):
            return Independent(Normal(target_x, torch.ones_like(target_x)), 1)

    learner = NeuralProcess(Flat())
    learner(regression())
    with pytest.raises(TypeError, match="Flat takes no context_mask"):
        learner(pad(functions()))


def test_plain_tasks_bring_no_masks():
    class Strict(CNP):
        def forward(self, *fields, **masks):
            assert not masks
            return super().forward(*fields)

    learner = NeuralProcess(Strict(1, 1, width=8).double())
    learner(regression())
    learner.score(one_task(regression(), 0))


# --- means -------------------------------------------------------------------------------------


def test_every_task_counts_alike_however_many_targets_it_has():
    losses = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert mean_loss(losses, mask) == (2 + 5) / 2
    assert mean_loss(losses, None) == losses.mean()
    assert masked_mean(losses, mask).tolist() == [2, 5, 0]
    assert masked_mean(losses, mask, empty=-1).tolist() == [2, 5, -1]
    assert mean_over_tasks(torch.tensor([1.0, 2.0, math.nan]), mask) == 1.5


def test_blank_leaves_real_values_and_plain_tensors_as_they_are():
    values = torch.tensor([[[1.0, math.nan], [math.inf, 2.0]]])
    assert blank(values, None) is values
    blanked = blank(values, torch.tensor([[True, False]]))
    assert blanked[0, 1].tolist() == [0, 0]
    assert torch.equal(blanked[0, 0], values[0, 0]) or blanked[0, 0].isnan().tolist() == [
        False,
        True,
    ]
