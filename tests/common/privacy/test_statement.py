"""The statement travels, is kept and is described, and each time the same comes back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.statement import Statement
from tests.support import recomputed, stated

FIGURES = st.floats(0, 1e3, exclude_min=True)
STATEMENTS = st.builds(
    Statement,
    epsilon=FIGURES,
    planned_epsilon=FIGURES,
    delta=st.floats(1e-9, 0.5),
    noise_multiplier=FIGURES,
    sampling_rate=st.floats(1e-6, 1),
    steps=st.integers(0, 10**6),
    count_epsilon=st.just(0.0) | FIGURES,
    rows=st.just(0.0) | st.integers(0, 10**9),
    evaluation_noise=st.just(0.0) | FIGURES,
    evaluations=st.integers(0, 1000),
    secure_noise=st.booleans(),
    exact_arithmetic=st.booleans(),
    opacus_planned_epsilon=st.none() | FIGURES,
    opacus_prv=st.none() | st.booleans(),
)


@given(STATEMENTS)
def test_a_statement_comes_back_from_the_wire_as_it_was(one):
    sent = one.to_wire()
    assert all(type(value) in (int, float) for value in sent.values())
    assert Statement.from_wire(json.loads(json.dumps(sent))) == one


@given(STATEMENTS)
def test_a_statement_comes_back_from_its_description(one):
    # What was not released is not described.
    told = one.describe(clip=0.5)
    expected = {
        **one.to_wire(),
        "rows": one.rows if one.count_epsilon else 0,
        "evaluations": one.evaluations if one.evaluation_noise else 0,
    }
    assert Statement.described(json.loads(json.dumps(told))).to_wire() == expected


def test_a_description_of_before_opacus_and_arithmetic_were_told_can_be_read():
    told = Statement.from_wire(stated()).describe(clip=0.5)
    for name in ("arithmetic", "opacus_planned_epsilon", "opacus_accountant"):
        del told[name]
    assert Statement.described(told) == Statement.from_wire(stated())


def test_a_description_is_enough_to_recompute_epsilon_from():
    # One Gaussian sum of multiplier 2 on all rows, and 0.1 for the row count, by dp-accounting.
    one = Statement.from_wire(stated(noise_multiplier=2.0, sampling_rate=1.0, steps=1, evaluation_noise=0.0))
    # epsilon of mu = 1 / 2 at delta 1e-3 (Balle and Wang 2018, theorem 8): 1.352
    assert recomputed(one.describe(clip=1.0)) == pytest.approx(0.1 + 1.352, abs=0.01)


@pytest.mark.parametrize("name", ["epsilon", "planned_epsilon", "delta", "released", "noise"])
def test_a_description_that_lacks_a_figure_is_an_error(name):
    told = Statement.from_wire(stated()).describe(clip=0.5)
    del told[name]
    with pytest.raises(LookupError):
        Statement.described(told)
