from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text import LONGEST, shown


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
