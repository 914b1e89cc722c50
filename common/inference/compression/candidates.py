"""Smaller models than a given one, each as an ONNX file, measured: what `cloister compress` chooses from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data.encoding import RowEncoder
from common.data.tables import Table
from common.document.schema import Classes
from common.inference.compression import smaller
from common.inference.compression.public_rows import PublicRows
from common.inference.evaluation import evaluate
from common.inference.onnx_model import to_onnx
from common.inference.onnx_predictor import OnnxPredictor
from common.inference.onnx_weights import Storage, rounded
from common.inference.predictor import Outputs, Predictor, TorchPredictor
from common.inference.saved import SavedModel
from common.model.weights import Weights

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
DIVISORS = (2, 4, 8)  # of the widths of hidden layers
MOST_LOST = 0.01
COSTS_NOTHING = "made of the released model and of {rows} (post-processing): the privacy statement holds as it is"
NOT_PRIVATE = "made of a model that its owner's rows made without noise: it can reveal them, too"
CHOSEN = "; chosen by its figures on a table, of whose rows the choice tells a little"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that could take the original's place. `weights` are those that its file makes of what lies in it."""

    method: str  # original, pruned or distilled
    weights: Weights
    sparsity: float  # asked of pruning, else 0
    int8: bool
    data: bytes

    @property
    def name(self) -> str:
        how = {
            "original": "original",
            "pruned": f"pruned {100 * self.sparsity:g} %",
            "distilled": f"distilled {'-'.join(map(str, self.hidden))}",
        }[self.method]
        return f"{how}, int8" if self.int8 else how

    @property
    def hidden(self) -> list[int]:
        return hidden_of(self.weights)

    @property
    def parameters(self) -> int:
        """Those that are not 0."""
        return sum(int(np.count_nonzero(array)) for array in self.weights.values())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a candidate does. `lost` is how much worse it is than the original, by the figure that is to choose: points
    of accuracy, or the part by which the error grew; without a table the share of rows with another class, or the mean
    distance of numbers as a share of the target's range."""

    candidate: Candidate
    row_s: float  # the median time of one row
    thousand_s: float  # ... of a thousand
    scores: dict[str, float]  # accuracy or mae, on the table if there is one
    apart: float  # from the original on public rows: as in `lost`
    lost: float

    @property
    def size(self) -> int:
        return len(self.candidate.data)

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        made = self.candidate
        return {
            "model": made.name,
            "method": made.method,
            "hidden": made.hidden,
            "sparsity": made.sparsity,
            "weights": "int8" if made.int8 else "float32",
            "bytes": self.size,
            "parameters": made.parameters,
            "row_us": 1e6 * self.row_s,
            "thousand_rows_ms": 1e3 * self.thousand_s,
            **self.scores,
            "apart": self.apart,
            "lost": self.lost,
        }


def candidates(model: SavedModel, rows: PublicRows, *, seed: int, judged: bool = False) -> Iterator[Candidate]:
    """The original, then what pruning and distillation make of it, each in float32 and in int8. `judged` by a table."""
    federation, weights = model.federation, model.weights
    costs_nothing = COSTS_NOTHING.format(rows=rows.kind) + (CHOSEN if judged else "")

    def stored(method: str, made: Weights, sparsity: float = 0.0) -> Iterator[Candidate]:
        for int8 in (False, True):
            storage = Storage(packed=method == "pruned", int8=int8)
            kept = {k: rounded(v) if int8 and v.ndim == 2 else v for k, v in made.items()}
            about = {
                "method": method,
                "hidden": hidden_of(made),
                "sparsity": sparsity,
                "weights": "int8" if int8 else "float32",
                "rows": rows.source,
                "seed": seed,
                "privacy": NOT_PRIVATE if "personal" in model.privacy else costs_nothing,
            }
            data = to_onnx(model, weights=made, storage=storage, compression=about)
            yield Candidate(method=method, weights=kept, sparsity=sparsity, int8=int8, data=data)

    yield from stored("original", weights)
    for sparsity, made in smaller.pruned(federation, weights, rows.x, sparsities=SPARSITIES, seed=seed):
        yield from stored("pruned", made, sparsity)
    for hidden in narrower(federation.model.hidden):
        yield from stored("distilled", smaller.distilled(federation, weights, rows.x, hidden=hidden, seed=seed))


def narrower(hidden: Sequence[int]) -> list[tuple[int, ...]]:
    """The hidden layers of smaller perceptrons: each divided, and of several the last one alone."""
    tried = [tuple(max(1, units // divisor) for units in hidden) for divisor in DIVISORS]
    if len(hidden) > 1:
        tried.append((hidden[-1],))
    return [sizes for sizes in dict.fromkeys(tried) if sizes != tuple(hidden)]


def hidden_of(weights: Weights) -> list[int]:
    """The units of each hidden layer."""
    return [len(bias) for bias in list(weights.values())[1:-2:2]]


def predictor_of(model: SavedModel, candidate: Candidate) -> TorchPredictor:
    """The candidate in torch, beside which its file can be checked."""
    federation = smaller.resized(model.federation, candidate.hidden)
    return TorchPredictor(SavedModel(federation=federation, weights=candidate.weights, round=model.round))


def measure(tried: Sequence[Candidate], rows: PublicRows, table: Table | None) -> list[Measured]:
    """What each does, as the file that it is. The first is the original.

    Raises `DataError` where the table does not fit.
    """
    found: list[Measured] = []
    first = OnnxPredictor(tried[0].data, "the original", threads=1)
    wanted = _outputs(first, rows.apart)
    for candidate in tried:
        predictor = OnnxPredictor(candidate.data, candidate.name, threads=1)
        scores = _scores(predictor, table)
        apart = _apart(_outputs(predictor, rows.apart), wanted, predictor)
        row_s, thousand_s = latencies(predictor, rows.apart)
        lost = _lost(scores, found[0].scores if found else scores) if scores else apart
        found.append(
            Measured(candidate=candidate, row_s=row_s, thousand_s=thousand_s, scores=scores, apart=apart, lost=lost)
        )
    return found


def latencies(predictor: OnnxPredictor, table: Table) -> tuple[float, float]:
    """Seconds that the file takes for one row and for a thousand, each the median of several runs after some."""
    block = next(RowEncoder(table, predictor.federation.data_schema, with_target=False).blocks())
    given, height = predictor.inputs_of(block), len(block.x)
    found = []
    for rows, runs in ((1, 100), (1000, 20)):
        some = {name: column[np.arange(rows) % height] for name, column in given.items()}
        times = []
        for _ in range(runs + runs // 5):
            start = time.perf_counter()
            predictor.run(some)
            times.append(time.perf_counter() - start)
        found.append(float(np.median(times[runs // 5 :])))
    return found[0], found[1]


def choose(measured: Sequence[Measured], *, target_size: int | None) -> Measured | None:
    """The best whose file is no larger than `target_size`, None if none is; without one the smallest that loses no more
    than `MOST_LOST`."""
    if target_size is None:
        return min((m for m in measured if m.lost <= MOST_LOST), key=lambda m: m.size)
    fitting = [m for m in measured if m.size <= target_size]
    return min(fitting, key=lambda m: (m.lost, m.size), default=None)


def shell(model: SavedModel, original: Candidate) -> int:
    """Bytes of a file that are no weights: encoding, document, schema and privacy statement."""
    return len(original.data) - sum(array.nbytes for array in model.weights.values())


def _scores(predictor: Predictor, table: Table | None) -> dict[str, float]:
    if table is None:
        return {}
    told = evaluate(table, predictor).to_json()
    return {name: told[name] for name in ("accuracy", "mae") if name in told}


def _lost(scores: dict[str, float], original: dict[str, float]) -> float:
    if "accuracy" in scores:
        return original["accuracy"] - scores["accuracy"]
    if original["mae"] == 0:
        return 0.0 if scores["mae"] == 0 else float("inf")
    return scores["mae"] / original["mae"] - 1


def _outputs(predictor: Predictor, table: Table) -> Outputs:
    blocks = RowEncoder(table, predictor.federation.data_schema, with_target=False).blocks()
    return np.concatenate([predictor.outputs(block) for block in blocks])


def _apart(outputs: Outputs, wanted: Outputs, predictor: Predictor) -> float:
    target = predictor.federation.data_schema.target
    if isinstance(target, Classes):
        return float((outputs.argmax(axis=1) != wanted.argmax(axis=1)).mean())
    low, high = target.bounds
    return float(np.abs(outputs - wanted).mean() / (high - low))
