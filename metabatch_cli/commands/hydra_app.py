"""The one place where a verb becomes a Hydra application."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from metabatch_cli.config.compose import config_dir, debug_last, register_resolvers

_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}


_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

_failed = False
"""Whether one of several jobs failed that ran in this process, one after the other."""


def launch(
    config_name: str,
    module: str,
    program: str,
    *,
    config_path: Path | None = None,
    words: list[str] | None = None,
) -> None:
    """Run `module.job(config)` as a Hydra application over the command line.

    Args:
        config_name: the primary configuration.
        module: where the job is; imported only when it has to run.
        program: what help calls the application.
        config_path: where the primary configuration is, if not in the shipped ones.
        words: the command line, if not as it stands in `sys.argv`.
    """
    import hydra
    from hydra.core.plugins import Plugins

    Plugins.instance()  # which makes the classes of Hydra's own plugins anew: only then
    from metabatch_cli.sweeps import ray_launcher, sweeper

    sweeper.register()
    ray_launcher.register()
    register_resolvers()
    if words is not None:
        options, overrides = sorted_out(words)
        sys.argv = [program, *options, *debug_last(overrides)]
    path = str(config_path or config_dir())
    hydra.main(version_base="1.3", config_path=path, config_name=config_name)(_Job(module))()
    if _failed:
        sys.exit(1)


def nowhere() -> list[str]:
    """Overrides by which an application leaves no directory: Hydra's are temporary ones."""
    scratch = tempfile.mkdtemp(prefix="metabatch-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}", "hydra/sweeper=basic"]


def complete_line(config_name: str, module: str, typed: list[str]) -> None:
    """Print what may follow the words typed behind a verb; the shell is in `sys.argv`."""
    os.environ["COMP_LINE"] = " ".join([os.path.basename(sys.argv[0]), *typed])
    os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    launch(config_name, module, sys.argv[0])


def sorted_out(words: list[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and overrides: Hydra's parser wants the latter in one piece."""
    options: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        if word in _WITH_VALUE and rest:
            options.append(rest.pop(0))
        elif word in ("--info", "-i"):  # its value may be left out, but not before an override
            options.append(rest.pop(0) if rest and rest[0] in _INFO else "all")
    return options, overrides


class _Job:
    """A job that imports its function, and so torch, where it runs; picklable for launchers."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.__name__ = self.__qualname__ = "job"

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register_resolvers()  # in a launcher's process

    def __call__(self, config: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        logging.getLogger("metabatch").propagate = False  # Hydra's handlers would say it twice
        job: Callable[[Any], Any] = import_module(self.module).job
        debug = "METABATCH_DEBUG" in os.environ
        if debug:
            return job(config)
        try:
            return job(config)
        except Exception as error:  # here and not in the app: Hydra would print a line of its own
            from metabatch_cli.config.errors import UserError, explain

            hydra, said = HydraConfig.get(), explain(error)
            if hydra.mode != RunMode.MULTIRUN:
                _say(said)
                sys.exit(1)
            if hydra.sweeper["_target_"].endswith(".ResumableSweeper"):
                _say(f"{Path(hydra.runtime.output_dir).name}: {said}")
                # the sweeper goes on, and knows; not every exception can be sent to it
                raise UserError(said) from error
            if not hydra.launcher["_target_"].endswith(".BasicLauncher"):
                raise  # Hydra's own sweeper tells of the first when all are done
            words = [word for word in hydra.overrides.task if not word.startswith("+run=")]
            _say(f"{' '.join(words)}: {said}")
            global _failed
            _failed = True
            return None


def _say(message: str) -> None:
    print(f"metabatch: {message}", file=sys.stderr, flush=True)
