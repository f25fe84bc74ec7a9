"""How the processes of a training come together: torchrun started them, or the first one does.

    torchrun --nnodes 2 --nproc-per-node 4 … -m metabatch_cli train +experiment=cnp_gp \\
        loader.shards=8 hydra.run.dir=DIR
    metabatch train +experiment=cnp_gp trainer.processes=4 loader.shards=4
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from metabatch_cli import mkl
from metabatch_cli.batching.auto import RANKS_HERE
from metabatch_cli.config.beside import heed_end_of_parent, is_under_torchrun
from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.ranks import Group, RankLost, Ranks, refuse_other_group

_PATIENCE = 20.0  # seconds for processes to end by themselves
_SIOCGIFADDR = 0x8915  # of ioctl(2): <linux/sockios.h>
_INTERFACE = "GLOO_SOCKET_IFNAME"
_FOLLOWER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # of Slurm to all processes; the parent heeds it
sys.path[:] = json.loads(sys.argv[1])
from metabatch_cli.engine.together import follow_parent
follow_parent(int(sys.argv[2]))
"""


@contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """The group that this process was started in; alone, where there is none.

    A rank other than zero that has only lost the others ends with exit code 1, without a word:
    rank zero tells what happened.

    Args:
        timeout: seconds that the processes wait for each other.
    """
    if not is_under_torchrun():
        yield Ranks()
        return
    refuse_other_group()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        heed_end_of_parent(signal.SIGTERM)  # a torchrun that is killed leaves its processes
    with _reachable(os.environ["MASTER_ADDR"]):
        place = _meeting_place(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        attempt = ""
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # several hosts may count otherwise
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        store = _room(place.store, next(place.trainings), attempt)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if store.check([f"joined/{rank}"]):
            raise UserError(
                "torchrun's store still has the words of an earlier attempt, which would be taken "
                "for those of this one\n  set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all hosts"
            )
        store.set(f"joined/{rank}", "")
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        with _closed(Group(store, rank, size, local_rank, timeout)) as group:
            yield group


def _room(store: dist.Store, training: int, attempt: str = "") -> dist.Store:
    """The part of a store that is of one training, and one attempt at it: torchrun keeps its store
    when it starts processes again."""
    return dist.PrefixStore(f"training {training} {attempt}", store)


class _Place(NamedTuple):
    """Where processes meet."""

    store: dist.Store
    trainings: Iterator[int]
    """Counts those of this process; the others count the same."""


@functools.cache
def _meeting_place(address: str, port: str) -> _Place:
    """What torchrun's processes all reach, for as long as they live."""
    store, _, _ = next(rendezvous("env://"))
    return _Place(store, itertools.count())


@contextmanager
def started(processes: int, timeout: float) -> Iterator[Ranks]:
    """A group of this process, its rank zero, and others on this machine that follow it.

    They end with the block, and with this process however that ends.

    Args:
        processes: how many, this one included.
        timeout: seconds that they wait for each other.
    """
    refuse_other_group()
    here = socket.create_server(("127.0.0.1", 0))  # the store's own would listen to everybody
    port = here.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
        master_listen_fd=here.detach(),
    )
    ours = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        RANKS_HERE: str(processes),
    }
    command = [sys.executable, "-c", _FOLLOWER, json.dumps(sys.path), str(os.getpid())]
    followers: dict[int, subprocess.Popen[bytes]] = {}

    def what_ended() -> dict[int, str]:
        codes = {rank: follower.poll() for rank, follower in followers.items()}
        return {rank: _how(code) for rank, code in codes.items() if code is not None}

    before = os.environ.get(RANKS_HERE)
    os.environ[RANKS_HERE] = str(processes)  # of the cores each has its share
    try:
        for rank in range(1, processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "METABATCH_TIMEOUT": str(timeout)}
            with mkl.same_in_children():
                followers[rank] = subprocess.Popen(command, env=os.environ | ours | own)
        with (
            _reachable("127.0.0.1"),
            _closed(Group(_room(store, 0), 0, processes, 0, timeout, what_ended)) as group,
        ):
            try:
                yield group
            except KeyboardInterrupt:  # nobody wants to wait, and a hung one would be waited for
                for follower in followers.values():
                    follower.kill()
                raise
    finally:
        _end(followers.values())
        os.environ.pop(RANKS_HERE)
        if before is not None:
            os.environ[RANKS_HERE] = before


def follow_parent(parent: int) -> None:
    """A process that `started` starts: it does as rank zero says, and ends when that one does."""
    heed_end_of_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        sys.exit(1)
    from metabatch_cli.engine.run import follow

    try:
        with joined(float(os.environ["METABATCH_TIMEOUT"])) as ranks:
            follow(ranks)
    except (Exception, KeyboardInterrupt):
        if "METABATCH_DEBUG" in os.environ:
            raise
        sys.exit(1)  # the parent tells


@contextmanager
def _closed(group: Group) -> Iterator[Group]:
    """Meanwhile; how it ends, the others learn."""
    try:
        yield group
    except BaseException as error:
        group.failed(error)
        if isinstance(error, RankLost) and not group.leads and group.leader_is_there:
            raise SystemExit(1) from error
        raise
    finally:
        group.close()


@contextmanager
def _reachable(leader: str) -> Iterator[None]:
    """Meanwhile gloo listens where rank zero's machine is reached from, unless it is told where.

    By itself it takes the interface of what the host name stands for, which often is none that
    others can reach.
    """
    interface = None if _INTERFACE in os.environ else _interface_towards(leader)
    if interface is None:
        yield
        return
    os.environ[_INTERFACE] = interface
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _interface_towards(host: str) -> str | None:
    """The network interface by which a host is reached; None where that cannot be told."""
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
        if own.startswith("127."):
            return "lo" if sys.platform.startswith("linux") else "lo0"
        for _, name in socket.if_nameindex() if sys.platform.startswith("linux") else []:
            with suppress(OSError):
                question = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, question)
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None


def _how(code: int) -> str:
    """How a process ended, from its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _end(followers: Collection[subprocess.Popen[bytes]]) -> None:
    """Wait for processes that should end by themselves; then see to it."""
    for end, patience in (("poll", _PATIENCE), ("terminate", 5.0), ("kill", 5.0)):
        left = [follower for follower in followers if follower.poll() is None]
        for follower in left:
            getattr(follower, end)()
        until = time.monotonic() + patience
        for follower in left:
            with suppress(subprocess.TimeoutExpired):
                follower.wait(max(until - time.monotonic(), 0.0))
