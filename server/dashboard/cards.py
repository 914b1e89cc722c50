"""The figures at the head of the page. A card is a name, a value and more in small; `share` of 1 is drawn as a bar.

Times are seconds since 1970, which the page turns into how long that is from now: `until` in place of a value, and
`since` at the end of what is small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.text import duration, shown
from server.report import facts
from server.rounds.events import Standing, State

if TYPE_CHECKING:
    from server.dashboard.view import View

Card = dict[str, Any]
CONNECTED = ("idle", "working", "connected")


def alarm(standing: Standing) -> str:
    """Why a run failed, or its last round; "" if neither did."""
    if standing.state == State.FAILED:
        return f"This run failed: {standing.reason}"
    return f"The last round failed: {standing.problem}" if standing.problem else ""


def cards(view: View) -> list[Card]:
    """All of them, in the order of the page."""
    return [_state(view), _rounds(view), _time(view), *_scores(view), *_loss(view), *_epsilons(view), _clients(view)]


def _state(view: View) -> Card:
    standing = view.standing
    more = shown(standing.reason) if standing.state != State.FAILED else "see above"
    if standing.waiting is not None:
        more = f"{standing.waiting.clients} of {standing.waiting.min_clients} are there"
    return {"name": "state", "value": str(standing.state), "more": more}


def _rounds(view: View) -> Card:
    done, rounds, failures = view.standing.round, view.standing.rounds, view.standing.failures
    failed = f"{failures} round{'s' if failures > 1 else ''} failed" if failures else ""
    return {"name": "rounds", "value": f"{done:,} of {rounds:,}", "more": failed, "share": done / rounds}


def _time(view: View) -> Card:
    if view.ended is not None and view.began is not None:
        return {"name": "time", "value": duration(max(view.ended - view.began, 0.0)), "more": "from beginning to end"}
    begun: Card = {"more": "begun", "since": round(view.began, 1)} if view.began is not None else {"more": "not begun"}
    if (ends := view.ends) is None:
        return {"name": "time left", "value": "not known yet", **begun}
    return {"name": "time left", "until": round(ends, 1), **begun}


def _scores(view: View) -> list[Card]:
    found, noisy = [], ", by noisy counts" if view.federation.privacy.limits else ""
    for who, scores in (
        (facts.EXACT, view.standing.held_out),
        (f"clients' validation rows{noisy}", view.standing.evaluation),
    ):
        if (score := facts.score_of(scores, view.federation)) is not None:
            more = f"{who}; {score.band}" if score.band else who
            found.append({"name": facts.label(score.name), "value": str(score), "more": more})
    return found


def _loss(view: View) -> list[Card]:
    if view.loss is None:
        return []
    return [{"name": "training loss", "value": f"{view.loss:.4g}", "more": "mean of a row, in the last round"}]


def _epsilons(view: View) -> list[Card]:
    found = []
    for unit, limit in view.federation.privacy.limits.items():
        spent = view.standing.privacy.get(unit, {}).get("epsilon", 0.0)
        settings = view.federation.privacy.row if unit == "row" else view.federation.privacy.client
        assert settings is not None
        more = f"at most, of any client; delta {settings.delta:g}" if unit == "row" else f"delta {settings.delta:g}"
        value = f"{spent:.2f} of {limit:g}"
        found.append({"name": f"epsilon of a {unit}", "value": value, "more": more, "share": min(spent / limit, 1.0)})
    return found


def _clients(view: View) -> Card:
    connected = sum(view.counts[state] for state in CONNECTED)
    rest = ", ".join(f"{number} {state}" for state, number in sorted(view.counts.items()) if state != "connected")
    return {"name": "clients connected", "value": f"{connected:,}", "more": rest}
