"""A site: what one participant has. Its data, policy, ledger, noise and device."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from client import data
from client.account.account import Account
from client.account.approval import check_approval
from client.account.books import Books, Charges, write_refusal
from client.account.ledger import Ledger
from client.account.policy import for_one_run
from client.data import Dataset, Rows
from client.device import describe_device, resolve_device
from client.energy import CodeCarbon, EnergyBook, Meter
from client.kept import KeptModels
from client.settings import ClientFile
from common.certificates import files, identity
from common.document.federation import Federation
from common.errors import DataError
from common.model.energy import Energy
from common.model.weights import Weights
from common.privacy import noise as noises
from common.privacy.claims import row_claims
from common.privacy.noise import NoiseSource

Result = TypeVar("Result")

SPLIT_KEY = "split.key"  # in the state folder


@dataclass
class Site:
    """One participant, ready to take part in one federation."""

    name: str
    account: Account
    device: torch.device
    noise_of: Callable[[str], NoiseSource]  # what a task ("train/7") draws from
    kept: KeptModels | None = None  # where models are kept; None in a simulation
    meter: Meter | None = None  # of what its tasks take; None where the federation does not ask
    energy: EnergyBook | None = None  # the owner's account of that; None in a simulation
    run: str | None = None  # the run that a server welcomed us to; None where there is no welcome

    @property
    def federation(self) -> Federation:
        return self.account.books.federation

    @property
    def dataset(self) -> Dataset:
        return self.account.books.dataset

    def keep(self, weights: Weights, *, run: str, complete: int) -> None:
        """Keeps the model that `complete` rounds of a run have made, for the owner."""
        if self.kept is not None:
            self.kept.note(weights, run=run, complete=complete, privacy=lambda: self.privacy(run))

    def metered(self, work: Callable[[], Result], *, run: str, trains: bool) -> tuple[Result, Energy | None]:
        """Does the work of a task, and notes for the owner what it took. Returns of that what the server may be told:
        nothing under privacy."""
        if self.meter is None:
            return work(), None
        result, energy = self.meter.measure(work)
        if self.energy is not None:
            self.energy.note(energy, run=run, trained=trains)
        return result, energy if self.federation.tells_energy else None

    def privacy(self, run: str) -> dict[str, Any]:
        """What a run has cost this site's rows, as a run folder's privacy.json says it."""
        row, budget = self.federation.privacy.row, self.account.opened_budget(run)
        claims = None
        if row is not None and budget is not None:
            statement = budget.statement()
            own = {self.name: statement.describe(clip=row.clip)}
            claims = row_claims(row, epsilon=statement.planned_epsilon, per_client=own)
        return {"federation": self.federation.fingerprint, "run": run, "row": claims}

    def close(self) -> None:
        """Writes what is still to be written, and gives back the ledger."""
        if self.kept is not None:
            self.kept.flush()
        self.account.close()

    def _how(self) -> str:
        if self.federation.privacy.row is None:
            return ""
        return (
            ", exact arithmetic"
            if self.account.arithmetic == "exact"
            else ", floating point, which can tell more of a row"
        )

    def describe(self) -> list[str]:
        """Device, table and what encoding met, for the owner's eyes only."""
        rows, validation = self.dataset.rows, self.dataset.validation_rows
        return [
            f"device {describe_device(self.device)}{self._how()}",
            f"{rows + validation} rows: {rows} to train on, {validation} to validate on{self._share()}",
            *size_warnings(self.federation, rows),
            *self.dataset.report.lines(),
        ]

    def _share(self) -> str:
        """The share of rows to validate on: each is dealt by chance, or with all that are about one person."""
        rows, validation = self.dataset.rows, self.dataset.validation_rows
        wanted = self.federation.data_schema.validation_fraction
        return f" ({validation / (rows + validation):.1%} for {wanted:.1%})" if rows + validation and wanted else ""


def size_warnings(federation: Federation, rows: int) -> list[str]:
    """What so many rows to train on mean for a federation: for the owner alone: their exact number is not told."""
    row, batch = federation.privacy.row, federation.training.batch_size
    if row is None:
        few = f"fewer rows than training.batch_size {batch}: each step takes all of them"
        return [few] if rows < batch else []
    said = []
    if row.delta * rows > 1:
        said.append(f"warning: privacy.row.delta {row.delta:g} is above 1 / rows: it allows to publish a row outright")
    if row.sampling_rate is None and rows < batch:
        said.append(f"warning: fewer rows than training.batch_size {batch}: each step takes all, and is mostly noise")
    return said


def open_site(settings: ClientFile, federation: Federation, *, name: str) -> Site:
    """Opens a real participant: reads its table and its ledger, and draws from secure noise.

    Raises:
        Refusal: the owner has not approved this document.
        DataError: the table does not fit the federation's schema.
        DeviceError: the device is not here, or its arithmetic is not what privacy rests on.
        LedgerError: the ledger is in use, or cannot be trusted.
    """
    state = Path(settings.state)
    check_approval(settings.policy, federation, settings.approvals)  # before the document meets the data
    private = federation.privacy.row is not None
    device = resolve_device(settings.device, exact=private and settings.arithmetic == "exact")
    meter = CodeCarbon.on(device, country=settings.energy.country) if federation.energy else None
    key = split_key(state)
    head = Path(settings.head) if settings.head else None
    ledger = Ledger(settings.ledger, head=head, authority=authority_of(settings))
    try:
        rows = _read(settings, federation, key, ledger)
        dataset = data.split(rows, federation.data_schema, key=key, device=device, use_up=True)
        books = Books(policy=settings.policy, ledger=ledger, federation=federation, dataset=dataset)
        noise = noises.secure()
        account = Account(books, noise=noise, arithmetic=settings.arithmetic)
        return Site(
            name=name,
            account=account,
            device=device,
            noise_of=lambda task: noise,
            kept=KeptModels(settings.models, federation),
            meter=meter,
            energy=EnergyBook.open(settings.energy_book) if federation.energy else None,
        )
    except BaseException:
        ledger.close()
        raise


def simulated_site(
    federation: Federation,
    dataset: Dataset,
    *,
    name: str,
    ledger: Charges,
    noise_of: Callable[[str], NoiseSource],
    device: torch.device,
    meter: Meter | None = None,
) -> Site:
    """A participant whose owner allows this federation once, as it is planned, and nothing after it."""
    books = Books(policy=for_one_run(federation), ledger=ledger, federation=federation, dataset=dataset)
    account = Account(books, noise=noise_of("plan"))
    return Site(name=name, account=account, device=device, noise_of=noise_of, meter=meter)


def _read(settings: ClientFile, federation: Federation, key: bytes, ledger: Ledger) -> Rows:
    """The table, as the document asks for it. Where rows are private, one that does not fit is left out: then whether
    the table is taken depends on its columns and on no row.

    That a document did not fit is heard by whoever sent it, so it is noted first, and after `policy.refusals` of them
    no document that was not trained with before is tried on the table.
    """
    path, entries = Path(settings.data.path), ledger.entries()
    refused = sum(e.mechanism == "refusal" for e in entries)
    known = any(e.federation == federation.fingerprint and e.mechanism != "refusal" for e in entries)
    if refused >= settings.policy.refusals and not known:
        raise DataError(
            f"policy.refusals: {refused} documents that did not fit this table were told so, and "
            f"{settings.policy.refusals} may be; no other is tried on it. If they were honest mistakes, allow more"
        )
    try:
        private = federation.privacy.row is not None
        return data.read(
            path,
            federation.data_schema,
            key=key,
            form=settings.data.form,
            leave_out=private,
            person=settings.data.id,
        )
    except DataError:
        if path.is_file():  # else it is the owner's mistake, and no document's
            write_refusal(ledger, federation)
        raise


def authority_of(settings: ClientFile) -> str:
    """Who stands behind the servers that this client hears: a digest of its authority's key; "" without TLS."""
    return identity.key_digest(Path(settings.tls.ca)) if settings.tls else ""


def name_of(settings: ClientFile) -> str:
    """What a client calls itself where no server tells it who it is: its certificate's name, or else its file's.

    Raises:
        CertificateError: `tls.certificate` cannot be read, or is no client's.
    """
    if settings.tls is None:
        return settings.name or settings.data.name
    return identity.peer(files.read(Path(settings.tls.certificate))).name


def split_key(state: Path) -> bytes:
    """The owner's secret for dealing rows to train and validation, made once and kept."""
    path = state / SPLIT_KEY
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            fresh = path.with_suffix(f".{secrets.token_hex(4)}")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # another client in this folder was first, and its key is the one
                os.link(fresh, path)
            fresh.unlink()
        key = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the state folder cannot be used: {error}") from error
    if len(key) != 32:
        raise DataError(f"{path}: not a split key of 32 bytes; restore it, since a new one would deal rows anew")
    return key
