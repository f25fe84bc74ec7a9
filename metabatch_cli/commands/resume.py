"""`metabatch resume DIR`: go on with a run, from its last checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(words: list[str]) -> None:
    """Read the directory and train on."""
    parser = argparse.ArgumentParser(
        prog="metabatch resume",
        description="Go on with a killed, interrupted or failed run; of a completed one, print "
        "the result.",
    )
    parser.add_argument("directory", metavar="DIR", help="the run's directory")
    options = parser.parse_args(words)

    from metabatch_cli.engine.run_directory import RunDirectory

    run = RunDirectory.existing(options.directory, "DIR")
    config = run.read_config()

    from metabatch_cli.engine.run import train

    train({**config, "fresh": False}, run.path)


def complete(words: list[str]) -> list[str]:
    """Directories that begin as the last word does."""
    return [f"{folder}/" for folder in sorted(Path().glob(f"{words[-1]}*")) if folder.is_dir()]
