"""`cloister budget`: what a dataset's account has spent, on what, and what is left. Looks, and writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from client.account.entries import Entry, Part, cost_of_run, spent
from client.account.ledger import Head, Ledger
from client.account.plan import remaining, stored
from client.account.policy import Policy
from client.settings import load_client_file
from common.errors import LedgerError
from common.privacy.plan import Plan
from common.privacy.releases import GaussianRelease

WHAT = {
    ("gaussian", "train"): "model update",
    ("gaussian", "validation"): "evaluation",
    ("geometric", "train"): "row count",
    ("none", "train"): "exact update",
    ("none", "validation"): "exact counts",
}


@dataclass(frozen=True)
class Balance:
    """A dataset's account as it stands: what was spent, on what, and what is left."""

    dataset: str
    policy: Policy
    entries: list[Entry]
    plans: dict[str, Plan]  # of the runs that had one
    head: Head
    verified: bool

    def describe(self) -> dict[str, Any]:
        """All there is to say, as plain values: what `cloister budget --json` prints."""
        policy, delta = self.policy, self.policy.delta
        counted = spent(self.entries, delta)
        return {
            "dataset": self.dataset,
            "epsilon": policy.epsilon,
            "delta": delta,
            "spent": counted,
            "left": max(0.0, policy.epsilon - counted),
            "exact": sum(e.mechanism == "none" for e in self.entries),
            "refusals": sum(e.mechanism == "refusal" for e in self.entries),
            "runs": [self._run(run) for run in dict.fromkeys(e.run for e in self.entries if e.mechanism != "refusal")],
            "entries": len(self.entries),
            "head": str(self.head),
            "verified": self.verified,
        }

    def _run(self, run: str) -> dict[str, Any]:
        mine = [e for e in self.entries if e.run == run and e.mechanism != "refusal"]
        exact = any(e.mechanism == "none" for e in mine)  # which no epsilon bounds
        # Whoever sees results may choose when to stop, so what was charged bounds nothing without the rest of the plan.
        plan = self.plans.get(run)
        rest = remaining(plan, mine) if plan else []
        planned = [_planned(mine[-1], part, release) for part, release in rest]
        # The plan's total has the row count too, where an earlier run told it.
        bound = max(cost_of_run([*mine, *planned], self.policy.delta), plan.total if plan else 0.0)
        return {
            "run": run,
            "federation": mine[0].federation,
            "first": mine[0].time,
            "last": mine[-1].time,
            "epsilon": None if exact else bound,
            "released": list(_released(mine)),
        }


def _planned(like: Entry, part: Part, release: GaussianRelease) -> Entry:
    """A release of the same run, table and split that was planned."""
    return replace(like, part=part, mechanism="gaussian", epsilon=None, value=None, **asdict(release))


def _released(entries: Iterable[Entry]) -> Iterable[dict[str, Any]]:
    """Equal releases of one run as one."""
    times: Counter[tuple[Any, ...]] = Counter()
    for e in entries:
        times[e.part, e.mechanism, e.noise_multiplier, e.sampling_rate, e.steps, e.epsilon] += 1
    for (part, mechanism, multiplier, rate, steps, pure), number in times.items():
        what = WHAT[mechanism, part]
        told: dict[str, Any] = {"what": what, "part": part, "times": number, "private": mechanism != "none"}
        if mechanism == "geometric":
            told["epsilon"] = number * pure
        if mechanism == "gaussian":
            told |= {"noise_multiplier": multiplier, "sampling_rate": rate, "steps": steps}
        yield told


def read_balance(document: Path, *, verify: bool = False, head: str | None = None) -> Balance:
    """The account that a client file names. A dataset that never released anything has an empty one.

    Args:
        verify: check the chain, and its end against the head that is kept.
        head: one that was written down earlier; the ledger must contain it.

    Raises:
        ConfigError: mistakes in the client file.
        LedgerError: the ledger cannot be read, or (when verified) cannot be trusted.
    """
    settings = load_client_file(document)
    known = Head.parse(head) if head is not None else None
    kept = Path(settings.head) if settings.head else None
    if not settings.ledger.exists() and not (kept or settings.ledger.with_suffix(".head")).exists():
        if known is not None and known.entries:
            raise LedgerError(
                f"{settings.ledger}: is missing, but has had {known.entries} entries, says the head given"
            )
        return Balance(settings.data.name, settings.policy, [], {}, Head(0, ""), verified=verify)
    ledger = Ledger.reading(settings.ledger, head=kept)
    try:
        if verify or known is not None:
            ledger.verify(known)
        entries = ledger.entries()
        plans = {run: found.plan for run in {e.run for e in entries} if (found := stored(ledger, run))}
        return Balance(settings.data.name, settings.policy, entries, plans, ledger.head(), verified=verify)
    finally:
        ledger.close()
