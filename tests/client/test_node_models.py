"""A node keeps the model of each run that it takes part in: what tasks bring, and what comes when a run is over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client.account.entries import cost_of_run
from common.document.federation import Federation
from common.inference import saved
from common.model import mlp
from common.wire import protocol
from tests.client.scripted import Link, entries, play
from tests.support import PRIVATE, federation, saved_model


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private"])
def test_a_node_keeps_the_model_of_the_last_complete_round_with_what_it_stated(tmp_path, changes):
    fed = federation(**changes)

    async def server(link: Link) -> None:
        await link.welcome(fed, run="kept-run")
        await link.hear("ready")
        for server_round in (1, 2, 3):
            await link.ask(fed, server_round=server_round, run="kept-run", **{"complete-rounds": server_round - 1})
            await link.answer()
        await link.finish()

    result, _ = play(tmp_path, server)
    assert result == "completed"
    (path,) = (tmp_path / "state" / "ada.models").iterdir()
    model = saved.from_bytes(path.read_bytes(), "it")
    assert (path.name, model.run, model.round) == ("kept-run.safetensors", "kept-run", 2)
    assert model.federation == fed
    sent = mlp.weights_of(mlp.build(fed))
    assert all(np.array_equal(model.weights[name], array) for name, array in sent.items())
    if not changes:
        assert model.privacy["row"] is None
        return
    (own,) = model.privacy["row"]["per_client"].values()
    charged = cost_of_run([e for e in entries(tmp_path) if e.run == "kept-run"], 1e-3)
    assert own["epsilon"] == pytest.approx(charged, rel=1e-6)
    assert own["released"][1]["steps"] == 6  # three rounds of two steps
    assert model.privacy["row"]["epsilon"] == own["planned_epsilon"] <= 4.0


def test_a_server_that_does_not_say_how_many_rounds_made_a_model_leaves_none(tmp_path):
    fed = federation()

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed, server_round=3)
        await link.answer()
        await link.finish()

    play(tmp_path, server)
    assert not (tmp_path / "state" / "ada.models").exists()


def last_model(fed: Federation, *, run: str = "run", **changes: Any) -> bytes:
    claims = {"epsilon": 3.5, "per_client": {}, "withheld": "theirs"} if fed.privacy.row else None
    model = saved_model(**changes)
    return saved.to_bytes(replace(model, federation=fed, run=run, round=3, privacy={"run": run, "row": claims}))


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private"])
def test_the_model_of_a_run_that_is_over_is_kept_with_the_runs_statement_and_our_own(tmp_path, changes):
    fed = federation(**changes)

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed, server_round=2, **{"complete-rounds": 1})
        await link.answer()
        for frame in protocol.model_frames(last_model(fed, **changes)):
            await link._context.write(frame)
        await link.finish()

    result, said = play(tmp_path, server)
    assert result == "completed"
    (path,) = (tmp_path / "state" / "ada.models").iterdir()
    assert f"the model after round 3 is kept: {path}" in said
    model = saved.from_bytes(path.read_bytes(), "it")
    assert model.round == 3
    expected = saved_model(**changes).weights
    assert all(np.array_equal(model.weights[name], array) for name, array in expected.items())
    if changes:
        assert model.privacy["row"]["epsilon"] == 3.5 and model.privacy["row"]["withheld"] == "theirs"
        assert list(model.privacy["row"]["per_client"]) == ["ada"]


@pytest.mark.parametrize(
    "content, said_so",
    [
        (lambda fed: b"no model at all", "not a model that Cloister saved"),
        (lambda fed: last_model(fed, run="another"), "sent the model of another run"),
        (lambda fed: last_model(federation(model__hidden=[9])), "does not fit its federation's document"),
        (lambda fed: last_model(federation(name="other")), "sent the model of another run"),
    ],
)
def test_a_last_model_that_is_none_of_the_runs_leaves_the_one_before(tmp_path, content, said_so):
    fed = federation()

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed, server_round=2, **{"complete-rounds": 1})
        await link.answer()
        for frame in protocol.model_frames(content(fed)):
            await link._context.write(frame)
        await link.finish()

    result, said = play(tmp_path, server)
    assert result == "completed"
    (path,) = (tmp_path / "state" / "ada.models").iterdir()
    assert saved.from_bytes(path.read_bytes(), "it").round == 1
    (line,) = (line for line in said if line.startswith("warning: "))
    assert said_so in line and line.endswith("the model that was kept before stays")
