"""What differential privacy of rows claims, in words: of whom, against whom, and what it does not cover.

It stands in a run folder's privacy.json, and beside the model that a client keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.document.federation import RowPrivacy


def row_claims(
    row: RowPrivacy, *, epsilon: float | None, per_client: Mapping[str, Mapping[str, Any]], withheld: str = ""
) -> dict[str, Any]:
    """The claims, as JSON values.

    Args:
        epsilon: what a row pays, at most; None where nobody has stated anything yet.
        per_client: each client's releases (`Statement.describe`).
        withheld: why clients are missing there.
    """
    claims: dict[str, Any] = {
        "epsilon": epsilon,
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
        "per_client": {name: dict(described) for name, described in per_client.items()},
    }
    return claims | ({"withheld": withheld} if withheld else {})
