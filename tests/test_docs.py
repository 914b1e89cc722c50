"""Every command on the pages of docs/: run as it stands, or at least one that Cloister would accept.

A block of ```sh is run, here or by the test that `ELSEWHERE` names. A block of ```console, whose commands begin with
`$`, needs what a test's machine has not; `NOT_RUN` says what. The README's blocks are test_readme.py's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

import cloister
from tests.integration.federation import Process
from tests.support import ROOT, port_8443

DOCS = ROOT / "docs"
HERE = ("tutorial.md", "coordinator.md", "data-owner.md", "operations.md")
ELSEWHERE = {
    "extending.md": "tests/examples/test_geometric_median.py",
    "flower.md": "tests/integration/test_flower_deployment.py",  # with TLS and keys; see below for its words
    "toolbox.md": "tests/test_readme.py",
}
NOT_RUN = {
    ("tutorial.md", ". .venv/bin/activate"): "the environment of whoever reads",
    (
        "coordinator.md",
        "cloister serve federation.yaml --certificates certs --address 0.0.0.0:8443",
    ): "a host for others",
    ("data-owner.md", "cloister doctor simulations/heart/cleveland.yaml"): "a server; test_examples.py has one",
    ("operations.md", "cloister status fed.example.org:8443 --certificates certs"): "a host name, and runs/...",
    ("operations.md", "pip install 'cloister[tensorboard]'"): "a package index, and runs/...",
    ("results.md", "cloister sweep simulations/digits.yaml --grid privacy.row"): "minutes; `make results` runs it",
    ("results.md", "cloister sweep simulations/digits.yaml --grid privacy.client"): "minutes; `make results` runs it",
    ("results.md", "cloister sweep simulations/heart/federation.yaml --grid privacy.row.epsilon"): "minutes, as above",
    ("results.md", "cloister sweep simulations/heart/federation.yaml --grid privacy.row=null"): "minutes, as above",
    (
        "simulation.md",
        "cloister simulate simulations/article.yaml",
    ): "half a minute; test_examples.py has a smaller one",
    (
        "simulation.md",
        "cloister sweep simulations/heart/federation.yaml",
    ): "a minute; test_examples.py has a smaller one",
}


def blocks(page: str, language: str = "sh") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def pages() -> list[str]:
    found = sorted(path.name for path in DOCS.glob("*.md"))
    assert len(found) > 12
    return found


def commands(block: str) -> list[str]:
    """The commands of a block of ```console, each on one line. Lines without `$` go on, or are what was printed."""
    joined = block.replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def test_every_page_with_commands_has_a_test_that_runs_them():
    assert {page for page in pages() if blocks(page)} == {*HERE, *ELSEWHERE}
    for page, where in ELSEWHERE.items():
        assert f"docs/{page}" in (ROOT / where).read_text()


def test_every_block_that_is_not_run_is_known_with_its_reason():
    found = [(page, commands(block)) for page in pages() for block in blocks(page, "console")]
    assert len(found) == len(NOT_RUN)
    for (page, first), reason in NOT_RUN.items():
        assert reason and [lines for at, lines in found if at == page and lines[0].startswith(first)], first


def written() -> Iterator[tuple[str, str]]:
    """Every line that begins with `cloister`, in any kind of block, with its page."""
    for page in pages():
        text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:\$ | {4,})?((?:\w+=\S+ )?cloister [a-z].*)$", text, re.M):
            yield page, re.sub(r"^\w+=\S+ ", "", line)


def test_every_command_anywhere_is_one_that_cloister_has(capsys):
    found = list(written())
    assert len(found) > 60
    root = typer.main.get_command(cloister.app)
    for page, line in found:
        group, (_, *words) = root, [word for word in shlex.split(line, comments=True) if word not in ("...", "&", "|")]
        while isinstance(group, click.Group):
            assert words and words[0] in group.commands, f"{page}: {line}"
            group = group.commands[words.pop(0)]
        try:
            group.make_context(str(group.name), words)
        except click.MissingParameter as error:
            assert "..." in line, f"{page}: {line}: {error.format_message()}"
        except click.UsageError as error:
            pytest.fail(f"{page}: {line}: {error.format_message()}")


class Terminal:
    """A reader's terminal: a block at a time, in the folder where the one before has left it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch

    def paste(self, block: str) -> str:
        """What it prints. Commands of Cloister run in this process; a block with anything else is the shell's."""
        lines = [shlex.split(line, comments=True) for line in block.splitlines()]
        if not all(line[0] in ("cloister", "cd") for line in lines):
            return self._shell(block)
        printed = ""
        for name, *arguments in lines:
            if name == "cd":
                self.folder = self.folder / arguments[0]
                continue
            self._monkeypatch.chdir(self.folder)
            done = CliRunner().invoke(cloister.app, arguments)
            assert done.exit_code == 0, f"{name} {arguments}\n{done.output}"
            printed += done.output
        return printed

    def _shell(self, block: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_the_tutorial_goes_from_two_terminals_to_predictions(tmp_path, monkeypatch):
    coordinator, hospitals = Terminal(tmp_path, monkeypatch), Terminal(tmp_path, monkeypatch)
    begin, read, attempt, certificates, examine, serve, ready, ask, join, use, budget, after = blocks("tutorial.md")
    with port_8443(), ExitStack() as processes:
        for block in (begin, read, attempt, certificates, examine):
            coordinator.paste(block)
        assert not (coordinator.folder / "certs/cleveland.key").exists()  # it lies with its owner alone
        server = Process(shlex.split(serve)[1:], coordinator.folder)
        processes.callback(server.end)
        server.until("waiting for clients: 0 of 4")
        with urllib.request.urlopen("http://127.0.0.1:8090", timeout=10) as page:
            assert b"<html" in page.read()
        assert hospitals.paste(ready).endswith("ready\n")
        assert "waiting for clients" in hospitals.paste(ask)
        assert hospitals.paste(join).count("the run is over: completed") == 4
        assert "completed after 30 rounds" in server.output()
    assert "by sex" in hospitals.paste(use)
    head, *rows = (hospitals.folder / "predictions.csv").read_text().splitlines()
    assert (head, len(rows)) == ("prediction,probability_healthy,probability_disease", 303)
    told = hospitals.paste(budget)
    for line in (
        "spent   4.01   left 3.99",
        "30 x model update",
        "3 x evaluation",
        "33 entries; chain and head verified",
    ):
        assert line in told and line in (DOCS / "tutorial.md").read_text()
    assert "round 30 of 30, completed" in coordinator.paste(after)
    # What the participant's own guide says to type is what was pasted here, word for word or with an option more.
    pasted = [line for block in blocks("tutorial.md") for line in block.splitlines()]
    guide = re.findall(r"^ {7}(cloister .*)$", (hospitals.folder / "README.md").read_text(), re.M)
    assert len(guide) == 5
    assert [line for line in guide if not any(line in each for each in pasted)] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_coordinators_commands_run_in_their_order(tmp_path, monkeypatch):
    rows = pl.int_range(300, eager=True)
    table = {
        "age": 20 + rows % 60,
        "ward": ["A", "B", "C"] * 100,
        "outcome": ["well" if r % 3 else "ill" for r in rows],
    }
    pl.DataFrame(table).write_csv(tmp_path / "table.csv")
    terminal = Terminal(tmp_path, monkeypatch)
    with port_8443():
        told = [terminal.paste(block) for block in blocks("coordinator.md")]
    assert any("ready\n" in text for text in told) and any("revoked" in text for text in told)


@pytest.mark.parametrize("page", ["operations.md", "data-owner.md"])
def test_the_commands_that_need_nothing_before_them_run(page, tmp_path, monkeypatch):
    kept = shutil.ignore_patterns("state", "certs", "runs", "*.py")
    shutil.copytree(ROOT / "simulations/heart", tmp_path / "simulations/heart", ignore=kept)
    terminal = Terminal(tmp_path, monkeypatch)
    (block,) = blocks(page)
    assert terminal.paste(block)


def test_flowers_commands_are_those_that_its_test_starts():
    """The page's have other folders and ports. Without TLS they are the same but for `--insecure`."""
    test = (ROOT / ELSEWHERE["flower.md"]).read_text()
    words = {word for block in blocks("flower.md") for word in re.findall(r"(?<!\S)(--[a-z-]+|flower-\w+)", block)}
    words -= {"--insecure", "--folder", "--name"}  # the last two are Cloister's, and a label that Flower shows
    assert {"flower-superlink", "flower-supernode", "--enable-supernode-auth", "--run-config"} <= words
    assert [word for word in sorted(words) if f'"{word}"' not in test] == []
