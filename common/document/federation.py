"""The federation document: what all parties agree on before any row is touched.

It holds no code and no path. The server sends it to a joining client as canonical JSON; the client checks it
with these same models and knows it by its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.document import documents
from common.document.augmentation import Augmentation
from common.document.documents import Document, unless
from common.document.heads import Head, Loss
from common.document.mistakes import Key, Problem
from common.document.numbers import Count, Fraction, NonNegative, Positive, Whole
from common.document.schedule import Plateau, Schedule
from common.document.schema import Classes, Numeric, Schema
from common.document.strategy import (
    BY_LOSSES,
    OF_A_MEAN,
    Bulyan,
    Krum,
    MultiKrum,
    QFedAvg,
    StrategyChoice,
)
from common.errors import ConfigError
from common.text import PLAIN_NAME

Rounds = Annotated[int, Field(ge=1, le=1_000_000)]
# Far outside, float32 rounds a clipped gradient up by more than the noise covers.
Clip = Annotated[float, Field(ge=1e-6, le=1e6)]
WIDEST = 2**22  # units of a layer: with more, too few bits are left for each factor of an exact product
# What no client should be asked: a private step holds some 64 bytes a parameter, and a machine computes 10^10 to 10^13
# operations a second.
MOST_PARAMETERS, BYTES_A_PARAMETER = 2**27, 64
MOST_OPERATIONS, SLOW_MACHINE = 1e16, 1e10  # of a client in a round; a second
MOST_COUNTS = 40_000  # of an evaluation: some 24 bytes each, in a message's header of 1 MiB
LEAST_EVALUATION_NOISE = 0.01  # the noise has a grid, which must be fine beside it
Dtype = Literal["float32", "bfloat16", "int8"]
OF_CLASSES = ("accuracy", "precision", "recall", "f1")  # figures of an evaluation
LOWER_IS_BETTER = ("mae", "mse")  # ... where the target is a number


class Model(Document):
    """A multilayer perceptron. `hidden: []` is a linear model."""

    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...]  # units of each hidden layer
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"  # after each hidden layer
    dropout: Fraction = 0.0  # share of hidden units left out at a step


class EarlyStopping(Document):
    """Ends a run when its evaluations no longer get better."""

    metric: Literal["accuracy", "precision", "recall", "f1", "mae", "mse"]  # which evaluation figure is watched
    patience: Count = 3  # evaluations in a row that are not better
    min_change: NonNegative = 0.0  # than the best by so much; should exceed the metric's noise


class Training(Document):
    """What a client does in one round, and how many rounds there are."""

    rounds: Rounds  # in all
    local_steps: Count | None = None  # of a client in a round; or local_epochs, and exactly one of the two
    local_epochs: Count | None = None  # passes over a client's rows in a round
    batch_size: Count  # rows in a step; with privacy.row, on average
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"  # begins anew each round
    learning_rate: Positive  # of the optimizer; with privacy.row a step moves the model by at most this times clip
    schedule: Annotated[Schedule | None, unless(None)] = None  # how the learning rate goes over the run
    augmentation: Annotated[Augmentation | None, unless(None)] = None  # rows that are changed at random
    momentum: Fraction = 0.0  # of sgd
    nesterov: bool = False  # sgd with momentum, after Nesterov
    weight_decay: NonNegative = 0.0  # pulls weights to 0
    # For classes, for two classes by one output, or (mse) for a target that is a number.
    loss: Literal["cross_entropy", "binary_cross_entropy", "mse"] = "cross_entropy"
    early_stopping: EarlyStopping | None = None  # ends a run that no longer gets better
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # initial weights and the server's sampling; never noise

    def steps(self, sampling_rate: float) -> int:
        """Local steps of one round of private training; an epoch is 1 / sampling_rate steps, rounded up."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return math.ceil(self.local_epochs / sampling_rate - 1e-9)  # 1 / (1 / 49) is a little more than 49

    def steps_without_privacy(self, rows: int) -> int:
        """Local steps of one round over so many rows, in shuffled batches; an epoch takes each row once."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * -(-rows // self.batch_size)

    @property
    def copies(self) -> int:
        """How many copies of a row a step takes."""
        return 1 if self.augmentation is None else self.augmentation.copies

    def contradictions(self) -> Iterator[Problem]:
        if self.augmentation is not None:
            for key, sentence in self.augmentation.contradictions():
                yield ("augmentation", *key), sentence
        if (self.local_steps is None) == (self.local_epochs is None):
            yield ("local_steps",), "or local_epochs: give exactly one of them"
        if self.optimizer != "sgd":
            for name in ("momentum", "nesterov"):
                if getattr(self, name):
                    yield (name,), f"belongs to optimizer sgd (optimizer is {self.optimizer})"
        elif self.nesterov and not self.momentum:
            yield ("nesterov",), "needs momentum greater than 0"
        if self.schedule is not None and self.schedule.over == "steps" and self.local_steps is None:
            yield (
                ("schedule", "over"),
                "steps needs local_steps: with local_epochs clients take different numbers of steps in a round",
            )

    def rate_at(self, server_round: int, step: int) -> float:
        """The learning rate of local step `step` (from 0) in round `server_round`, but for what a plateau adds."""
        if self.schedule is None:
            return self.learning_rate
        at = self.schedule.at(server_round, rounds=self.rounds, step=step, steps=self.local_steps or 1)
        return self.learning_rate * at


class Start(Document):
    """A model that the run begins from, in place of first weights drawn from the seed. Whoever serves or simulates
    gives its file by `--start-from`; the document knows it by its digest."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of the file, model.safetensors of a run folder
    new_head: bool = False  # is the last layer drawn from the seed all the same? Another target needs that
    frozen: tuple[Whole, ...] = ()  # layers that stay as they are, counted from the inputs, from 0


class RowPrivacy(Document):
    """(epsilon, delta)-differential privacy for adding or removing one row of one client's table."""

    epsilon: Positive  # of a whole run
    delta: Annotated[float, Field(gt=0, lt=1)]  # the probability that epsilon may fail with
    clip: Clip  # L2 bound on one row's gradient
    count_epsilon: Positive | None = 0.1  # the part of epsilon that pays for telling roughly how many rows there are
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None  # with it no count is told; all weigh the same

    def contradictions(self) -> Iterator[Problem]:
        if (self.count_epsilon is None) == (self.sampling_rate is None):
            yield (
                ("sampling_rate",),
                "or count_epsilon: give exactly one and set the other to null; without a count of rows, the rate at "
                "which a row is drawn must be given",
            )
        if self.count_epsilon is not None and self.count_epsilon > self.epsilon / 2:
            yield (
                ("count_epsilon",),
                f"must be at most half of epsilon, {self.epsilon / 2:g} (got {self.count_epsilon:g})",
            )


class AdaptiveClip(Document):
    """Lets the clip follow a quantile of the updates' norms (Andrew et al. 2021, arXiv:1905.03871)."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5  # this share of the updates is to be within the clip
    learning_rate: Positive = 0.2  # how fast the clip follows
    share: Annotated[float, Field(gt=0, lt=1)] = 0.05  # of a round's privacy, paid for the noisy share of clipped ones


class ClientPrivacy(Document):
    """(epsilon, delta)-differential privacy for one whole client, by a server that is trusted.

    A round asks each connected client with probability `strategy.fraction`, and divides the noisy sum of the updates
    by the public number `fraction x clients`.
    """

    epsilon: Positive  # of a whole run
    delta: Annotated[float, Field(gt=0, lt=1)]  # the probability that epsilon may fail with
    clip: Clip  # L2 bound on one client's update; with `adaptive`, that of the first round
    clients: Count  # how many there are in all, a public number
    weight_cap: Positive | None = None  # rows with which a client counts in full; null: all count the same
    adaptive: AdaptiveClip | None = None  # a clip that follows the updates

    def contradictions(self) -> Iterator[Problem]:
        if self.delta * self.clients > 1:
            yield ("delta",), f"must be at most 1 / clients, {1 / self.clients:g} (got {self.delta:g})"


class Evaluation(Document):
    """How often clients score the model on their validation rows, and the noise on each count."""

    every: Annotated[int, Field(ge=0)] = 1  # rounds; 0 is never
    # Standard deviation of the noise over the sensitivity of the counts. Beyond a million its integers have no room.
    noise: Annotated[float, Field(ge=0, le=1e6)] = 0.0


class Privacy(Document):
    """`row: null` lets clients train without differential privacy; a client's policy must allow that."""

    row: RowPrivacy | None  # each row of each client, noise by the client
    client: ClientPrivacy | None = None  # each client as a whole, noise by the server
    evaluation: Evaluation = Evaluation()  # scores of the model on validation rows

    def contradictions(self) -> Iterator[Problem]:
        for name in ("row", "client"):
            if (unit := getattr(self, name)) is not None:
                for key, sentence in unit.contradictions():
                    yield (name, *key), sentence
        if 0 < self.evaluation.noise < LEAST_EVALUATION_NOISE:
            yield (
                ("evaluation", "noise"),
                f"must be at least {LEAST_EVALUATION_NOISE:g}, which hides next to nothing as it is "
                f"(got {self.evaluation.noise:g})",
            )
        private = [f"privacy.{name}" for name in ("row", "client") if getattr(self, name) is not None]
        if not private and self.evaluation.noise:
            yield (
                ("evaluation", "noise"),
                "needs privacy.row or privacy.client, whose epsilon and delta it is accounted against",
            )
        if private and self.evaluation.every and not self.evaluation.noise:
            yield (
                ("evaluation", "noise"),
                f"must be greater than 0: with {' and '.join(private)} no count leaves without noise",
            )

    @property
    def limits(self) -> dict[str, float]:
        """The epsilon of each unit that is protected."""
        units = {"row": self.row, "client": self.client}
        return {name: unit.epsilon for name, unit in units.items() if unit is not None}


class Wire(Document):
    """In which numbers a client's update travels to the server, rounded without bias (common/wire/compression.py)."""

    dtype: Dtype = "float32"  # bfloat16 is half of the bytes, int8 a quarter; the model travels to clients in float32


class Federation(Document):
    """The agreed document, checked."""

    name: Annotated[str, Field(pattern=rf"^{PLAIN_NAME}$")]  # letters, digits, dots, dashes and underscores
    data_schema: Annotated[Schema, Field(alias="schema")]  # what every table looks like
    model: Model  # what is trained
    start: Annotated[Start | None, unless(None)] = None  # what it begins from
    training: Training  # how a client trains
    strategy: StrategyChoice  # whom a round asks, and how replies move the model
    privacy: Privacy  # what is protected, and how well
    wire: Wire = Wire()  # how updates travel
    # Does each client measure its energy? It tells the server its figures only without privacy.row and privacy.client.
    energy: Annotated[bool, unless(False)] = False

    def contradictions(self) -> Iterator[Problem]:
        for part in ("data_schema", "training", "privacy"):
            for key, sentence in getattr(self, part).contradictions():
                yield ("schema" if part == "data_schema" else part, *key), sentence
        if self.privacy.row is not None and max(self.layer_sizes) > WIDEST:
            yield (
                ("schema", "features"),
                f"make {self.layer_sizes[0]} inputs; with privacy.row a layer may have at most {WIDEST}, beyond which "
                "its products are not exact",
            )
        yield from self._size_problems()
        yield from self._count_problems()
        yield from self._loss_problems()
        if self.training.early_stopping is not None:
            yield from self._watch_problems(("training", "early_stopping"), self.training.early_stopping)
        if self.start is not None:
            yield from self._start_problems(self.start)
        yield from self._schedule_problems()
        if self.training.augmentation is not None:
            yield from self._augmentation_problems(self.training.augmentation)
        yield from self._strategy_problems()
        private = self.privacy.row is not None or self.privacy.client is not None
        if private and self.data_schema.validation_fraction == 0 and self.privacy.evaluation.every:
            yield (
                ("schema", "validation_fraction"),
                "is 0, so there is nothing to evaluate; set privacy.evaluation.every to 0",
            )

    def _size_problems(self) -> Iterator[Problem]:
        parameters = self.parameters
        if parameters > MOST_PARAMETERS:
            yield (
                ("model", "hidden"),
                f"make {parameters:,} parameters, some {parameters * BYTES_A_PARAMETER / 2**30:,.0f} GiB at each "
                f"client; at most {MOST_PARAMETERS:,} are accepted",
            )
        steps, batch = self.training.local_steps or 0, self.training.batch_size
        copies = self.training.copies
        operations = 6 * parameters * batch * copies * steps
        if operations > MOST_OPERATIONS:
            each = f" in {copies} copies" if copies > 1 else ""
            yield (
                ("training", "local_steps"),
                f"of batch {batch}{each} on {parameters:,} parameters are {operations:.1e} operations in each round, "
                f"{operations / SLOW_MACHINE / 86_400:,.0f} days where 10^10 a second are computed; at most "
                f"{MOST_OPERATIONS:.0e} are accepted",
            )

    def _count_problems(self) -> Iterator[Problem]:
        if self.evaluation_rounds and (counts := self.data_schema.counts) > MOST_COUNTS:
            name = "group" if self.data_schema.group is not None else "target"
            yield (
                ("schema", name),
                f"makes {counts:,} counts in each evaluation, which are more than travel, {MOST_COUNTS:,}: a matrix of "
                "each target's classes for each group. Declare fewer, or set privacy.evaluation.every to 0",
            )

    def _loss_problems(self) -> Iterator[Problem]:
        target, loss = self.data_schema.target, self.training.loss
        key = ("training", "loss")
        if isinstance(target, Classes):
            if loss == "mse":
                yield key, "mse needs a numeric target; for classes use cross_entropy"
            if loss == "binary_cross_entropy" and len(target.classes) != 2:
                yield (
                    key,
                    f"binary_cross_entropy needs exactly 2 classes (the schema has {len(target.classes)})",
                )
        elif loss != "mse":
            yield key, f"{loss} needs a target with classes; for a numeric target use mse"

    def _watch_problems(self, place: Key, rule: EarlyStopping | Plateau) -> Iterator[Problem]:
        """Of what watches a figure of the evaluations."""
        key = (*place, "metric")
        if rule.metric not in self.metrics:
            yield key, f"must be one of {', '.join(self.metrics)} for this target (got {rule.metric})"
        if not self.evaluation_rounds:
            yield key, "is never evaluated; set privacy.evaluation.every and schema.validation_fraction above 0"

    def _schedule_problems(self) -> Iterator[Problem]:
        for part in ("training", "strategy"):
            schedule: Schedule | None = getattr(self, part).schedule
            if schedule is None:
                continue
            if schedule.warmup >= self.training.rounds:
                yield (
                    (part, "schedule", "warmup"),
                    f"must be less than training.rounds, {self.training.rounds} (got {schedule.warmup})",
                )
            if isinstance(schedule, Plateau):
                yield from self._watch_problems((part, "schedule"), schedule)
            if schedule.over != "steps":
                continue
            if part == "strategy":
                yield (part, "schedule", "over"), "must be rounds here: the server takes one step in each"
            elif isinstance(self.strategy, QFedAvg):
                yield (
                    (part, "schedule", "over"),
                    "must be rounds with qfedavg, which divides a client's update by the rate that it was made with",
                )

    def _start_problems(self, start: Start) -> Iterator[Problem]:
        key, layers = ("start", "frozen"), len(self.layer_sizes) - 1
        if beyond := [layer for layer in start.frozen if layer >= layers]:
            yield key, f"names layer {beyond[0]}, and the model has {layers}, counted from 0"
        elif len(set(start.frozen)) < len(start.frozen):
            yield key, "must all differ"
        elif not self.trained_layers:
            yield key, "are all layers, so that nothing is left to train"
        elif start.new_head and layers - 1 in start.frozen:
            yield key, f"names layer {layers - 1}, the head, which is new and would never learn"

    def _augmentation_problems(self, augmentation: Augmentation) -> Iterator[Problem]:
        place, image = ("training", "augmentation"), self.data_schema.image
        for name in ("shift", "flip"):
            if getattr(augmentation, name) and image is None:
                yield (*place, name), "is for images, and the schema declares none: see schema.image"
        if image is not None and augmentation.shift >= min(image.height, image.width):
            yield (
                (*place, "shift"),
                f"must be less than the image's height and width, {image.height} x {image.width} "
                f"(got {augmentation.shift})",
            )
        if augmentation.jitter and not any(isinstance(f, Numeric) for f in self.data_schema.features):
            yield (*place, "jitter"), "is for numbers, and the schema has none among the features"
        if augmentation.mixup and self.privacy.row is not None:
            yield (
                (*place, "mixup"),
                "mixes the values of two rows, so that each would be in the gradients of others, and privacy.row "
                "bounds what a row adds by its own gradient; leave it out, or use jitter, drop, shift or flip",
            )
        if augmentation.mixup and self.data_schema.also:
            yield (
                (*place, "mixup"),
                "is for one target: of several, one row may lack what another has; leave it out",
            )
        if augmentation.copies > 1 and not augmentation.changes_rows and not self.model.dropout:
            yield (
                (*place, "copies"),
                "of a row are all alike without jitter, drop, shift, flip or dropout",
            )

    def _strategy_problems(self) -> Iterator[Problem]:
        strategy, clients = self.strategy, self.strategy.min_clients
        # Blanchard et al. 2017 need n >= 2f + 3 for Krum, El Mhamdi et al. 2018 n >= 4f + 3 for Bulyan.
        if isinstance(strategy, Krum | MultiKrum | Bulyan):
            factor = 4 if isinstance(strategy, Bulyan) else 2
            least = factor * strategy.num_malicious_nodes + 3
            if clients < least:
                rule = f"{factor} x num_malicious_nodes + 3 = {least}"
                yield ("strategy", "min_clients"), f"must be at least {rule} for {strategy.name} (got {clients})"
        if isinstance(strategy, MultiKrum) and strategy.num_nodes_to_select > clients:
            yield ("strategy", "num_nodes_to_select"), f"must be at most min_clients, {clients}"
        if self.privacy.client is not None and strategy.name not in OF_A_MEAN:
            yield ("strategy", "name"), f"privacy.client needs a strategy of a mean: {', '.join(OF_A_MEAN)}"
        if self.privacy.client is not None and strategy.over_selection:
            yield (
                ("strategy", "over_selection"),
                "must be 0 with privacy.client, whose guarantee rests on who is sampled; fraction can be larger",
            )
        if self.privacy.client is not None and clients > self.privacy.client.clients:
            yield ("strategy", "min_clients"), f"must be at most privacy.client.clients, {self.privacy.client.clients}"
        whole, row = self.privacy.client, self.privacy.row
        if whole is not None and whole.weight_cap is not None and row is not None and row.sampling_rate is not None:
            yield (
                ("privacy", "client", "weight_cap"),
                "needs row counts, and with privacy.row.sampling_rate none are told; set it to null",
            )
        if strategy.name in BY_LOSSES and self.privacy.row is not None:
            yield (
                ("strategy", "name"),
                f"{strategy.name} needs each client's exact loss, which privacy.row does not let out",
            )

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Widths of the model's layers, inputs first. Binary cross entropy tells two classes by one output."""
        return (self.data_schema.inputs, *self.model.hidden, sum(head.width for head in self.heads))

    @property
    def heads(self) -> tuple[Head, ...]:
        """One for each target. `training.loss` is that of the first; others have the usual one of their kind."""
        first, *others = self.data_schema.targets
        width = 1 if self.training.loss == "binary_cross_entropy" else first.outputs
        heads = [Head(self.training.loss, width, first.weight)]
        for target in others:
            loss = "cross_entropy" if isinstance(target, Classes) else "mse"
            heads.append(Head(loss, target.outputs, target.weight))
        return tuple(heads)

    @property
    def loss(self) -> Loss:
        """What a model is trained for."""
        return self.heads if self.data_schema.also else self.training.loss

    def alone(self, target: str) -> Federation:
        """The same for one of its targets, as if it were trained for no other: what the rounds went by is left out.
        Raises `ConfigError` if there is none of this name."""
        for head, task in zip(self.heads, self.data_schema.tasks, strict=True):
            if task.target.name == target:
                training = self.training.model_copy(
                    update={"loss": head.loss, "early_stopping": None, "schedule": None}
                )
                strategy = self.strategy.model_copy(update={"schedule": None})
                return self.model_copy(update={"data_schema": task, "training": training, "strategy": strategy})
        known = ", ".join(one.name for one in self.data_schema.targets)
        raise ConfigError([f"the federation has no target {target}; it has {known}"])

    @property
    def parameters(self) -> int:
        """How many numbers the model has: weights and biases."""
        return sum((fan_in + 1) * out for fan_in, out in pairwise(self.layer_sizes))

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """Which layers are trained, counted from the inputs, from 0: those that are not frozen."""
        frozen = self.start.frozen if self.start is not None else ()
        return tuple(layer for layer in range(len(self.layer_sizes) - 1) if layer not in frozen)

    @property
    def frozen_arrays(self) -> tuple[str, ...]:
        """The names of the arrays that stay as they are."""
        frozen = self.start.frozen if self.start is not None else ()
        return tuple(f"layers.{layer}.{part}" for layer in sorted(frozen) for part in ("weight", "bias"))

    @property
    def model_bytes(self) -> int:
        """Its size as float32."""
        return 4 * self.parameters

    @property
    def canonical(self) -> str:
        """The document as JSON: equal documents are equal text. Defaults are written out, but for a column's usual
        `unfit`, so that older documents keep their fingerprints."""
        return self.model_dump_json(by_alias=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `canonical`, in hex."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def with_rounds(self, rounds: int) -> Federation:
        """The same federation, for another number of rounds. Raises `ConfigError`."""
        return self._with_training(rounds=rounds)

    def with_seed(self, seed: int) -> Federation:
        """The same federation, with another seed. Raises `ConfigError`."""
        return self._with_training(seed=seed)

    def _with_training(self, **changes: int) -> Federation:
        value = json.loads(self.canonical)
        value["training"] |= changes
        try:
            return documents.validate(value, Federation)
        except documents.Mistakes as error:
            raise ConfigError([str(error)]) from error

    def evaluates(self, server_round: int) -> bool:
        """Do clients evaluate after this round?"""
        every, last = self.privacy.evaluation.every, self.training.rounds
        if every == 0 or self.data_schema.validation_fraction == 0:
            return False
        return server_round % every == 0 or server_round == last

    @property
    def tells_energy(self) -> bool:
        """Do clients tell the server what energy they took? Under privacy they do not: how long a task ran depends on
        rows, and no noise is on it."""
        return self.energy and not self.privacy.limits

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures of an evaluation, for this target."""
        return OF_CLASSES if isinstance(self.data_schema.target, Classes) else LOWER_IS_BETTER

    @property
    def evaluation_rounds(self) -> tuple[int, ...]:
        """The rounds after which clients evaluate: every so many, and the last."""
        return tuple(r for r in range(1, self.training.rounds + 1) if self.evaluates(r))


def load(path: Path, *, changes: Mapping[Key, Any] | None = None) -> Federation:
    """Reads federation.yaml, with some values changed. Raises `ConfigError` with every mistake."""
    return documents.load(path, Federation, changes=changes)


def from_canonical(text: str) -> Federation:
    """The document as a server sent it. Raises `ConfigError` with every mistake."""
    try:
        return documents.validate(json.loads(text), Federation)
    except (documents.Mistakes, ValueError, RecursionError) as error:  # a peer may send anything
        raise ConfigError([f"the server's federation document is not valid: {error}"]) from error
