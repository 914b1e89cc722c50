"""The arrows between the packages: common <- client, server <- simulations <- cloister."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

ARROWS = {
    "common": {"common"},
    "client": {"common", "client"},
    "server": {"common", "server"},
    "simulations": {"common", "client", "server", "simulations"},
    "cloister": {"common", "client", "server", "simulations", "cloister"},
}

# Which folders of its package a folder may import; files that lie in none are open to all.
FOLDERS = {
    "common/document": set(),
    "common/data": {"common/document"},
    "common/model": {"common/document"},
    "common/privacy": {"common/document"},
    "common/certificates": set(),
    "common/inference": {"common/document", "common/data", "common/model"},
    "common/wire": {"common/document", "common/model"},
    "client/training": set(),
    "client/account": {"client/training"},
    "client/doctor": {"client/account"},
    "server/rounds": set(),
    "server/sessions": {"server/rounds"},
    "server/folder": {"server/rounds"},
    "server/observers": {"server/rounds"},
    "server/report": {"server/rounds", "server/folder"},
    "server/dashboard": {"server/rounds", "server/report"},
}

# Where a package may be imported: in a folder, or in one file. So all else is tested without a network.
EDGES = {
    "flwr": (
        "common/wire/",
        "client/app.py",
        "client/node.py",
        "server/app.py",
        "server/rounds/",
        "server/sessions/",
        "simulations/inline.py",
        "simulations/ray_grid.py",
        "simulations/vector/grid.py",
        "simulations/benchmarks/",
    ),
    "grpc": ("client/node.py", "client/calls.py", "server/sessions/", "simulations/benchmarks/"),
    "sqlite3": ("client/account/ledger.py",),
    "ray": ("simulations/ray_grid.py", "simulations/benchmarks/"),
    "codecarbon": ("client/energy.py",),
    "rich": ("cloister/",),
    "typer": ("cloister/",),
    "altair": ("server/report/",),
    "vl_convert": ("server/report/page.py",),
    "jinja2": ("server/report/page.py",),
    "onnx": ("common/inference/",),
    "onnxruntime": ("common/inference/",),
    "captum": ("common/inference/explanation.py",),
    "tensorboard": ("server/observers/trackers/tensorboard.py",),
    "mlflow": ("server/observers/trackers/mlflow.py",),
    "starlette": ("server/dashboard/",),
    "uvicorn": ("server/dashboard/",),
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
    found = [p for package in ARROWS for p in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > 100
    return [p for p in found if "_pb2" not in p.name]


def test_imports_follow_the_arrows():
    wrong = []
    for path in modules():
        package = path.relative_to(ROOT).parts[0]
        entry_point = path.name == "__main__.py"
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in ARROWS and top not in ARROWS[package] and not (entry_point and top == "cloister"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {package} must not import {name}")
    assert wrong == []


def test_imports_between_folders_point_one_way():
    made = {
        str(p.parent.relative_to(ROOT)) for top in ("common", "client", "server") for p in (ROOT / top).glob("*/*.py")
    }
    assert made == set(FOLDERS)
    wrong = []
    for path in modules():
        folder = str(path.parent.relative_to(ROOT))
        for line, name in imports(path) if folder in FOLDERS else ():
            target = "/".join(name.split(".")[:2])
            if target in FOLDERS and target.split("/")[0] == folder.split("/")[0]:
                if target not in {*FOLDERS[folder], folder}:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {folder} must not import {name}")
    assert wrong == []


def test_what_belongs_to_an_edge_is_imported_there_alone():
    wrong = []
    for path in modules():
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in EDGES and not str(path.relative_to(ROOT)).startswith(EDGES[top]):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {top} is imported at an edge only")
    assert wrong == []


@pytest.mark.parametrize(
    ("called", "where"),
    [
        ("charge", "client/account/books.py"),  # a ledger's
        ("Recipe", "client/account/account.py"),
        ("Scoring", "client/account/account.py"),
    ],
)
def test_what_leaves_a_client_passes_one_door(called, where):
    found = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == called:
                found.add(str(path.relative_to(ROOT)))
    # A simulation's worker processes make what they are sent anew; it was charged where it came from.
    again = {"simulations/vector/workers.py"} if called == "Recipe" else set()
    found = {path for path in found if path.startswith(("client/", "simulations/"))}
    assert {path for path in found if not path.startswith("simulations/benchmarks/")} == {where} | again


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("server.serve", {"torch", "opacus", "polars", "codecarbon", "tensorboard", "mlflow", "server.dashboard"}),
        ("client.join", {"opacus", "codecarbon"}),
        ("simulations.engine", {"codecarbon"}),
        ("cloister", {"torch", "opacus", "polars", "flwr", "grpc", "pydantic", "numpy", "rich"}),
    ],
)
def test_a_process_starts_without_what_it_may_never_need(module, unwanted):
    # Torch is two thirds of a server's memory; Opacus takes most of a client's time to start.
    code = f"import sys, {module}; print(sorted({unwanted!r} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
