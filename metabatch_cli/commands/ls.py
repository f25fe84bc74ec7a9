"""`metabatch ls [GROUP]`: what there is to choose from, a line each."""

from __future__ import annotations

import argparse
import ast
from itertools import pairwise
from pathlib import Path

from metabatch_cli.config.compose import config_dir

GROUPS = (
    "experiment",
    "setup",
    "sweep",
    "taskset",
    "model",
    "learner",
    "loader",
    "optimizer",
    "scheduler",
    "trainer",
    "evaluation",
    "logger",
    "launcher",
    "debug",
)

ADDED = {"experiment", "setup", "sweep"}  # nothing of these is chosen unless +GROUP=NAME says so

SECTIONS = {"loader": "LoaderConfig", "trainer": "TrainerConfig", "evaluation": "EvaluationConfig"}


def main(words: list[str]) -> None:
    """Print the configurations of one group or of all."""
    parser = argparse.ArgumentParser(
        prog="metabatch ls", description="List experiments, task sets, models, learners and so on."
    )
    parser.add_argument("group", nargs="?", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of further ones")
    options = parser.parse_args(words)
    folders = [config_dir()]
    if options.config_dir is not None:
        folders.append(_own_folder(options.config_dir))
    groups = [group for group in GROUPS if any((folder / group).is_dir() for folder in folders)]
    if options.group is not None:
        if options.group not in groups:
            from metabatch_cli.config.errors import ConfigError

            raise ConfigError(
                "ls",
                "there is no such group",
                value=options.group,
                allowed=groups,
                wrong_name=options.group,
            )
        groups = [options.group]
    for group in groups:
        print(f"{group}  ({'+' if group in ADDED else ''}{group}=NAME)")
        entries = {name: text for folder in folders for name, text in describe(folder / group)}
        width = max(map(len, entries), default=0)
        for name, text in sorted(entries.items()):
            print(f"  {name:{width}}  {text}")
        if group != groups[-1]:
            print()
    if options.group in SECTIONS:
        print(f"\nkeys  ({options.group}.KEY=VALUE)")
        keys = describe_keys(SECTIONS[options.group])
        width = max(map(len, keys))
        for key, text in keys.items():
            print(f"  {key:{width}}  {text}")


def describe_keys(section: str) -> dict[str, str]:
    """The fields of a section of the schema and their docstrings, read without importing it."""
    source = (Path(__file__).parents[1] / "config" / "schema.py").read_text()
    kind = next(node for node in ast.parse(source).body if getattr(node, "name", "") == section)
    assert isinstance(kind, ast.ClassDef)
    keys = {}
    for field, doc in pairwise(kind.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            assert isinstance(field.target, ast.Name)
            keys[field.target.id] = str(ast.literal_eval(doc.value))
    return keys


def describe(folder: Path) -> list[tuple[str, str]]:
    """Name and first comment of every configuration in a folder and below it."""
    found = []
    for file in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
        comments = (
            line.lstrip("# ").strip()
            for line in file.read_text(errors="replace").splitlines()
            if line.startswith("#") and "@package" not in line
        )
        name = file.relative_to(folder).with_suffix("").as_posix()
        found.append((name, next(comments, "")))
    return found


def complete(words: list[str]) -> list[str]:
    """Groups that begin as the last word does."""
    return [group for group in GROUPS if group.startswith(words[-1])]


def _own_folder(path: str) -> Path:
    from metabatch_cli.config.errors import ConfigError

    if not Path(path).is_dir():
        raise ConfigError("--config-dir", "there is no such folder", value=path)
    return Path(path)
