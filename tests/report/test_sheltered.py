"""A logger that fails costs its own rows, and nothing else."""

from __future__ import annotations

import pytest

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.run import train
from metabatch_cli.engine.stop import Stopped
from metabatch_cli.report.sheltered import Sheltered
from tests.engine.examples import Watcher, assert_same_run, result, run, settings

HERE = "tests.report.test_sheltered"


class Fragile:
    """Fails in one of its methods, or ends the training, and counts how often it is called."""

    def __init__(self, directory, fails: str = "nowhere", stops: bool = False) -> None:
        self.fails, self.stops = fails, stops
        self.calls: list[str] = []

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if method == self.fails:
            raise Stopped("enough") if self.stops else ConnectionError("no answer\nfrom there")

    def log(self, row) -> None:
        self._called("log")

    def rewind(self, step) -> None:
        self._called("rewind")

    def close(self) -> None:
        self._called("close")


def fragile(**arguments) -> str:
    node = {"_target_": f"{HERE}.Fragile", **arguments}
    return "+logger.fragile={" + ",".join(f"{k}:{v}" for k, v in node.items()) + "}"


@pytest.mark.parametrize("method", ["log", "close"])
def test_the_training_is_the_same_as_without_it(tmp_path, method):
    run(tmp_path / "without")
    watcher = Watcher()
    train(settings(fragile(fails=method)), tmp_path / "with", reporter=watcher)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert watcher.text.count("logger.fragile failed: ConnectionError: no answer") == 1
    said = (tmp_path / "with" / "train.log").read_text()
    assert "from there" in said
    assert "Traceback" in said


def test_it_is_left_alone_until_it_is_closed():
    logger, said = Fragile(None, fails="log"), []
    sheltered = Sheltered("logger.fragile", logger, said.append)
    sheltered.rewind(0)
    for step in range(3):
        sheltered.log({"step": step})
    sheltered.close()
    assert logger.calls == ["rewind", "log", "close"]
    assert len(said) == 1


def test_one_that_cannot_begin_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"logger\.fragile: ConnectionError: no answer$"):
        run(tmp_path, fragile(fails="rewind"))
    assert result(tmp_path)["status"] == "failed"
    assert result(tmp_path)["step"] == 0


def test_one_that_ends_the_training_does_so(tmp_path):
    with pytest.raises(Stopped, match="enough"):
        run(tmp_path, fragile(fails="log", stops="true"))
    assert result(tmp_path)["status"] == "interrupted"


def test_all_loggers_are_closed_once_the_result_says_how_it_ended(tmp_path):
    seen = []

    class Reader(Fragile):
        def close(self) -> None:
            seen.append(result(tmp_path)["status"])
            super().close()

    with pytest.raises(UserError):
        train(
            settings(fragile(fails="rewind")), tmp_path, reporter=Watcher(), loggers=[Reader(None)]
        )
    assert seen == ["failed"]
    train(settings(), tmp_path, reporter=Watcher(), loggers=[Reader(None), Reader(None)])
    assert seen == ["failed", "completed", "completed"]
