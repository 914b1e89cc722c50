"""An audit passes the true build and catches twelve broken ones, each a real change of what trains.

Seeds are fixed, so a test does the same each time; of other seeds one in 500 would fail the true build.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cloister
from client.training import kernel
from client.training.audit import Check, audit
from client.training.augment import Augmenter
from client.training.dpsgd import fit_privately
from client.training.exact import ExactOptimizer
from client.training.row_draws import row_ids
from cloister.audit import lines
from common.document.augmentation import Augmentation
from common.document.heads import Head
from common.privacy import noise
from common.privacy.noise import NoiseSource
from tests.support import federation

TRIALS = 600


def audited() -> dict[str, Check]:
    numbers = count()
    return {check.name: check for check in audit(lambda: noise.seeded(31, next(numbers)), trials=TRIALS)}


def test_the_true_build_passes():
    found = audited()
    assert list(found) == ["bound", "noise", "distribution", "mean", "batches", "pairs", "steps", "bits", "fresh"]
    assert all(check.passed for check in found.values()), lines(list(found.values()))
    assert 2 < found["bound"].value <= 4  # the bound has something to say


clip, add, sample, draw = (
    ExactOptimizer.clip_and_accumulate,
    ExactOptimizer.add_noise,
    NoiseSource.poisson_sample,
    NoiseSource.rounded_normal,
)


def clipping_at(factor: float) -> Callable[[Any], None]:
    """As if the clip were so much larger; the unit stays."""

    def broken(self: Any) -> None:
        own = self.max_grad_norm
        self.max_grad_norm = own * factor
        clip(self)
        self.max_grad_norm = own
        self._sums = [(part.double() * factor).round().to(torch.int64) for part in self._sums]

    return broken


def noise_times(factor: float) -> Callable[[Any], None]:
    def broken(self: Any) -> None:
        own = self.noise_multiplier
        self.noise_multiplier = own * factor
        add(self)
        self.noise_multiplier = own

    return broken


def every_row(self: NoiseSource, size: int, rate: float) -> Any:
    return np.arange(size)


def twice_the_rate(self: NoiseSource, size: int, rate: float) -> Any:
    return sample(self, size, min(1.0, 2 * rate))


def fixed_size(self: NoiseSource, size: int, rate: float) -> Any:
    chosen = np.random.default_rng(self.integer()).choice(size, round(size * rate), replace=False)
    return np.sort(chosen).astype(np.int64)


def some_in_pairs_and_some_never(self: NoiseSource, size: int, rate: float) -> Any:
    """Of each eight rows two always come together, and of the others each two never: so the variances even out."""
    came = sample(self, size, rate)
    groups = np.random.default_rng(self.integer()).random((-(-size // 8), 4))
    pairs = [
        [g < rate, g < rate] if i == 0 else [g < rate, rate <= g < 2 * rate]
        for row in groups
        for i, g in enumerate(row)
    ]
    return np.flatnonzero(np.concatenate(pairs)[:size]) if size >= 8 else came


def each_row_in_one_step_of_an_epoch(self: NoiseSource, size: int, rate: float) -> Any:
    """Balls in bins: by itself each step is a Poisson sample."""
    if getattr(self, "bins", None) is None or len(self.bins) != size:  # type: ignore[attr-defined]
        self.bins = np.random.default_rng(self.integer()).integers(0, round(1 / rate), size)  # type: ignore[attr-defined]
        self.step = -1  # type: ignore[attr-defined]
    self.step += 1  # type: ignore[attr-defined]
    return np.flatnonzero(self.bins == self.step % round(1 / rate))  # type: ignore[attr-defined]


def from_the_experiments_seed(self: NoiseSource, size: int, tau: float) -> Any:
    return draw(noise.seeded(0), size, tau)


BROKEN = {
    "no clip": (ExactOptimizer, "clip_and_accumulate", clipping_at(500.0), {"bound", "distribution", "mean"}),
    "clip x 1.41": (ExactOptimizer, "clip_and_accumulate", clipping_at(1.41), {"bound"}),
    "noise x 0.5": (ExactOptimizer, "add_noise", noise_times(0.5), {"bound", "noise", "distribution"}),
    "noise x 0.75": (ExactOptimizer, "add_noise", noise_times(0.75), {"noise"}),
    "noise x 0.9": (ExactOptimizer, "add_noise", noise_times(0.9), {"noise"}),
    "every row, each step": (NoiseSource, "poisson_sample", every_row, {"distribution", "mean", "batches"}),
    "twice the rate": (NoiseSource, "poisson_sample", twice_the_rate, {"mean", "batches", "steps"}),
    "batches of a fixed size": (NoiseSource, "poisson_sample", fixed_size, {"batches"}),
    "rows in pairs": (NoiseSource, "poisson_sample", some_in_pairs_and_some_never, {"pairs"}),
    "each row once an epoch": (NoiseSource, "poisson_sample", each_row_in_one_step_of_an_epoch, {"steps"}),
    "noise from the experiment's seed": (NoiseSource, "rounded_normal", from_the_experiments_seed, {"fresh"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_build_is_caught(monkeypatch, name):
    place, function, broken, by = BROKEN[name]
    monkeypatch.setattr(place, function, broken)
    caught = {check.name for check in audited().values() if not check.passed}
    assert by <= caught


def test_noise_in_floating_point_is_off_the_lattice(monkeypatch):
    def in_floats(self: Any) -> None:
        add(self)
        for p in self.params:
            p.grad += self._source.gaussian(p.grad, 1e-9)

    monkeypatch.setattr(ExactOptimizer, "add_noise", in_floats)
    assert not audited()["bits"].passed


# The command


def test_the_command_prints_a_table_and_ends_well():
    done = CliRunner().invoke(cloister.app, ["audit", "--trials", "120"])
    assert done.exit_code == 0, done.output
    head, *rows = [line for line in done.stdout.splitlines() if line]
    assert head.split() == ["check", "measured", "claimed"]
    assert [row.split()[:2] for row in rows[:2]] == [["ok", "bound"], ["ok", "noise"]]


def test_the_command_ends_with_1_and_says_what_failed(monkeypatch):
    monkeypatch.setattr(ExactOptimizer, "add_noise", noise_times(0.25))
    done = CliRunner().invoke(cloister.app, ["audit", "--trials", "120", "--json"])
    assert done.exit_code == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert not checks["noise"]["passed"] and checks["bits"]["passed"]
    assert "do not train with privacy here" in done.stderr


def copied(monkeypatch: pytest.MonkeyPatch, copies: int) -> None:
    """Trains on so many copies of each row, all alike."""
    augmenter = Augmenter(Augmentation(copies=copies), federation().data_schema)

    def fit_copies(model: Any, x: Any, y: Any, **how: Any) -> None:
        fit_privately(model, x, y, augmenter=augmenter, ids=row_ids(np.arange(len(y), dtype=np.uint64)), **how)

    monkeypatch.setattr("client.training.audit.fit_privately", fit_copies)


def test_rows_in_copies_pass(monkeypatch):
    copied(monkeypatch, 4)
    found = audited()
    assert all(check.passed for check in found.values()), lines(list(found.values()))


def test_copies_that_each_count_as_a_row_are_found(monkeypatch):
    copied(monkeypatch, 4)
    monkeypatch.setattr(ExactOptimizer, "__init__", without_copies)
    assert not all(check.passed for check in audited().values())


def with_two_targets(monkeypatch: pytest.MonkeyPatch, weight: float) -> None:
    """Trains for two targets with a head each, of which every other row lacks the second; the canary has both. Its
    errors are those that the audit looks for."""
    heads = (Head("binary_cross_entropy", 1, 1.0), Head("binary_cross_entropy", 1, weight))

    def fit_both(model: Any, x: Any, y: Any, **how: Any) -> None:
        both = torch.stack([1.0 - y, y.float()], -1)
        both[: len(y) // 2 * 2 : 2, 1] = math.nan
        fit_privately(model, x, both, loss=heads, **how)

    monkeypatch.setattr("client.training.audit.fit_privately", fit_both)


def test_rows_with_several_targets_pass(monkeypatch):
    with_two_targets(monkeypatch, 1.0)
    found = audited()
    assert all(check.passed for check in found.values()), lines(list(found.values()))


def test_a_head_that_is_weighed_after_the_clip_is_found(monkeypatch):
    with_two_targets(monkeypatch, 1.0)
    clipped = kernel.ExactMLP.clipped_sum

    def weighed_too_late(self: Any, *args: Any, **how: Any) -> Any:
        sums = clipped(self, *args, **how)
        return sums if isinstance(self._loss, str) else [sums[0] * torch.tensor([[1], [6]])]

    monkeypatch.setattr(kernel.ExactMLP, "clipped_sum", weighed_too_late)
    assert not all(check.passed for check in audited().values())


made = ExactOptimizer.__init__


def without_copies(self: Any, *args: Any, copies: int, **how: Any) -> None:
    made(self, *args, **how)
