"""Where the configurations are, and how to compose one from Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def config_dir() -> Path:
    """The folder of the shipped configurations: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def register_resolvers() -> None:
    """What configurations ask for by `${jobs_at_once:…}`."""
    from omegaconf import OmegaConf

    from metabatch_cli.config.beside import jobs_at_once

    OmegaConf.register_new_resolver("jobs_at_once", jobs_at_once, replace=True)


def debug_last(words: list[str]) -> list[str]:
    """The words with debug=NAME as +debug=NAME at the end: it changes what an experiment says."""
    debug = [word for word in words if word.lstrip("+").startswith("debug=")]
    return [word for word in words if word not in debug] + [f"+{w.lstrip('+')}" for w in debug]


def compose(*overrides: str, config_name: str = "train", user_dir: str | None = None) -> DictConfig:
    """Compose a configuration as the command line does.

    Args:
        overrides: as typed behind `metabatch train`: `"+experiment=cnp_sine"`, `"seed=1"`.
        config_name: the primary configuration.
        user_dir: a folder of further configurations, as with `--config-dir`.

    Raises:
        UserError: a name or value that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from metabatch_cli.config.errors import readable

    register_resolvers()
    words = debug_last(list(overrides))
    if user_dir is not None:
        words.append(f"hydra.searchpath=[file://{os.path.abspath(user_dir)}]")
    outer = GlobalHydra.instance().hydra  # composing inside a Hydra application must not end it
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3", job_name="metabatch"):
            return hydra_compose(config_name, words)
    except Exception as error:
        message = readable(error)
        raise error if message is None else message from error
    finally:
        GlobalHydra.instance().hydra = outer
