"""Differential privacy for whole clients, added by the server (`privacy.client`).

DP-FedAvg (McMahan, Ramage, Talwar, Zhang 2018, arXiv:1710.06963, algorithm 1, with the fixed denominator of its
equation for f_f) on top of any Flower strategy that moves by a mean of updates.

Unit: one client. Neighbours: federations in which what one client sends counts, or counts as nothing; that it is
enrolled and connected is public. Adversary: sees every model and every metric that leaves the server; the server is
trusted, and with it whoever can see which clients a round asks. Sampler: Poisson, each connected client independently
with probability `strategy.fraction`, drawn from the server's noise source, which no seed of the document reaches.

    sum of w_k clip(update_k) + N(0, (noise_multiplier x clip)^2 I), divided by fraction x clients

w_k is 1, or min(rows, weight_cap) / weight_cap. The denominator is public and does not change with who answers, so a
reply that is missing, rejected or late only leaves its place in the sum empty: sensitivity, noise and charge stay.

All of this is done in integers, since the low bits of a float sum with float noise tell what was summed (Mironov 2012).
Each client's part v_k is a vector of whole units that follows from its reply and public numbers alone, of an L2 norm
of at most S, checked exactly (server/rounds/lattice_vectors.py). What leaves is

    sum of v_k + rint(N(0, (noise_multiplier x S)^2 I)) = rint(sum of v_k + N(0, (noise_multiplier x S)^2 I))

times the unit: a rounded Gaussian mechanism of sensitivity S, hence at most as costly as the one that is charged.

    release        unit          S, for n numbers
    model          clip / 2^24   2^24 + floor(sqrt(n) / 2) + 2
    counts         2^-20         the same, with the counts' sensitivity in units, rounded up, for 2^24
    adaptive clip  2^-20         2^19: each client adds or takes 1/2
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.document.federation import ClientPrivacy, Federation
from common.errors import PrivacyError
from common.model.scores import COUNT_UNIT, Counts, count_sensitivity, count_size, rows_of
from common.model.update import Update, Updates
from common.model.weights import Weights, flat_of, of_flat
from common.privacy.noise import NoiseSource
from common.privacy.releases import client_releases, epsilon
from common.privacy.rounded_normal import Integers
from common.privacy.statement import FROM_SEED, FROM_SYSTEM
from server.rounds.aggregation import TOGETHER
from server.rounds.lattice_vectors import clipped, longest

STEPS = 2**24  # units in a clip: rounding to them is far below the noise, which is at least 2^-7 of a clip
HALF = 2**19  # of a client, in units of 2^-20
# Noise is drawn with a deviation from 2^11 to 2^52. The least is 2^19 x 0.008, since calibration returns no smaller
# multiplier and the document takes none below 0.01; the largest is 2^27 x 2^25.
MOST_NOISE = 2.0**27
LEAST_CLIP, MOST_CLIP = 2.0**-400, 2.0**400  # where its unit and the lattice stay in float64


@dataclass(frozen=True)
class Charged:
    """What has been released about a client so far. Stands in the checkpoint beside the model that it paid for."""

    updates: int = 0
    evaluations: int = 0


@dataclass(frozen=True)
class Spent:
    """What a restart needs to know of a run's privacy for whole clients."""

    charged: Charged
    clip: float


class ClientLevelDP:
    """The server's sampler, noise and account for one run."""

    def __init__(self, federation: Federation, noise: NoiseSource) -> None:
        """Raises `PrivacyError` if no noise keeps the run within `privacy.client.epsilon`, or only noise that has no
        integers."""
        assert federation.privacy.client is not None
        self.settings: ClientPrivacy = federation.privacy.client
        self.clip = self.settings.clip
        self.told_clip = self.clip  # that of the last round that is on disk: it follows from a noisy count
        self.charged = Charged()
        self._federation, self._noise = federation, noise
        self._present = self.settings.clients
        self.updates, self.evaluations = client_releases(federation)
        share = self.settings.adaptive.share if self.settings.adaptive else 0.0
        # Two Gaussian releases of one round cost what a single one does whose 1 / noise_multiplier^2 is their sum
        # (Andrew et al. 2021, theorem 1).
        self._update_noise = self.updates.noise_multiplier / math.sqrt(1 - share)
        self._count_noise = self.updates.noise_multiplier / math.sqrt(share) if share else 0.0
        if (most := max(self._update_noise, self._count_noise)) > MOST_NOISE:
            raise PrivacyError(
                f"privacy.client: noise multiplier {most:g} is above {MOST_NOISE:g}; raise epsilon, or take a share "
                "further from 0 and 1"
            )

    @property
    def spent(self) -> Spent:
        return Spent(self.charged, self.clip)

    def restore(self, spent: Spent) -> None:
        """Goes on from what a checkpoint kept."""
        self.charged, self.clip, self.told_clip = spent.charged, spent.clip, spent.clip

    @property
    def denominator(self) -> float:
        """How many clients a round asks on average, if all are connected: fraction x clients."""
        return self._federation.strategy.fraction * self.settings.clients

    def sample(self, present: list[int]) -> list[int]:
        """The nodes that a round asks. None at all is a sample like any other."""
        self._present = len(present)
        return [present[i] for i in self._noise.poisson_sample(len(present), self._federation.strategy.fraction)]

    def aggregator(self, weights: Weights) -> NoisyMean:
        """Of a round that moves `weights`."""
        return NoisyMean(self, weights, frozen=self._federation.frozen_arrays)

    def finish(self, part: NoisyMean) -> Weights:
        """The weights moved by the noisy mean of clipped updates. Charged before it is computed."""
        self.charged = replace(self.charged, updates=self.charged.updates + 1)
        noisy = self._noisy(part.total, self._update_noise, longest(STEPS, len(part.total)))
        self._follow(part.within)
        moved = part.trained(part.weights)
        return part.weights | _like(part.start + noisy * (part.unit / self.denominator), moved)

    def _noisy(self, total: Integers, noise_multiplier: float, sensitivity: int) -> Integers:
        """The Gaussian mechanism on integers, rounded."""
        return total + self._noise.rounded_normal(len(total), math.nextafter(noise_multiplier * sensitivity, math.inf))

    def _follow(self, within: int) -> None:
        """Moves the clip towards its quantile (Andrew et al. 2021, algorithm 1).

        `within` sums 1/2 for each update within the clip and -1/2 for each other, in units of 2^-20, so a client moves
        it by 2^19. It is a share of those that were connected, which is public: else absent clients would pull the
        clip to one side.
        """
        if (adaptive := self.settings.adaptive) is None:
            return
        noisy = int(self._noisy(np.array([within]), self._count_noise, HALF)[0]) / (2 * HALF)
        share = min(max(noisy / (self._federation.strategy.fraction * self._present) + 0.5, 0.0), 1.0)
        clip = self.clip * math.exp(-adaptive.learning_rate * (share - adaptive.quantile))
        self.clip = min(max(clip, LEAST_CLIP), MOST_CLIP)

    def counts(self, of_clients: Iterable[Counts]) -> Counts:
        """The noisy sum of clients' counts, each scaled to one row, so that all clients weigh the same.

        Charged before it is computed. A client's counts are clipped to an L2 norm of `count_sensitivity` and rounded
        to multiples of `COUNT_UNIT`, as is the noise. Counts that are not finite count as zeros.
        """
        assert self.evaluations is not None
        self.charged = replace(self.charged, evaluations=self.charged.evaluations + 1)
        schema = self._federation.data_schema
        steps = count_sensitivity(schema) / COUNT_UNIT
        total = np.zeros(count_size(schema), np.int64)
        for counts in of_clients:
            with np.errstate(invalid="ignore", over="ignore"):
                scaled = counts / max(rows_of(counts, schema), 1.0)
            total += clipped(scaled, unit=COUNT_UNIT, steps=steps).whole
        noisy = self._noisy(total, self.evaluations.noise_multiplier, longest(steps, len(total)))
        return noisy.astype(np.float64) * COUNT_UNIT

    @property
    def epsilon(self) -> float:
        """What has been released costs one client so much, if its amount was fixed beforehand."""
        return self._cost(self.charged.updates, self.charged.evaluations)

    @property
    def planned_epsilon(self) -> float:
        """What the whole run costs one client at most, whenever it stops and whyever."""
        return self._cost(self.updates.steps, self.evaluations.steps if self.evaluations is not None else 0)

    def _cost(self, updates: int, evaluations: int) -> float:
        releases = [replace(self.updates, steps=updates)]
        if self.evaluations is not None:
            releases.append(replace(self.evaluations, steps=evaluations))
        return epsilon(releases, self.settings.delta)

    def statement(self) -> dict[str, Any]:
        """What privacy.json says of this unit."""
        return {
            "epsilon": self.planned_epsilon,
            "epsilon_so_far": self.epsilon,  # that of `released`; holds if the run's end did not depend on its results
            "delta": self.settings.delta,
            "unit": "one client",
            "neighbours": "federations in which what one client sends counts, or counts as nothing",
            "adversary": (
                "sees every model and metric that leaves the server; the server, and whoever sees which clients it "
                "asks, is trusted"
            ),
            "accountant": "PLD (privacy loss distributions, composed numerically)",
            "composition": "a client is in updates and evaluations, so it pays for both",
            "noise": FROM_SYSTEM if self._noise.hardened else FROM_SEED,
            "released": self._released(),
            "not_covered": [
                "that a client is enrolled, when it is connected, and that it refuses",
                "how long a round takes, which can tell how many clients it asked, and whether one that is "
                "recognisably slow was among them",
                "other runs with the same clients, also after a restart: their costs add up",
                "whoever can read the server's memory, its network or a client's messages",
            ],
        }

    def _released(self) -> list[dict[str, Any]]:
        cap, adaptive = self.settings.weight_cap, self.settings.adaptive
        models = {
            "what": "models: noisy sums of clipped client updates",
            "mechanism": "Gaussian",
            "noise_multiplier": self.updates.noise_multiplier,
            "sampler": "Poisson",
            "sampling_rate": self.updates.sampling_rate,
            "steps": self.charged.updates,
            "clip": self.settings.clip,
            "denominator": self.denominator,
            "weights": "equal" if cap is None else f"rows, at most {cap:g}, over {cap:g}",
        }
        if adaptive is not None:
            models["adaptive_clip"] = {
                "quantile": adaptive.quantile,
                "what": "a noisy count of the clipped updates; both releases together have the noise multiplier above",
                "update_noise_multiplier": self._update_noise,
                "count_noise_multiplier": self._count_noise,
                "clip_now": self.told_clip,
            }
        if self.evaluations is None:
            return [models]
        metrics = {
            "what": "metrics of noisy counts",
            "mechanism": "Gaussian",
            "noise_multiplier": self.evaluations.noise_multiplier,
            "sampler": "no",
            "sampling_rate": 1.0,
            "steps": self.charged.evaluations,
        }
        return [models, metrics]


class NoisyMean:
    """An aggregator (aggregation.py) of clipped updates as whole numbers, whose sum gets its noise at the end.

    Each update is clipped when it is added, so parts of a cohort may be added up anywhere and merged. Arrays that are
    frozen have no part in it: no update of theirs counts, and they get no noise.
    """

    loss = None  # none is told

    def __init__(self, mechanism: ClientLevelDP, weights: Weights, *, frozen: Collection[str] = ()) -> None:
        self._mechanism: ClientLevelDP | None = mechanism
        self._cap, self.weights, self._frozen = mechanism.settings.weight_cap, weights, frozenset(frozen)
        self.start, self.unit = _flat(self.trained(weights)), mechanism.clip / STEPS
        self.total: Integers = np.zeros(len(self.start), np.int64)
        self.within = 0  # for the adaptive clip: 1/2 for each update within it and -1/2 for each other, times 2^20

    def __getstate__(self) -> dict[str, Any]:
        """For another process: it can add and be merged. Noise, and so the end, stays where it was made."""
        return {**vars(self), "_mechanism": None}

    def trained(self, weights: Weights) -> Weights:
        """Those arrays that are not frozen."""
        return {name: array for name, array in weights.items() if name not in self._frozen}

    def add(self, node: int, update: Update) -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite counts as zeros
            moved = _flat(self.trained(update.weights)) - self.start
        part = clipped(moved, unit=self.unit, steps=STEPS, weight=weight_of(update, self._cap))
        self.total += part.whole
        self.within += HALF if part.within else -HALF

    def add_all(self, nodes: Sequence[int], updates: Updates) -> None:
        for node, update in zip(nodes, updates, strict=True):
            self.add(node, update)

    def merge(self, other: NoisyMean) -> None:
        self.total += other.total
        self.within += other.within

    def finish(self) -> list[tuple[int, Update]]:
        """No update at all gives an outcome like any other: else one would tell who was asked."""
        assert self._mechanism is not None, "only where it was made does it get its noise"
        return [(TOGETHER, Update(weights=self._mechanism.finish(self), weight=1.0))]


def weight_of(update: Update, cap: float | None) -> float:
    """What an update counts, from 0 to 1."""
    return 1.0 if cap is None else min(update.weight, cap) / cap


def _flat(weights: Weights) -> NDArray[np.float64]:
    return flat_of(weights).astype(np.float64)


def _like(flat: NDArray[np.float64], weights: Weights) -> Weights:
    """`flat` in the shapes and types of `weights`."""
    return {name: array.astype(weights[name].dtype) for name, array in of_flat(flat, weights).items()}
