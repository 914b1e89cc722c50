"""What MkDocs is told on top of mkdocs.yml, so that one text serves the site and whoever reads the files.

Links in the pages are as they are between files: `tables.md`, `../README.md`, `../server/report/facts.py`. The README,
CONTRIBUTING and the CHANGELOG become pages of the site; other files that a page links to are put into it as text.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS, SOURCE = "docs", "source"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)((?:#[^)]*)?)\)")  # of a file, perhaps with a place in it


def place_of(target: str, folder: str) -> str:
    """Where in the site is what a text in `folder` calls `target`? Its pages are all in one folder."""
    path = normpath(PurePosixPath(folder, target))
    if path in PAGES:
        return PAGES[path]
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{SOURCE}/{path}.txt"


def relinked(text: str, folder: str) -> str:
    """The text with its links as they are in the site."""
    return LINK.sub(lambda link: f"]({place_of(link[1], folder)}{link[2]})", text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and the texts that do not lie in docs/."""
    texts = [(path.read_text(encoding="utf-8"), DOCS) for path in sorted((ROOT / DOCS).glob("*.md"))]
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        texts.append((text, "."))
        files.append(File.generated(config, page, content=relinked(text, ".")))
    for target, folder in {(link[1], folder) for text, folder in texts for link in LINK.finditer(text)}:
        path = ROOT / folder / target
        place = place_of(target, folder)
        if place.startswith(f"{SOURCE}/") and path.is_file() and place not in files.src_uris:
            files.append(File.generated(config, place, abs_src_path=str(path.resolve())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page of docs/ with its links as they are in the site; the others were made so."""
    return markdown if page.file.src_uri in PAGES.values() else relinked(markdown, DOCS)
