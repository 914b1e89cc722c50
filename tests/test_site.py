"""The site of docs/, as `make docs` builds it: without a warning, and asking nothing of another host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.devtools import tab
from tests.support import ROOT

# Elements that fetch what one of their attributes names.
FETCHING = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
}


def built(project: Path, into: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(into),
    ]  # quietly it counts no warning
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("site")
    done = built(ROOT, into)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return into


class Fetched(HTMLParser):
    """What a page fetches by itself: its scripts, styles, pictures and the like."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in FETCHING.get(tag, ()) and value]


def outside(text: str) -> list[str]:
    return [address for address in Fetched(text).addresses if re.match(r"(https?:)?//", address)]


def test_every_page_is_in_the_site_and_finds_what_it_fetches_beside_it(site):
    pages = {path.name: path for path in site.glob("*.html")}
    expected = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert set(pages) == expected | {"index.html", "contributing.html", "changelog.html", "404.html"}
    for path in pages.values():
        fetched = Fetched(path.read_text()).addresses
        assert len(fetched) > 3
        for address in fetched:
            assert (site / address.lstrip("/").split("#")[0].split("?")[0]).is_file(), f"{path.name}: {address}"


def test_no_page_and_no_style_asks_another_host_for_anything(site):
    for path in site.glob("*.html"):
        assert outside(path.read_text()) == [], path.name
    styles = list(site.rglob("*.css"))
    assert len(styles) > 2
    for path in styles:
        assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]*", path.read_text()) == [], path.name
    assert outside('<script src="https://cdn.example.org/x.js">') and outside('<link href="//fonts.example.org">')


def test_links_to_files_outside_docs_lead_to_their_text(site):
    page = (site / "threat-model.html").read_text()
    (place,) = set(re.findall(r'href="(source/[^"]*test_attacks[^"]*)"', page))
    assert (site / place).read_text() == (ROOT / "tests/test_attacks.py").read_text()
    assert 'href="index.html#when-to-use-something-else"' in (site / "coordinator.html").read_text()
    assert 'href="tutorial.html"' in (site / "coordinator.html").read_text()


@pytest.mark.parametrize("link", ["no-such-page.md", "tutorial.md#no-such-place", "../no/such/file.py"])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path, link):
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("client", "server", "simulations", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs/tutorial.md").open("a") as page:
        page.write(f"\n[nowhere]({link})\n")
    done = built(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "tutorial.md" in done.stderr and link.split("#")[-1].removeprefix("../") in done.stderr


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder at an address of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *said: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.integration
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("width", "scheme"), [(1400, "default"), (400, "slate")], ids=["wide, light", "narrow, dark"])
def test_in_a_browser_pages_fit_search_finds_and_nothing_is_asked_elsewhere(site, tmp_path, width, scheme):
    with served(site) as address, tab(tmp_path / "profile") as page:
        page.look(width, 900, dark=scheme == "slate")
        for name in ("index", "tutorial", "federation-file", "toolbox"):
            page.open(f"{address}/{name}.html")
            page.until(f"location.pathname === '/{name}.html' && document.readyState === 'complete'")
            page.until("document.documentElement.scrollWidth <= innerWidth")  # once the search bar has its place
            assert page.value("document.body.dataset.mdColorScheme") == scheme
        page.open(f"{address}/index.html?q=ledger")
        found = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.pathname)"
        page.until(found, lambda pages: "/data-owner.html" in pages)
        asked = page.value("performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
        assert set(asked) == {address}
        assert page.said == []
