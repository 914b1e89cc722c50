"""Run folders that tests draw: written as a run writes them, so that any run can be told in a few lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.document.federation import Federation
from common.model.scores import scores_of
from common.privacy.claims import row_claims
from common.privacy.statement import Statement
from server.folder.folder import RunFolder, RunRecord, read_run
from server.rounds.events import Ended, Event, Refused, Rejected, RoundEnded, Started
from tests.support import PRIVATE, federation, stated


def rounds(
    document: Federation,
    *,
    count: int = 3,
    members: Sequence[str] = ("ada", "ben"),
    named: bool = True,
    noise: float = 0.0,
) -> list[RoundEnded]:
    """Rounds that get better and better."""
    private = document.privacy.row is not None
    told = []
    for number in range(1, count + 1):
        good = 40 + 50 * number / count
        scores = scores_of(np.array([good, 100 - good, 10.0, 90.0]), document.data_schema)
        if noise:
            scores["count_noise"] = noise
        if named:
            scores["per_client"] = {name: {"accuracy": 0.5 + 0.1 * i} for i, name in enumerate(members)}
        else:
            scores["spread"] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
        told.append(
            RoundEnded(
                round=number,
                rounds=count,
                waiting=0.5,
                clients=len(members),
                asked=len(members) + 1,
                members=tuple(members) if named else (),
                loss=None if private else 1 / number,
                rejected=(Rejected("cyd", "late", "no reply within 30 s"),) if number == 2 else (),
                seconds=2.0,
                times={"clients": 1.0, "transfer": 0.2, "aggregation": 0.3, "evaluation": 0.5},
                evaluation=scores,
                privacy={"row": {"epsilon": 0.5 * number}} if private else {},
                time=1e9 + number,
            )
        )
    return told


def written(path: Path, document: Federation, events: Sequence[Event], **result: Any) -> RunRecord:
    """The folder of a run with these events; with `result`, one that has ended."""
    folder = RunFolder.create(document, path=path)
    (path / "events.jsonl").touch()
    for event in events:
        folder.record(event)
    row = document.privacy.row
    if row is not None:
        took_part = ("ada", "ben") if any(isinstance(event, RoundEnded) for event in events) else ()
        ours = {name: Statement.from_wire(stated()).describe(clip=1.0) for name in took_part}
        claims = row_claims(row, epsilon=3.0, per_client=ours)
        software = {"python": "3.11.7", "cloister": "0.1.0"}
        folder.write_json(
            "privacy.json", {"run": "r", "federation": "f", "row": claims, "client": None, "software": software}
        )
    if result:
        folder.write_json("result.json", result)
    return read_run(path)


def completed(path: Path, *, changes: dict[str, Any] | None = None, **how: Any) -> RunRecord:
    """A private run that has ended well, unless `changes` say otherwise."""
    document = federation(**(PRIVATE if changes is None else changes))
    made = rounds(document, **{"noise": 5.0 if document.privacy.row else 0.0, **how})
    events = [
        Started(run="small-1", federation=document.fingerprint, rounds=len(made), time=1e9),
        Refused(client="dan", kind="refused", reason="policy.delta: asked 0.001, allowed 0.0001", time=1e9),
        *made,
        Ended(status="completed", time=2e9),
    ]
    held_out = {**scores_of(np.array([45.0, 5.0, 10.0, 40.0]), document.data_schema)}
    return written(path, document, events, status="completed", seconds=75.0, clients=["ada", "ben"], held_out=held_out)


def explained(path: Path) -> None:
    """What `cloister explain` leaves in a run's folder."""
    columns = [
        {"column": "a", "worse": 0.2, "spread": 0.01, "attribution": 0.3},
        {"column": "b", "worse": 0.1, "spread": 0.02, "attribution": 0.2},
    ]
    told = {"rows": 100, "metric": "accuracy", "baseline": 0.9, "of": "", "columns": columns, "row": None}
    (path / "explanation.json").write_text(json.dumps(told))
