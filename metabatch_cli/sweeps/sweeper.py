"""The sweeper behind `-m`: every job that can run does, finished ones rest, and all are told of.

Hydra's own ends before the first job if one of them cannot be composed, runs finished ones again,
and of several failures shows the first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from metabatch_cli.config.errors import explain
from metabatch_cli.sweeps.beside import SWEEP
from metabatch_cli.sweeps.jobs import identity, job_names, known_jobs, record_failure

# Hydra takes plugins from two packages only, of which this one is always there
AMONG_PLUGINS = "hydra._internal.core_plugins.metabatch"
BY_NUMBER = "${hydra.job.num}"  # Hydra's own names of directories, which tell nothing


def register() -> None:
    """Make the sweeper known to Hydra."""
    sys.modules[AMONG_PLUGINS] = sys.modules[__name__]
    Plugins.instance().register(ResumableSweeper)


class ResumableSweeper(BasicSweeper):
    """All combinations of the values that were typed, in directories named by them.

    Run again with the same `hydra.sweep.dir`, with further values or without, a sweep leaves out
    the jobs that are completed there, goes on with those that were cut short, and tries the failed
    ones once more.
    """

    __module__ = AMONG_PLUGINS

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run what is not completed yet; exits with 1, after all the others, if a job failed."""
        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        from metabatch_cli.batching.auto import JOBS

        setup_globals()
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        directory = Path(str(self.config.hydra.sweep.dir))
        directory.mkdir(parents=True, exist_ok=True)
        jobs_at_once = OmegaConf.select(self.config, "launcher.jobs")
        if jobs_at_once is not None:
            os.environ |= {JOBS: str(jobs_at_once), SWEEP: str(os.getpid())}
        returned: list[Sequence[JobReturn]] = []
        failed = launched = 0
        try:
            for batch in self._named(self.split_arguments(overrides, self.max_batch_size)):
                planned = [self._is_to_run(job, directory) for job in batch]
                waiting = [job for job, runs in zip(batch, planned, strict=True) if runs]
                failed += planned.count(None)
                if waiting:
                    results = self.launcher.launch(waiting, initial_job_idx=launched)
                    failed += sum(job.status != JobStatus.COMPLETED for job in results)
                    returned.append(results)
                launched += len(waiting)
        finally:
            _summarise(directory)
        if failed:
            sys.exit(1)
        return returned

    def _named(self, batches: list[list[list[str]]]) -> list[list[list[str]]]:
        """The jobs, told where to be: where they are already, else in a directory of their own."""
        assert self.config is not None
        sweep = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        assert isinstance(sweep, dict)
        if sweep["subdir"] != BY_NUMBER:  # somebody wants other names
            return batches
        known = known_jobs(Path(str(self.config.hydra.sweep.dir)))
        jobs = [job for batch in batches for job in batch]
        names = iter(job_names(jobs))
        return [
            [
                [*job, f"hydra.sweep.subdir='{known.get(identity(job), name)}'"]
                for job, name in zip(batch, names)  # noqa: B905  # as many as in the batch
            ]
            for batch in batches
        ]

    def _is_to_run(self, job: Sequence[str], directory: Path) -> bool | None:
        """Whether a job is to be launched; None if it cannot be, which is said and written down."""
        from metabatch_cli.engine.run import is_completed

        before = HydraConfig.instance().cfg
        place = directory / job[-1].partition("=")[2].strip("'")
        try:
            config = self._composed(job)
            place = directory / str(config.hydra.sweep.subdir)
            with open_dict(config):
                del config["hydra"]
            return not is_completed(config, place)
        except Exception as error:
            message = explain(error, list(job))
            print(f"metabatch: {place.name}: {message}", file=sys.stderr)
            record_failure(place, job[:-1], message)
            return None
        finally:
            HydraConfig.instance().cfg = before

    def _composed(self, job: Sequence[str]) -> DictConfig:
        """The job's configuration, as a launcher composes it."""
        assert self.config is not None
        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = 0
        HydraConfig.instance().set_config(config)
        return config


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
