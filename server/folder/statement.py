"""The privacy statement of a run: what was released about whom, and what that costs.

Written so that a data protection officer can read it and an expert can recompute every figure from it alone.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from common.document.federation import RowPrivacy
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
        "software": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def row_epsilon(run: Run) -> float | None:
    """What a run has cost a row, at most: all that its clients had planned. How much of that was used, when a run
    stopped and which rounds were tried again, may have followed from its results, and the figure of what was used holds
    for a number fixed beforehand."""
    if run.disclosure.hides_cohorts:
        return run.epsilon
    return max((s.planned_epsilon for s in run.progress.statements.values()), default=None)


def _row(run: Run, row: RowPrivacy) -> dict[str, Any]:
    return {
        "epsilon": row_epsilon(run),
        "delta": row.delta,
        "unit": "one row of one client's table",
        "neighbours": "tables that differ by adding or removing that row",
        "adversary": "sees every message of every client and every model, and may be the server",
        "accountant": (
            "PLD (privacy loss distributions, composed numerically); the row count's epsilon is added to the updates'"
        ),
        "composition": (
            "while a client's table stays as it is, each row is either in its training part or in its validation part, "
            "so it pays the larger of the two parts' costs; once the table has changed, their sum, unless its owner "
            "has rows dealt by whom they are about"
        ),
        "whole_model": (
            "a row is at one client, so the model, and all else that left, costs it what its own client's releases "
            "cost; the largest of these is the epsilon above"
        ),
        "not_covered": [
            "that a client takes part, when, and how long it takes",
            "what a row's owner has told elsewhere, and rows that are copies of it at other clients",
            "a refusal: that a table's columns do not fit the schema (a few times in all: each client's policy says "
            "how many), that the row count it told is above 1 / delta, or that a budget is spent",
            "other runs: each client's own ledger adds them up",
        ],
        **_per_client(run, row),
    }


def _per_client(run: Run, row: RowPrivacy) -> dict[str, Any]:
    if run.disclosure.hides_cohorts:
        return {
            "per_client": {},
            "withheld": (
                "how often a client was asked is what privacy.client's sampling keeps secret; the epsilon above is "
                "that of a whole plan, and each client's own ledger has its figures"
            ),
        }
    return {"per_client": {name: s.describe(clip=row.clip) for name, s in sorted(run.progress.statements.items())}}
