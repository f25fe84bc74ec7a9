"""A logger to MLflow: a run in a store that many trainings share."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.same_run import flatten
from metabatch_cli.report.files import write_json
from metabatch_cli.report.loggers import final_scores, read_rows, run_name, shown

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
PARAMETERS, METRICS = 100, 1000  # in a request, at most
SECONDS = 1.0  # between two requests, at least: to a database each takes longer than some steps
_SQLITE = "sqlite:///"


class MlflowLogger:
    """Metrics, parameters, test scores and figures, in the run that `mlflow/run.json` remembers.

    A training that goes on goes on in the same one. MLflow cannot delete values: what was written
    beyond the checkpoint stays, and is not written again when the training comes by: all but the
    seconds are the same. Rows that the store lacks are made up for: those from before it was
    chosen, and those of a time in which it did not answer.

    Args:
        directory: of the run.
        tracking_uri: the store; None: $MLFLOW_TRACKING_URI, else `mlflow.db` in the current
            directory, where `mlflow ui` looks, and where a sweep's runs come together.
        experiment: the name under which runs are listed.
        name: of the run; None: the last two parts of its directory.
    """

    needs = "mlflow"

    def __init__(
        self,
        directory: str | Path,
        tracking_uri: str | None = None,
        experiment: str = "metabatch",
        name: str | None = None,
    ) -> None:
        self.run = RunDirectory(directory)
        self.memory = self.run.path / "mlflow" / "run.json"
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.name = name or run_name(self.run.path)
        self.client: MlflowClient | None = None
        self.run_id = ""
        # steps, by metric, of which the store has a value or will be sent one
        self._written: dict[str, set[int]] = defaultdict(set)
        self._waiting: list[Metric] = []
        self._sent = 0.0

    def rewind(self, step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        remembered = json.loads(self.memory.read_text()) if self.memory.exists() else {}
        uri = _absolute(self.tracking_uri or remembered.get("tracking_uri") or _default_store())
        with _alone_with(uri):
            client = MlflowClient(tracking_uri=uri)
            experiment = _experiment(client, self.experiment, uri)
        known = remembered.get("tracking_uri") == uri
        found = _find(client, remembered["run_id"]) if known else None
        if found is None:
            tags = {"directory": str(self.run.path)}
            found = client.create_run(experiment, run_name=self.name, tags=tags)
        self.client, self.run_id = client, found.info.run_id
        write_json(self.memory, {"tracking_uri": uri, "run_id": self.run_id})
        client.update_run(self.run_id, status="RUNNING")
        self._log_parameters(found.data.params)
        client.log_artifact(self.run_id, str(self.run.config_file))
        for name in found.data.metrics:
            history = client.get_metric_history(self.run_id, name)
            self._written[name] = {value.step for value in history}
        self._catch_up()

    def log(self, row: dict[str, Any]) -> None:
        self._add(shown(row), row["step"])
        if time.monotonic() - self._sent >= SECONDS:
            self._send()

    def close(self) -> None:
        if self.client is None:  # it never came to begin
            return
        self._catch_up()
        result = self.run.read_result()
        self._add(final_scores(result), result["step"])
        self._send()
        status = STATUS.get(result.get("status", ""), "FAILED")
        self.client.set_terminated(self.run_id, status)
        for file in sorted(self.run.figures.glob("*.png")):
            self.client.log_artifact(self.run_id, str(file), "figures")

    def _catch_up(self) -> None:
        for row in read_rows(self.run.metrics_file):
            self._add(shown(row), row["step"])
        self._send()

    def _add(self, values: dict[str, float], step: int) -> None:
        """Have that sent of which there is nothing yet."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in values.items():
            steps = self._written[_legal(name)]
            if step not in steps:
                self._waiting.append(Metric(_legal(name), value, now, step))
                steps.add(step)

    def _send(self) -> None:
        assert self.client is not None
        while self._waiting:
            self.client.log_batch(self.run_id, metrics=self._waiting[:METRICS])
            del self._waiting[:METRICS]
        self._sent = time.monotonic()

    def _log_parameters(self, known: dict[str, str]) -> None:
        """The configuration; what the store has stays, as it cannot be changed there."""
        from mlflow.entities import Param

        assert self.client is not None
        settings = flatten(self.run.read_config())
        new = [
            Param(_legal(key), str(value))
            for key, value in settings.items()
            if _legal(key) not in known
        ]
        for start in range(0, len(new), PARAMETERS):
            self.client.log_batch(self.run_id, params=new[start : start + PARAMETERS])


def _default_store() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"


def _absolute(uri: str) -> str:
    """The same store, resumed from wherever."""
    if not uri.startswith(_SQLITE):
        return uri
    return _SQLITE + os.path.abspath(uri.removeprefix(_SQLITE))


def _artifacts(uri: str) -> Path | None:
    """The folder for files beside a database file; None for other stores, which have their own."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts"


@contextmanager
def _alone_with(uri: str) -> Iterator[None]:
    """While no other job of a sweep makes the same tables: MLflow lets them collide."""
    folder = _artifacts(uri)
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _find(client: MlflowClient, run_id: str) -> Run | None:
    """A run of the store, unless somebody deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of the experiment of that name, made if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    folder = _artifacts(uri)
    try:
        return client.create_experiment(name, None if folder is None else str(folder))
    except MlflowException:  # another job of a sweep may have been faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def _legal(name: str) -> str:
    """`test/accuracy@ways=5,shots=1` without what MLflow allows in no name."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", " ").replace("=", ":").replace(",", " "))
