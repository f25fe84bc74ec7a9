"""Who imports whom: nothing imports upward, and the package itself imports next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metabatch_cli

ROOT = Path(__file__).parents[1]

# what each part may import of ours beside itself: all that is below it
LEARNING = {"learners", "models", "batching", "mkl"}
MAY_IMPORT = {
    "mkl": set(),
    "batching": {"mkl"},
    "models": {"batching", "mkl"},
    "learners": {"models", "batching", "mkl"},
    "engine": LEARNING | {"engine", "report", "config"},
    "report": LEARNING | {"engine", "report", "config"},
    "config": LEARNING | {"engine", "report", "config"},
    "bench": LEARNING | {"engine", "report", "config", "tasksets"},
    "sweeps": LEARNING | {"engine", "report", "config"},
    "commands": LEARNING | {"engine", "report", "config", "sweeps", "tasksets", "bench"},
    "app": LEARNING | {"engine", "report", "config", "sweeps", "tasksets", "bench", "commands"},
    "__main__": {"app"},
    "tasksets": {"batching", "mkl"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The full names of all modules and members that a source imports, wherever in it."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            name = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(name, ast.Constant):
                yield str(name.value)


def part_of(name: str) -> str | None:
    """The part of ours that a full name lies in; None for what is not ours, or our version."""
    top, *rest = name.split(".")
    if top == "tasksets":
        return "tasksets"
    if top != "metabatch_cli" or not rest or rest[0] == "__version__":
        return None
    home = metabatch_cli._HOMES.get(rest[0])  # `from metabatch_cli import TaskSet`
    return part_of(home) if home else rest[0]


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module that its part may not make."""
    part = part_of(module)
    assert part in MAY_IMPORT, f"{module}: give {part!r} its place in MAY_IMPORT"
    allowed = MAY_IMPORT[part] | {part}
    names = imported(source, module, is_package)
    return sorted(name for name in names if part_of(name) not in {None, *allowed})


SOURCES = sorted([*ROOT.glob("metabatch_cli/**/*.py"), *ROOT.glob("tasksets/**/*.py")])
INSIDE = [path for path in SOURCES if module_name(path) != "metabatch_cli"]


@pytest.mark.parametrize("path", INSIDE, ids=module_name)
def test_nothing_imports_upward(path):
    found = upward(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found, f"{module_name(path)} may not import {', '.join(found)}"


def test_all_parts_were_looked_at():
    assert {part_of(module_name(path)) for path in INSIDE} >= {"batching", "learners", "tasksets"}
    assert len(INSIDE) > 10


def test_every_part_sees_all_that_the_parts_below_it_see():
    for part, below in MAY_IMPORT.items():
        for other in below:
            assert MAY_IMPORT[other] <= below | {part} or part == "__main__"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("metabatch_cli.batching.task", "import metabatch_cli.models", "metabatch_cli.models"),
        ("metabatch_cli.batching.task", "import tasksets.gp as t", "tasksets.gp"),
        (
            "metabatch_cli.models.mlp",
            "from metabatch_cli import learners",
            "metabatch_cli.learners",
        ),
        ("metabatch_cli.models.mlp", "from ..learners import maml", "metabatch_cli.learners.maml"),
        ("metabatch_cli.learners.maml", "def f():\n from .. import train", "metabatch_cli.train"),
        ("metabatch_cli.learners.maml", "__import__('metabatch_cli.app')", "metabatch_cli.app"),
        ("metabatch_cli.report.table", "from ..commands import ls", "metabatch_cli.commands.ls"),
        (
            "tasksets.gp",
            "import importlib\nimportlib.import_module('metabatch_cli.config')",
            "metabatch_cli.config",
        ),
    ],
)
def test_an_upward_import_is_found_however_it_is_written(module, source, found):
    assert upward(source, module) == [found]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metabatch_cli.learners.maml", "from metabatch_cli.models.mlp import MLP\nimport torch"),
        ("metabatch_cli.learners.maml", "from metabatch_cli import TaskSet, __version__"),
        ("metabatch_cli.engine.trainer", "from metabatch_cli.report import console"),
        ("metabatch_cli.models.cnp", "from .mlp import MLP\nfrom ..batching import Task"),
        ("tasksets.images", "from tasksets.episodes import Episodes\nimport metabatch_cli"),
    ],
)
def test_imports_downward_and_sideways_are_fine(module, source):
    assert upward(source, module) == []


# --- the package itself ------------------------------------------------------------------------


def test_importing_the_package_imports_no_torch():
    program = (
        "import sys, metabatch_cli\n"
        "metabatch_cli.__version__, dir(metabatch_cli)\n"
        "heavy = {'torch', 'numpy', 'hydra', 'omegaconf', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "metabatch_cli.TaskLoader\n"
        "assert 'torch' in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_package_hands_out_the_batching_core_and_no_unknown_name():
    from metabatch_cli import batching

    for name in ("Task", "TaskLoader", "TaskSet"):
        assert getattr(metabatch_cli, name) is getattr(batching, name)
        assert name in metabatch_cli.__all__
    with pytest.raises(AttributeError, match="no attribute 'TaskLoaders'"):
        metabatch_cli.TaskLoaders  # noqa: B018


def test_every_public_name_has_a_home_that_exists():
    assert set(metabatch_cli.__all__) == set(metabatch_cli._HOMES)
    for name in metabatch_cli.__all__:
        home = ROOT.joinpath(*metabatch_cli._HOMES[name].split("."))
        assert home.with_suffix(".py").is_file() or (home / "__init__.py").is_file()
        assert getattr(metabatch_cli, name).__name__ == name
