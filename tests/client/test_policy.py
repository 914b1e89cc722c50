from __future__ import annotations

from typing import Any

import pytest

from client.policy import Policy
from common import documents
from common.errors import Refusal
from tests.support import PRIVATE, federation


def policy(**changes: Any) -> Policy:
    """As read from client.yaml."""
    return documents.validate({"epsilon": 4.0, "delta": 1e-3, **changes}, Policy)


def test_a_federation_within_the_policy_is_permitted():
    policy().check(federation(**PRIVATE))


def test_a_federation_without_privacy_needs_the_owners_word():
    with pytest.raises(Refusal, match=r"^policy\.without_privacy is false, and the federation trains without .*null"):
        policy().check(federation())
    policy(without_privacy=True).check(federation())


def test_a_policy_that_allows_training_without_privacy_still_bounds_private_training():
    with pytest.raises(Refusal, match=r"^policy\.delta: asked 0\.001, allowed 0\.0001$"):
        policy(without_privacy=True, delta=1e-4).check(federation(**PRIVATE))


@pytest.mark.parametrize("allowed", [9.9e-4, 1e-9])
def test_a_delta_above_the_policys_is_refused_with_both(allowed):
    with pytest.raises(Refusal, match=rf"^policy\.delta: asked 0\.001, allowed {allowed:g}$"):
        policy(delta=allowed).check(federation(**PRIVATE))


def test_the_policys_own_delta_is_permitted():
    policy(delta=1e-3).check(federation(**PRIVATE))


def test_an_epsilon_above_the_policys_is_no_refusal_since_the_run_gets_what_is_left():
    policy(epsilon=0.5).check(federation(**PRIVATE))


def test_only_approved_fingerprints_are_permitted():
    known, other = federation(**PRIVATE), federation(name="other", **PRIVATE)
    approving = policy(approved=["0" * 64, known.fingerprint])
    approving.check(known)
    said = rf"^policy\.approved: federation {other.fingerprint} is not among the 2 approved fingerprints"
    with pytest.raises(Refusal, match=said):
        approving.check(other)


def test_approving_none_permits_none():
    with pytest.raises(Refusal, match="is not among the 0 approved fingerprints"):
        policy(approved=[]).check(federation(**PRIVATE))


def test_an_approved_federation_is_still_held_to_the_other_rules():
    plain = federation()
    with pytest.raises(Refusal, match=r"^policy\.without_privacy"):
        policy(approved=[plain.fingerprint]).check(plain)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"epsilon": 0}, "epsilon must be greater than 0"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number"),
        ({"epsilon": float("inf")}, "epsilon must be a finite number"),
        ({"delta": 0}, "delta must be greater than 0"),
        ({"delta": 1}, "delta must be less than 1"),
        ({"approved": ["abc"]}, "approved"),
        ({"approved": "any"}, "approved"),
        ({"approval": []}, "did you mean approved"),
        ({"without_privacy": "yes"}, "without_privacy must be true or false"),
    ],
)
def test_an_impossible_policy_is_refused(changes, said):
    with pytest.raises(documents.Mistakes, match=said):
        policy(**changes)
