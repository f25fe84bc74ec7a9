"""A few-shot run from training to evaluation: whose moments normalised stands beside its scores."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from metabatch_cli.commands.eval import evaluate_run
from metabatch_cli.engine.run import train
from metabatch_cli.report.console import Reporter
from tasksets.images import LabelledImages
from tests.cli.program import metabatch
from tests.composed import composed
from tests.engine.examples import Watcher, new_directory

ROOT = Path(__file__).parents[2]
HERE = "tests.engine.test_normalisation"


class Noise:
    """Classes of random images, fewer in the held-out splits."""

    def select(self, split: str) -> LabelledImages:
        classes = 12 if split == "train" else 6
        generator = np.random.default_rng(len(split))
        images = generator.integers(0, 256, (8 * classes, 1, 16, 16), dtype=np.uint8)
        return LabelledImages.from_labels(images, np.repeat(np.arange(classes), 8))


def settings(learner: str, *more: str):
    size = ["pools=2", "flatten=false"] if learner == "relation" else []
    return composed(
        "taskset=omniglot_episodes",
        "~taskset.dataset",
        f"+taskset.dataset={{_target_: {HERE}.Noise}}",
        "taskset.ways=3",
        "taskset.queries=2",
        "model=conv4",
        "model.width=4",
        *(f"model.{word}" for word in size),
        f"learner={learner}",
        "loader.batch_size=2",
        "loader.device=cpu",
        "loader.workers=0",
        "trainer.max_steps=2",
        "trainer.threads=1",
        "trainer.eval_tasks=2",
        "evaluation.tasks=4",
        "evaluation.figures=false",
        *more,
    )


@pytest.fixture(scope="module")
def run_of_protonet():
    directory = new_directory()
    result = train(settings("protonet"), directory, reporter=Watcher())
    return directory, result


@pytest.mark.parametrize("learner", ["matching", "relation", "r2d2", "finetune"])
def test_every_learner_of_embeddings_trains_as_it_is_shipped(learner):
    result = train(settings(learner), new_directory(), reporter=Watcher())
    assert result["status"] == "completed"
    assert result["metrics"]["test/accuracy"]["normalisation"] == "running"


def test_the_normalisation_stands_beside_the_accuracy_in_result_and_table(run_of_protonet):
    directory, result = run_of_protonet
    assert result["metrics"]["test/accuracy"]["normalisation"] == "running"
    assert json.loads((directory / "result.json").read_text())["metrics"] == result["metrics"]
    console = Console(file=io.StringIO(), width=160)
    Reporter(console).result("test", result["metrics"])
    lines = console.file.getvalue().splitlines()
    assert "normalisation=running" in next(line for line in lines if "test/accuracy" in line)


@pytest.mark.parametrize("mode", ["support", "transductive"])
def test_a_run_is_scored_under_another_normalisation(run_of_protonet, mode):
    directory, result = run_of_protonet
    config = OmegaConf.load(directory / "config.yaml")
    config.run = str(directory)
    config.learner.normalisation = mode
    written = evaluate_run(config, [f"learner.normalisation={mode}"])
    assert written["metrics"]["test/accuracy"]["normalisation"] == mode
    assert written["digests"] == result["digests"]
    likelihoods = [m["metrics"]["test/log_likelihood"]["mean"] for m in (written, result)]
    assert likelihoods[0] != likelihoods[1]


def test_a_run_that_is_older_than_the_choice_can_be_scored_under_it(run_of_protonet):
    directory, _ = run_of_protonet
    file = directory / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("  normalisation: running\n", ""))
    try:
        assert file.read_text() != text
        said = metabatch(
            "eval", f"run={directory}", "learner.normalisation=support", cwd=ROOT
        ).stdout
        assert "normalisation=support" in said
    finally:
        file.write_text(text)
