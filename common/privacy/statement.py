"""What a private client says that it has released: written by the client, checked when it is admitted, kept by the run
folder and read by `cloister privacy`.

It is enough to recompute epsilon from (`describe` names each release as the field does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from common.text import shown

FROM_SEED, FROM_SYSTEM = "a seeded stream: for simulations only", "AES-256 counter mode, keyed by the operating system"
EXACT = "exact: sums and their noise are whole numbers, so no rounding tells more than is accounted for"
FLOATING = (
    "floating point (Opacus): the figures hold for real numbers, and how floats are rounded can tell more about a row"
)
BY_CLIENT = ", drawn by the client"

# What each number can be.
_BOUNDS = {
    "epsilon": (0.0, math.inf),
    "planned_epsilon": (0.0, math.inf),
    "delta": (0.0, 1.0),
    "noise_multiplier": (0.0, math.inf),
    "sampling_rate": (0.0, 1.0),
    "steps": (0.0, 1e15),
    "count_epsilon": (0.0, math.inf),
    "rows": (0.0, 1e12),
    "evaluation_noise": (0.0, math.inf),
    "evaluations": (0.0, 1e9),
    "secure_noise": (0.0, 1.0),
    "exact_arithmetic": (0.0, 1.0),
    "opacus_planned_epsilon": (0.0, math.inf),
    "opacus_prv": (0.0, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One client's releases so far, and what all of its plan costs. Older clients lack the last four figures."""

    epsilon: float  # what was released costs a row so much, at delta
    planned_epsilon: float  # ... and all that is planned
    delta: float
    noise_multiplier: float  # of an update's steps
    sampling_rate: float
    steps: float  # of all updates together
    count_epsilon: float  # of the row count; 0 if none was told
    rows: float  # the row count that was told
    evaluation_noise: float  # noise multiplier of each evaluation; 0 if there is none
    evaluations: float
    secure_noise: bool = False  # from a keystream of the operating system?
    exact_arithmetic: bool = False
    opacus_planned_epsilon: float | None = None  # `planned_epsilon` by a second accountant
    opacus_prv: bool | None = None  # was that its PRV accountant? Else RDP, an upper bound

    def to_wire(self) -> dict[str, int | float]:
        """As named numbers, which is how it travels."""
        told = {name: value for name, value in vars(self).items() if value is not None}
        return {name: int(value) if isinstance(value, bool) else value for name, value in told.items()}

    @classmethod
    def from_wire(cls, given: Mapping[str, object], *, limit: float = math.inf) -> Statement:
        """What a client stated. `limit` is the epsilon that its federation allows.

        Raises:
            ValueError: it lacks a figure, or has one that no client can state.
        """
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                raise ValueError(f"the privacy statement's {name} is not a finite number")
            if name not in _BOUNDS:
                raise ValueError(f"the privacy statement has {shown(name, 40)!r}, which no client states")
            low, high = _BOUNDS[name]
            if name in ("epsilon", "planned_epsilon"):
                high = limit * (1 + 1e-9)
            if not low <= value <= high:
                raise ValueError(f"the privacy statement's {name} is {value:g}; it is from {low:g} to {high:g}")
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]:
            raise ValueError(f"the privacy statement lacks {', '.join(missing)}")
        figures: dict[str, Any] = dict(given)
        for name in ("secure_noise", "exact_arithmetic", "opacus_prv"):
            if name in figures:
                figures[name] = bool(figures[name])
        return cls(**figures)

    def describe(self, *, clip: float) -> dict[str, Any]:
        """For a reader: what a run's privacy.json says of this client. `clip` is the federation's for a row."""
        size = {
            "what": "how many training rows there are, about",
            "mechanism": "two-sided geometric",
            "part": "train",
            "epsilon": self.count_epsilon,
            "told": self.rows,
        }
        updates = {
            "what": "model updates: noisy sums of clipped row gradients",
            "mechanism": "Gaussian",
            "part": "train",
            "noise_multiplier": self.noise_multiplier,
            "clip": clip,
            "sampler": "Poisson",
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
        }
        counts = {
            "what": "noisy counts of right and wrong predictions",
            "mechanism": "Gaussian",
            "part": "validation",
            "noise_multiplier": self.evaluation_noise,
            "sampler": "no",
            "sampling_rate": 1.0,
            "steps": self.evaluations,
        }
        return {
            "epsilon": self.epsilon,
            "planned_epsilon": self.planned_epsilon,
            "opacus_planned_epsilon": self.opacus_planned_epsilon,
            "opacus_accountant": None if self.opacus_prv is None else "PRV" if self.opacus_prv else "RDP",
            "delta": self.delta,
            "arithmetic": EXACT if self.exact_arithmetic else FLOATING,
            "noise": (FROM_SYSTEM if self.secure_noise else FROM_SEED) + BY_CLIENT,
            "released": [
                *([size] if self.count_epsilon else []),
                updates,
                *([counts] if self.evaluation_noise else []),
            ],
        }

    @classmethod
    def described(cls, told: Mapping[str, Any]) -> Statement:
        """The statement that `describe` described. Raises LookupError or TypeError if that was none."""
        of = {(r["mechanism"], r["part"]): r for r in told["released"]}
        updates = of["Gaussian", "train"]
        counts = of.get(("Gaussian", "validation"), {"noise_multiplier": 0.0, "steps": 0})
        size = of.get(("two-sided geometric", "train"), {"epsilon": 0.0, "told": 0})
        accountant = told.get("opacus_accountant")
        return cls(
            epsilon=told["epsilon"],
            planned_epsilon=told["planned_epsilon"],
            delta=told["delta"],
            noise_multiplier=updates["noise_multiplier"],
            sampling_rate=updates["sampling_rate"],
            steps=updates["steps"],
            count_epsilon=size["epsilon"],
            rows=size["told"],
            evaluation_noise=counts["noise_multiplier"],
            evaluations=counts["steps"],
            secure_noise=told["noise"] == FROM_SYSTEM + BY_CLIENT,
            exact_arithmetic=told.get("arithmetic") == EXACT,
            opacus_planned_epsilon=told.get("opacus_planned_epsilon"),
            opacus_prv=None if accountant is None else accountant == "PRV",
        )


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False
