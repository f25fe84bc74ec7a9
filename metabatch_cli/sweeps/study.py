"""A study: trainings one after the other, each with values that those before it suggest.

Its trials are remembered in one file, which several processes share. A trial is a run in a
directory of its own; one that was cut short is taken up again by whoever comes first.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from metabatch_cli.engine.stop import Stopped
from metabatch_cli.learners.learner import Metric
from metabatch_cli.report.loggers import read_rows

DIRECTORY, WHY, PUT_OFF = "directory", "why", "put off"  # what trials remember beside values

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Attempt:
    """A trial that this process is to train.

    Attributes:
        directory: of its run, which may have begun.
        values: by key.
        claim: an open file; while it is locked, the trial is this process's.
    """

    trial: optuna.Trial
    directory: Path
    values: Mapping[str, Any]
    claim: IO[str]


class Study:
    """The trials of a directory: `study.journal`, and `trials/` with a run for each.

    Args:
        directory: of the study; made where it is not there.
        space: by key.
        metric: what is optimised, a validation score.
        n_trials: in all.
        sampler: Optuna's, from a seed; a new one for every trial, so that neither processes beside
            each other nor those that come later try the same again.
        pruner: Optuna's.
    """

    def __init__(
        self,
        directory: Path,
        space: Mapping[str, BaseDistribution],
        metric: Metric,
        n_trials: int,
        sampler: Callable[[int], optuna.samplers.BaseSampler],
        pruner: optuna.pruners.BasePruner,
    ) -> None:
        self.directory, self.space = directory, dict(space)
        self.metric, self.n_trials, self._sampler = metric, n_trials, sampler
        self.runs = directory / "trials"
        self.runs.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(directory / "study.journal"))),
                study_name="metabatch",
                direction="maximize" if metric.higher_is_better else "minimize",
                pruner=pruner,
                load_if_exists=True,
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those that count: begun, and not put off."""
        found = self._study.get_trials(deepcopy=False)
        return [t for t in found if t.state != TrialState.WAITING and PUT_OFF not in t.user_attrs]

    @property
    def best(self) -> FrozenTrial | None:
        """The completed trial with the best score."""
        sign = 1 if self.metric.higher_is_better else -1
        completed = [t for t in self.trials if t.state == TrialState.COMPLETE]
        return max(completed, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def try_first(self, values: Mapping[str, Any]) -> None:
        """Begin a new study with these values, if they are in the space."""
        with self._alone():
            new = not self._study.get_trials(deepcopy=False)
            if new and all(_contains(self.space[key], value) for key, value in values.items()):
                self._study.enqueue_trial(dict(values))

    def next(self) -> Attempt | None:
        """A trial that was cut short, or a new one; None once there are enough."""
        with self._alone():
            self._put_off_what_was_cut_short()
            if len(self.trials) >= self.n_trials:
                return None
            self._study.sampler = self._sampler(len(self._study.get_trials(deepcopy=False)))
            trial = self._study.ask(self.space)
            name = trial.user_attrs.get(DIRECTORY, f"{trial.number:04}")
            trial.set_user_attr(DIRECTORY, name)
            claim = self._claimed(name)
            assert claim is not None
        values = {key: trial.params[key] for key in self.space}
        return Attempt(trial, self.runs / name, values, claim)

    def tell(self, attempt: Attempt, score: float | None, why: str | None = None) -> None:
        """What came of a trial: a score, or none, and why."""
        self._end(attempt, TrialState.FAIL if score is None else TrialState.COMPLETE, score, why)

    def prune(self, attempt: Attempt, why: str) -> None:
        """A trial was ended early, because it did badly."""
        self._end(attempt, TrialState.PRUNED, None, why)

    def _end(
        self, attempt: Attempt, state: TrialState, score: float | None, why: str | None
    ) -> None:
        if why is not None:
            attempt.trial.set_user_attr(WHY, why)
        self._study.tell(attempt.trial, score, state)
        attempt.claim.close()

    def _put_off_what_was_cut_short(self) -> None:
        """Trials whose process is gone are to be tried again, where they were."""
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            name = frozen.user_attrs.get(DIRECTORY, f"{frozen.number:04}")
            claim = self._claimed(name)
            if claim is None:  # somebody is at work on it
                continue
            self._study._storage.set_trial_user_attr(frozen._trial_id, PUT_OFF, "cut short")
            self._study.tell(frozen.number, state=TrialState.FAIL)
            self._study.enqueue_trial(frozen.params, user_attrs={DIRECTORY: name})
            claim.close()

    def _claimed(self, name: str) -> IO[str] | None:
        """A trial as this process's; None if it is another's. The claim dies with its process."""
        file = (self.runs / f".{name}").open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process decides what is tried next."""
        with (self.directory / ".lock").open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield


class Pruning:
    """A logger that shows the study each validation, and ends the training when it says so."""

    def __init__(self, attempt: Attempt, metric: Metric) -> None:
        self.attempt, self.name = attempt, f"val/{metric.name}"

    def log(self, row: dict[str, Any]) -> None:
        """Report a validation.

        Raises:
            Stopped: it is behind those of other trials.
        """
        score = row.get(self.name)
        if score is None:
            return
        self.attempt.trial.report(score, row["step"])
        if self.attempt.trial.should_prune():
            raise Stopped(f"pruned at step {row['step']:,} with {self.name} {score:.4g}")

    def rewind(self, step: int) -> None:
        """Report what a run that goes on has validated before."""
        for row in read_rows(self.attempt.directory / "metrics.jsonl"):
            if row["step"] <= step and row.get(self.name) is not None:
                self.attempt.trial.report(row[self.name], row["step"])

    def close(self) -> None:
        """Nothing is open."""


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (TypeError, ValueError):
        return False
