"""`cloister budget`: what a dataset's account has spent, on what, and what is left. Looks, and writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.entries import Entry, spent
from client.ledger import Head, Ledger
from client.policy import Policy
from client.site import load_client_file
from common.errors import LedgerError
from common.privacy import GaussianRelease, epsilon
from common.wire.text import shown


@dataclass(frozen=True)
class Account:
    """A dataset's account as it stands."""

    dataset: str
    policy: Policy
    entries: list[Entry]
    head: Head
    verified: bool

    def describe(self) -> dict[str, Any]:
        """All there is to say, as plain values: what `cloister budget --json` prints."""
        policy, delta = self.policy, self.policy.delta
        bound = spent(self.entries, delta)
        return {
            "dataset": self.dataset,
            "epsilon": policy.epsilon,
            "delta": delta,
            "spent": bound,
            "left": max(0.0, policy.epsilon - bound),
            "by": {accountant: spent(self.entries, delta, accountant=accountant) for accountant in ("pld", "rdp")},
            "exact": sum(e.mechanism == "none" for e in self.entries),
            "refusals": sum(e.mechanism == "refusal" for e in self.entries),
            "runs": [self._run(run) for run in dict.fromkeys(e.run for e in self.entries if e.mechanism != "refusal")],
            "entries": len(self.entries),
            "head": str(self.head),
            "verified": self.verified,
        }

    def _run(self, run: str) -> dict[str, Any]:
        mine = [e for e in self.entries if e.run == run and e.mechanism != "refusal"]
        return {
            "run": run,
            "federation": mine[0].federation,
            "first": mine[0].time,
            "last": mine[-1].time,
            "epsilon": spent(mine, self.policy.delta),
            "released": list(_released(mine, self.policy.delta)),
        }


def _released(entries: Iterable[Entry], delta: float) -> Iterable[dict[str, Any]]:
    """Equal releases of one run as one, with what they cost by themselves."""
    times: Counter[tuple[Any, ...]] = Counter()
    for e in entries:
        times[e.part, e.mechanism, e.noise_multiplier, e.sampling_rate, e.steps, e.epsilon] += 1
    for (part, mechanism, multiplier, rate, steps, pure), number in times.items():
        if mechanism == "none":
            yield {
                "what": "exact update" if part == "train" else "exact counts",
                "part": part,
                "times": number,
                "epsilon": None,
            }
            continue
        if mechanism == "geometric":
            yield {"what": "row count", "part": part, "times": number, "epsilon": number * pure}
            continue
        release = GaussianRelease(noise_multiplier=multiplier, sampling_rate=rate, steps=steps * number)
        yield {
            "what": "model update" if part == "train" else "evaluation",
            "part": part,
            "times": number,
            "epsilon": epsilon([release], delta),
            "noise_multiplier": multiplier,
            "sampling_rate": rate,
            "steps": steps,
        }


def read_account(document: Path, *, verify: bool = False, head: str | None = None) -> Account:
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
        return Account(settings.data.name, settings.policy, [], Head(0, ""), verified=verify)
    ledger = Ledger.reading(settings.ledger, head=kept)
    try:
        if verify or known is not None:
            ledger.verify(known)
        return Account(settings.data.name, settings.policy, ledger.entries(), ledger.head(), verified=verify)
    finally:
        ledger.close()


def lines(account: dict[str, Any]) -> list[str]:
    """`Account.describe` for a person. Runs have the names that servers gave them, in old ledgers unchecked."""
    return [shown(line) for line in _lines(account)]


def _lines(account: dict[str, Any]) -> list[str]:
    out = [
        f"dataset {account['dataset']}: epsilon {account['epsilon']:g} at delta {account['delta']:g}, for all "
        "federations together",
        f"spent   {account['spent']:.2f}   left {account['left']:.2f}",
    ]
    if account["refusals"]:
        out.append(f"documents that did not fit the table, and were told so: {account['refusals']}")
    if not account["runs"]:
        return [*out, "nothing was ever released"]
    by = account["by"]
    out.append(f"        (PLD {by['pld']:.2f}, RDP {by['rdp']:.2f}{_why_more(account)})")
    if account["exact"]:
        out.append(f"and {account['exact']} exact releases without privacy, which no epsilon bounds")
    for run in account["runs"]:
        out += ["", f"run {run['run']}, federation {run['federation'][:16]}...: epsilon {run['epsilon']:.2f}"]
        out.append(f"  {run['first']} to {run['last']}")
        for release in run["released"]:
            detail = ""
            if "steps" in release:
                detail = f", noise multiplier {release['noise_multiplier']:.3g}"
                if release["part"] == "train":
                    detail += f", {release['steps']} steps at sampling rate {release['sampling_rate']:.3g}"
            cost = "no privacy    " if release["epsilon"] is None else f"epsilon {release['epsilon']:<6.2f}"
            out.append(f"  {release['times']:>5} x {release['what']:<13} {cost} ({release['part']} rows{detail})")
    chain = "; chain and head verified" if account["verified"] else "; --verify checks them"
    return [*out, "", f"{account['entries']} entries{chain}", f"head {account['head']}"]


def _why_more(account: dict[str, Any]) -> str:
    """Why the figure that counts may be above both."""
    if account["spent"] <= account["by"]["rdp"] + 1e-9:
        return ""
    return "; runs that are chosen in the light of earlier ones cost what is spent"
