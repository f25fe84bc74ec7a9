"""Studies: no trial too many, none lost, and the best as an experiment that composes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from metabatch_cli.config.compose import compose
from metabatch_cli.engine.stop import Stopped
from metabatch_cli.learners.learner import Metric
from metabatch_cli.sweeps.best import as_experiment

optuna = pytest.importorskip("optuna")

from metabatch_cli.sweeps.study import Pruning, Study  # noqa: E402

SPACE = {"optimizer.lr": optuna.distributions.FloatDistribution(0.0, 1.0)}
ERROR, ACCURACY = Metric("error", False), Metric("accuracy", True)


def study(folder: Path, metric: Metric = ERROR, n_trials: int = 3, pruner=None) -> Study:
    def sampler(number: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.RandomSampler(seed=number)

    pruner = pruner or optuna.pruners.NopPruner()
    return Study(folder, SPACE, metric, n_trials, sampler, pruner)


def test_a_study_has_as_many_trials_as_asked_for_however_often_it_is_opened(tmp_path):
    for _ in range(2):
        opened = study(tmp_path)
        for score in (3.0, 1.0):
            if (attempt := opened.next()) is not None:
                opened.tell(attempt, score)
    assert [trial.value for trial in opened.trials] == [3.0, 1.0, 3.0]
    assert study(tmp_path).next() is None
    assert len({trial.params["optimizer.lr"] for trial in opened.trials}) == 3
    assert study(tmp_path, n_trials=4).next() is not None


@pytest.mark.parametrize(("metric", "best"), [(ERROR, 1.0), (ACCURACY, 3.0)])
def test_the_best_is_the_one_that_the_metric_says(tmp_path, metric, best):
    opened = study(tmp_path, metric)
    assert opened.best is None
    for score in (1.0, 3.0, None):
        opened.tell(opened.next(), score)
    assert opened.best.value == best


def test_the_configurations_own_values_come_first_if_they_are_in_the_space(tmp_path):
    inside, outside = study(tmp_path / "a"), study(tmp_path / "b")
    inside.try_first({"optimizer.lr": 0.25})
    outside.try_first({"optimizer.lr": 2.0})
    first = inside.next()
    assert first.values == {"optimizer.lr": 0.25}
    inside.tell(first, 1.0)
    assert outside.next().values["optimizer.lr"] <= 1.0
    later = study(tmp_path / "a")
    later.try_first({"optimizer.lr": 0.5})
    assert later.next().values["optimizer.lr"] not in (0.25, 0.5)


def test_a_trial_that_was_cut_short_is_tried_again_in_its_directory(tmp_path):
    opened = study(tmp_path)
    attempt = opened.next()
    attempt.claim.close()  # as it is when the process dies
    again = study(tmp_path).next()
    assert (again.directory, again.values) == (attempt.directory, attempt.values)
    assert len(opened.trials) == 1


def test_pruning_ends_a_training_that_is_behind_and_counts_what_a_run_did_before(tmp_path):
    opened = study(tmp_path, pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    attempt = opened.next()
    pruning = Pruning(attempt, ERROR)
    attempt.directory.mkdir(parents=True)
    rows = [{"step": 1, "val/error": 0.5}, {"step": 2, "loss": 9.0}, {"step": 3, "val/error": 0.4}]
    (attempt.directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pruning.rewind(2)
    pruning.log({"step": 4, "loss": 5.0})
    pruning.log({"step": 4, "val/error": 0.9})
    with pytest.raises(Stopped, match="pruned at step 5"):
        pruning.log({"step": 5, "val/error": 1.5})
    opened.prune(attempt, "behind")
    (trial,) = opened.trials
    assert trial.state.name == "PRUNED"
    assert trial.intermediate_values == {1: 0.5, 4: 0.9, 5: 1.5}
    assert opened.best is None


def test_the_best_composes_to_the_configuration_that_was_tried(tmp_path):
    typed = ["+experiment=cnp_sine", "model=canp", "loader.batch_size=4", "tune.trials=3", "seed=2"]
    values = {"optimizer.lr": 0.003, "model.width": 64}
    text = as_experiment(typed, values, "log_likelihood", 1.25)
    assert "1.2500" in text
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "best.yaml").write_text(text)
    found = compose("+experiment=best", user_dir=str(tmp_path))
    words = [word for word in typed if not word.startswith("tune")]
    expected = compose(*words, *(f"{key}={value}" for key, value in values.items()))
    assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
    assert yaml.safe_load(text)["model"] == {"width": 64}
