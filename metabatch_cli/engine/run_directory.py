"""A run's directory: its files, whole at any moment, and the lock that keeps others out."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from metabatch_cli.config.errors import UserError, nearest
from metabatch_cli.report.files import sweep, write_json, write_text

_held: set[Path] = set()  # a process's own locks never keep itself out, so we remember them
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # where libyaml is: ten times as fast

# C's `struct flock`, by which one asks for a lock without taking it; BSD and macOS have its type
# and `whence` last
_LOCK = "hhqqi" if sys.platform.startswith("linux") else "qqihh"
_TYPE_OF_LOCK = 0 if sys.platform.startswith("linux") else 3


def no_such_directory(path: str | os.PathLike[str], key: str) -> UserError:
    """What to say of a directory that is not there; names the nearest beside it."""
    wanted = Path(path).absolute()
    parent = wanted.parent
    beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = nearest(wanted.name, beside)
    hint = f"\n  did you mean {parent / near}?" if near else ""
    return UserError(f"{key}={path}: there is no such directory{hint}")


class RunDirectory:
    """The files of one run.

    Args:
        path: the directory; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.config_file = self.path / "config.yaml"
        self.overrides_file = self.path / "overrides.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.result_file = self.path / "result.json"
        self.log_file = self.path / "train.log"
        self.last_checkpoint = self.path / "checkpoints" / "last.pt"
        self.best_checkpoint = self.path / "checkpoints" / "best.pt"
        self.figures = self.path / "figures"
        self.evaluations = self.path / "evaluations"
        self.profile_file = self.path / "profile.json"

    @classmethod
    def existing(cls, path: str | os.PathLike[str], key: str = "run") -> RunDirectory:
        """The directory of a run that is there.

        Raises:
            UserError: it is not there, or holds no run; names runs beside it.
        """
        run = cls(path)
        if run.config_file.is_file():
            return run
        if not run.path.is_dir():
            raise no_such_directory(path, key)
        # a few levels, as sweeps and dated folders have: not a walk through somebody's disk
        below = (f for depth in range(1, 4) for f in run.path.glob("*/" * depth + "result.json"))
        runs = [file.parent for file in below if (file.parent / "config.yaml").is_file()]
        hint = "".join(f"\n  a run in it: {directory}" for directory in sorted(runs)[-3:])
        raise UserError(f"{key}={path}: is no run: it holds no config.yaml{hint}")

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return self.config_file.is_file()

    @property
    def in_use(self) -> bool:
        """Whether a process is at work here: this one or, by its lock, another."""
        if self.path.resolve() in _held:
            return True
        try:
            with (self.path / ".lock").open("rb") as file:
                answer = fcntl.fcntl(file, fcntl.F_GETLK, _pack_lock(fcntl.F_WRLCK))
        except OSError:  # there is none, or a file system without locks
            return False
        return _type_of_lock(answer) != fcntl.F_UNLCK

    def read_config(self) -> dict[str, Any]:
        """The run's resolved configuration."""
        try:
            config = yaml.load(self.config_file.read_text(), _YAML)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config_file}: is no valid configuration: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.config_file}: is no configuration")
        return config

    def write_config(self, config: Mapping[str, Any], overrides: list[str] | None = None) -> None:
        """Write the resolved configuration, and what was typed to get it."""
        write_text(self.config_file, yaml.safe_dump(dict(config), sort_keys=False, width=100))
        if overrides is not None:
            self.write_overrides(overrides)

    def write_overrides(self, overrides: Iterable[str]) -> None:
        """Write what was typed."""
        write_text(self.overrides_file, yaml.safe_dump(list(overrides)))

    def read_result(self) -> dict[str, Any]:
        """`result.json`; empty where there is none yet."""
        try:
            return json.loads(self.result_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    @property
    def status(self) -> str:
        """What `result.json` says of the run."""
        return self.read_result().get("status", "not begun")

    def write_result(self, **entries: Any) -> dict[str, Any]:
        """Update `result.json`; returns it whole."""
        result = {**self.read_result(), **entries}
        write_json(self.result_file, result)
        return result

    def clear(self) -> None:
        """Delete the run that is here, and nothing else; without a run here, nothing."""
        if not self.holds_run:
            return
        for name in ("tensorboard", "mlflow", "wandb"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for file in (
            self.last_checkpoint,
            self.best_checkpoint,
            *self.figures.glob("*.png"),
            *self.evaluations.glob("*.json"),
            self.evaluations / "multirun.yaml",
            self.overrides_file,
            self.metrics_file,
            self.metrics_file.with_suffix(".csv"),
            self.result_file,
            self.log_file,
            self.profile_file,
            self.config_file,  # the last: what is left by a kill is still a run
        ):
            file.unlink(missing_ok=True)
        for folder in (self.last_checkpoint.parent, self.figures, self.evaluations):
            with suppress(OSError):  # it is not there, or has something else in it
                folder.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out; the lock dies with this process, however it dies.

        Raises:
            UserError: somebody else is at work here.
        """
        place = self.path.resolve()
        if place in _held:  # another file on it, closed again, would give the lock away
            raise UserError(f"{self.path}: is in use by this process")
        self.path.mkdir(parents=True, exist_ok=True)
        # a POSIX record lock: workers do not inherit it, so that after a SIGKILL of this process
        # the run can be resumed at once, and it works on NFS
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(f"{self.path}: is in use by {owner}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            _held.add(place)
            for folder in (self.path, self.last_checkpoint.parent, self.figures, self.evaluations):
                sweep(folder)
            try:
                yield
            finally:
                _held.discard(place)


def _pack_lock(kind: int) -> bytes:
    """A `struct flock` of the whole file."""
    fields = [0, 0, 0, 0, 0]
    fields[_TYPE_OF_LOCK] = kind
    return struct.pack(_LOCK, *fields)


def _type_of_lock(answer: bytes) -> int:
    return struct.unpack(_LOCK, answer)[_TYPE_OF_LOCK]
