from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from client.account.approval import check_approval, question, remember
from client.account.policy import Policy
from common.document import documents
from common.document.federation import Federation
from common.errors import LedgerError, Refusal
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


ROW = {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0}


@pytest.mark.parametrize(
    "rule, allowed, asks, said",
    [
        ("federation_epsilon", 3.9, {}, "federation_epsilon: asked 4, allowed 3.9"),
        ("federation_delta", 9e-4, {}, "federation_delta: asked 0.001, allowed 0.0009"),
        ("max_clip", 0.5, {}, "max_clip: asked 1, allowed 0.5"),
        ("max_rounds", 2, {}, "max_rounds: asked 3, allowed 2"),
        ("max_local_steps", 1, {}, "max_local_steps: asked 2, allowed 1"),
        ("min_noise_multiplier", 3.5, {}, "min_noise_multiplier: asked 3, allowed at least 3.5"),  # of the evaluations
        ("releases", ["evaluation", "row_count"], {}, "releases: asked model, allowed evaluation, row_count"),
        ("releases", ["model", "evaluation"], {}, "releases: asked row_count, allowed model, evaluation"),
        ("releases", [], {}, "releases: asked model, allowed nothing"),
    ],
)
def test_each_rule_is_refused_by_name_with_what_was_asked_and_what_is_allowed(rule, allowed, asks, said):
    with pytest.raises(Refusal, match=rf"^policy\.{said}$"):
        policy(**{rule: allowed}).check(federation(**PRIVATE, **asks))


@pytest.mark.parametrize(
    "rules",
    [
        {"federation_epsilon": 4.0, "federation_delta": 1e-3, "max_clip": 1.0, "max_rounds": 3, "max_local_steps": 2},
        {"min_noise_multiplier": 3.0},
        {"min_noise_multiplier": 9.0, "releases": ["model", "row_count"]},  # no evaluation leaves, so it may be noisy
    ],
)
def test_what_is_just_allowed_is_permitted(rules):
    policy(**rules).check(federation(**PRIVATE))


def test_a_federation_that_wants_no_row_count_needs_none_allowed():
    row = {**ROW, "count_epsilon": None, "sampling_rate": 0.1}
    policy(releases=["model", "evaluation"]).check(federation(**{**PRIVATE, "privacy__row": row}))


def test_rules_that_are_not_about_noise_hold_without_privacy_too():
    with pytest.raises(Refusal, match=r"^policy\.max_rounds: asked 3, allowed 1$"):
        policy(without_privacy=True, max_rounds=1).check(federation())
    with pytest.raises(Refusal, match=r"^policy\.releases: asked row_count, allowed model$"):
        policy(without_privacy=True, releases=["model"]).check(federation())


NOON = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize("after, pause", [(0, 60), (59, 1), (60, 0), (600, 0), (-3600, 3660)])
def test_the_next_round_comes_no_earlier_than_the_policy_says_also_when_the_clock_is_set_back(after, pause):
    rule, now = policy(min_seconds_between_rounds=60), NOON + timedelta(seconds=after)
    assert rule.pause(NOON.isoformat(), now) == pause
    if not pause:
        rule.check_time(NOON.isoformat(), now)
        return
    with pytest.raises(Refusal, match=r"asked a round at 2026-05-01 1\S+ UTC, allowed from 2026-05-01 12:01:00 UTC"):
        rule.check_time(NOON.isoformat(), now)


def test_the_first_round_need_not_wait_and_without_the_rule_none():
    policy(min_seconds_between_rounds=60).check_time("", NOON)
    policy().check_time(NOON.isoformat(), NOON)


# Approval


def test_only_approved_fingerprints_are_permitted(tmp_path):
    known, other = federation(**PRIVATE), federation(name="other", **PRIVATE)
    approving = policy(approved=["0" * 64, known.fingerprint])
    check_approval(approving, known, tmp_path / "x")
    said = rf"^policy\.approved: federation {other.fingerprint} is not among the 2 approved fingerprints"
    with pytest.raises(Refusal, match=said):
        check_approval(approving, other, tmp_path)
    with pytest.raises(Refusal, match="is not among the 0 approved fingerprints"):
        check_approval(policy(approved=[]), known, tmp_path)
    check_approval(policy(), other, tmp_path)


def test_with_ask_a_yes_is_remembered_for_that_document_alone(tmp_path):
    asking, known, other = policy(approved="ask"), federation(**PRIVATE), federation(name="other", **PRIVATE)
    with pytest.raises(Refusal, match=rf"approved is ask, and the owner has not said yes to .* {known.fingerprint}$"):
        check_approval(asking, known, tmp_path / "state" / "ada.approved.jsonl")
    remember(known, tmp_path / "state" / "ada.approved.jsonl")
    check_approval(asking, known, tmp_path / "state" / "ada.approved.jsonl")
    with pytest.raises(Refusal, match="has not said yes"):
        check_approval(asking, other, tmp_path / "state" / "ada.approved.jsonl")
    remember(other, tmp_path / "state" / "ada.approved.jsonl")
    check_approval(asking, known, tmp_path / "state" / "ada.approved.jsonl")
    check_approval(asking, other, tmp_path / "state" / "ada.approved.jsonl")


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', "1"])
def test_a_damaged_record_of_approvals_approves_nothing(tmp_path, text):
    (tmp_path / "ada.approved.jsonl").write_text(text)
    with pytest.raises(LedgerError, match=r"approved\.jsonl: cannot be read; remove it, and you are asked again"):
        check_approval(policy(approved="ask"), federation(**PRIVATE), tmp_path / "ada.approved.jsonl")


def test_a_yes_that_cannot_be_written_down_is_one_clear_error(tmp_path):
    (tmp_path / "state" / "ada.approved.jsonl").mkdir(parents=True)
    with pytest.raises(LedgerError, match=r"approved\.jsonl: your yes cannot be written down: "):
        remember(federation(**PRIVATE), tmp_path / "state" / "ada.approved.jsonl")


def test_the_question_shows_the_whole_document():
    shown = question(federation(**PRIVATE))
    assert documents.validate(yaml.safe_load(shown.rsplit("fingerprint:")[0]), Federation) == federation(**PRIVATE)
    assert shown.endswith(f"fingerprint: {federation(**PRIVATE).fingerprint}\nTake part in this federation? [yes/no] ")


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
        ({"releases": ["models"]}, "releases"),
        ({"max_clip": 0}, "max_clip must be greater than 0"),
        ({"max_rounds": 0}, "max_rounds must be at least 1"),
        ({"min_seconds_between_rounds": -1}, "min_seconds_between_rounds must be at least 0"),
        ({"without_privacy": "yes"}, "without_privacy must be true or false"),
    ],
)
def test_an_impossible_policy_is_refused(changes, said):
    with pytest.raises(documents.Mistakes, match=said):
        policy(**changes)
