"""`cloister track`: a run in TensorBoard or MLflow, beside others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click import Choice

from cloister.verbs import app, verb

if TYPE_CHECKING:
    from server.observers.trackers.tracking import Kind

NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}  # the package of each, in the extra of that name


@app.command()
@verb
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run folder.")],
    to: Annotated[str, typer.Option(click_type=Choice(list(NEEDS)), help="Which tracker.")],
    into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For tensorboard: a folder of runs [default: the run folder].")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="For mlflow: of its server or store [default: MLFLOW_TRACKING_URI].")
    ] = None,
) -> None:
    """Write a run to TensorBoard's event files, or to MLflow. What is there already is left, what is missing is added.

    `cloister serve` and `cloister simulate` do the same as a run goes: `--track tensorboard`, `--track mlflow`.
    `tensorboard --logdir runs` then shows all runs.

    Example: `cloister track runs/heart --to tensorboard`
    """
    from common.errors import RunFolderError
    from server.folder.folder import RunFolder, read_run
    from server.observers.trackers.tracker import named
    from server.observers.trackers.tracking import FOLDER, Tracking, opener
    from server.report.facts import readable

    if (into is not None and to != "tensorboard") or (uri is not None and to != "mlflow"):
        raise typer.BadParameter("--into belongs to --to tensorboard, and --uri to --to mlflow")
    (kind,) = usable([to], uri=uri)
    record = read_run(run)
    folder = run / FOLDER if into is None else into / named(record.run)
    tracking = Tracking(record.federation, opener(kind, record.federation, folder=folder, uri=uri))
    with readable(record):
        for event in RunFolder(run).events():
            tracking(event)
    if not tracking.place:
        raise RunFolderError(f"{run}: this run has not begun: there is nothing to track")
    print(tracking.place)


def usable(kinds: Sequence[str], *, uri: str | None = None) -> list[Kind]:
    """The trackers that were asked for. Raises `ConfigError` if one is not installed, or MLflow's place is not told."""
    from cloister import models
    from common.errors import ConfigError

    for kind in kinds:
        models.needs(kind, NEEDS[kind])
        if kind == "mlflow" and not (uri or os.environ.get("MLFLOW_TRACKING_URI")):
            where = "MLFLOW_TRACKING_URI, as http://127.0.0.1:5000 of a server or file:mlruns for a folder"
            raise ConfigError([f"mlflow: say where: set {where}; `cloister track` takes it as --uri, too"])
    return list(kinds)  # type: ignore[arg-type]  # the option's choices
