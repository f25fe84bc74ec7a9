"""The launcher of jobs on Ray, https://docs.ray.io: a Ray of the sweep's own, or a cluster's.

Hydra's own plugin for Ray gives up all jobs when the process of one is killed, and wants a
cloudpickle older than 3.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from metabatch_cli import mkl
from metabatch_cli.config.beside import threads_of
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.engine.stop import Interrupted
from metabatch_cli.sweeps.jobs import record_loss
from metabatch_cli.sweeps.ray_job import Assignment, Outcome, failed, run
from metabatch_cli.sweeps.ray_keeper import a_ray_of_ones_own

# Hydra takes plugins from two packages only, of which this one is always there
AMONG_PLUGINS = "hydra._internal.core_plugins.metabatch_ray"
_SECONDS = 10.0  # until a cluster that does not answer is taken for none


def register() -> None:
    """Make the launcher known to Hydra."""
    sys.modules[AMONG_PLUGINS] = sys.modules[__name__]
    Plugins.instance().register(RayLauncher)


class Share(NamedTuple):
    """What a job has for itself: cores, and devices or a part of one."""

    cpus: float
    gpus: float


class RayLauncher(Launcher):
    """Each job a task of Ray, in a process of its own that ends with it.

    Args:
        jobs: at a time, at the most.
        cpus: of each job.
        gpus: of each job.
        address: of a cluster; None for a Ray of the sweep's own.
    """

    __module__ = AMONG_PLUGINS

    def __init__(
        self,
        jobs: int | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
        address: str | None = None,
    ) -> None:
        self.jobs = None if jobs is None else max(_number("jobs", jobs, whole=True), 1)
        self.cpus = None if cpus is None else _number("cpus", cpus)
        self.gpus = None if gpus is None else _number("gpus", gpus)
        self.address = address

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError(
                "hydra/launcher=ray: Ray is not installed\n  it comes with: pip install '.[ray]'"
            )
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; returns what became of each, in their order."""
        setup_globals()
        configs = [
            self._composed(words, number)
            for number, words in enumerate(job_overrides, initial_job_idx)
        ]
        with _connected(self.address) as ray, _told_by_sigterm() as told:
            share = self._share(ray, len(configs))
            remote = ray.remote(
                num_cpus=share.cpus, num_gpus=share.gpus, max_calls=1, max_retries=0
            )(run)
            waiting = dict(enumerate(self._assignment(config, share) for config in configs))
            running: dict[Any, int] = {}
            returned: dict[int, JobReturn] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < (self.jobs or math.inf):
                        number = next(iter(waiting))
                        running[remote.remote(waiting.pop(number))] = number
                    for job in ray.wait(list(running))[0]:
                        number = running.pop(job)
                        returned[number] = _result(ray, job, configs[number])
            except KeyboardInterrupt:
                _stop(ray, list(running))
                if told:
                    raise Interrupted(told[0]) from None
                raise
        return [returned[number] for number in sorted(returned)]

    def _composed(self, words: Sequence[str], number: int) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, list(words))
        with open_dict(config):
            config.hydra.job.num = number
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            # made absolute, and free of dates, for processes elsewhere
            config.hydra.sweep.dir = os.path.abspath(str(self.config.hydra.sweep.dir))
        return config

    def _assignment(self, config: DictConfig, share: Share) -> Assignment:
        from metabatch_cli.batching.auto import CORES, JOBS

        own = max(int(share.cpus), 1)
        environment = {name: os.environ[name] for name in os.environ if is_for_jobs(name)}
        environment |= {JOBS: "1", CORES: str(own), "OMP_NUM_THREADS": str(threads_of(own))}
        if not share.gpus:  # else it would see all of them
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return Assignment(
            config, self.task, self.context, Singleton.get_state(), os.getcwd(), environment
        )

    def _share(self, ray: Any, waiting: int) -> Share:
        """What each job is to have, of the machine or of those of a cluster.

        Raises:
            ConfigError: more than this machine has.
        """
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_of(
            {name: sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU")},
            waiting,
            Share(self.cpus or 0, -1 if self.gpus is None else self.gpus),
            self.jobs,
            alone=self.address is None,
        )
        for name, wanted, key in (("CPU", share.cpus, "cpus"), ("GPU", share.gpus, "gpus")):
            most = max((machine.get(name, 0) for machine in machines), default=0)
            if wanted > most:
                problem = f"no machine has more than {most:g}"
                if self.address is None:
                    raise ConfigError(f"launcher.{key}", problem, value=f"{wanted:g}")
                print(  # one that has may join the cluster yet
                    f"metabatch: launcher.{key}={wanted:g}: {problem} at present: waiting",
                    file=sys.stderr,
                )
        return share


def share_of(
    there: Mapping[str, float], waiting: int, wanted: Share, jobs: int | None, *, alone: bool
) -> Share:
    """What each job is to have.

    Args:
        there: of `CPU` and `GPU`, in all.
        waiting: how many jobs there are.
        wanted: by somebody; no CPUs, or GPUs below 0, for nobody's word.
        jobs: at a time, at the most.
        alone: whether they are the only ones on the only machine, so that all of it is theirs.
    """
    cpus, gpus = wanted
    devices = int(there["GPU"])
    at_once = max(min(jobs or devices or int(there["CPU"]), waiting), 1)
    if not cpus:
        cpus = max(there["CPU"] // at_once, 1) if alone else 1
    if gpus < 0:
        on_each = math.ceil(at_once / devices) if devices and alone else 1
        gpus = 1 / on_each if devices else 0
    return Share(cpus, gpus)


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, while the sweep needs it.

    Raises:
        ConfigError: nobody answers at the address.
        UserError: there is none, and no Ray begins here.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with ExitStack() as stack:
        where = address
        if where is None:
            from metabatch_cli.batching.auto import cores

            # jobs run as they would without Ray; a secret of this sweep's processes, instead of
            # one in a file in the user's home
            os.environ |= {
                "RAY_worker_niceness": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
            where = stack.enter_context(a_ray_of_ones_own(cores()))
            if not where:
                raise UserError("launcher=ray: no Ray begins on this machine: ray.init() fails")
        import ray

        logging.getLogger("ray").setLevel(logging.CRITICAL)
        stack.callback(ray.shutdown)
        try:
            _knock(where)
            ray.init(address=where, log_to_driver=False, logging_level=logging.CRITICAL)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                "launcher.address", f"no Ray answers: {reason}", value=where
            ) from error
        yield ray


def _knock(address: str) -> None:
    """Where nobody listens Ray itself would try for many minutes, and complain aloud.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), _SECONDS).close()


@contextmanager
def _told_by_sigterm() -> Iterator[list[int]]:
    """While SIGTERM ends what Ray is doing; gives a list that it is then in.

    Ray's own handler forgets the jobs, and makes a SystemExit of its own of anybody else's.
    """
    received: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _result(ray: Any, job: Any, config: DictConfig) -> JobReturn:
    """What became of a job that ended, which is said as it was there."""
    try:
        outcome: Outcome = ray.get(job)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        message = f"its process is gone: {type(error).__name__}: {reason}"
        directory = Path(config.hydra.sweep.dir, str(config.hydra.sweep.subdir))
        print(f"metabatch: {directory.name}: {message}", file=sys.stderr, flush=True)
        record_loss(directory, list(config.hydra.overrides.task), message)
        return failed(UserError(message))
    print(outcome.out, end="", flush=True)
    print(outcome.err, end="", file=sys.stderr, flush=True)
    return outcome.returned


def _stop(ray: Any, running: list[Any]) -> None:
    """Interrupt jobs, and wait until they have saved; another Ctrl-C does not wait."""
    for job in running:
        ray.cancel(job)
    if running:
        ray.wait(running, num_returns=len(running))


def is_for_jobs(name: str) -> bool:
    """Whether a variable of the environment goes along with a job."""
    # they arrive when the job's process has imported us, which is too late for that one
    return (name.startswith("METABATCH_") and name != mkl.SWITCH) or name == "HYDRA_FULL_ERROR"


def _number(key: str, value: Any, *, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"launcher.{key}", f"is no {'whole ' * whole}number", value=value)
    if not 0 <= value < math.inf:
        raise ConfigError(f"launcher.{key}", "must be 0 or more", value=value)
    return value
