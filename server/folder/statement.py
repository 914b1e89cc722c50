"""The privacy statement of a run: what was released about whom, and what that costs.

Written so that a data protection officer can read it and an expert can recompute every figure from it alone.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from common.document.federation import RowPrivacy
from common.privacy.claims import row_claims
from server.rounds.run import Run

PACKAGES = ("cloister", "opacus", "torch", "flwr", "numpy")


def statement(run: Run) -> dict[str, Any]:
    """What privacy.json holds."""
    row = run.federation.privacy.row
    return {
        "federation": run.federation.fingerprint,
        "run": run.name,
        "row": None if row is None else _row(run, row),
        "client": None if run.client_privacy is None else run.client_privacy.statement(),
        **({"start": dict(run.start)} if run.start else {}),
        "software": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def for_clients(statement: Mapping[str, Any]) -> dict[str, Any]:
    """What privacy.json holds, as each client may have it: what the others stated is theirs, and left out."""
    row = statement.get("row")
    if not isinstance(row, Mapping):
        return dict(statement)
    withheld = row.get("withheld") or "each client's own figures are the client's to tell"
    return {**statement, "row": {**row, "per_client": {}, "withheld": withheld}}


def row_epsilon(run: Run) -> float | None:
    """What a run has cost a row, at most: all that its clients had planned. How much of that was used, when a run
    stopped and which rounds were tried again, may have followed from its results, and the figure of what was used holds
    for a number fixed beforehand."""
    if run.disclosure.hides_cohorts:
        return run.epsilon
    return max((s.planned_epsilon for s in run.progress.statements.values()), default=None)


def _row(run: Run, row: RowPrivacy) -> dict[str, Any]:
    if run.disclosure.hides_cohorts:
        withheld = (
            "how often a client was asked is what privacy.client's sampling keeps secret; the epsilon above is "
            "that of a whole plan, and each client's own ledger has its figures"
        )
        return row_claims(row, epsilon=row_epsilon(run), per_client={}, withheld=withheld)
    described = {name: s.describe(clip=row.clip) for name, s in sorted(run.progress.statements.items())}
    return row_claims(row, epsilon=row_epsilon(run), per_client=described)
