"""TensorBoard: its own reader finds every row once, the configuration, the scores, the figures."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.report.loggers import run_name
from metabatch_cli.report.tensorboard_logger import TensorboardLogger
from tests.engine.examples import learner, new_directory, result, run
from tests.report.tracked import curves, train, train_and_kill

LOGGER = "logger=tensorboard"


@pytest.fixture(scope="module")
def completed():
    directory = new_directory()
    train(directory, LOGGER, "evaluation.figures=true")
    return directory


def read(directory):
    accumulator = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    return accumulator.Reload()


def scalars(directory):
    found = read(directory)
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
        if not name.startswith("test/")
    }


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


def session(directory, tag):
    content = read(directory).SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def status(directory):
    return session(directory, metadata.SESSION_END_INFO_TAG).session_end_info.status


def test_every_row_stands_at_its_step(completed):
    same(scalars(completed), curves(completed))


def test_the_configuration_is_listed_under_the_runs_name(completed):
    start = session(completed, metadata.SESSION_START_INFO_TAG).session_start_info
    assert start.group_name == run_name(completed)
    assert start.hparams["model.width"].number_value == 8
    assert start.hparams["evaluation.figures"].bool_value is True
    assert start.hparams["loader.device"].string_value == "cpu"
    assert start.hparams["trainer.max_time"].string_value == "None"


def test_the_final_scores_are_the_results(completed):
    found = read(completed)
    for name, entry in result(completed)["metrics"].items():
        (event,) = found.Scalars(name)
        assert (event.step, event.value) == (10, pytest.approx(entry["mean"], rel=1e-6))
    assert found.Scalars("test/mse/ci95")


def test_every_figure_is_there_as_it_is_on_disk(completed):
    found, files = read(completed), sorted((completed / "figures").glob("*.png"))
    assert found.Tags()["images"] == [f"figures/{file.stem}" for file in files]
    assert len(files) >= 2
    for file in files:
        (event,) = found.Images(f"figures/{file.stem}")
        assert event.encoded_image_string == file.read_bytes()
        assert event.step == 10
        with Image.open(file) as picture:
            assert (event.width, event.height) == picture.size


def test_it_says_how_the_training_ended(completed, tmp_path):
    assert status(completed) == api_pb2.STATUS_SUCCESS
    with pytest.raises(ArithmeticError):
        run(tmp_path, LOGGER, *learner("Scripted", fail_at=3))
    assert status(tmp_path) == api_pb2.STATUS_FAILURE


def test_after_a_kill_every_step_is_there_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TensorboardLogger, "close", lambda self: None)  # as SIGKILL would
        train_and_kill(tmp_path, LOGGER)
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    train(tmp_path, LOGGER)
    same(scalars(tmp_path), curves(tmp_path))


def test_rows_are_on_disk_once_they_are_logged(tmp_path):
    RunDirectory(tmp_path).write_config({"seed": 1})
    logger = TensorboardLogger(tmp_path)
    logger.rewind(0)
    (file,) = (tmp_path / "tensorboard").iterdir()
    for step in range(1, 501):
        logger.log({"step": step, "loss": 0.5})
        # looked at at once: the writer's own thread would come to it a little later
        assert file.read_bytes().count(b"train/loss") == step
    logger.writer.close()


def test_rows_from_before_the_logger_was_chosen_are_there_too(tmp_path):
    train_and_kill(tmp_path)
    train(tmp_path, LOGGER)
    same(scalars(tmp_path), curves(tmp_path))


def test_starting_anew_forgets_the_events(tmp_path):
    train_and_kill(tmp_path, LOGGER)
    train(tmp_path, LOGGER, "fresh=true")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    same(scalars(tmp_path), curves(tmp_path))


def test_closing_it_before_it_began_writes_nothing(tmp_path):
    TensorboardLogger(tmp_path).close()
    assert not any(tmp_path.iterdir())
