"""Whether the owner has said yes to a federation: by its fingerprint in the policy, or when asked.

A yes is remembered in the state folder, so that a restart does not ask again; it covers that one document and dataset.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import yaml

from client.account.policy import Policy
from common.document.federation import Federation
from common.errors import LedgerError, Refusal
from common.text import shown_lines


def check_approval(policy: Policy, federation: Federation, record: Path) -> None:
    """Raises `Refusal` unless the policy, or the owner at some earlier time, approves this very document."""
    if policy.approved == "any-within-policy":
        return
    if policy.approved == "ask":
        if not is_remembered(federation, record):
            raise Refusal(
                f"policy.approved is ask, and the owner has not said yes to federation {federation.fingerprint}"
            )
    elif federation.fingerprint not in policy.approved:
        raise Refusal(
            f"policy.approved: federation {federation.fingerprint} is not among the {len(policy.approved)} "
            "approved fingerprints; compare the document with `cloister check` and add it, or leave"
        )


def is_remembered(federation: Federation, record: Path) -> bool:
    """Did the owner say yes to this document before? Raises `LedgerError` if the record cannot be read."""
    try:
        lines = record.read_text(encoding="utf-8").splitlines()
        return federation.fingerprint in {json.loads(line)["fingerprint"] for line in lines}
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LedgerError(
            f"{record}: cannot be read; remove it, and you are asked again ({type(error).__name__})"
        ) from error


def remember(federation: Federation, record: Path) -> None:
    """Notes that the owner said yes. Raises `LedgerError` if it cannot be written."""
    entry = {"fingerprint": federation.fingerprint, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise LedgerError(f"{record}: your yes cannot be written down: {error.strerror}") from error


def question(federation: Federation) -> str:
    """The whole document and its fingerprint, for the owner to say yes or no to."""
    document = yaml.safe_dump(json.loads(federation.canonical), sort_keys=False, allow_unicode=True)
    document = shown_lines(document)
    return f"{document}fingerprint: {federation.fingerprint}\nTake part in this federation? [yes/no] "
