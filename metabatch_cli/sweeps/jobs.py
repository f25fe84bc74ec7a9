"""A sweep's jobs: what their directories are called, which are there already, which never began.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from metabatch_cli.engine.run_directory import RunDirectory

LONGEST = 180  # characters of a name; file systems allow 255 bytes

# overrides that say how and where jobs run, not what they are
_ELSEWHERE = ("fresh", "launcher", "logger", "hydra")

Identity = frozenset[str]


def identity(overrides: Iterable[str]) -> Identity:
    """What makes a job the same as another one: what was typed, in whatever order."""
    return frozenset(word.lstrip("+") for word in overrides if not _is_elsewhere(word))


def job_names(jobs: Sequence[Sequence[str]], known: dict[Identity, str]) -> list[str]:
    """The directory of each job: where it is already, else `model.width=8,seed=0`, what it has
    for itself, with more behind it if that is another job's.

    Args:
        jobs: the overrides of each, the same keys in the same order.
        known: the names of jobs that are there.
    """
    in_common = frozenset.intersection(*map(identity, jobs)) if jobs else frozenset()
    named, taken = dict(known), set(known.values())
    for job in jobs:
        if (who := identity(job)) in named:
            continue
        own = [word.lstrip("+") for word in job if word.lstrip("+") in who - in_common]
        name = _as_file_name(",".join(own))
        named[who] = f"{name}-{_hash(','.join(sorted(who)))}" if name in taken else name
        taken.add(named[who])
    return [named[identity(job)] for job in jobs]


def known_jobs(directory: Path) -> dict[Identity, str]:
    """The jobs that a sweep's directory holds, and the names of theirs."""
    found = {}
    for file in sorted(directory.glob("*/overrides.yaml")):
        words = yaml.safe_load(file.read_text())
        if isinstance(words, list):
            found[identity(map(str, words))] = file.parent.name
    return found


def record_failure(directory: Path, overrides: Iterable[str], message: str) -> None:
    """Leave a word of a job that failed before its run began; a run that is there stays."""
    run = RunDirectory(directory)
    if not run.holds_run:
        run.write_overrides(overrides)
        run.write_result(status="failed", step=0, seconds=0.0, error=message, metrics={})


def record_loss(directory: Path, overrides: Iterable[str], message: str) -> None:
    """Leave a word of a job whose process could not."""
    run = RunDirectory(directory)
    if run.read_result().get("status") == "running":
        run.write_result(status="failed", error=message)
    else:
        record_failure(directory, overrides, message)


def _as_file_name(text: str) -> str:
    name = re.sub(r"[^\w.=,+-]", "_", text) or "job"
    if len(name) <= LONGEST and name in (text, "job"):
        return name
    return f"{name[: LONGEST - 13]}-{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _is_elsewhere(word: str) -> bool:
    return re.split(r"[./@=]", word.lstrip("+~"), maxsplit=1)[0] in _ELSEWHERE
