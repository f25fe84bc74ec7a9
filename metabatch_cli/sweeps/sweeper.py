"""The sweeper behind `-m`: every job that can run does, finished ones rest, and all are told of.

Hydra's own ends before the first job if one of them cannot be composed, runs finished ones again,
and of several failures shows the first.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from metabatch_cli.config.errors import explain
from metabatch_cli.sweeps.jobs import identity, job_names, known_jobs, record_failure

# Hydra takes plugins from two packages only, of which this one is always there
AMONG_PLUGINS = "hydra._internal.core_plugins.metabatch"
BY_NUMBER = "${hydra.job.num}"  # Hydra's own names of directories, which tell nothing


def register() -> None:
    """Make the sweeper known to Hydra."""
    sys.modules[AMONG_PLUGINS] = sys.modules[__name__]
    Plugins.instance().register(ResumableSweeper)


@dataclass(frozen=True)
class Job:
    """One combination of values.

    Attributes:
        number: among all of the sweep.
        words: its overrides, as typed.
        name: of its directory, unless somebody wants others.
    """

    number: int
    words: list[str]
    name: str


class ResumableSweeper(BasicSweeper):
    """All combinations of the values that were typed, in directories named by them.

    Run again with the same `hydra.sweep.dir`, with further values or without, a sweep leaves out
    the jobs that are completed there, goes on with those that were cut short, and tries the failed
    ones once more.

    Args:
        max_batch_size, params: as of Hydra's own sweeper.
        retry_failed: whether jobs that failed before are tried again.
    """

    __module__ = AMONG_PLUGINS

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        retry_failed: bool = True,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.retry_failed = retry_failed

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run what is not completed yet; exits with 1, after all the others, if a job failed."""
        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        from metabatch_cli.config.beside import sharing

        # where Slurm keeps no accounts submitit complains each time that it looks for a job; its
        # level it sets itself, once it is imported
        logging.getLogger("submitit").addFilter(_is_error)
        setup_globals()
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        directory = Path(str(self.config.hydra.sweep.dir))
        directory.mkdir(parents=True, exist_ok=True)
        returned: list[Sequence[JobReturn]] = []
        failed = 0
        try:
            for batch in self._jobs(directory, overrides):
                places = [self._place(job, directory) for job in batch]
                failed += places.count(None)
                waiting = [
                    [*job.words, f"hydra.sweep.subdir='{place}'"]
                    for job, place in zip(batch, places, strict=True)
                    if place
                ]
                if waiting:
                    with sharing(self.launcher, self.config, len(waiting)):
                        results = self.launcher.launch(waiting, initial_job_idx=batch[0].number)
                    failed += sum(job.status != JobStatus.COMPLETED for job in results)
                    returned.append(results)
        finally:
            _summarise(directory)
        if failed:
            sys.exit(1)
        return returned

    def _jobs(self, directory: Path, overrides: list[Override]) -> list[list[Job]]:
        """The batches of jobs, each job once."""
        batches = self.split_arguments(overrides, self.max_batch_size)
        every = [words for batch in batches for words in batch]
        names = job_names(every, known_jobs(directory))
        jobs, seen = iter(map(Job, range(len(every)), every, names)), set()
        found = []
        for batch in batches:
            own = [job for job, _ in zip(jobs, batch)]  # noqa: B905  # as many as are in it
            new = [job for job in own if identity(job.words) not in seen]
            seen |= {identity(job.words) for job in new}
            found.append(new)
        return [batch for batch in found if batch]

    def _place(self, job: Job, directory: Path) -> str | None:
        """The directory of a job that is to be launched; empty if it is completed; None if it
        cannot be launched, which is said and written down."""
        from metabatch_cli.engine.run import is_completed
        from metabatch_cli.engine.run_directory import RunDirectory

        outer = HydraConfig.instance().cfg
        name = job.name
        try:
            config = self._composed(job)
            sweep = OmegaConf.to_container(config.hydra.sweep, resolve=False)
            assert isinstance(sweep, dict)
            if sweep["subdir"] != BY_NUMBER:  # somebody wants other names
                name = str(config.hydra.sweep.subdir)
            with open_dict(config):
                del config["hydra"]
            before = RunDirectory(directory / name).read_result()
            if before.get("status") == "failed" and not self.retry_failed:
                print(f"metabatch: {name}: failed before: {before['error']}", file=sys.stderr)
                return None
            return "" if is_completed(config, directory / name) else name
        except Exception as error:
            message = explain(error, job.words)
            print(f"metabatch: {name}: {message}", file=sys.stderr)
            record_failure(directory / name, job.words, message)
            return None
        finally:
            HydraConfig.instance().cfg = outer

    def _composed(self, job: Job) -> DictConfig:
        """The job's configuration, as a launcher composes it."""
        assert self.config is not None
        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(job.words))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = job.number
        HydraConfig.instance().set_config(config)
        return config


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _summarise(directory: Path) -> None:
    """One table of all that is in the sweep's directory."""
    from metabatch_cli.report.console import make_console
    from metabatch_cli.report.table import summarise
    from metabatch_cli.report.terminal_table import render

    console = make_console()
    if any(directory.glob("**/result.json")):
        console.print()
        render(summarise([directory]), console)
    console.print(f"sweep: {directory}", soft_wrap=True, markup=False)
