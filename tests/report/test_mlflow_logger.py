"""MLflow: its own client finds every row once, the configuration, the scores, the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")

from mlflow.tracking import MlflowClient

from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.report import mlflow_logger
from metabatch_cli.report.loggers import run_name
from metabatch_cli.report.mlflow_logger import MlflowLogger
from tests.engine.examples import learner, new_directory, result, run
from tests.report.tracked import curves, train, train_and_kill, without_seconds

LOGGER = "logger=mlflow"


@pytest.fixture(scope="module", autouse=True)
def store():
    """One for all runs here: its tables take seconds to be made."""
    uri = f"sqlite:///{new_directory()}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.fixture(scope="module")
def client(store):
    return MlflowClient(tracking_uri=store)


@pytest.fixture(scope="module")
def completed(store):
    directory = new_directory()
    train(directory, LOGGER, "evaluation.figures=true")
    return directory


def run_id(directory):
    return json.loads((directory / "mlflow" / "run.json").read_text())["run_id"]


def tracked(client, directory):
    return client.get_run(run_id(directory))


def metrics(client, directory):
    of = tracked(client, directory)
    return {
        name: sorted(
            (value.step, value.value) for value in client.get_metric_history(of.info.run_id, name)
        )
        for name in of.data.metrics
        if not name.startswith("test/")
    }


def test_every_row_stands_at_its_step(client, completed):
    assert metrics(client, completed) == curves(completed)


def test_the_run_is_found_by_its_name_in_the_experiment(client, completed):
    experiment = client.get_experiment_by_name("metabatch")
    found = client.search_runs(
        [experiment.experiment_id], f"attributes.run_name = '{run_name(completed)}'"
    )
    assert [one.info.run_id for one in found] == [run_id(completed)]
    assert found[0].data.tags["directory"] == str(completed)


def test_the_configuration_is_there_as_parameters_and_as_a_file(client, completed):
    parameters = tracked(client, completed).data.params
    assert parameters["model.width"] == "8"
    assert parameters["loader.device"] == "cpu"
    file = client.download_artifacts(run_id(completed), "config.yaml")
    assert Path(file).read_text() == (completed / "config.yaml").read_text()


def test_the_final_scores_are_the_results(client, completed):
    found = tracked(client, completed).data.metrics
    for name, entry in result(completed)["metrics"].items():
        assert found[name] == entry["mean"]
    assert found["test/mse/ci95"] == result(completed)["metrics"]["test/mse"]["ci95"]


def test_every_figure_is_there(client, completed):
    files = sorted((completed / "figures").glob("*.png"))
    assert len(files) >= 2
    found = client.list_artifacts(run_id(completed), "figures")
    assert [one.path for one in found] == [f"figures/{file.name}" for file in files]
    assert [one.file_size for one in found] == [file.stat().st_size for file in files]


def test_it_says_how_the_training_ended(client, completed, tmp_path):
    assert tracked(client, completed).info.status == "FINISHED"
    with pytest.raises(ArithmeticError):
        run(tmp_path, LOGGER, *learner("Scripted", fail_at=3))
    assert tracked(client, tmp_path).info.status == "FAILED"


def test_after_a_kill_the_same_run_goes_on_with_every_step_once(client, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_logger, "SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowLogger, "close", lambda self: None)  # as SIGKILL would
        train_and_kill(tmp_path, LOGGER)
    before = run_id(tmp_path)
    assert tracked(client, tmp_path).info.status == "RUNNING"
    assert [step for step, _ in metrics(client, tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    train(tmp_path, LOGGER)
    assert run_id(tmp_path) == before
    assert tracked(client, tmp_path).info.status == "FINISHED"
    found, wanted = metrics(client, tmp_path), curves(tmp_path)
    assert without_seconds(found) == without_seconds(wanted)
    assert [step for step, _ in found["train/seconds"]] == list(range(1, 11))


def test_what_may_change_on_resuming_does_not_hinder_it(client, tmp_path):
    train_and_kill(tmp_path, LOGGER)
    train(tmp_path, LOGGER, "loader.prefetch_factor=3")
    assert tracked(client, tmp_path).data.params["loader.prefetch_factor"] == "2"


def test_rows_from_before_the_logger_was_chosen_are_there_too(client, tmp_path):
    train_and_kill(tmp_path)
    train(tmp_path, LOGGER)
    assert metrics(client, tmp_path) == curves(tmp_path)


def test_rows_that_the_store_did_not_take_are_made_up_for_at_the_end(client, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_logger, "SECONDS", 0)
    send, refused = MlflowLogger._send, []

    def send_but_once(self):
        if self._waiting and self._waiting[0].step == 5 and not refused:
            refused.append(5)
            raise ConnectionError("no answer")
        send(self)

    monkeypatch.setattr(MlflowLogger, "_send", send_but_once)
    train(tmp_path, LOGGER)
    assert refused == [5]
    assert metrics(client, tmp_path) == curves(tmp_path)


def test_a_request_holds_no_more_than_the_store_takes(client, tmp_path, monkeypatch):
    sizes, log_batch = [], MlflowClient.log_batch

    def counted(self, run_id, metrics=(), params=()):
        sizes.append((len(metrics), len(params)))
        log_batch(self, run_id, metrics=metrics, params=params)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    monkeypatch.setattr(mlflow_logger, "METRICS", 4)
    monkeypatch.setattr(mlflow_logger, "PARAMETERS", 7)
    train_and_kill(tmp_path)
    train(tmp_path, LOGGER)
    assert tuple(map(max, zip(*sizes, strict=True))) == (4, 7)
    assert len(tracked(client, tmp_path).data.params) > 50
    assert metrics(client, tmp_path) == curves(tmp_path)


def test_starting_anew_begins_another_run(client, tmp_path):
    train_and_kill(tmp_path, LOGGER)
    before = run_id(tmp_path)
    train(tmp_path, LOGGER, "fresh=true")
    assert run_id(tmp_path) != before
    assert metrics(client, tmp_path) == curves(tmp_path)


def test_a_run_that_somebody_deleted_is_begun_again(client, tmp_path):
    train_and_kill(tmp_path, LOGGER)
    client.delete_run(run_id(tmp_path))
    train(tmp_path, LOGGER)
    assert metrics(client, tmp_path) == curves(tmp_path)


def test_a_run_goes_on_in_its_store_from_any_directory(client, store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    train_and_kill(tmp_path / "run", LOGGER, f"logger.mlflow.tracking_uri={store}")
    before = run_id(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", LOGGER)
    assert run_id(tmp_path / "run") == before
    assert not (tmp_path / "mlflow.db").exists()


def test_qualified_scores_keep_names_that_tell_them_apart(client, tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_config({"seed": 1})
    directory.write_result(status="completed", step=2)
    logger = MlflowLogger(tmp_path)
    logger.rewind(0)
    logger.log({"step": 2, "val/accuracy@ways=5,shots=1": 0.5, "val/accuracy@ways=5,shots=5": 0.75})
    logger.close()
    assert tracked(client, tmp_path).data.metrics == {
        "val/accuracy ways:5 shots:1": 0.5,
        "val/accuracy ways:5 shots:5": 0.75,
    }


@pytest.mark.slow
def test_jobs_that_begin_together_make_one_store(tmp_path):
    program = (
        "import sys\n"
        "from metabatch_cli.engine.run_directory import RunDirectory\n"
        "from metabatch_cli.report.mlflow_logger import MlflowLogger\n"
        "RunDirectory(sys.argv[1]).write_config({'seed': 1})\n"
        "MlflowLogger(sys.argv[1], tracking_uri='sqlite:///mlflow.db').rewind(0)\n"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", program, f"run{number}"], cwd=tmp_path)
        for number in range(4)
    ]
    assert [job.wait() for job in jobs] == [0] * 4
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("metabatch")
    assert len(client.search_runs([experiment.experiment_id])) == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        "mlflow.db", "mlartifacts", *(f"run{number}" for number in range(4))
    }  # fmt: skip


def test_closing_it_before_it_began_writes_nothing(tmp_path):
    MlflowLogger(tmp_path).close()
    assert not any(tmp_path.iterdir())
