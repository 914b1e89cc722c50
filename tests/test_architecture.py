"""The arrows between the packages: common <- client, server <- simulations <- cloister.py."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

MAY_IMPORT = {
    "common": {"common"},
    "client": {"common", "client"},
    "server": {"common", "server"},
    "simulations": {"common", "client", "server", "simulations"},
}
OURS = {*MAY_IMPORT, "cloister"}

# Where a package may be imported: in a folder, or in one file. So all else is tested without a network.
EDGES = {
    "flwr": (
        "common/wire/",
        "client/app.py",
        "client/node.py",
        "server/app.py",
        "server/rounds/",
        "server/sessions/",
        "server/folder/checkpoint.py",
        "simulations/inline.py",
        "simulations/benchmarks/",
    ),
    "grpc": ("client/node.py", "server/sessions/", "server/status.py", "simulations/benchmarks/"),
    "sqlite3": ("client/account/ledger.py",),
    "opacus": ("client/training/", "common/privacy/second_opinion.py", "simulations/benchmarks/"),
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""


def modules() -> list[Path]:
    found = [p for package in MAY_IMPORT for p in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > 30
    return [p for p in found if "_pb2" not in p.name]


def test_imports_follow_the_arrows():
    wrong = []
    for path in modules():
        package = path.relative_to(ROOT).parts[0]
        entry_point = path.name == "__main__.py"
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in OURS and top not in MAY_IMPORT[package] and not (entry_point and top == "cloister"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {package} must not import {name}")
    assert wrong == []


def test_flower_and_grpc_stay_at_the_edges():
    wrong = []
    for path in modules():
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in EDGES and not str(path.relative_to(ROOT)).startswith(EDGES[top]):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {top} is imported at an edge only")
    assert wrong == []


def test_the_command_line_imports_only_inside_its_verbs():
    top_level = [n for n in ast.parse((ROOT / "cloister.py").read_text()).body if isinstance(n, ast.ImportFrom)]
    assert {n.module.split(".")[0] for n in top_level} & (set(MAY_IMPORT) | {"torch", "flwr", "rich"}) == set()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("server.serve", {"torch", "opacus", "polars"}),
        ("server.explain", {"torch", "opacus"}),
        ("client.join", {"opacus"}),
    ],
)
def test_a_process_starts_without_what_it_may_never_need(module, unwanted):
    # Torch is two thirds of a server's memory; Opacus takes most of a client's time to start.
    code = f"import sys, {module}; print(sorted({unwanted!r} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
