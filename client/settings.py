"""client.yaml: what is local to one participant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from client.account.policy import Policy
from client.training.recipe import Arithmetic
from common.data.tables import FileFormat
from common.data.text_files import known_encoding
from common.document import documents
from common.document.documents import Document
from common.document.mistakes import Problem
from common.document.schema import Name
from common.text import PLAIN_NAME
from common.wire import address


class DataFile(Document):
    """`name` is the dataset's account in the ledger: it stays when the file moves or grows. `id` is the column that
    says whom a row is about. `encoding` and `decimal` say of a CSV file what it does not say itself."""

    path: Name  # CSV in its many spellings, or Parquet
    id: Name | None = None  # the column that says whom a row is about: a corrected row then stays in its part
    encoding: Annotated[Name | None, AfterValidator(known_encoding)] = None  # of CSV that is not UTF-8
    decimal: Literal[".", ","] | None = None  # decimal mark of CSV; by default a comma beside semicolons, else a point
    # The dataset's account in the ledger. It stays the same when the file moves or grows.
    name: Annotated[str, Field(pattern=rf"^{PLAIN_NAME}$")]

    @property
    def form(self) -> FileFormat:
        return FileFormat(self.encoding, self.decimal)


class TLSFiles(Document):
    """What the federation's authority gave to this client (`cloister certs client`)."""

    ca: Name  # ca.pem
    certificate: Name  # NAME.pem
    key: Name  # NAME.key


class EnergySource(Document):
    """Where this client's electricity is from, for a federation that asks for `energy`."""

    # ISO 3166, three letters, such as DEU; by default codecarbon's average of the world, 475 g of CO2e a kWh.
    country: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] | None = None


class ClientFile(Document):
    """client.yaml: what is local to one participant. Paths are relative to the file's folder."""

    server: Annotated[str, AfterValidator(address.checked)]  # HOST:PORT
    tls: TLSFiles | None  # null is plain text, for loopback only
    name: Annotated[str, Field(pattern=rf"^{PLAIN_NAME}$")] | None = None  # without TLS only
    data: DataFile  # the table
    federation: Name | None = None  # the owner's copy of the document, for `join --strict`
    # auto, cpu, cuda, cuda:1 or mps. With privacy.row it is tried first, and must compute exactly.
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    arithmetic: Arithmetic = "exact"  # of private training and evaluation; opacus is floating point
    state: Name  # folder of the ledger, the key by which rows are dealt, replies that wait, and models
    head: Name | None = None  # where the ledger's head is kept; by default in `state`, safer on another disk
    policy: Policy  # what a federation may ask
    energy: EnergySource = EnergySource()  # of federations that measure it

    def contradictions(self) -> Iterator[Problem]:
        if self.arithmetic != "exact" and self.policy.arithmetic == "exact":
            yield (
                ("arithmetic",),
                f"{self.arithmetic} is floating point, which can tell more about a row than epsilon says; exact is "
                "safe, and policy.arithmetic: any allows the other",
            )

    @property
    def approvals(self) -> Path:
        """Where the owner's word on federations for this dataset is kept."""
        return Path(self.state) / f"{self.data.name}.approved.jsonl"

    @property
    def ledger(self) -> Path:
        """The dataset's account."""
        return Path(self.state) / f"{self.data.name}.ledger"

    @property
    def models(self) -> Path:
        """The models of the runs that this dataset was in."""
        return Path(self.state) / f"{self.data.name}.models"

    @property
    def personal(self) -> Path:
        """The models that `cloister personalise` made, one for each run."""
        return Path(self.state) / f"{self.data.name}.personal"

    @property
    def energy_book(self) -> Path:
        """What each run took of this client, for its owner."""
        return Path(self.state) / f"{self.data.name}.energy.json"

    @property
    def outbox(self) -> Path:
        """Where replies wait until the server has them."""
        return Path(self.state) / f"{self.data.name}.outbox"


def load_client_file(path: Path) -> ClientFile:
    """Reads client.yaml, its paths made absolute. Raises `ConfigError` with every mistake."""
    read = documents.load(path, ClientFile)
    here = path.resolve().parent
    tls = read.tls and TLSFiles(**{k: str(here / v) for k, v in read.tls.model_dump().items()})
    head = str(here / read.head) if read.head else None
    own = str(here / read.federation) if read.federation else None
    placed = read.data.model_copy(update={"path": str(here / read.data.path)})
    return read.model_copy(
        update={"data": placed, "state": str(here / read.state), "head": head, "tls": tls, "federation": own}
    )
