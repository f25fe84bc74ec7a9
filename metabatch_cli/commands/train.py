"""`metabatch train`: train what a configuration declares, or go on with it."""

from __future__ import annotations

import contextlib
import os
import signal
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


_places: list[Path] = []
"""Where a run may be, as far as the command line says."""

_there: set[Path] = set()
"""Of those folders, and the ones above, those that were there before Hydra made the others."""


def main(words: list[str]) -> None:
    """A Hydra application: overrides, `-m`, `--cfg`, `--help` and the rest."""
    from metabatch_cli.commands.hydra_app import launch
    from metabatch_cli.config.beside import refuse_under_torchrun

    if {"-m", "--multirun"} & set(words):
        refuse_under_torchrun("--multirun")
    typed = [w.partition("=")[2] for w in words if w.lstrip("+").startswith("hydra.run.dir=")]
    for name in typed or [date.today().strftime("outputs/%Y-%m-%d")]:
        place = Path(os.path.abspath(name.strip("'\"").partition("${")[0]))
        _places.append(place)
        _there.update(folder for folder in (place, *place.parents) if folder.exists())
    launch("train", __name__, "metabatch train", words=words)


def job(config: DictConfig) -> float | None:
    """One training; returns the monitored validation score, for sweepers."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    directory, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
    train = _one_of_several if hydra.mode == RunMode.MULTIRUN else _alone
    return train(config, directory, overrides).get("monitor", {}).get("best")


def _alone(config: DictConfig, directory: Path, overrides: list[str]) -> dict[str, Any]:
    from metabatch_cli.engine.run import train

    try:
        return train(config, directory, overrides=overrides)
    finally:
        # where nothing came of it, what Hydra made shall not stay
        with contextlib.suppress(OSError):
            known = any(directory.is_relative_to(place) for place in _places)
            for folder in (directory, *directory.parents) if known else ():
                if folder in _there:
                    break
                folder.rmdir()


def _one_of_several(config: DictConfig, directory: Path, overrides: list[str]) -> dict[str, Any]:
    """A job of a sweep: it is told of in the sweep's table, whatever becomes of it."""
    from metabatch_cli.config.beside import ending_with_the_sweep, is_beside_others, wait_for
    from metabatch_cli.config.errors import explain
    from metabatch_cli.engine.run import train
    from metabatch_cli.engine.run_directory import RunDirectory
    from metabatch_cli.engine.stop import Interrupted
    from metabatch_cli.report.console import Reporter, silent
    from metabatch_cli.sweeps.jobs import record_failure

    beside = is_beside_others()
    reporter = Reporter(silent() if beside else None)
    with ending_with_the_sweep() if beside else contextlib.nullcontext():
        wait_for(RunDirectory(directory))
        try:
            result = train(config, directory, overrides=overrides, reporter=reporter)
        except Interrupted as stopped:
            if stopped.signum == signal.SIGUSR2:  # all is saved: now the launcher queues it again
                signal.raise_signal(signal.SIGUSR2)
            raise
        except Exception as error:
            record_failure(directory, overrides, explain(error))
            raise
    if beside:
        print(f"completed   {directory.name}", flush=True)
    return result
