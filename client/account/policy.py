"""What the data owner permits. A federation that asks for more is refused, with the rule, what was asked and
what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from common.document.documents import Document
from common.document.federation import Federation
from common.errors import Refusal
from common.privacy.plan import ATTEMPTS

Positive = Annotated[float, Field(gt=0)]
Delta = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Release = Literal["model", "evaluation", "row_count"]


class Policy(Document):
    """`policy:` of client.yaml. What is left out is not limited, but nothing leaves without noise.

    `epsilon` and `delta` bound what all federations together may ever cost one row of this dataset.
    """

    epsilon: Positive  # what all federations together may cost one row
    delta: Delta  # ... at this delta
    federation_epsilon: Positive | None = None  # the most that one authority's federations may cost together
    federation_delta: Delta | None = None  # ... at this delta; policy.delta if it is left out
    min_noise_multiplier: Annotated[float, Field(ge=0)] = 0.0  # of any release, updates and evaluations
    max_clip: Positive | None = None  # of one row's gradient
    max_rounds: Count | None = None  # of training for one authority, over all its runs
    attempts: Annotated[int, Field(ge=0)] = ATTEMPTS  # at rounds of a run that a crash cut off
    max_local_steps: Count | None = None  # in a round
    min_seconds_between_rounds: Annotated[float, Field(ge=0)] = 0.0  # also of several federations
    refusals: Annotated[int, Field(ge=0)] = 3  # how many documents that do not fit the table are told so, in all
    releases: tuple[Release, ...] = ("model", "evaluation", "row_count")  # what may leave at all
    arithmetic: Literal["exact", "any"] = "exact"  # any lets `arithmetic: opacus` train in floating point
    without_privacy: bool = False  # may a federation train on this table with no differential privacy?
    # Which documents: all that the policy allows, those that the owner says yes to when asked, or these fingerprints.
    approved: Literal["any-within-policy", "ask"] | tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = (
        "any-within-policy"
    )

    def check(self, federation: Federation) -> None:
        """Raises `Refusal` if the federation asks for what the policy does not allow: the first of `refusals_of`."""
        for refusal in self.refusals_of(federation):
            raise refusal

    def refusals_of(self, federation: Federation) -> list[Refusal]:
        """All that the federation asks and the policy does not allow."""
        training, row = federation.training, federation.privacy.row
        checks: list[Callable[[], None]] = []
        if row is None:
            checks.append(self._check_without_privacy)
        else:
            checks += [
                partial(_at_most, "delta", row.delta, self.delta),
                partial(_at_most, "federation_delta", row.delta, self.federation_delta),
                partial(_at_most, "federation_epsilon", row.epsilon, self.federation_epsilon),
                partial(_at_most, "max_clip", row.clip, self.max_clip),
            ]
            if federation.evaluates(training.rounds) and "evaluation" in self.releases:
                checks.append(partial(self.check_noise, federation.privacy.evaluation.noise))
        checks.append(partial(self.check_rounds, training.rounds))
        if training.local_steps is not None:
            checks.append(partial(self.check_steps, training.local_steps))
        checks.append(partial(self.check_release, "model"))
        if row is None or row.count_epsilon is not None:
            checks.append(partial(self.check_release, "row_count"))
        return [refusal for check in checks if (refusal := _refused(check)) is not None]

    def _check_without_privacy(self) -> None:
        if not self.without_privacy:
            raise Refusal(
                "policy.without_privacy is false, and the federation trains without differential privacy "
                "(privacy.row is null)"
            )

    def check_noise(self, multiplier: float) -> None:
        """Raises `Refusal` if that is too little noise for a release."""
        if multiplier < self.min_noise_multiplier:
            raise _refusal("min_noise_multiplier", f"{multiplier:.3g}", f"at least {self.min_noise_multiplier:g}")

    def check_rounds(self, rounds: int) -> None:
        """Raises `Refusal` if those are too many rounds."""
        _at_most("max_rounds", rounds, self.max_rounds)

    def check_steps(self, steps: int) -> None:
        """Raises `Refusal` if those are too many steps for a round."""
        _at_most("max_local_steps", steps, self.max_local_steps)

    def check_release(self, kind: Release) -> None:
        """Raises `Refusal` if nothing of that kind may leave."""
        if kind not in self.releases:
            raise _refusal("releases", kind, ", ".join(self.releases) or "nothing")

    def pause(self, last: str, now: datetime) -> float:
        """Seconds from `now` until a round may follow one that was charged at `last` (ISO 8601; "" for none)."""
        if not last or not self.min_seconds_between_rounds:
            return 0.0
        earliest = datetime.fromisoformat(last) + timedelta(seconds=self.min_seconds_between_rounds)
        return max(0.0, (earliest - now).total_seconds())

    def check_time(self, last: str, now: datetime) -> None:
        """Raises `Refusal` if it is too early for a round after one that was charged at `last`."""
        if pause := self.pause(last, now):
            earliest = (now + timedelta(seconds=pause)).astimezone(UTC)
            raise _refusal(
                "min_seconds_between_rounds",
                f"a round at {now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC",
                f"from {earliest:%Y-%m-%d %H:%M:%S} UTC on",
            )


def _refused(check: Callable[[], None]) -> Refusal | None:
    try:
        check()
    except Refusal as refusal:
        return refusal
    return None


def _at_most(rule: str, asked: float, allowed: float | None) -> None:
    if allowed is not None and asked > allowed:
        raise _refusal(rule, f"{asked:g}", f"{allowed:g}")


def _refusal(rule: str, asked: str, allowed: str) -> Refusal:
    return Refusal(f"policy.{rule}: asked {asked}, allowed {allowed}")


def for_one_run(federation: Federation) -> Policy:
    """Of a simulated owner, who allows this federation once, as it is planned, and nothing after it."""
    row = federation.privacy.row
    if row is None:
        return Policy(epsilon=1.0, delta=0.5, without_privacy=True)
    # One run's bound has half of an account's delta (entries.py, `spent`); above 1/3 that is less than asked.
    return Policy(epsilon=row.epsilon, delta=min(2 * row.delta, (1 + row.delta) / 2))
