"""A job on Ray: how it settles in its process, wherever that is, and what it hands back."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from omegaconf import DictConfig

from metabatch_cli.config.beside import SWEEP
from metabatch_cli.config.errors import UserError, explain


@dataclass(frozen=True)
class Assignment:
    """What a job needs to know.

    Attributes:
        config: composed, Hydra's own part included.
        task: the function of it.
        context: Hydra's.
        state: Hydra's, of the process that sent it.
        folder: where the command was typed.
        environment: variables, beside those of the machine.
    """

    config: DictConfig
    task: Any
    context: Any
    state: Any
    folder: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What became of a job, and what it said."""

    returned: JobReturn
    out: str
    err: str


def run(assignment: Assignment) -> Outcome:
    """Run a job in this process, which is its alone."""
    _settle(assignment)
    setup_globals()
    Singleton.set_state(assignment.state)
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            returned = run_job(
                task_function=assignment.task,
                config=assignment.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=assignment.context,
            )
        except (SystemExit, KeyboardInterrupt):  # to Ray it would look like a crash
            returned = failed(UserError("interrupted"))
    if returned.status == JobStatus.FAILED:  # not every exception can be sent
        returned.return_value = UserError(explain(returned._return_value))
    return Outcome(returned, out.getvalue(), err.getvalue())


def failed(error: Exception) -> JobReturn:
    """What Hydra makes of a job that failed."""
    return JobReturn(_return_value=error, status=JobStatus.FAILED)


def _settle(assignment: Assignment) -> None:
    """Make this process, in which torch is not loaded yet, one like those of other launchers."""
    os.environ |= assignment.environment
    os.environ[SWEEP] = str(os.getppid())  # Ray's own process on this machine
    os.chdir(assignment.folder)
    if assignment.folder not in sys.path:  # a `_target_` may live beside the user
        sys.path.append(assignment.folder)
