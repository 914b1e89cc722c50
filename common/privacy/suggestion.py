"""Settings to begin with, by rules that were measured (docs/results.md, "Settings that work").

The rules know the schema, the privacy and how many rows and clients there are, and nothing of the rows themselves.

Where each row is protected, a step takes all rows of a client, so that no count of rows is told and all of them share
the noise. Let sigma be the noise multiplier of T such steps. A client's mean gradient has noise of the deviation
sigma x clip / rows in each entry, the mean over clients sqrt(clients) times less, and T steps of the rate eta add up to
sqrt(T) x eta of it. With reach = T x eta x clip (common/privacy/reach.py) that is, in each weight,

    reach x sigma / (sqrt(T) x rows x sqrt(clients))

and since sigma grows as sqrt(T), neither T nor the clip matters much: the reach decides what noise costs. Inputs are
about 1/2 in size, so an output of a linear model has sqrt(inputs) / 2 times as much. That, for a reach of 1, is
`noise_per_reach`, and the rule for classes is the reach at which an output's noise is 1, within bounds.

Where each client is protected as a whole, the clip is that of a round's update, and the server's noise comes once: then
reach = T x clip, and the number of clients that a round expects is in place of rows x sqrt(clients).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.document import documents
from common.document.federation import Federation
from common.document.mistakes import Key
from common.document.schema import Classes
from common.document.strategy import title
from common.errors import ConfigError
from common.privacy.plan import plan_for
from common.privacy.releases import GaussianRelease, calibrate, client_releases, epsilon

# What the rules were found on, and what they were only tried on: simulations/settings.py.
FOUND_ON = ("the hospitals", "the digits", "breast cancer", "wine", "diabetes")
HELD_BACK = ("iris", "a made-up table of classes", "a made-up table of numbers")


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a run may move a model: `per_noise` / noise_per_reach, from `least` to `most` (L2 norm)."""

    per_noise: float
    least: float
    most: float

    def at(self, noise_per_reach: float) -> float:
        wanted = self.per_noise / noise_per_reach if noise_per_reach else math.inf
        return min(self.most, max(self.least, wanted))


ROWS = Reach(per_noise=1.0, least=15.0, most=60.0)  # classes, with each row protected
WHOLE = Reach(per_noise=1.0, least=7.5, most=15.0)  # classes, with each client protected
NUMBERS = Reach(per_noise=0.15, least=2.0, most=10.0)  # whose outputs lie between 0 and 1
ROUNDS, ROUNDS_OF_NUMBERS = 30, 60  # a number's loss has no bounded slope, and wants smaller steps
CLIP, CLIP_OF_NUMBERS = 1.0, 0.3  # of a row's gradient
MOST_SUGGESTED = 10**9  # rows: beyond that noise is so little that finding it takes long
MOST_ROWS = 10_000  # in a step under privacy.row
BATCH, STEPS, RATE = 32, 8, 0.3  # of clients whose rows have no noise of their own
WHOLE_STEPS = 4  # ... where the update is clipped
HIDDEN = (32,)
TOO_NOISY = 1 / 15  # noise_per_reach above which a hidden layer lost
MANY_CLASSES, CALM = 5, 0.004  # so many classes learned better without one, down to this noise_per_reach


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings for a document, and why."""

    changes: dict[Key, Any]  # as `common.document.federation.load` takes them
    reasons: tuple[str, ...]  # a sentence a value
    noise_per_reach: float  # deviation of an output's noise, for each unit by which a run can move the model
    reach: float | None  # L2 norm; None without privacy
    found_on: tuple[str, ...]  # the tables that the rules for such a document come from
    held_back: tuple[str, ...] = HELD_BACK  # ... and those that they were only tried on
    caveats: tuple[str, ...] = ()  # what of this document was not measured

    @property
    def measured(self) -> str:
        """What all of it was measured on, in a sentence or two."""
        found, held_back = _listed(self.found_on), _listed(self.held_back)
        page = 'docs/results.md, "Settings that work"'
        return f"Measured on {found}, and tried on {held_back} ({page}). The rules know nothing of your rows."


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def suggest(federation: Federation, *, rows: int, clients: int) -> Suggestion:
    """Settings for `clients` clients, each of whose tables has `rows` rows, training and validation together.

    Raises:
        ConfigError: fewer than one row or client, or the document would not be valid with the settings.
        PrivacyError: no noise keeps to the federation's epsilon.
    """
    if not 1 <= rows <= MOST_SUGGESTED or clients < 1:
        raise ConfigError(
            [f"a suggestion is for 1 to {MOST_SUGGESTED:,} rows, and at least 1 client (got {rows:,} and {clients:,})"]
        )
    part = max(1, round(rows * (1 - federation.data_schema.validation_fraction)))
    changes = _steps(federation, part) | _leftovers(federation)
    changes |= _evaluations(changed(federation, changes))
    noise = _noise_per_reach(changed(federation, changes), clients)
    reach = _reach(federation).at(noise) if federation.privacy.limits else None
    if reach is not None:
        changes |= _sizes(federation, reach / _rounds(federation))
    if federation.start is None:  # whose weights have the sizes that they have
        changes[("model", "hidden")] = _hidden(federation, noise)
    changed(federation, changes)
    return Suggestion(
        changes=changes,
        reasons=tuple(_reasons(federation, changes, noise, reach)),
        noise_per_reach=noise,
        reach=reach,
        found_on=_measured_on(federation),
        caveats=tuple(_caveats(federation)),
    )


def changed(federation: Federation, changes: Mapping[Key, Any]) -> Federation:
    """The federation with changes, as `common.document.federation.load` would make them. Raises `ConfigError`."""
    value = json.loads(federation.canonical)
    for key, new in changes.items():
        place = value
        for name in key[:-1]:
            place = place[name]
        place[key[-1]] = new
    try:
        return documents.validate(value, Federation)
    except documents.Mistakes as error:
        raise ConfigError([f"with the suggested settings: {error}"]) from error


def _is_numeric(federation: Federation) -> bool:
    return not isinstance(federation.data_schema.target, Classes)


def _rounds(federation: Federation) -> int:
    return ROUNDS_OF_NUMBERS if _is_numeric(federation) and federation.privacy.limits else ROUNDS


def _clip(federation: Federation) -> float:
    return CLIP_OF_NUMBERS if _is_numeric(federation) else CLIP


def _reach(federation: Federation) -> Reach:
    if _is_numeric(federation):
        return NUMBERS
    return ROWS if federation.privacy.client is None else WHOLE


def _steps(federation: Federation, part: int) -> dict[Key, Any]:
    """What a client does in a round; the learning rate is that without privacy."""
    row, whole = federation.privacy.row, federation.privacy.client
    changes: dict[Key, Any] = {
        ("training", "rounds"): _rounds(federation),
        ("training", "local_steps"): 1 if row is not None else STEPS if whole is None else WHOLE_STEPS,
        ("training", "batch_size"): _batch(federation, part),
        ("training", "learning_rate"): RATE,
    }
    if row is not None:
        changes |= {
            ("privacy", "row", "clip"): _clip(federation),
            ("privacy", "row", "sampling_rate"): min(1.0, MOST_ROWS / part),
            ("privacy", "row", "count_epsilon"): None,
        }
    return changes


def _batch(federation: Federation, part: int) -> int:
    """Rows in a step. A batch a little smaller than a table would leave a second one of very few rows."""
    if federation.privacy.row is not None:
        return min(part, MOST_ROWS)
    return BATCH if federation.privacy.client is None else min(max(BATCH, 2 * part), MOST_ROWS)


def _leftovers(federation: Federation) -> dict[Key, Any]:
    """What a document may have that the rules were not measured with, or that contradicts them, as it must be."""
    training, whole = federation.training, federation.privacy.client
    wanted: dict[Key, Any] = {
        ("training", "local_epochs"): None,
        ("training", "optimizer"): "sgd",
        ("training", "momentum"): 0.0,
        ("training", "nesterov"): False,
    }
    changes = {key: value for key, value in wanted.items() if getattr(training, str(key[-1])) != value}
    for part in ("training", "strategy"):
        if getattr(federation, part).schedule is not None:
            changes[(part, "schedule")] = None
    if federation.privacy.row is not None and whole is not None and whole.weight_cap is not None:
        changes[("privacy", "client", "weight_cap")] = None
    return changes


def _evaluations(federation: Federation) -> dict[Key, Any]:
    """One evaluation, after the last round, where those of the document would cost too much."""
    privacy, times = federation.privacy, len(federation.evaluation_rounds)
    # A row is in one part, so its evaluations may cost all of epsilon; a client is in both.
    shares = [(unit, share) for unit, share in ((privacy.row, 1.0), (privacy.client, 0.5)) if unit is not None]
    release = GaussianRelease(noise_multiplier=privacy.evaluation.noise or 1.0, steps=times)
    if not times or all(epsilon([release], unit.delta) <= share * unit.epsilon for unit, share in shares):
        return {}
    least = max(calibrate(share * unit.epsilon / 2, unit.delta, sampling_rate=1.0, steps=1) for unit, share in shares)
    noise = max(privacy.evaluation.noise, math.ceil(10 * least) / 10)
    return {
        ("privacy", "evaluation", "every"): federation.training.rounds,
        ("privacy", "evaluation", "noise"): noise,
    }


def _sizes(federation: Federation, step: float) -> dict[Key, Any]:
    """The learning rate, or the clip of a client's update, with which a round moves the model by at most `step`."""
    changes: dict[Key, Any] = {}
    if federation.privacy.row is not None:
        changes[("training", "learning_rate")] = _rounded(step / _clip(federation))
    if federation.privacy.client is not None:
        changes[("privacy", "client", "clip")] = _rounded(step)
    return changes


def _hidden(federation: Federation, noise: float) -> list[int]:
    if federation.privacy.limits:
        target = federation.data_schema.target
        many = isinstance(target, Classes) and len(target.classes) >= MANY_CLASSES and noise > CALM
        if many or noise > TOO_NOISY or (federation.privacy.client is not None and not _is_numeric(federation)):
            return []
    return list(HIDDEN)


def _noise_per_reach(federation: Federation, clients: int) -> float:
    """The deviation of the noise of an output, for a reach of 1: of both units together, where both are protected."""
    training, row, whole = federation.training, federation.privacy.row, federation.privacy.client
    fraction, own, server = federation.strategy.fraction, 0.0, 0.0
    if row is not None:
        sigma = plan_for(federation, rows=training.batch_size, epsilon=row.epsilon).noise_multiplier
        own = sigma / training.batch_size / math.sqrt(max(1.0, fraction * clients))
    if whole is not None:
        server = client_releases(federation)[0].noise_multiplier / (fraction * whole.clients)
    return math.hypot(own, server) / math.sqrt(training.rounds) * math.sqrt(federation.layer_sizes[0]) / 2


def _rounded(value: float) -> float:
    """To two significant digits."""
    return float(f"{value:.2g}")


def _reasons(federation: Federation, changes: Mapping[Key, Any], noise: float, reach: float | None) -> list[str]:
    """A sentence a value, in the order of the changes."""
    row = federation.privacy.row is not None
    bound = (
        f"a run then moves the model by at most {reach or 0:.2g}, and each unit of that gives an output noise of "
        f"{noise:.2g}"
    )
    why: dict[Key, str] = {
        ("training", "rounds"): (
            "more brought little, as noise depends on how far the run moves the model and hardly on the number of steps"
            if reach
            else "more brought little"
        ),
        ("training", "local_steps"): (
            "several steps of a round have the noise of as many rounds"
            if row
            else "it did at least as well as one step"
        ),
        ("training", "batch_size"): (
            "all of a client's training rows share the noise; the noisy sum is divided by this number"
            if row
            else "it did as well as all rows at once, or better"
            if not federation.privacy.limits
            else "a step takes all rows of a client, also of one with twice as many; small batches mostly did no better"
        ),
        ("training", "learning_rate"): bound if row else "0.1 was too slow and 1 did not always converge",
        ("privacy", "row", "clip"): "from 0.1 to 1 it hardly mattered while learning_rate x clip stayed the same",
        ("privacy", "row", "sampling_rate"): (
            "every row is in every step, and no count of rows has to be paid for"
            if changes.get(("privacy", "row", "sampling_rate")) == 1.0
            else f"a step of {MOST_ROWS:,} rows is enough of a large table; this was tried on no table"
        ),
        ("privacy", "row", "count_epsilon"): "with a sampling rate no count is told",
        ("privacy", "client", "clip"): bound,
        ("model", "hidden"): _why_hidden(federation, changes.get(("model", "hidden")), noise),
        (
            "privacy",
            "evaluation",
            "every",
        ): "the document's evaluations would cost more of epsilon than there is for them",
        ("privacy", "evaluation", "noise"): "one evaluation then leaves half of what there is for them",
    }
    return [
        f"{'.'.join(map(str, key))} is {json.dumps(value)}: {why.get(key, 'the rules were measured so')}"
        for key, value in changes.items()
    ]


def _measured_on(federation: Federation) -> tuple[str, ...]:
    """The tables that the rules for such a federation come from."""
    if _is_numeric(federation):
        return ("diabetes",)
    if federation.privacy.client is not None and federation.privacy.row is None:
        return ("the digits", "breast cancer")
    return ("the hospitals", "the digits", "breast cancer", "wine")


def _why_hidden(federation: Federation, hidden: object, noise: float) -> str:
    if hidden:
        return "a hidden layer did as well as a linear model or better, on most tables"
    if federation.privacy.client is not None:
        return "with whole clients protected a linear model did better"
    if noise > TOO_NOISY:
        return "with so much noise a linear model did better, on most tables"
    return "with many classes and noise a linear model did better"


def _caveats(federation: Federation) -> list[str]:
    """What of the document was not measured."""
    privacy, found = federation.privacy, []
    if federation.strategy.name not in ("fedavg", "fedprox"):
        found.append(f"strategy {title(federation.strategy)} takes steps of its own, and was not measured")
    if privacy.row is not None and privacy.client is not None:
        found.append("both units at once were not measured: each rule is used as if the other's noise were its own")
    if privacy.client is not None and _is_numeric(federation):
        found.append("numbers were not measured with whole clients protected: the rule is that of protected rows")
    if federation.data_schema.also:
        found.append("several targets were not measured: the rules look at the first")
    if federation.training.augmentation is not None:
        found.append("augmentation was not measured")
    return found
