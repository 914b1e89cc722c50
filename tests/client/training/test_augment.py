"""Changed rows: what a row draws follows from it alone, and what is drawn is what the document says."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from client.training.augment import Augmenter, PlainAugmenter
from client.training.dpsgd import fit_privately
from client.training.plain import fit
from client.training.recipe import DPSGD
from client.training.row_draws import KEY, row_ids
from common.document.augmentation import Augmentation
from common.document.federation import Federation, load
from common.document.schema import Schema
from common.errors import ConfigError
from common.model import mlp
from common.model.mlp import MLP
from common.privacy import noise
from tests.support import PRIVATE, document, federation

A_KEY = bytes(range(KEY))
FEATURES = [
    {"name": "a", "type": "numeric", "bounds": [0, 9]},
    {"name": "b", "type": "numeric", "bounds": [0, 9], "optional": True},
    {"name": "c", "type": "categorical", "categories": ["red", "green"]},
]
PIXELS = [{"name": f"p{i}", "type": "numeric", "bounds": [0, 16]} for i in range(2 * 4 * 3)]
PICTURE = {"first": "p0", "height": 4, "width": 3, "channels": 2}


def schema(**changes: Any) -> Schema:
    return federation(schema__features=FEATURES, **changes).data_schema


def pictured(**changes: Any) -> Federation:
    """A number, a picture of 2 x 4 x 3, and a number."""
    features = [FEATURES[0], *PIXELS, FEATURES[1]]
    return federation(schema__features=features, schema__image=PICTURE, **changes)


def ids(rows: int) -> Any:
    return row_ids(np.random.default_rng(5).integers(0, 2**63, rows).astype(np.uint64))


def changed(augmenter: Augmenter, x: Tensor, seed: int = 5) -> Tensor:
    y = torch.zeros(len(x), dtype=torch.int64)
    return augmenter.rows(x, y, row_ids(np.arange(len(x), dtype=np.uint64)), seed.to_bytes(KEY, "big"))[0]


def rows_of(number: int) -> Tensor:
    """a, b, is b missing?, red, green, other."""
    rng = np.random.default_rng(2)
    x = np.zeros((number, 6), np.float32)
    x[:, 0], x[:, 1] = rng.uniform(-1, 1, (2, number))
    x[::4, 1], x[::4, 2] = 0.0, 1.0
    x[np.arange(number), 3 + rng.integers(0, 3, number)] = 1.0
    return torch.from_numpy(x)


EVERYTHING = Augmentation(copies=3, jitter=0.1, drop=0.2, shift=1, flip=True)


def test_what_becomes_of_a_row_depends_neither_on_the_batch_nor_on_its_place():
    augmenter = Augmenter(EVERYTHING, pictured().data_schema)
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (101, 27)).astype(np.float32))
    y, named = torch.arange(101), ids(101)
    together, labels = augmenter.rows(x, y, named, A_KEY)
    assert (together.shape, labels.tolist()[:6]) == ((303, 27), [0, 0, 0, 1, 1, 1])
    for picked in ([3], [99, 3, 50], list(range(100, -1, -1))):
        alone, _ = augmenter.rows(x[picked], y[picked], named[picked], A_KEY)
        assert torch.equal(alone.view(-1, 3, 27), together.view(-1, 3, 27)[picked])
    assert len({tuple(row.tolist()) for row in together}) == 303  # no copy is like another
    assert not torch.equal(augmenter.rows(x, y, named, bytes(KEY))[0], together)


def test_jitter_is_normal_on_numbers_that_are_there_and_stays_within_their_bounds():
    augmenter = Augmenter(Augmentation(copies=4, jitter=0.2), schema())
    x = rows_of(4000)
    found = changed(augmenter, x)
    before = x.repeat_interleave(4, 0)
    assert torch.equal(found[:, 2:], before[:, 2:])  # a flag and a category are no numbers
    missing = before[:, 2] == 1
    assert not found[missing, 1].any() and missing.any()
    assert found[:, :2].abs().max() == 1.0
    inner = (before[:, 0].abs() < 0.2).numpy()  # 4 deviations from the bounds
    moved = (found[:, 0] - before[:, 0]).numpy()[inner] / 0.2
    assert stats.kstest(moved, "norm").pvalue > 1e-3
    other = ((before[:, 1].abs() < 0.2) & ~missing).numpy() & inner
    pair = [(found[:, i] - before[:, i]).numpy()[other] for i in (0, 1)]
    assert abs(np.corrcoef(pair)[0, 1]) < 5 / np.sqrt(other.sum())


def test_a_dropped_column_is_as_if_it_were_missing():
    x = rows_of(4000)
    found = changed(Augmenter(Augmentation(drop=0.3), schema()), x)
    gone_a, gone_b = found[:, 0] != x[:, 0], (found[:, 1] != x[:, 1]) | (found[:, 2] != x[:, 2])
    gone_c = (found[:, 3:] != x[:, 3:]).any(1)
    assert not found[gone_a, 0].any()  # the middle
    assert (found[gone_b, 1:3] == torch.tensor([0.0, 1.0])).all()
    assert not found[gone_c, 3:].any()
    for gone, of in ((gone_a, 4000), (gone_b, 3000), (gone_c, 4000)):
        assert abs(int(gone.sum()) - 0.3 * of) < 5 * np.sqrt(0.21 * of)


def test_an_image_is_moved_by_each_number_of_pixels_equally_often_and_nothing_else_is():
    augmenter = Augmenter(Augmentation(shift=1), pictured().data_schema)
    x = torch.from_numpy(np.random.default_rng(1).uniform(-0.9, 1, (1, 27)).astype(np.float32)).repeat(9000, 1)
    found = changed(augmenter, x)
    assert torch.equal(found[:, [0, 25, 26]], x[:, [0, 25, 26]])
    picture = x[0, 1:25].view(2, 4, 3)
    padded = torch.nn.functional.pad(picture, (1, 1, 1, 1), value=-1.0)
    windows = {
        tuple(padded[:, down : down + 4, right : right + 3].flatten().tolist()): 0
        for down in range(3)
        for right in range(3)
    }
    for row in found[:, 1:25].tolist():
        windows[tuple(row)] += 1  # a KeyError for anything else
    assert len(windows) == 9
    assert stats.chisquare(list(windows.values())).pvalue > 1e-3


def test_an_image_is_mirrored_every_other_time():
    augmenter = Augmenter(Augmentation(flip=True), pictured().data_schema)
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (1, 27)).astype(np.float32)).repeat(1000, 1)
    found = changed(augmenter, x)[:, 1:25].view(-1, 2, 4, 3)
    before = x[:, 1:25].view(-1, 2, 4, 3)
    same = (found == before).flatten(1).all(1)
    assert torch.equal(found[~same], before[~same].flip(-1))
    assert abs(int(same.sum()) - 500) < 5 * np.sqrt(250)


def test_rows_without_privacy_are_changed_anew_at_each_step():
    plain = PlainAugmenter(Augmenter(Augmentation(copies=2, jitter=0.1), schema()), 7)
    places = np.arange(5)
    first = plain.draw(places, 0)
    assert first.shape == (10, 2) and len(np.unique(first)) == 20
    assert not np.intersect1d(first, plain.draw(places, 1)).size
    assert np.array_equal(plain.draw(places[[3, 1]], 0).reshape(2, 2, 2), first.reshape(5, 2, 2)[[3, 1]])


def test_mixup_pairs_each_row_with_one_and_keeps_a_beta_share():
    plain = PlainAugmenter(Augmenter(Augmentation(mixup=0.4), schema()), 7)
    partner, share = plain.mix(5000, 2)
    assert sorted(partner.tolist()) == list(range(5000)) and share.dtype == np.float32
    assert stats.kstest(share, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert not np.array_equal(partner, plain.mix(5000, 3)[0])


# What training makes of them


def step_of(arithmetic: Any, augmenter: Augmenter, x: Tensor, y: Tensor, model: MLP) -> Tensor:
    trained = copy.deepcopy(model)
    if arithmetic is None:
        fed = federation(training__batch_size=len(y), training__learning_rate=0.5)
        fit(trained, x, y, training=fed.training, steps=1, noise=noise.seeded(3), proximal_mu=0.0, augmenter=augmenter)
    else:
        fed = federation(training__learning_rate=0.5)
        fit_privately(
            trained,
            x,
            y,
            training=fed.training,
            dpsgd=DPSGD(
                steps=1,
                sampling_rate=1.0,
                clip=0.3,
                noise_multiplier=1e-5,
                expected_batch_size=8,
                arithmetic=arithmetic,
            ),
            noise=noise.seeded(3),
            proximal_mu=0.0,
            augmenter=augmenter,
            ids=ids(len(y)),
        )
    return torch.cat([p.detach().flatten() for p in trained.parameters()])


@pytest.mark.parametrize("arithmetic", ["exact", "opacus", None])
def test_a_step_takes_the_mean_gradient_of_each_rows_copies(arithmetic, monkeypatch):
    augmenter = Augmenter(Augmentation(copies=5, jitter=0.3, drop=0.2), schema())
    x, y = rows_of(12), torch.arange(12) % 2
    model = mlp.build(federation(schema__features=FEATURES, model__hidden=[6], model__activation="tanh"))
    applied: list[Tensor] = []
    real = Augmenter.apply
    monkeypatch.setattr(Augmenter, "apply", lambda self, *a: (applied.append(real(self, *a)), applied[-1])[1])
    found = step_of(arithmetic, augmenter, x, y, model)
    (rows,) = applied
    order = torch.arange(12)
    if arithmetic is None:  # whose batches are in an order of their own
        order = torch.from_numpy(noise_order(12))
    losses = torch.nn.functional.cross_entropy(model(rows), y[order].repeat_interleave(5), reduction="none")
    gradients = []
    for i in range(12):
        parts = torch.autograd.grad(losses[5 * i : 5 * i + 5].mean(), list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    each = torch.stack(gradients)
    clipped = each * (0.3 / each.norm(dim=1, keepdim=True)).clamp(max=1)
    whole = each.mean(0) if arithmetic is None else clipped.sum(0) / 8
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float(each.norm(dim=1).max()) > 0.3  # some are clipped
    assert torch.allclose(found, start - 0.5 * whole, rtol=0, atol=3e-4 if arithmetic == "exact" else 1e-5)


def noise_order(rows: int) -> Any:
    """The order in which `fit` takes its first batch: after two seeds."""
    source = noise.seeded(3)
    source.integer(), source.integer()
    return source.permutation(rows)


def test_mixed_rows_have_mixed_losses():
    augmenter = Augmenter(Augmentation(mixup=1.0), schema())
    x, y = rows_of(12), torch.arange(12) % 2
    model = mlp.build(federation(schema__features=FEATURES, model__hidden=[6], model__activation="tanh"))
    found = step_of(None, augmenter, x, y, model)
    source = noise.seeded(3)
    source.integer()
    plain = PlainAugmenter(augmenter, source.integer())
    order = source.permutation(12)
    partner, share = plain.mix(12, 0)
    x, y, kept = x[order], y[order], torch.from_numpy(share)
    out = model(x * kept[:, None] + x[partner] * (1 - kept[:, None]))
    soft = torch.nn.functional.one_hot(y, 2) * kept[:, None]
    soft += torch.nn.functional.one_hot(y[partner], 2) * (1 - kept[:, None])
    parts = torch.autograd.grad(-(soft * torch.log_softmax(out, 1)).sum(1).mean(), list(model.parameters()))
    start, gradient = (torch.cat([p.detach().flatten() for p in each]) for each in (model.parameters(), parts))
    assert torch.allclose(found, start - 0.5 * gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arithmetic", ["exact", "opacus"])
def test_private_rows_without_ids_are_not_changed(arithmetic):
    model = mlp.build(federation(schema__features=FEATURES))
    dpsgd = DPSGD(
        steps=1, sampling_rate=1.0, clip=1.0, noise_multiplier=1.0, expected_batch_size=8, arithmetic=arithmetic
    )
    with pytest.raises(ValueError, match="augmentation needs the ids of the rows"):
        fit_privately(
            model,
            rows_of(4),
            torch.zeros(4, dtype=torch.int64),
            training=federation().training,
            dpsgd=dpsgd,
            noise=noise.seeded(0),
            proximal_mu=0.0,
            augmenter=Augmenter(Augmentation(jitter=0.1), schema()),
        )


# Documents

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "training.augmentation changes nothing"),
    ({"copies": 4}, "copies of a row are all alike without jitter, drop, shift, flip or dropout"),
    ({"copies": 17, "drop": 0.1}, r"copies must be at most 16 \(got 17\)"),
    ({"flip": True}, "flip is for images, and the schema declares none: see schema.image"),
    ({"shift": 1}, "shift is for images, and the schema declares none"),
    ({"drop": 1.0}, r"drop must be less than 1"),
    ({"jitter": -0.1}, "jitter must be at least 0"),
]


def mistakes(tmp_path: Any, **changes: Any) -> str:
    path = tmp_path / "federation.yaml"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(ConfigError) as error:
        load(path)
    return "\n".join(error.value.problems)


@pytest.mark.parametrize("augmentation, said", BAD, ids=[said for _, said in BAD])
def test_what_changes_no_row_is_said(tmp_path, augmentation, said):
    assert re.search(said, mistakes(tmp_path, training__augmentation=augmentation))


def test_rows_are_not_mixed_where_they_are_private(tmp_path):
    said = mistakes(tmp_path, **PRIVATE, training__augmentation={"mixup": 0.2})
    assert "training.augmentation.mixup mixes the values of two rows" in said
    assert federation(training__augmentation={"mixup": 0.2}).training.copies == 1


def test_copies_differ_by_dropout_as_well():
    assert federation(training__augmentation={"copies": 4}, model__dropout=0.1).training.copies == 4


@pytest.mark.parametrize(
    "image, said",
    [
        ({**PICTURE, "first": "q"}, r"schema\.image\.first is no feature \(got q\)"),
        ({**PICTURE, "first": "p1"}, "has pixels that are numbers and never missing, and b is not"),
        ({**PICTURE, "channels": 3}, "has 36 pixels, but from p0 on there are only 25 features"),
    ],
)
def test_an_image_that_the_columns_are_not_is_said(tmp_path, image, said):
    features = [FEATURES[0], *PIXELS, FEATURES[1]]
    assert re.search(said, mistakes(tmp_path, schema__features=features, schema__image=image))


def test_a_shift_past_the_image_is_said(tmp_path):
    features = [FEATURES[0], *PIXELS, FEATURES[1]]
    changes = {"schema__features": features, "schema__image": PICTURE, "training__augmentation": {"shift": 3}}
    assert "shift must be less than the image's height and width, 4 x 3 (got 3)" in mistakes(tmp_path, **changes)
