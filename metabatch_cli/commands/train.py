"""`metabatch train`: train what a configuration declares, or go on with it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(words: list[str]) -> None:
    """A Hydra application: overrides, `-m`, `--cfg`, `--help` and the rest."""
    from metabatch_cli.commands.hydra_app import launch

    launch("train", __name__, "metabatch train", words=words)


def job(config: DictConfig) -> float | None:
    """One training; returns the monitored validation score, for sweepers."""
    from hydra.core.hydra_config import HydraConfig

    from metabatch_cli.engine.run import train

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    try:
        result = train(config, directory, overrides=list(hydra.overrides.task))
    except BaseException:
        # Hydra made it and the folders above; where nothing came of it, they shall not stay
        with contextlib.suppress(OSError):
            for folder in (directory, *directory.parents):
                if folder == Path.cwd():
                    break
                folder.rmdir()
        raise
    return result.get("monitor", {}).get("best")
