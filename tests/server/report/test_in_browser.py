"""The page in a real browser: every chart draws, no request leaves, and what others are called stays text."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from server.folder.folder import RunRecord, read_run
from server.report import figures, page
from server.report.comparison import comparison
from server.rounds.events import Ended, Refused, Started
from tests import browser
from tests.server.report.runs import completed, explained, rounds, written
from tests.support import PRIVATE, federation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

# Each would change the page's title, if it ran.
EVIL = "<script>document.title='evil'</script><img src=x onerror=document.title='evil'>"


@pytest.fixture(autouse=True)
def there_is_a_browser() -> None:
    browser.executable()


def evil(path: Path) -> RunRecord:
    """A run in which everything that others name is a script."""
    features = [{"name": EVIL, "type": "categorical", "categories": [EVIL, "b"]}]
    target = {"name": f"y {EVIL}", "classes": {EVIL: [1], "b": [0]}}
    document = federation(schema__features=features, schema__target=target, **PRIVATE)
    events = [
        Started(run=EVIL, rounds=2, time=1e9),
        Refused(client=EVIL, kind=EVIL, reason=EVIL),
        *rounds(document, members=(EVIL, "ben"), noise=5.0),
        Ended(status="failed", reason=EVIL),
    ]
    record = written(path, document, events, status="failed", clients=[EVIL], seconds=1.0)
    columns = [{"column": EVIL, "worse": 0.1, "spread": 0.01, "attribution": 1.0}]
    (path / "explanation.json").write_text(json.dumps({"rows": 9, "metric": "accuracy", "columns": columns}))
    return read_run(record.path)


def drawn(dom: str) -> list[str]:
    """The charts that have drawn, by their key."""
    places = re.findall(r'<div class="chart[^"]*" data-chart="(\w+)"[^>]*>', dom)
    whole = re.findall(r"<div [^>]*data-chart=\"(\w+)\"[^>]*data-drawn=\"yes\"[^>]*>", dom)
    assert len(places) == len(set(places))
    return whole


@pytest.mark.parametrize("kind", ["private", "plain", "many", "evil"])
@pytest.mark.parametrize("size", ["1200,900", "380,800"], ids=["wide", "narrow"])
def test_every_chart_draws_and_no_request_leaves(tmp_path, kind, size):
    make = {
        "private": lambda path: completed(path),
        "plain": lambda path: completed(path, changes={}, count=40),
        "many": lambda path: completed(path, members=[f"c{i}" for i in range(500)], named=False),
        "evil": evil,
    }[kind]
    record = make(tmp_path / "run")
    if kind != "evil":
        explained(record.path)
        record = read_run(record.path)
    place = tmp_path / "report.html"
    place.write_text(page.report(record))
    found = browser.opened(place, tmp_path, f"--window-size={size}")
    wanted = [figure.key for figure in figures.figures(record)]
    assert len(wanted) >= 7 and sorted(drawn(found.dom)) == sorted(wanted)
    assert re.sub(r"<script.*?</script>", "", found.dom, flags=re.S).count("<svg") == len(wanted)
    assert [url for url in found.asked if url.startswith(("http", "ws", "ftp"))] == []

    if kind == "evil":
        assert re.search(r"<title>(.*?)</title>", found.dom)[1] == "small: report of a run"  # type: ignore[index]
        shown = unescape(re.sub(r"<script.*?</script>", "", found.dom, flags=re.S))
        assert "document.title='evil'" in shown, "it is there as text, in tables"


def test_a_page_that_does_ask_the_network_is_seen(tmp_path):
    place = tmp_path / "asks.html"
    place.write_text("<img src='http://127.0.0.1:9/picture.png'><p>asks</p>")
    assert "http://127.0.0.1:9/picture.png" in browser.opened(place, tmp_path).asked


def test_even_a_script_in_the_page_could_not_ask_the_network(tmp_path):
    place = tmp_path / "report.html"
    html = page.report(completed(tmp_path / "run"))
    place.write_text(
        html.replace("</main>", "<script>fetch('http://127.0.0.1:9/x')</script><img src='http://127.0.0.1:9/y'></main>")
    )
    assert [url for url in browser.opened(place, tmp_path).asked if url.startswith("http")] == []


def test_a_comparison_draws(tmp_path):
    place = tmp_path / "comparison.html"
    records = [completed(tmp_path / "one"), completed(tmp_path / "two", changes={}), evil(tmp_path / "three")]
    place.write_text(comparison(records))
    found = browser.opened(place, tmp_path)
    assert sorted(drawn(found.dom)) == ["curves", "tradeoff"]
    assert [url for url in found.asked if url.startswith("http")] == []


def test_dark_and_light_have_their_colours(tmp_path):
    place = tmp_path / "report.html"
    script = "<script>document.title = getComputedStyle(document.body).backgroundColor;</script></body>"
    place.write_text(page.report(completed(tmp_path / "run")).replace("</body>", script))
    light, dark = (
        re.search(r"<title>(.*?)</title>", browser.opened(place, tmp_path / name, *how).dom)[1]  # type: ignore[index]
        for name, how in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"]))
        if (tmp_path / name).mkdir() is None
    )
    assert light == "rgb(255, 255, 255)" and dark == "rgb(20, 24, 30)"


def test_it_can_be_printed(tmp_path):
    place = tmp_path / "report.html"
    place.write_text(page.report(completed(tmp_path / "run")))
    pdf = browser.printed(place, tmp_path / "report.pdf", tmp_path)
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000, "charts and all"
