"""The page in a real browser, on a real run: it follows, what others say stays text, a lost server is found again."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.wire import session_pb2 as pb
from common.wire.records import REFUSED
from tests import browser
from tests.devtools import Tab, tab
from tests.integration.federation import Federation
from tests.integration.proxy import Proxy
from tests.server.sessions.test_grid import Peer, material

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

# It would change the page's title, if it ran.
EVIL = "<script>document.title='evil'</script><img src=x onerror=document.title='evil'>"
POINTS = "Number((document.querySelector('[data-key=loss]') || {dataset: {}}).dataset.points || 0)"
ROUND = "parseInt((document.querySelectorAll('.value')[1]?.textContent || '0').replace(',', ''))"
LINK = "document.getElementById('link')?.dataset.is"


@pytest.fixture(autouse=True)
def there_is_a_browser() -> None:
    browser.executable()


def refuses(fed: Federation, name: str, reason: str) -> Peer:
    """A client that was written by someone else."""
    peer = Peer(int(fed.address.rpartition(":")[2]), material(fed.certs, name))
    peer.hello()
    peer.hear("welcome")
    peer.say(failure=pb.Failure(code=REFUSED, reason=reason))
    return peer


def fits(page: Tab, width: int, *, dark: bool) -> bool:
    """Is nothing wider than the window? And do its colours follow what the reader prefers?"""
    page.look(width, 800, dark=dark)
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 30)" if dark else "rgb(255, 255, 255)")
    return bool(page.value("document.documentElement.scrollWidth <= innerWidth"))


def test_a_page_follows_a_run_to_its_end_through_a_broken_link(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fed = Federation(tmp_path, stack, names=("ada", "ben", "eve"), training__rounds=5000)
        server = fed.serve("--dashboard", "127.0.0.1:0", "--no-report")
        served = server.until(r"dashboard on http://(\S+)/")[1]
        proxy = stack.enter_context(Proxy(served))
        for name in ("ada", "ben"):
            fed.join(name)
        eve = refuses(fed, "eve", EVIL)
        page = stack.enter_context(tab(tmp_path / "profile"))
        page.open(f"http://{proxy.address}/")

        page.until(POINTS, lambda points: points >= 3)
        before = page.value(ROUND)
        page.until(ROUND, lambda number: number > before)
        page.until("document.getElementById('refusals').innerText", lambda text: EVIL in text)
        page.until("document.getElementById('clients').innerText", lambda text: "ada" in text and EVIL in text)
        eve.close()
        assert page.value("document.querySelectorAll('main script, main img').length") == 0
        assert page.value("document.title").endswith("running: small")
        assert all(fits(page, width, dark=dark) for width in (380, 1200) for dark in (False, True))

        proxy.closed = True
        proxy.cut()
        page.until(LINK, lambda link: link == "lost")
        lost = page.value(ROUND)
        proxy.closed = False
        page.until(LINK, lambda link: link == "live")
        page.until(ROUND, lambda number: number > lost)
        page.said.clear()  # the browser's own words on the link that was lost

        server.send_signal(signal.SIGINT)
        page.until(LINK, lambda link: link == "over")
        assert page.value("document.querySelector('.value').textContent") == "stopped"
        asked = proxy.accepted
        server.output(130)
        assert page.value("new Promise((done) => setTimeout(() => done(1), 1500))") is not None
        assert proxy.accepted == asked  # it does not ask again
        assert page.value(POINTS) > 3 and page.said == []
