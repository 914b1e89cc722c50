"""A release as the ledger knows it, and what releases cost together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from common.privacy.releases import GaussianRelease, epsilon, epsilon_of_adaptive

Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = get_args(Part)
Mechanism = Literal["gaussian", "geometric", "none", "refusal"]
BY_ID = "id:"  # how the name of a split begins that deals rows by whom they are about, and not by their cells


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
    mechanism: Mechanism
    federation: str  # fingerprint of the document
    content: str  # fingerprint of the table
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    epsilon: float | None = None
    value: int | None = None
    time: str = ""
    authority: str = ""  # a digest of the key that vouches for the server; "" without TLS, and in older entries

    @property
    def deal(self) -> tuple[str, str]:
        """What decides which part a row is in."""
        return deal(self.split, self.content)

    def counts_for(self, authority: str) -> bool:
        """Does it count among what this authority's federations have had? Where no authority is known, all do."""
        return not authority or self.authority in ("", authority)

    @property
    def gaussian(self) -> GaussianRelease:
        assert self.noise_multiplier is not None and self.sampling_rate is not None and self.steps is not None
        return GaussianRelease(
            noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=self.steps
        )


def deal(split: str, content: str) -> tuple[str, str]:
    """Two releases of equal deals have each row, or each person, in the same part.

    By its cells, a row stays where it is while the table does. By an identifier, also when its cells are corrected.
    """
    return split, "" if split.startswith(BY_ID) else content


def spent(entries: Iterable[Entry], delta: float, *, more: Iterable[Entry] = ()) -> float:
    """Epsilon, at `delta`, of all entries and of `more` that are only planned, whoever chose them and when.

    While the table stays as it is, and is split in one way, a row is in one part, so it pays the larger of the two
    parts' costs (parallel composition; McSherry 2009): a table without the row differs in that part alone, for every
    entry. So it is if rows are dealt by an identifier (`data.id`), for all rows of one and whatever their cells become.
    Otherwise the parts' costs are added (sequential composition). A table that was split in two ways may have
    had the row in either part, and so may one that has changed: a person whose cell was corrected is another row by its
    digest, and may be dealt to the other part. A table that has only grown cannot be told from one that was corrected.

    Within a run the parameters of its Gaussian releases are fixed beforehand, and PLD's figure holds (of a run that was
    stopped in the light of its results, only together with the `more` that it had planned). What another run releases
    later, updates or a row count, is chosen in the light of them, and RDP's filter holds. Whether there is anything of
    another run may depend on the first one's outputs, so neither figure alone bounds everything. Each gets delta / 2.
    Proof, for an account that is kept within epsilon by this figure: let P and Q be the laws of all that is told, with
    the row and without it, S any event, and L that something of another run was told of a part after its first Gaussian
    release.

        P(S, not L) <= e^epsilon Q(S, not L) + delta / 2    what is told outside L follows from row counts and then the
                                                            first run alone, played to the end of its plan; its PLD at
                                                            delta / 2 and the counts' epsilons together kept to epsilon
                                                            when it was last checked, before its first Gaussian release
        P(S, L)     <= e^epsilon Q(S, L) + delta / 2        on L the filter kept to epsilon at the last release, and
                                                            before it, since it only grows: a mechanism that the filter
                                                            stops whenever it is passed does on L what ours does

    The sum is (epsilon, delta). A row count is epsilon'-private without a delta, so at every order its RDP is at most
    epsilon', and the filter adds it like any other release, whenever it was chosen.
    """
    return _over_parts((*entries, *more), lambda part: _of_any_runs(part, delta / 2))


def cost_of_run(entries: Iterable[Entry], delta: float) -> float:
    """Epsilon, at `delta`, of one run by itself, as its statement has it: parts as in `spent`, by PLD.

    No bound on an account: such figures of several runs do not add up to one.
    """
    everything = list(entries)
    assert len({e.run for e in everything if e.mechanism == "gaussian"}) <= 1, "one run's entries"
    return _over_parts(everything, lambda part: _pure(part) + epsilon(_releases(part), delta))


def _over_parts(entries: Iterable[Entry], cost: Callable[[list[Entry]], float]) -> float:
    """The larger of the two parts' costs, or that of all if a row may have been in both."""
    everything = [e for e in entries if e.mechanism in ("gaussian", "geometric")]
    if len({e.deal for e in everything}) > 1:
        return cost(everything)
    parts = {e.part for e in everything}
    return max((cost([e for e in everything if e.part == part]) for part in parts), default=0.0)


def _of_any_runs(entries: list[Entry], delta: float) -> float:
    """Of one part's entries, in the order in which they were charged."""
    first = next((i for i, e in enumerate(entries) if e.mechanism == "gaussian"), len(entries))
    several = len({e.run for e in entries[first:]}) > 1
    return _pure(entries) + (epsilon_of_adaptive if several else epsilon)(_releases(entries), delta)


def _pure(entries: list[Entry]) -> float:
    return sum(e.epsilon or 0.0 for e in entries if e.mechanism == "geometric")


def _releases(entries: list[Entry]) -> list[GaussianRelease]:
    return [e.gaussian for e in entries if e.mechanism == "gaussian"]
