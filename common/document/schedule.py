"""`schedule:` of the federation document: how a learning rate goes over a run.

A schedule gives a factor, above 0 and at most 1, by which the document's rate is multiplied in a round or at a step. It
follows from the document and the round alone. A plateau's falls by what evaluations say, so the server tells it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from common.document.documents import Document
from common.document.numbers import Count, Fraction, NonNegative, Share, Whole


class _Schedule(Document):
    """What every schedule shares."""

    warmup: Whole = 0  # rounds in which the rate rises, evenly, to its full size
    over: Literal["rounds", "steps"] = "rounds"  # does the rate change between rounds alone, or at each local step?

    @property
    def words(self) -> str:
        """It in a few words."""
        kind = type(self).__name__.lower()  # which is its name
        over = " at each step" if self.over == "steps" else ""
        rounds = f"{self.warmup} {'round' if self.warmup == 1 else 'rounds'}"
        return f"{kind}{over}" + (f", after {rounds} of warm-up" if self.warmup else "")

    def at(self, server_round: int, *, rounds: int, step: int = 0, steps: int = 1) -> float:
        """What the rate is multiplied by at local step `step` (from 0) of `steps` in round `server_round` (from 1) of
        `rounds`."""
        moments = steps if self.over == "steps" else 1  # in a round, each with a rate of its own
        now = (server_round - 1) * moments + (step if self.over == "steps" else 0)
        rising = self.warmup * moments
        if now < rising:
            return (now + 1) / (rising + 1)
        return self.falling((now - rising) / moments, rounds - self.warmup)

    def falling(self, elapsed: float, length: int) -> float:
        """The factor once `elapsed` rounds have gone by since the warm-up, of `length`."""
        return 1.0


class Constant(_Schedule):
    """How the learning rate (`training.schedule`) or the server's step (`strategy.schedule`) goes over the run:
    constant, step, exponential, cosine or plateau, by name."""

    name: Literal["constant"]  # or another one


class Step(_Schedule):
    name: Literal["step"]
    every: Count  # rounds
    factor: Share = 0.5  # what the rate is multiplied by after each of them

    def falling(self, elapsed: float, length: int) -> float:
        return float(self.factor ** math.floor(elapsed / self.every))


class Exponential(_Schedule):
    name: Literal["exponential"]
    factor: Share = 0.95  # what the rate is multiplied by in a round

    def falling(self, elapsed: float, length: int) -> float:
        return float(self.factor**elapsed)


class Cosine(_Schedule):
    """Half a cosine, from 1 down to `final` (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5)."""

    name: Literal["cosine"]
    final: Fraction = 0.0  # the factor that it would come to after the last round

    def falling(self, elapsed: float, length: int) -> float:
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * elapsed / length)) / 2.0


class Plateau(_Schedule):
    """A rate that falls when evaluations no longer get better (server/rounds/plateau.py)."""

    name: Literal["plateau"]
    metric: Literal["accuracy", "precision", "recall", "f1", "mae", "mse"]  # which evaluation figure is watched
    patience: Count = 3  # evaluations in a row that are not better
    min_change: NonNegative = 0.0  # than the best by so much; should exceed the metric's noise
    factor: Share = 0.5  # what the rate is then multiplied by
    least: Share = 0.01  # it falls to no smaller part of the document's


Schedule = Annotated[Constant | Step | Exponential | Cosine | Plateau, Field(discriminator="name")]
