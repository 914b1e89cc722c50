"""What the live page is told of a run: what may be told, up to date, and no more points than a line can show."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from server.dashboard.lines import MOST_POINTS, Line
from server.dashboard.view import MOST_ROWS, View
from server.rounds.events import TERMINATED, Ended, Refused, Rejected, Resumed, RoundEnded, Started, Waiting
from tests.server.report.runs import rounds
from tests.support import PRIVATE, WHOLE, federation

PLAIN = federation(training__rounds=9)
CONNECTED = {"ada": ("idle", 0.5, ""), "ben": ("away", 60.0, ""), "cyd": ("refused", 3.0, "its policy")}


def view(*events: Any, of: Any = PLAIN) -> View:
    made = View(of, "run-1")
    for at, event in enumerate(events):
        made.take(event, float(at))
    return made


def card(of: View, name: str) -> dict[str, Any]:
    return next(one for one in of.whole()["cards"] if one["name"] == name)


def ended(number: int, **changes: Any) -> RoundEnded:
    return RoundEnded(**{"round": number, "rounds": 9, "loss": 1 / number, "clients": 2, "time": 1000.0, **changes})


def test_a_page_is_told_name_fingerprint_state_and_rounds():
    told = view(Started(rounds=9, time=990.0), ended(1), ended(2)).whole()
    assert told["run"] == {"name": "small", "run": "run-1", "fingerprint": PLAIN.fingerprint}
    assert [one["value"] for one in told["cards"][:2]] == ["running", "2 of 9"]
    assert told["cards"][1]["share"] == pytest.approx(2 / 9)
    assert told["lines"]["loss"] == [[1, 1.0], [2, 0.5]]
    assert told["state"] == {"over": False, "alarm": ""}


def test_the_time_left_is_that_of_the_rounds_left_at_their_pace():
    made = view(Started(rounds=9, time=990.0))
    for number, at in ((1, 10.0), (2, 13.0), (3, 14.0)):
        made.take(ended(number), at)
    assert made.ends == 1000 + 6 * 2.0  # 6 rounds are left, and 2 took 4 s
    made.take(Waiting(clients=1, min_clients=2), 20.0)
    assert made.ends is None
    assert card(made, "time left")["value"] == "not known yet"
    assert card(made, "state")["more"] == "1 of 2 are there"
    made.take(ended(4), 500.0)
    made.take(ended(5), 503.0)
    assert made.ends == 1000 + 4 * 3.0  # how long clients were away tells nothing about rounds


def test_scores_are_drawn_with_what_noise_makes_uncertain():
    of = federation(training__rounds=3, **PRIVATE)
    told = view(Started(rounds=3), *rounds(of, noise=5.0), of=of).whole()
    number, value, low, high = told["lines"]["clients"][-1]
    assert (number, value) == (3, pytest.approx(0.9))  # (90 + 90) of 200
    assert low < value < high
    assert told["lines"]["epsilon_row"] == [[1, 0.5], [2, 1.0], [3, 1.5]]
    epsilon = next(one for one in told["cards"] if one["name"] == "epsilon of a row")
    assert (epsilon["value"], epsilon["share"]) == ("1.50 of 4", 1.5 / 4)
    assert [chart["limit"] for chart in told["charts"] if "limit" in chart] == [4.0]


def test_refusals_and_rejections_are_told_with_their_reasons_the_newest_first():
    late = Rejected("ben", "late", "no reply within 30 s")
    made = view(
        Refused(client="cyd", kind="budget_exhausted", reason="spent\x1b[31m"),
        ended(1, rejected=(late,)),
        ended(2, rejected=(late,)),
        ended(2, rejected=(late,)),  # told again after a restart
    )
    assert made.whole()["refusals"] == {
        "rows": [["ben", "late", 2, 2, "no reply within 30 s"], ["cyd", "budget exhausted", 0, 0, "spent [31m"]],
        "of": 2,
    }


def test_why_a_round_or_the_run_failed_is_told():
    made = view(ended(1), ended(2, failed="1 of at least 2 replies"))
    assert made.whole()["state"]["alarm"] == "The last round failed: 1 of at least 2 replies"
    assert card(made, "rounds")["more"] == "1 round failed"
    assert [point[0] for point in made.whole()["lines"]["loss"]] == [1]
    made.take(Ended(status="failed", reason="no quorum", time=1100.0))
    assert made.whole()["state"] == {"over": True, "alarm": "This run failed: no quorum"}


def test_a_run_that_another_server_goes_on_with_is_not_over():
    assert view(Ended(status="stopped", reason=TERMINATED)).whole()["state"]["over"] is False
    assert view(Ended(status="stopped", reason="interrupted")).whole()["state"]["over"] is True


def test_after_a_restart_curves_go_on_where_the_run_does():
    made = view(Started(rounds=9), ended(1), ended(2), ended(3))
    made.news()
    made.take(Resumed(round=2, rounds=9), 9.0)
    assert made.whole()["lines"]["loss"] == [[1, 1.0], [2, 0.5]]
    made.take(ended(3, loss=7.0), 10.0)
    assert made.whole()["lines"]["loss"] == [[1, 1.0], [2, 0.5], [3, 7.0]]
    assert made.news()["more"]["loss"] == (2, [[3, 7.0]])  # pages keep two points


def test_clients_are_told_with_what_they_do_those_that_need_attention_first():
    made = view(ended(1, strikes={"ben": 2}, rejected=(Rejected("ben", "late", "was late"),)))
    made.look(CONNECTED, now=1000.0)
    assert made.whole()["clients"]["rows"] == [
        ["ben", "away", 940.0, 2, "was late"],
        ["cyd", "refused", None, 0, "its policy"],
        ["ada", "idle", None, 0, ""],
    ]
    connected = card(made, "clients connected")
    assert (connected["value"], connected["more"]) == ("1", "1 away, 1 idle, 1 refused")


def test_looking_again_at_who_is_away_is_no_news():
    made = view()
    made.look(CONNECTED, now=1000.0)
    made.news()
    made.look({**CONNECTED, "ben": ("away", 61.4, "")}, now=1001.3)
    assert made.news() == {}


def test_of_many_clients_a_page_is_told_some_and_how_many_there_are():
    made = view()
    made.look({f"c{i:04}": ("idle", 0.0, "") for i in range(1000)} | {"z": ("away", 1.0, "")}, now=5.0)
    told = made.whole()["clients"]
    assert (len(told["rows"]), told["of"], told["rows"][0][0]) == (MOST_ROWS, 1001, "z")


def test_nobody_is_told_whom_a_round_asks_nor_what_a_refusal_says_of_it():
    of = federation(**WHOLE, strategy__fraction=0.5)
    made = view(of=of)
    made.look({"ada": ("working", 0.1, ""), "ben": ("idle", 7.0, ""), "cyd": ("refused", 3.0, "after 3 rounds")}, 9.0)
    assert made.whole()["clients"]["rows"] == [
        ["cyd", "refused", None, 0, ""],
        ["ada", "connected", None, 0, ""],
        ["ben", "connected", None, 0, ""],
    ]
    assert "working" not in str(made.whole()) and "3 rounds" not in str(made.whole())


def test_a_line_stays_short_and_keeps_its_last_point():
    line = Line()
    for number in range(1, 5001):
        line.add(number, float(number))
        if number % 7 == 0:
            line.news()
    assert MOST_POINTS < len(line.points) <= 2 * MOST_POINTS
    assert line.points[-1] == [5000, 5000.0]
    *steps, last = [b[0] - a[0] for a, b in pairwise(line.points)]
    assert set(steps) == {8} and last <= 8  # 5000 / 8 = 625 points; every fourth would be too many


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_json_cannot_hold_is_no_point(value):
    line = Line()
    line.add(1, 0.5)
    line.add(2, value)
    assert line.points == [[1, 0.5]]
