from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text import LONGEST, duration, shown


@pytest.mark.parametrize(
    "text, expected",
    [
        ("policy.epsilon is 8", "policy.epsilon is 8"),
        ("é, 漢, €", "é, 漢, €"),
        ("no\nserver: ada connected", "no server: ada connected"),
        ("\x1b[2Jgone\r\x07", " [2Jgone  "),
        ("\u202eright to left\u2066", " right to left "),
        ("x" * 301, "x" * 300 + "..."),
        ("x" * 300, "x" * 300),
    ],
)
def test_what_a_terminal_would_obey_becomes_a_space(text, expected):
    assert shown(text) == expected


@given(st.text(max_size=1000))
def test_whatever_is_said_is_one_short_printable_line(text):
    assert shown(text).isprintable()
    assert len(shown(text)) <= LONGEST + 3


@pytest.mark.parametrize(
    "seconds, words",
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1 min 0 s"), (119.7, "2 min 0 s"), (3599.9, "1 h 0 min")],
)
def test_durations_are_told_in_two_units_at_most(seconds, words):
    assert duration(seconds) == words
