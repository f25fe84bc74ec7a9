"""Predictions without training: the same as task by task with numpy, padded or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from metabatch_cli.batching import PaddedTask, Task, pad
from tasksets.baselines import context_mean, gaussian_scores, linear_interpolation

OTHERWISE = torch.tensor([7.0, -7.0])
sizes = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def tasks_of(points: list[tuple[int, int]], seed: int) -> list[Task]:
    """Whole numbers of a small range as x, so that many occur twice or meet a target."""
    random = np.random.default_rng(seed)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = random.integers(-4, 5, (count, 1))
        return torch.tensor(x / 2.0).float(), torch.tensor(random.normal(size=(count, 2))).float()

    return [Task(*part(context), *part(target)) for context, target in points]


def spoiled(batch: PaddedTask) -> PaddedTask:
    """With NaN in place of padding, and the points somewhere between it."""
    order = torch.randperm(batch.context_x.shape[1], generator=torch.Generator().manual_seed(0))
    fields = batch._asdict()
    for part in ("context", "target"):
        for name in (f"{part}_x", f"{part}_y"):
            fields[name] = fields[name].masked_fill(~fields[f"{part}_mask"][:, :, None], torch.nan)
    for name in ("context_x", "context_y", "context_mask"):
        fields[name] = fields[name][:, order]
    return PaddedTask(**fields)


def mean_alone(task: Task) -> np.ndarray:
    y = task.context_y.double().numpy()
    mean = y.mean(axis=0) if len(y) else OTHERWISE.numpy()
    return np.tile(mean, (len(task.target_x), 1))


def lines_alone(task: Task) -> np.ndarray:
    if not len(task.context_x):
        return mean_alone(task)
    x, y = task.context_x[:, 0].numpy(), task.context_y.double().numpy()
    knots = np.unique(x)
    means = np.stack([y[x == knot].mean(axis=0) for knot in knots])
    return np.stack(
        [np.interp(task.target_x[:, 0].numpy(), knots, means[:, d]) for d in range(y.shape[1])], 1
    )


PAIRS = [(context_mean, mean_alone), (linear_interpolation, lines_alone)]


@pytest.mark.parametrize(("batched", "alone"), PAIRS)
@given(sizes, seeds)
def test_padded_tasks_are_predicted_as_each_alone(batched, alone, points, seed):
    tasks = tasks_of(points, seed)
    batch = spoiled(pad(tasks))
    predicted = batched(batch, OTHERWISE)
    assert predicted.shape == batch.target_y.shape
    for task, found, mask in zip(tasks, predicted, batch.target_mask, strict=True):
        np.testing.assert_allclose(found[mask].numpy(), alone(task), atol=1e-9)


@pytest.mark.parametrize(("batched", "alone"), PAIRS)
@given(st.integers(0, 6), st.integers(1, 5), seeds)
def test_tasks_of_one_size_are_predicted_alike(batched, alone, n_context, n_target, seed):
    tasks = tasks_of([(n_context, n_target)] * 3, seed)
    batch = Task(*(torch.stack([task[place] for task in tasks]) for place in range(4)))
    predicted = batched(batch, OTHERWISE)
    for task, found in zip(tasks, predicted, strict=True):
        np.testing.assert_allclose(found.numpy(), alone(task), atol=1e-9)


@given(sizes, seeds)
def test_scores_are_those_of_each_task_alone(points, seed):
    tasks, sigma = tasks_of(points, seed), torch.tensor([0.5, 2.0]).double()
    batch = spoiled(pad(tasks))
    scores = gaussian_scores(batch, context_mean(batch, OTHERWISE), sigma)
    for place, task in enumerate(tasks):
        mean, y = torch.from_numpy(mean_alone(task)), task.target_y.double()
        mse = (mean - y).square().mean().item()
        assert scores["mse"][place].item() == pytest.approx(mse)
        assert scores["rmse"][place].item() == pytest.approx(mse**0.5)
        nats = Normal(mean, sigma).log_prob(y).sum(dim=1).mean().item()
        assert scores["log_likelihood"][place].item() == pytest.approx(nats)


def test_a_task_without_targets_has_no_score():
    batch = pad(tasks_of([(2, 3), (2, 0)], 0))
    scores = gaussian_scores(batch, context_mean(batch, OTHERWISE), torch.ones(2))
    for values in scores.values():
        assert values.isnan().tolist() == [False, True]


def test_there_are_no_lines_between_points_of_a_plane():
    tasks = Task(*(torch.zeros(1, 3, 2) for _ in range(4)))
    with pytest.raises(ValueError, match=r"x is \[2\] a point"):
        linear_interpolation(tasks, OTHERWISE)
