"""A release as the ledger knows it, and what releases cost together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from common.privacy import Accountant, GaussianRelease, epsilon, epsilon_of_adaptive

Part = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One release, completely enough to account for it knowing nothing else.

    A Gaussian release has a noise multiplier, sampling rate and steps; a geometric one (a row count) is
    `epsilon`-private by itself and has `value`, what was told. "none" is an exact release, where the policy allows one:
    no epsilon bounds it, and none is counted for it. "refusal" is a document that did not fit the table, which the
    server heard: only a few are told (policy `refusals`), a limit on bits and not on epsilon.
    """

    part: Part
    split: str  # which rows can be in which part: parts are disjoint only under one split
    run: str
    task: str
    attempt: int
    mechanism: Literal["gaussian", "geometric", "none", "refusal"]
    federation: str  # fingerprint of the document
    content: str  # fingerprint of the table
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    epsilon: float | None = None
    value: int | None = None
    time: str = ""
    authority: str = ""  # a digest of the key that vouches for the server; "" without TLS, and in entries of before

    def counts_for(self, authority: str) -> bool:
        """Does it count among what this authority's federations have had? Where no authority is known, all do."""
        return not authority or self.authority in ("", authority)

    @property
    def gaussian(self) -> GaussianRelease:
        assert self.noise_multiplier is not None and self.sampling_rate is not None and self.steps is not None
        return GaussianRelease(
            noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=self.steps
        )


def spent(
    entries: Iterable[Entry], delta: float, *, more: Iterable[Entry] = (), accountant: Accountant | None = None
) -> float:
    """Epsilon, at `delta`, of all entries and of `more` that are only planned.

    While the table stays as it is, and is split in one way, a row is in one part, so it pays the larger of the two
    parts' costs (parallel composition; McSherry 2009): a table without the row differs in that part alone, for every
    entry. Otherwise the parts' costs are added (sequential composition). A table that was split in two ways may have
    had the row in either part, and so may one that has changed: a person whose cell was corrected is another row by its
    digest, and may be dealt to the other part. A table that has only grown cannot be told from one that was corrected.

    Within a run the parameters of its Gaussian releases are fixed beforehand, and PLD's figure holds (of a run that was
    stopped in the light of its results, only together with the `more` that it had planned). A later run is
    chosen in the light of earlier ones; several runs cost what RDP's filter says. An `accountant` by name gives its
    figure for all runs as if they had been fixed beforehand: to compare, not to rely on.
    """
    everything = [e for e in (*entries, *more) if e.mechanism in ("gaussian", "geometric")]
    if len({(e.split, e.content) for e in everything}) > 1:
        return _sequential(everything, delta, accountant)
    parts = {e.part for e in everything}
    costs = (_sequential([e for e in everything if e.part == part], delta, accountant) for part in parts)
    return max(costs, default=0.0)


def _sequential(entries: list[Entry], delta: float, accountant: Accountant | None) -> float:
    pure = sum(e.epsilon or 0.0 for e in entries if e.mechanism == "geometric")
    gaussian = [e for e in entries if e.mechanism == "gaussian"]
    releases = [e.gaussian for e in gaussian]
    if accountant is None and len({e.run for e in gaussian}) > 1:
        return pure + epsilon_of_adaptive(releases, delta)
    return pure + epsilon(releases, delta, accountant=accountant or "pld")
