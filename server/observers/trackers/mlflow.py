"""A run as a run of MLflow, in the experiment of its federation's name: on a tracking server or in a store.

By the client of mlflow-skinny, which names neither user, nor script, nor commit, as MLflow's own `start_run` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from common.errors import ConnectionFailed
from common.text import shown
from server.observers.trackers.tracker import COMPLETE, Param
from server.rounds.events import Status

# Read at each request. A server that is away may keep a round waiting once, but not for MLflow's usual minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # or it refuses file:, the store that needs no database
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # which is the verb's

from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.entities import Param as MlflowParam
from mlflow.exceptions import MlflowException

RUN, STATUS = "cloister.run", "cloister.status"  # tags
MOST_PARAMS, MOST_METRICS = 100, 1000  # in one request
LONGEST_VALUE = 6000  # characters of a param
ENDS: dict[Status, str] = {
    "completed": "FINISHED",
    "budget_exhausted": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}


class MlflowRun:
    """A run by the tag of its name: each time that it is opened, the same one goes on."""

    def __init__(self, uri: str | None, *, experiment: str, run: str, began: float) -> None:
        """`uri` is by default what MLFLOW_TRACKING_URI says. `began` is in seconds since 1970."""
        self.place = f"run {run} of experiment {experiment}"
        with self._asking():
            self._client = MlflowClient(tracking_uri=uri)
            self.place += f" at {_without_password(self._client.tracking_uri)}"
            found = self._found(experiment, run)
            self._is_new = found is None
            if found is None:
                there, tags = self._experiment(experiment), {RUN: run}
                found = self._client.create_run(there, start_time=_ms(began), run_name=run, tags=tags)
            else:
                self._client.update_run(found.info.run_id, status="RUNNING")
        self._id = found.info.run_id
        self.done = int(found.data.metrics.get(COMPLETE, 0))

    def params(self, told: Mapping[str, Param], *, time: float) -> None:
        if self._is_new:  # MLflow takes no other value for one, as when a run is given more rounds
            params = [MlflowParam(name, str(value)[:LONGEST_VALUE]) for name, value in told.items()]
            with self._asking():
                for i in range(0, len(params), MOST_PARAMS):
                    self._client.log_batch(self._id, params=params[i : i + MOST_PARAMS])

    def scalars(self, told: Mapping[str, float], *, step: int, time: float) -> None:
        # The mark that a round is there comes last: one of which a part is missing is written again.
        names = sorted(told, key=lambda name: name == COMPLETE)
        metrics = [Metric(name, told[name], _ms(time), step) for name in names]
        with self._asking():
            for i in range(0, len(metrics), MOST_METRICS):
                self._client.log_batch(self._id, metrics=metrics[i : i + MOST_METRICS])

    def close(self, status: Status, *, time: float) -> None:
        with self._asking():
            self._client.set_tag(self._id, STATUS, status)
            self._client.set_terminated(self._id, ENDS[status], end_time=_ms(time))

    def _experiment(self, name: str) -> str:
        """The id of an experiment, made if it is not there."""
        there = self._client.get_experiment_by_name(name)
        made: str = there.experiment_id if there is not None else self._client.create_experiment(name)
        return made

    def _found(self, experiment: str, run: str) -> Run | None:
        there = self._client.get_experiment_by_name(experiment)
        if there is None:
            return None
        runs = self._client.search_runs([there.experiment_id], f"tags.`{RUN}` = '{run}'", max_results=1)
        return runs[0] if runs else None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, OSError) as error:  # those of requests are OSErrors
            said = _without_password(str(error)).split("\n")[0]
            raise ConnectionFailed(f"{self.place}: cannot be tracked: {shown(said)}") from error


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _without_password(text: str) -> str:
    """Text without the user and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", text)
