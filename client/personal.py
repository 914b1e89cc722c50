"""A model of one's own, made of the federation's on one's own rows; and whether joining was worth it.

It is made after a run, at the owner, without noise, and never leaves: so it costs no privacy, and is not private. Four
models are held against each other on the owner's validation rows, which none of them was made with:

    federation  as it came
    head        the same, its last layer trained further
    personal    the same, trained further as a whole but pulled back to where it began: on the rows' mean loss and
                lambda / 2 |w - w_federation|^2 (Ditto: Li et al. 2021, arXiv:2012.04221, equation 1)
    alone       the same perceptron, trained on one's own rows only: what one would have without the others

How long, how fast and with which lambda each is trained is chosen by cross-validation on the training rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client import data
from client.data import Dataset
from client.device import resolve_device
from client.settings import ClientFile
from client.site import split_key
from client.training import plain
from client.training.augment import Augmenter
from common.document.federation import Federation
from common.document.schema import Classes
from common.errors import DataError
from common.inference.saved import SavedModel
from common.inference.tallies import Z, proportion_interval
from common.model import mlp, objective
from common.model.scores import Scores, scores_of
from common.model.weights import Weights, initial_weights
from common.privacy import noise

Missed = tuple[float, float]  # the share of rows that are wrong (or the mean absolute error), and the mean loss
Errors = NDArray[np.float64]  # [rows]
Kind = Literal["federation", "head", "personal", "alone"]
KINDS: tuple[Kind, ...] = ("federation", "head", "personal", "alone")
LEAST_ROWS = 10  # to train on
FOLDS, ENOUGH_ROWS = 5, 2_000  # from so many rows on one split is as good as cross-validation
STEPS = (0, 8, 16, 32, 64, 128, 256, 512)  # of Adam, in all, after which a model may be taken; more of many rows
LEAST_EPOCHS = 8  # that the last of them are at least: else one alone would be cut short
RATES = (0.002, 0.02)
PULLS = (0.01, 0.1, 1.0)  # lambda
BATCH, LARGE_BATCH, MANY_ROWS = 64, 512, 20_000
CHANCE = 0.05  # at which a difference is taken for more than chance
NOTE = "trained on its owner's rows without noise: it can reveal them, and is not to be given away"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a model is made: so many steps of Adam at a rate, pulled back to its start by `pull`."""

    rate: float = 0.0
    pull: float = 0.0
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Made:
    """One of the four models. `missed` is what it came to in cross-validation, the less the better; `right` is on which
    validation rows it is right (of a number: its error on each, in the target's unit)."""

    kind: Kind
    way: Way
    missed: Missed
    weights: Weights = field(repr=False)
    scores: Scores
    right: Errors = field(repr=False)

    @property
    def interval(self) -> list[float]:
        """The 95 % interval of its accuracy, or of its mean absolute error."""
        if "accuracy" in self.scores:
            return proportion_interval(int(self.right.sum()), len(self.right))
        mean, half = _mean(self.right)
        return [max(mean - half, 0.0), mean + half]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The four models of one owner. `rows` were trained on, `validation_rows` are what they are scored on."""

    models: dict[Kind, Made]
    rows: int
    validation_rows: int

    @property
    def best(self) -> Made:
        """The one of one's own that did best in cross-validation: validation rows have not chosen it."""
        return min((self.models[kind] for kind in ("head", "personal", "alone")), key=lambda made: made.missed)


def own_rows(settings: ClientFile, federation: Federation) -> Dataset:
    """A client's table, dealt to training and validation as in its runs. Nothing is charged: nothing leaves.

    Raises:
        DataError, ConfigError: the table does not fit the federation's schema.
        DeviceError: the device is not here.
    """
    key = split_key(Path(settings.state))
    rows = data.read(
        Path(settings.data.path),
        federation.data_schema,
        key=key,
        form=settings.data.form,
        leave_out=federation.privacy.row is not None,
        person=settings.data.id,
    )
    device = resolve_device(settings.device)
    return data.split(rows, federation.data_schema, key=key, device=device, use_up=True)


def personalise(model: SavedModel, dataset: Dataset) -> Compared:
    """Makes the four models of one owner.

    Raises:
        DataError: there are too few rows to train on, or none to validate on.
    """
    if dataset.rows < LEAST_ROWS or not dataset.validation_rows:
        raise DataError(
            f"{dataset.rows} rows to train on and {dataset.validation_rows} to validate on: to say anything, at least "
            f"{LEAST_ROWS} and 1 are needed"
        )
    trainer = _Trainer(model, dataset)
    made: dict[Kind, Made] = {}
    for kind in KINDS:
        way, missed = trainer.choose(kind)
        weights = trainer.train(kind, way)
        scores, right = _scored(model.federation, weights, dataset.validation_x, dataset.validation_y)
        made[kind] = Made(kind=kind, way=way, missed=missed, weights=weights, scores=scores, right=right)
    return Compared(models=made, rows=dataset.rows, validation_rows=dataset.validation_rows)


def saved_as(made: Made, model: SavedModel) -> SavedModel:
    """One of one's own models as a file's content, which says that it is not private."""
    return replace(model, weights=made.weights, privacy={"personal": NOTE})


class _Trainer:
    """Trains models on one owner's rows."""

    def __init__(self, model: SavedModel, dataset: Dataset) -> None:
        self._federation = model.federation
        self._starts = {kind: model.weights for kind in KINDS} | {"alone": initial_weights(model.federation)}
        self._x, self._y = dataset.x, dataset.y
        self._augmenter = Augmenter.of(model.federation)
        self._batch = min(BATCH if dataset.rows < MANY_ROWS else LARGE_BATCH, dataset.rows)
        longer = max(1.0, LEAST_EPOCHS * dataset.rows / self._batch / STEPS[-1])
        self._steps = [round(longer * steps) for steps in STEPS]
        order = np.random.default_rng(self._federation.training.seed).permutation(dataset.rows)
        folds = FOLDS if dataset.rows < ENOUGH_ROWS else 1
        parts = np.array_split(order, FOLDS)
        self._folds = [(np.concatenate([*parts[:i], *parts[i + 1 :]]), parts[i]) for i in range(folds)]

    def choose(self, kind: Kind) -> tuple[Way, Missed]:
        """The way that misses least on rows that it was not trained on, and by how much."""
        found = {way: self._missed_untrained(kind) for way in _ways(kind) if not way.rate}
        for rate, pull in {(way.rate, way.pull) for way in _ways(kind) if way.rate}:
            found |= self._missed_on_the_way(kind, rate, pull)
        way = min(found, key=lambda way: (found[way], way.steps))
        return way, found[way]

    def _missed_untrained(self, kind: Kind) -> Missed:
        everywhere = np.concatenate([rows for _, rows in self._folds])
        return self._missed(self._starts[kind], everywhere)

    def _missed_on_the_way(self, kind: Kind, rate: float, pull: float) -> dict[Way, Missed]:
        found: dict[Way, list[Missed]] = {}
        for train, rows in self._folds:
            for steps, weights in self._path(kind, rate, pull, train):
                found.setdefault(Way(rate=rate, pull=pull, steps=steps), []).append(self._missed(weights, rows))
        shares = [len(rows) for _, rows in self._folds]
        return {way: _averaged(of_folds, shares) for way, of_folds in found.items()}

    def train(self, kind: Kind, way: Way) -> Weights:
        """On all training rows."""
        if not way.steps:
            return self._starts[kind]
        for steps, weights in self._path(kind, way.rate, way.pull, np.arange(len(self._y))):
            if steps == way.steps:
                return weights
        raise AssertionError(f"{way.steps} is none of the steps")

    def _path(self, kind: Kind, rate: float, pull: float, rows: Any) -> Iterator[tuple[int, Weights]]:
        """A model after each number of steps."""
        model = mlp.with_weights(self._federation, self._starts[kind]).to(self._x.device)
        if kind == "head":
            for parameter in list(model.parameters())[:-2]:
                parameter.requires_grad_(False)
        index = torch.from_numpy(np.asarray(rows)).to(self._x.device)
        x, y = self._x[index], self._y[index]
        how = {"optimizer": "adam", "learning_rate": rate, "batch_size": self._batch, "momentum": 0.0}
        training = self._federation.training.model_copy(update={**how, "nesterov": False})
        start, source = plain.copies(model), noise.seeded(self._federation.training.seed)
        for before, steps in itertools.pairwise(self._steps):
            plain.fit(
                model,
                x,
                y,
                training=training,
                steps=steps - before,
                noise=source,
                proximal_mu=pull,
                start=start,
                augmenter=self._augmenter,
            )
            yield steps, mlp.weights_of(model)

    @torch.no_grad()
    def _missed(self, weights: Weights, rows: Any) -> Missed:
        model = mlp.with_weights(self._federation, weights).to(self._x.device).eval()
        index = torch.from_numpy(np.asarray(rows)).to(self._x.device)
        out, y, loss = model(self._x[index]), self._y[index], self._federation.training.loss
        predicted = objective.predictions(out, loss)
        wrong = predicted != y if loss != "mse" else (predicted - y).abs()
        return float(wrong.double().mean()), float(objective.row_losses(out, y, loss).double().mean())


def _averaged(missed: Sequence[Missed], rows: Sequence[int]) -> Missed:
    """Over folds of so many rows; shares of equal rows are equal, to the last bit that matters."""
    wrong, loss = np.average(np.array(missed), axis=0, weights=rows).tolist()
    return round(wrong, 9), loss


def _ways(kind: Kind) -> list[Way]:
    """Those that are tried."""
    if kind == "federation":
        return [Way()]
    untrained = [] if kind == "alone" else [Way()]
    pulls: Sequence[float] = PULLS if kind == "personal" else (0.0,)
    return untrained + [Way(rate=rate, pull=pull) for rate in RATES for pull in pulls]


@torch.no_grad()
def _scored(federation: Federation, weights: Weights, x: Tensor, y: Tensor) -> tuple[Scores, Any]:
    """A model's metrics on a table, and on which rows it is right, or its error on each."""
    schema, loss = federation.data_schema, federation.training.loss
    model = mlp.with_weights(federation, weights).to(x.device).eval()
    predicted = objective.predictions(model(x), loss)
    scores = scores_of(objective.counts(predicted, y, schema.ungrouped), schema.ungrouped)
    if isinstance(schema.target, Classes):
        return scores, (predicted == y).cpu().numpy().astype(np.float64)
    low, high = schema.target.bounds
    return scores, (predicted.double() - y.double()).abs().cpu().numpy() * (high - low)


def verdict(compared: Compared) -> str:
    """Was joining worth it? One sentence, by the validation rows on which two models differ."""
    joined, alone = compared.models["federation"], compared.models["alone"]
    if "accuracy" not in joined.scores:
        return _verdict_of_numbers(joined, alone)
    better = int(((joined.right == 1) & (alone.right == 0)).sum())
    worse = int(((joined.right == 0) & (alone.right == 1)).sum())
    said = (
        f"On {better} of {compared.validation_rows} rows the federation's model is right and your own alone is wrong, "
        f"and on {worse} it is the other way round: "
    )
    if _by_chance(better, worse) >= CHANCE:
        return f"{said}a difference that chance explains."
    return said + ("joining was worth it." if better > worse else "alone you would have done better.")


def _by_chance(one: int, other: int) -> float:
    """The probability of so uneven a split, or a more uneven one, if both were as likely (McNemar's exact test)."""
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def _mean(values: Errors) -> tuple[float, float]:
    """The mean, and half of its 95 % interval."""
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), half


def _verdict_of_numbers(joined: Made, alone: Made) -> str:
    mean, half = _mean(alone.right - joined.right)
    said = f"On average the federation's model is nearer than your own alone by {mean:.4g}, give or take {half:.4g}: "
    if abs(mean) <= half:
        return f"{said}a difference that chance explains."
    return said + ("joining was worth it." if mean > 0 else "alone you would have done better.")
