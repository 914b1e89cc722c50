"""A seeded dose of chaos (tests/integration/chaos.py); `python -m tests.integration.chaos` takes it for longer."""

from __future__ import annotations

import pytest

from tests.integration import chaos

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def test_a_private_run_survives_whatever_breaks(tmp_path):
    out = chaos.run(tmp_path, rounds=200, faults=14, seed=4)
    assert out.problems == []
    assert out.status == "completed"
    # A round may fail for want of a reply in time, on a machine that is busy; what it leaves is judged above.
    assert out.rounds == 200 and out.failed <= 2
    assert sum(out.faults.values()) == 14 and len(out.faults) >= 6
    assert out.restarts["server"] >= 2 and out.restarts["client"] >= 2
