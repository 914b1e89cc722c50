"""`strategy:` of the federation document: whom a round asks, and how replies move the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from common.document.documents import Document, unless
from common.document.numbers import Count, Fraction, NonNegative, Positive, Share
from common.document.schedule import Schedule
from common.text import PLAIN_NAME


class _Rounds(Document):
    """What every strategy shares."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the connected clients that a round asks
    min_clients: Count = 2  # quorum: a round starts with, and counts with, at least so many
    over_selection: Annotated[float, Field(ge=0, le=4)] = 0.0  # asks so many more, and waits only for the first
    round_timeout: Positive = 600.0  # seconds
    max_failed_rounds: Count = 3  # so many failed rounds in a row end the run
    schedule: Annotated[Schedule | None, unless(None)] = None  # how the size of the server's step goes over the run
    # The model that is scored and handed out is the rounds' average, which forgets older ones by this factor a round.
    average: Annotated[Share | None, unless(None)] = None


class FedAvg(_Rounds):
    """Which clients a round asks, and how replies move the model. Strategies are Flower's, by name: fedavg, fedavgm,
    fedadam, fedadagrad, fedyogi, fedprox, fedmedian, fedtrimmedavg, krum, multikrum, bulyan, qfedavg; and agnostic; and
    one's own, installed."""

    name: Literal["fedavg"]  # or another one


class FedAvgM(_Rounds):
    name: Literal["fedavgm"]
    server_learning_rate: Positive = 1.0  # of a step by the mean of updates
    server_momentum: Fraction = 0.9  # of such steps


class FedAdam(_Rounds):
    name: Literal["fedadam"]
    eta: Positive = 0.1  # learning rate of the server's step
    beta_1: Fraction = 0.9  # how slowly its first moment forgets
    beta_2: Fraction = 0.99  # how slowly its second moment forgets
    tau: Positive = 1e-3  # added to the root of its second moment


class FedAdagrad(_Rounds):
    name: Literal["fedadagrad"]
    eta: Positive = 0.1  # learning rate of the server's step
    tau: Positive = 1e-3  # added to the root of its second moment


class FedYogi(_Rounds):
    name: Literal["fedyogi"]
    eta: Positive = 0.01  # learning rate of the server's step
    beta_1: Fraction = 0.9  # how slowly its first moment forgets
    beta_2: Fraction = 0.99  # how slowly its second moment forgets
    tau: Positive = 1e-3  # added to the root of its second moment


class FedProx(_Rounds):
    name: Literal["fedprox"]
    proximal_mu: Positive = 0.1  # pulls a client's weights to those it was sent


class FedMedian(_Rounds):
    name: Literal["fedmedian"]


class FedTrimmedAvg(_Rounds):
    name: Literal["fedtrimmedavg"]
    beta: Annotated[float, Field(ge=0, lt=0.5)] = 0.2  # share of replies cut off at each end


class Krum(_Rounds):
    name: Literal["krum"]
    num_malicious_nodes: Annotated[int, Field(ge=0)] = 0  # so many replies may be hostile


class MultiKrum(_Rounds):
    name: Literal["multikrum"]
    num_malicious_nodes: Annotated[int, Field(ge=0)] = 0  # so many replies may be hostile
    num_nodes_to_select: Count = 1  # replies that count


class Bulyan(_Rounds):
    name: Literal["bulyan"]
    num_malicious_nodes: Annotated[int, Field(ge=0)] = 0  # so many replies may be hostile


class QFedAvg(_Rounds):
    name: Literal["qfedavg"]
    q: NonNegative = 0.1  # how much more clients with a large loss weigh


class Agnostic(_Rounds):
    """The model that is best for the worst mixture of clients (Mohri et al. 2019, arXiv:1902.00146)."""

    name: Literal["agnostic"]
    mixture_rate: NonNegative = 0.1  # how fast clients with larger losses gain weight


def _sorted(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """Equal documents are equal text, in whatever order they were written."""
    return dict(sorted(parameters.items()))


Parameter = bool | int | float | str


class Installed(_Rounds):
    """A strategy that does not come with Cloister: a class of a Python package that is installed where the server runs
    ([extending.md](extending.md)). The document names it and holds no code."""

    name: Literal["installed"]
    entry_point: Annotated[str, Field(pattern=rf"^{PLAIN_NAME}$")]  # its name in the group cloister.strategies
    version: Annotated[str, Field(min_length=1, max_length=64)]  # of the package; a server with another one refuses
    # Keyword arguments of its constructor: numbers, text, true or false.
    parameters: Annotated[dict[str, Parameter], AfterValidator(_sorted)] = Field(default={})


StrategyChoice = Annotated[
    FedAvg
    | FedAvgM
    | FedAdam
    | FedAdagrad
    | FedYogi
    | FedProx
    | FedMedian
    | FedTrimmedAvg
    | Krum
    | MultiKrum
    | Bulyan
    | QFedAvg
    | Agnostic
    | Installed,
    Field(discriminator="name"),
]


BY_LOSSES = ("qfedavg", "agnostic")  # weigh clients by the losses that they tell
OF_A_MEAN = ("fedavg", "fedavgm", "fedadam", "fedadagrad", "fedyogi", "fedprox")  # move by a mean of updates


def title(strategy: StrategyChoice) -> str:
    """What people are told of which strategy it is."""
    if isinstance(strategy, Installed):
        return f"{strategy.entry_point} (installed, version {strategy.version})"
    return str(strategy.name)
