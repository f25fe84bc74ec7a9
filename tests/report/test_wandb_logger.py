"""Weights & Biases, offline: its file holds every row once, the configuration, scores, figures."""

from __future__ import annotations

import json
import struct
from collections import defaultdict

import pytest

pytest.importorskip("wandb", reason="needs the extra 'wandb'")

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from metabatch_cli.config.errors import ConfigError
from metabatch_cli.report.loggers import run_name
from metabatch_cli.report.wandb_logger import WandbLogger
from tests.engine.examples import learner, new_directory, result, run
from tests.report.tracked import curves, train, train_and_kill

LOGGER = "logger=wandb"
BLOCK = 32768


@pytest.fixture(scope="module")
def completed():
    directory = new_directory()
    train(directory, LOGGER, "evaluation.figures=true", "logger.wandb.tags=[small,short]")
    return directory


def records(directory):
    """The messages of the one file that `wandb sync` would send: LevelDB's format of logs, where
    a message is in as many pieces as blocks that it reaches into."""
    wandb.teardown()  # its own process writes the file, and may not be done yet
    (file,) = (directory / "wandb").glob("*/*.wandb")
    content, place, message = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, piece = struct.unpack_from("<IHB", content, place)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if piece in (1, 4):  # whole, last
            yield Record.FromString(message)
            message = b""


def of_kind(directory, kind):
    return [getattr(r, kind) for r in records(directory) if r.WhichOneof("record_type") == kind]


def items(entries):
    return {
        entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries
    }


def history(directory):
    found = defaultdict(list)
    for record in of_kind(directory, "history"):
        row = items(record.item)
        for name, value in row.items():
            if name.startswith(("train/", "val/")):
                found[name].append((row["_step"], value))
    return dict(found)


def summary(directory):
    return {
        k: v for record in of_kind(directory, "summary") for k, v in items(record.update).items()
    }


def test_every_row_stands_at_its_step(completed):
    assert history(completed) == curves(completed)


def test_the_run_has_its_name_tags_and_configuration(completed):
    (about,) = of_kind(completed, "run")
    assert about.display_name == run_name(completed)
    assert about.project == "metabatch"
    assert list(about.tags) == ["small", "short"]
    assert about.run_id == (completed / "wandb" / "id").read_text()
    assert items(about.config.update)["model"]["width"] == 8


def test_the_final_scores_are_the_results(completed):
    found = summary(completed)
    for name, entry in result(completed)["metrics"].items():
        assert found[name] == entry["mean"]
    assert found["test/mse/ci95"] == result(completed)["metrics"]["test/mse"]["ci95"]


def test_every_figure_is_there_as_it_is_on_disk(completed):
    files = sorted((completed / "figures").glob("*.png"))
    assert len(files) >= 2
    last = items(of_kind(completed, "history")[-1].item)
    (folder,) = (completed / "wandb").glob("offline-run-*")
    for file in files:
        path = last[f"figures/{file.stem}/path"]
        assert (folder / "files" / path).read_bytes() == file.read_bytes()


def test_it_says_how_the_training_ended(completed, tmp_path):
    assert [end.exit_code for end in of_kind(completed, "exit")] == [0]
    with pytest.raises(ArithmeticError):
        run(tmp_path, LOGGER, *learner("Scripted", fail_at=3))
    assert [end.exit_code for end in of_kind(tmp_path, "exit")] == [1]


def test_after_a_kill_the_same_run_goes_on_with_every_step_once(tmp_path):
    train_and_kill(tmp_path, LOGGER)
    before = (tmp_path / "wandb" / "id").read_text()
    assert [step for step, _ in history(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    train(tmp_path, LOGGER)
    assert [about.run_id for about in of_kind(tmp_path, "run")] == [before]
    assert history(tmp_path) == curves(tmp_path)
    assert [end.exit_code for end in of_kind(tmp_path, "exit")] == [0]


def test_rows_from_before_the_logger_was_chosen_are_there_too(tmp_path):
    train_and_kill(tmp_path)
    train(tmp_path, LOGGER)
    assert history(tmp_path) == curves(tmp_path)


def test_runs_of_others_in_that_folder_are_left_alone(tmp_path):
    train_and_kill(tmp_path, LOGGER)
    other = tmp_path / "wandb" / "offline-run-20260101_000000-somebody"
    other.mkdir()
    train(tmp_path, LOGGER)
    assert other.exists()


def test_starting_anew_begins_another_run(tmp_path):
    train_and_kill(tmp_path, LOGGER)
    before = (tmp_path / "wandb" / "id").read_text()
    train(tmp_path, LOGGER, "fresh=true")
    assert [about.run_id for about in of_kind(tmp_path, "run")] != [before]
    assert history(tmp_path) == curves(tmp_path)


def test_it_prints_nothing(tmp_path, capfd):
    train(tmp_path, LOGGER)
    assert capfd.readouterr() == ("", "")


def test_a_mode_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"logger\.wandb\.mode=ofline"):
        train(tmp_path, LOGGER, "logger.wandb.mode=ofline")


def test_closing_it_before_it_began_writes_nothing(tmp_path):
    WandbLogger(tmp_path).close()
    assert not any(tmp_path.iterdir())
