"""The owner's policy, ledger and budget against a federation, and the plan that a run would have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from client.account import approval
from client.account.account import Account
from client.account.balance import Balance, read_balance
from client.account.books import Books
from client.account.ledger import Ledger
from client.data import Dataset
from client.energy import CodeCarbon
from client.settings import ClientFile
from client.site import authority_of
from common.document.federation import Federation
from common.errors import BudgetExhausted, CertificateError, CloisterError, LedgerError, Refusal
from common.findings import Finding, mistakes, ok, warning, wrong
from common.privacy import noise

REHEARSAL = "doctor"  # the run that is planned, and never begins


def look(
    settings: ClientFile, document: Path, federation: Federation | None = None, dataset: Dataset | None = None
) -> Iterator[Finding]:
    """Policy, ledger, budget and plan, as far as there are a federation and a table that fits it. `document` is the
    settings' file."""
    if federation is not None:
        yield from _policy(settings, federation)
        yield from _energy(settings, federation)
    try:
        balance = read_balance(document, verify=True)
    except LedgerError as error:
        yield wrong("ledger", error)
        return
    yield ok("ledger", f"{balance.head.entries} entries, chain and head verified" if balance.entries else "none yet")
    yield from _budget(settings, balance, federation)
    if federation is not None and dataset is not None:
        yield from _plan(settings, federation, dataset)


def _policy(settings: ClientFile, federation: Federation) -> Iterator[Finding]:
    policy = settings.policy
    refusals = list(policy.refusals_of(federation))
    for refusal in refusals:
        yield wrong("policy", refusal, "ask whoever coordinates to ask for less, or allow it under `policy:`")
    if not refusals:
        yield ok("policy", "allows what the federation asks")
    if policy.approved == "any-within-policy":
        return
    try:
        approval.check_approval(policy, federation, settings.approvals)
        yield ok("approval", "you have said yes to this document")
    except Refusal as refusal:
        if policy.approved == "ask":
            yield warning("approval", "not given yet", "`cloister join` shows the document and asks you, on a terminal")
        else:
            remedy = f"if you agree to the document, add {federation.fingerprint} to policy.approved"
            yield wrong("approval", refusal, remedy)
    except LedgerError as error:
        yield wrong("approval", error)


def _energy(settings: ClientFile, federation: Federation) -> Iterator[Finding]:
    if federation.energy:
        try:
            CodeCarbon(settings.energy.country).check()
            yield ok("energy", "is measured, as the federation asks")
        except CloisterError as error:
            yield from mistakes("energy", error)


def _budget(settings: ClientFile, balance: Balance, federation: Federation | None) -> Iterator[Finding]:
    policy, account = settings.policy, balance.describe()
    said = f"epsilon {account['left']:.2f} of {policy.epsilon:g} left, at delta {policy.delta:g}"
    row = federation.privacy.row if federation else None
    if row is not None and account["left"] < row.epsilon:
        yield warning(
            "budget",
            f"{said}; the federation asks for {row.epsilon:g}",
            "its noise will be larger here than planned, as far as that fits",
        )
    else:
        yield ok("budget", said)
    if account["refusals"] >= policy.refusals:
        yield warning(
            "budget",
            f"{account['refusals']} documents did not fit this table and were told so, and policy.refusals allows "
            f"{policy.refusals}: only those that were trained with before are tried on it",
            "allow more, if those were honest mistakes",
        )


def _plan(settings: ClientFile, federation: Federation, dataset: Dataset) -> Iterator[Finding]:
    """Makes the plan that a new run would have, charged to a copy of the ledger that ends here."""
    try:
        copy = Ledger.copy_of(settings.ledger, authority=authority_of(settings))
    except (LedgerError, CertificateError) as error:
        yield wrong("plan", error)
        return
    books = Books(policy=settings.policy, ledger=copy, federation=federation, dataset=dataset)
    account = Account(books, noise=noise.secure(), arithmetic=settings.arithmetic)
    try:
        budget = account.budget(REHEARSAL)
        if budget is None:
            yield ok(
                "plan", f"{federation.training.rounds} rounds without differential privacy: updates can reveal rows"
            )
            return
        yield ok("plan", budget.describe().removeprefix("privacy plan: "))
        yield ok("plan", budget.confirm())
    except BudgetExhausted as error:
        yield wrong(
            "plan", error, "`cloister budget` says what it was spent on; a larger policy.epsilon is yours to give"
        )
    except Refusal as refusal:
        yield wrong("plan", refusal)
    finally:
        account.close()
