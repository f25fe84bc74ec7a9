"""Few-shot learners: trained on tasks of their own sizes, chosen on some, tested on others."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from omegaconf import DictConfig

from metabatch_cli.engine.run import train
from tasksets.images import LabelledImages
from tests.composed import composed
from tests.engine.examples import Watcher, differences, result, rows, state

LEARNERS = {
    "protonet": ("learner=protonet", "model.norm=batch"),
    "maml": ("learner=maml", "model.norm=transductive", "model.head=true"),
}
SETS = {
    "ways=5,shots=1": {"ways": 5, "shots": 1},
    "ways=8,shots=3": {"ways": 8, "shots": 3, "vary": "batch"},
    "ways=varied": {"ways": [3, 8], "shots": 2, "vary": "task"},
}


class Drawings:
    """Ten classes of six noisy images each, others in every split."""

    note = "of no alphabet"

    def select(self, split: str) -> LabelledImages:
        random = np.random.default_rng(["train", "val", "test"].index(split))
        classes = random.integers(0, 2, (10, 1, 1, 16, 16)) * 200
        images = classes + random.integers(0, 56, (10, 6, 1, 16, 16))
        return LabelledImages.from_labels(
            images.reshape(60, 1, 16, 16).astype(np.uint8), np.repeat(np.arange(10), 6)
        )


@functools.cache
def settings(learner: str) -> DictConfig:
    """Ten steps on tasks of 2 to 8 ways, whose classes have 1 to 3 shots of their own."""
    config = composed(
        "taskset=omniglot_imbalanced",
        "taskset.ways=[2,8]",
        "taskset.shots=[1,3]",
        "taskset.queries=2",
        "model=conv4",
        "model.width=8",
        *LEARNERS[learner],
        "+debug=short",
        "evaluation.tasks=8",
        "trainer.eval_tasks=8",
        "loader.batch_size=4",
        "loader.device=cpu",
        "loader.workers=0",
        "trainer.threads=1",
        "evaluation.figures=false",
    )
    config.taskset.dataset = {"_target_": f"{__name__}.Drawings"}
    config.evaluation.val = SETS["ways=5,shots=1"]
    config.evaluation.test = SETS
    return config


@pytest.mark.parametrize("learner", LEARNERS)
def test_several_test_sets_have_other_sizes_than_the_training_tasks(tmp_path, learner):
    train(settings(learner), tmp_path, reporter=Watcher())
    found = result(tmp_path)
    assert found["status"] == "completed"
    assert found["note"].endswith("1–3 shots for each class; of no alphabet")
    for name in SETS:
        entries = [e for n, e in found["metrics"].items() if n.startswith(f"test/accuracy@{name}")]
        assert entries
        for entry in entries:
            assert entry["tasks"] == 8
            assert 0 <= entry["mean"] <= 1
            assert entry["ci95"] is not None
    assert len(set(found["digests"].values())) == len(SETS)


def test_the_weights_that_are_tested_are_the_best_on_validation_tasks(tmp_path):
    train(settings("protonet"), tmp_path, reporter=Watcher())
    scores = {row["step"]: row["val/accuracy"] for row in rows(tmp_path) if "val/accuracy" in row}
    best = state(tmp_path, "best")
    assert len(scores) == 2
    assert best["score"] == scores[best["step"]] == max(scores.values())


def test_tasks_of_their_own_sizes_train_the_same_with_a_worker(tmp_path):
    for workers in (0, 1):
        config = settings("protonet").copy()
        config.loader.workers = workers
        train(config, tmp_path / str(workers), reporter=Watcher())
    assert differences(state(tmp_path / "0")["learner"], state(tmp_path / "1")["learner"]) == []
    assert result(tmp_path / "0")["metrics"] == result(tmp_path / "1")["metrics"]
