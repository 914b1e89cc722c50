"""The privacy statement of a run: what was released about whom, and what that costs.

Written so that a data protection officer can read it and an expert can recompute every figure from it alone.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from common.document.federation import RowPrivacy
from server.rounds.admission import Statement
from server.rounds.client_privacy import FROM_SEED, FROM_SYSTEM
from server.rounds.run import Run

EXACT = "exact: sums and their noise are whole numbers, so no rounding tells more than is accounted for"
FLOATING = (
    "floating point (Opacus): the figures hold for real numbers, and how floats are rounded can tell more about a row"
)

PACKAGES = ("cloister", "opacus", "torch", "flwr", "numpy")


def statement(run: Run) -> dict[str, Any]:
    """What privacy.json holds."""
    row = run.federation.privacy.row
    return {
        "federation": run.federation.fingerprint,
        "run": run.name,
        "row": None if row is None else _row(run, row),
        "client": None if run.central is None else run.central.statement(),
        "software": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def row_epsilon(run: Run) -> float | None:
    """What a run has cost a row, at most: all that its clients had planned. How much of that was used, when a run
    stopped and which rounds were tried again, may have followed from its results, and the figure of what was used holds
    for a number fixed beforehand."""
    if run.disclosure.hides_cohorts:
        return run.epsilon
    return max(
        (s.get("planned_epsilon", s.get("epsilon", 0.0)) for s in run.progress.statements.values()), default=None
    )


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
    return {"per_client": {name: _client(s, row) for name, s in sorted(run.progress.statements.items())}}


def _client(stated: Statement, row: RowPrivacy) -> dict[str, Any]:
    updates = {
        "what": "model updates: noisy sums of clipped row gradients",
        "mechanism": "Gaussian",
        "part": "train",
        "noise_multiplier": stated.get("noise_multiplier"),
        "clip": row.clip,
        "sampler": "Poisson",
        "sampling_rate": stated.get("sampling_rate"),
        "steps": stated.get("steps"),
    }
    counts = {
        "what": "noisy counts of right and wrong predictions",
        "mechanism": "Gaussian",
        "part": "validation",
        "noise_multiplier": stated.get("evaluation_noise"),
        "sampler": "no",
        "sampling_rate": 1.0,
        "steps": stated.get("evaluations"),
    }
    size = {
        "what": "how many training rows there are, about",
        "mechanism": "two-sided geometric",
        "part": "train",
        "epsilon": stated.get("count_epsilon"),
        "told": stated.get("rows"),
    }
    return {
        "epsilon": stated.get("epsilon"),
        "planned_epsilon": stated.get("planned_epsilon"),
        "opacus_planned_epsilon": stated.get("opacus_planned_epsilon"),  # None from a client of before it was told
        "opacus_accountant": None if "opacus_prv" not in stated else "PRV" if stated["opacus_prv"] else "RDP",
        "delta": stated.get("delta"),
        "arithmetic": EXACT if stated.get("exact_arithmetic") else FLOATING,  # clients of before did not say
        "noise": (FROM_SYSTEM if stated.get("secure_noise") else FROM_SEED) + ", drawn by the client",
        "released": [
            *([size] if stated.get("count_epsilon") else []),
            updates,
            *([counts] if stated.get("evaluation_noise") else []),
        ],
    }
