"""Tasks of unequal sizes are trained, resumed, scored, checked and drawn like all others."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

from metabatch_cli.batching import PaddedTask, Task, TaskLoader, TaskSpec, pad, slice_tasks
from metabatch_cli.commands.check import job
from metabatch_cli.config.build import spec_of
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.engine.evaluator import evaluate
from metabatch_cli.engine.precision import Precision
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.learners.protonet import ProtoNet
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.mlp import MLP
from metabatch_cli.report import figures
from metabatch_cli.report.figures import draw_predictions
from tests.batching.examples import Example
from tests.engine.examples import (
    Groups,
    Killed,
    WholeGroups,
    assert_same_run,
    differences,
    kill_at,
    learner,
    result,
    rows,
    run,
    settings_of,
    state,
)

RAGGED = ["Groups", "WholeGroups"]
every_set = pytest.mark.parametrize("taskset", RAGGED)
PRECISION = Precision(32, torch.device("cpu"))


@every_set
def test_a_ragged_set_trains_the_same_with_and_without_a_worker(tmp_path, taskset):
    for workers in (0, 1):
        done = run(tmp_path / str(workers), f"loader.workers={workers}", taskset=taskset)
        assert done["status"] == "completed"
        assert done["step"] == 10
    assert differences(state(tmp_path / "0")["learner"], state(tmp_path / "1")["learner"]) == []
    assert rows(tmp_path / "0") == rows(tmp_path / "1")
    assert result(tmp_path / "0")["metrics"] == result(tmp_path / "1")["metrics"]


@every_set
def test_a_killed_ragged_run_goes_on_as_if_nothing_had_happened(tmp_path, taskset):
    run(tmp_path / "whole", taskset=taskset)
    with pytest.raises(Killed):
        run(tmp_path / "killed", taskset=taskset, after_step=kill_at(7))
    run(tmp_path / "killed", taskset=taskset)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@every_set
@pytest.mark.parametrize("accumulate", [2, 4])  # down to parts of one task, with targets or not
def test_a_ragged_batch_in_parts_is_the_same_step_to_rounding(tmp_path, taskset, accumulate):
    parts = f"trainer.accumulate={accumulate}"
    run(tmp_path / "whole", "trainer.precision=64", taskset=taskset)
    run(tmp_path / "parts", "trainer.precision=64", parts, taskset=taskset)
    whole, in_parts = (state(tmp_path / name)["learner"] for name in ("whole", "parts"))
    torch.testing.assert_close(in_parts, whole, rtol=1e-9, atol=1e-11)


@every_set
def test_shards_of_other_lengths_make_one_batch(tmp_path, taskset):
    done = run(tmp_path, "loader.shards=2", taskset=taskset)
    assert done["status"] == "completed"


@every_set
def test_check_passes_a_ragged_set(taskset, capsys):
    job(settings_of(taskset))
    said = capsys.readouterr().out
    assert "context_mask" in said
    assert "or fewer" in said
    assert "all is well" in said


def test_a_learner_that_takes_padding_for_points_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"Scripted takes padding for points.*target_mask"):
        run(tmp_path / "run", *learner("Scripted"), taskset="Groups")
    assert not (tmp_path / "run").exists()


def test_points_and_masks_that_do_not_belong_together_are_named(tmp_path, monkeypatch):
    original = WholeGroups.__gettasks__

    def wrong(self, *arguments, **more):
        fields = original(self, *arguments, **more)
        return fields | {"target_mask": fields["target_mask"][:, 1:]}

    monkeypatch.setattr(WholeGroups, "__gettasks__", wrong)
    with pytest.raises(ConfigError, match=r"points are .* in target_y and \d in target_mask"):
        run(tmp_path / "run", taskset="WholeGroups")


# --- scores ------------------------------------------------------------------------------------


class Bounded(Groups):
    """Knows the best score of each task: its number of targets, to be seen again."""

    def oracle(self, tasks: PaddedTask):
        return {"mse": tasks.target_mask.sum(dim=1).float()}


def test_tasks_without_targets_are_not_among_those_scored():
    torch.manual_seed(0)
    model = NeuralProcess(CNP(1, 1, width=8))
    loader = TaskLoader(Bounded(1, 5, 8), 7, shuffle=True)
    counts = torch.cat([loader.batch_at(step).target_mask.sum(dim=1) for step in range(3)])[:20]
    with_targets = counts[counts > 0].double()
    assert 0 < len(with_targets) < 20
    evaluation = evaluate(model, {"": loader}, PRECISION, split="test", n_tasks=20)
    entry = evaluation.metrics["test/mse"]
    assert entry["tasks"] == len(with_targets)
    assert entry["oracle"] == pytest.approx(with_targets.mean().item())
    each = [
        model.score(Task(*(field.float()[None] for field in task[:4])))["mse"].item()
        for step in range(3)
        for task in slice_tasks(loader.batch_at(step), 0, 6 if step == 2 else 7).unpad()
        if len(task.target_x)
    ]
    assert entry["mean"] == pytest.approx(sum(each) / len(each), rel=1e-5)


# --- shapes ------------------------------------------------------------------------------------


def test_the_most_classes_of_a_batch_are_the_ways_of_a_ragged_set_whatever_its_padding():
    def task(ways: int) -> Task:
        labels = torch.arange(ways)
        return Task(torch.rand(ways, 2), labels, torch.rand(ways, 2), labels)

    batch = pad([task(2), task(5), task(3)])
    batch.context_y[~batch.context_mask] = 9
    assert spec_of(Groups(1, 5, 9), batch) == TaskSpec((2,), (), "classification", ways=5)


# --- figures -----------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch) -> list[Figure]:
    """The figures that were saved, still to be looked into."""
    seen: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: seen.append(figure) or path)
    return seen


class Curves(Example):
    """Between 3 and 8 points of a function around 5, none of which is 0."""

    ragged = True

    def __gettask__(self, index, n_context, n_target):
        count = 3 + index % 6
        x, y = 5 + torch.rand(2, 2 * count, 1)
        return Task(x[:count], y[:count], x[count:], y[count:])


class Shades(Example):
    """Episodes of 2 to 4 classes with 1 or 2 images each, whose brightness is their class."""

    ragged = True

    def __gettask__(self, index, n_context, n_target):
        ways, shots = 2 + index % 3, 1 + index % 2
        y = torch.arange(ways).repeat(shots)
        x = (60 * y + 10).to(torch.uint8)[:, None, None, None].expand(-1, 1, 5, 4)
        return Task(x, y, x, y)


def test_functions_of_unequal_sizes_are_drawn_without_padding(shown, tmp_path):
    model = NeuralProcess(CNP(1, 1, width=8))
    assert draw_predictions(model, Curves(), tmp_path / "p.png", spec=TaskSpec((1,), (1,)))
    (figure,) = shown
    dots = [line for panel in figure.axes for line in panel.lines if line.get_marker() == "o"]
    assert dots
    for line in dots:
        assert min(line.get_xdata()) >= 5
        assert min(line.get_ydata()) >= 5


def test_tasks_without_targets_are_not_drawn(shown, tmp_path):
    model, spec = NeuralProcess(CNP(1, 1, width=8)), TaskSpec((1,), (1,))
    assert draw_predictions(model, Groups(1, 5, 9), tmp_path / "p.png", spec=spec)

    class Nothing(Groups):
        def __gettask__(self, index, n_context, n_target):
            return super().__gettask__(index, n_context, 0)

    assert draw_predictions(model, Nothing(1, 5, 9), tmp_path / "p.png", spec=spec) is None


def test_episodes_of_unequal_sizes_are_drawn_without_padding(shown, tmp_path):
    class Flat(MLP):
        def forward(self, x):
            return super().forward(x.flatten(1).float() / 255)

    taskset = Shades()
    spec = TaskSpec((1, 5, 4), (), "classification", ways=4)
    model = ProtoNet(Flat(20, 8))
    assert draw_predictions(model, taskset, tmp_path / "p.png", spec=spec, seed=1)
    (figure,) = shown
    images = [panel.images[0].get_array().max() for panel in figure.axes]
    assert min(images) > 0  # padding would be black
    titles = [text.get_text() for text in figure.texts if text.get_text().startswith("Episode")]
    asked = sum(int(title.split(" of ")[1].split()[0]) for title in titles)
    assert len(images) == 2 * asked  # each is shown once to learn from, once to be asked
