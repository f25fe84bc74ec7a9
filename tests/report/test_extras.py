"""Loggers to other programs: imported when used, asked for by the name of their extra."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from metabatch_cli.config import build
from metabatch_cli.config.check import locate
from metabatch_cli.config.errors import UserError
from tests.engine.examples import run, settings

ROOT = Path(__file__).parents[2]
EXTRAS = ("tensorboard", "mlflow", "wandb")


@pytest.mark.parametrize("name", EXTRAS)
def test_a_package_that_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(build, "find_spec", lambda package: None)
    with pytest.raises(UserError) as told:
        run(tmp_path / "run", f"logger={name}")
    assert str(told.value) == (
        f"logger.{name}: {name} is not installed; it comes with: pip install '.[{name}]'"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_called_like_the_package_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    target = "tests.report.test_extras.Needy"
    with pytest.raises(UserError, match="no_package is not installed"):
        build.refuse_missing("logger.mine", {"_target_": target})


class Needy:
    """A logger of what is not there."""

    needs = "no_package"


@pytest.mark.parametrize("name", EXTRAS)
def test_there_is_an_extra_of_the_packages_name(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    node = settings(f"logger={name}").logger[name]
    needs = locate("logger", node._target_).needs
    assert needs == name
    assert any(line.startswith(needs) for line in extras["optional-dependencies"][needs])


def test_a_logger_imports_its_package_only_when_it_is_used():
    program = (
        "import sys\n"
        f"for name in {EXTRAS}:\n"
        "    module = __import__(f'metabatch_cli.report.{name}_logger', fromlist=['x'])\n"
        "    getattr(module, name.capitalize() + 'Logger')('nowhere')\n"
        f"heavy = {{*{EXTRAS}, 'torch'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert not (ROOT / "nowhere").exists()


def test_several_loggers_are_chosen_as_a_list():
    assert list(settings("logger=[csv,tensorboard,wandb]").logger) == [
        "csv",
        "tensorboard",
        "wandb",
    ]
    assert settings("logger=wandb", "logger.wandb.project=mine").logger.wandb.project == "mine"
