"""The example of a strategy of one's own: its numbers, and docs/extending.md's commands as they stand."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import ROOT

FOLDER = ROOT / "docs/examples/geometric-median"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("geometric_median")


@pytest.mark.parametrize(
    ("points", "weights", "expected"),
    [
        # A right triangle's: each side is seen under 120 degrees from ((3 - sqrt 3) / 6, (3 - sqrt 3) / 6).
        ([[0, 0], [1, 0], [0, 1]], [1, 1, 1], [(3 - math.sqrt(3)) / 6] * 2),
        # An angle of more than 120 degrees: its corner.
        ([[0, 0], [1, 0.1], [-1, 0.1]], [1, 1, 1], [0, 0]),
        # On a line: the median, whatever the outlier; and the weighted one.
        ([[0], [1], [2], [3], [1e9]], [1, 1, 1, 1, 1], [2]),
        ([[0], [1], [2]], [5, 1, 1], [0]),
    ],
)
def test_it_is_the_geometric_median(module, points, weights, expected):
    found = module.geometric_median(
        np.array(points, np.float64), np.array(weights, np.float64), steps=300, smoothing=1e-9
    )
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"steps": 0}, "steps must be"), ({"smoothing": 0.0}, "smoothing must be")]
)
def test_its_parameters_are_checked(module, wrong, said):
    with pytest.raises(ValueError, match=said):
        module.GeometricMedian(**wrong)


@pytest.mark.slow
def test_the_commands_that_add_it_run_as_they_stand(tmp_path):
    (block,) = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), re.M | re.S)
    for part in ("simulations/heart", "docs/examples"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("state", "certs", "runs"))
    there = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), str(ROOT)]),
        # pip is to touch neither this environment nor a network.
        "PIP_TARGET": str(tmp_path / "packages"),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # for pip this says: without
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env={**os.environ, **there},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "runs/median/result.json").read_text())
    assert (result["status"], len(result["clients"])) == ("completed", 4)
    assert "geometric-median" in (tmp_path / "runs/median/federation.yaml").read_text()


def test_the_pages_own_class_is_valid_and_moves_to_the_largest_clients_model():
    text = (ROOT / "docs/extending.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    scope: dict[str, Any] = {}
    exec(code, scope)
    from flwr.app import Message, RecordDict

    from common.model.update import Update
    from common.wire.identity import identify_process
    from common.wire.records import from_update, to_weights

    identify_process("test")
    replies = []
    for rows, value in ((3.0, 1.0), (5.0, 2.0)):
        update = Update(weights={"w": np.full(2, value, np.float32)}, weight=rows)
        replies.append(Message(from_update(update), dst_node_id=1, message_type="train"))
    assert isinstance(replies[0].content, RecordDict)
    arrays, _ = scope["First"](scale=0.5).aggregate_train(1, replies)
    assert to_weights(arrays)["w"].tolist() == [1.0, 1.0]
