"""Energy through whole runs: each engine, what the run folder says, and that under privacy it says nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from flwr.app import Message

from client.app import client_app
from common.document.federation import Federation
from common.model.energy import Energy
from common.model.update import Updates
from common.wire import records
from server.folder.folder import RunFolder, read_run
from server.report import page
from server.report.card import card
from simulations import engine
from simulations.engine import run_on, simulate
from simulations.inline import InlineGrid
from simulations.sites import Sites
from simulations.sources import sites_from_table
from simulations.vector.fold import Folding
from simulations.vector.grid import VectorGrid
from simulations.vector.workers import Workers
from tests.support import PRIVATE, WHOLE, federation, table

CPU = torch.device("cpu")
Result = TypeVar("Result")


class Fixed:
    """A meter by which every measurement is of 12 J and 3 g."""

    def measure(self, work: Callable[[], Result]) -> tuple[Result, Energy]:
        return work(), Energy(joules=12.0, grams=3.0)

    def at(self, device: torch.device) -> Fixed:
        return self


def sites(folder: Path, document: Federation) -> Sites:
    table(300).write_csv(folder / "table.csv")
    made = sites_from_table(document, folder / "table.csv", clients=4, how="iid", seed=0, device=CPU)
    if made.meter is not None:
        made.meter = Fixed()
    return made


def ran(folder: Path, by: Any, document: Federation, **how: Any) -> dict[str, Any]:
    run = RunFolder.create(document, path=folder / "run")
    return simulate(document, sites(folder, document), run, run="r", engine=by, **how)


# Two rounds of four clients, who train and evaluate: one by one that is 16 tasks of 12 J. Together, a round trains in
# chunks and is scored at once.
@pytest.mark.parametrize("by, measured", [("inline", 16), ("vector", None)])
def test_a_run_says_what_its_clients_took(tmp_path, by, measured):
    document = federation(energy=True, training__rounds=2)
    result = ran(tmp_path, by, document, **({"workers": 1} if by == "vector" else {}))
    record = read_run(tmp_path / "run")
    joules = [event.energy["joules"] for event in record.rounds]
    assert len(joules) == 2 and joules[0] == joules[1]
    assert result["energy"]["joules"] == pytest.approx(sum(joules))
    assert result["energy"]["grams"] == pytest.approx(sum(joules) / 4)  # 3 g for 12 J
    if measured is not None:
        assert sum(joules) == 12.0 * measured
    assert sum(joules) % 12.0 == pytest.approx(0.0)  # whole measurements: the parts of each add up to it
    points = 100 * result["evaluation"]["accuracy"]
    assert result["energy"]["per_point"]["joules"] == pytest.approx(sum(joules) / points)
    told = in_figures(sum(joules))
    assert f"{told}, " in card(record)
    assert f">{told}<" in page.report(record)


def in_figures(joules: float) -> str:
    return f"{joules:.3g} J"


@pytest.mark.parametrize("by", ["inline", "vector"])
@pytest.mark.parametrize("privacy", [PRIVATE, WHOLE])
def test_under_privacy_nothing_of_it_is_in_a_run_folder(tmp_path, by, privacy):
    document = federation(energy=True, training__rounds=2, **privacy)
    assert "energy" not in ran(tmp_path, by, document)
    for name in ("events.jsonl", "result.json", "privacy.json"):
        text = (tmp_path / "run" / name).read_text()
        assert "joules" not in text and "grams" not in text


@pytest.mark.parametrize("privacy", [{}, PRIVATE])
def test_a_server_turns_away_a_figure_that_it_did_not_ask_for(tmp_path, privacy):
    # The first client tells its energy in a run that does not ask, or under privacy.
    document = federation(energy=bool(privacy), training__rounds=1, **privacy)
    its = sites(tmp_path, document)

    honest = client_app(lambda context: nullcontext(its.asked(context.node_id, run="r")))
    first = its.nodes[0]

    def app(message: Message, context: Any) -> Message:
        reply = honest(message, context)
        if context.node_id == first:
            records.add_energy(reply.content, Energy(joules=1.0, grams=1.0))
        return reply

    folder = RunFolder.create(document, path=tmp_path / "run")
    run_on(InlineGrid(app, its.nodes, run="r"), document, its, folder, run="r")
    (event,) = read_run(tmp_path / "run").rounds
    assert event.clients == 3 and not event.energy
    assert {(r.client, r.kind) for r in event.rejected} == {(its.name_of(first), "rejected")}
    assert all("got" in r.reason and "joules" in r.reason for r in event.rejected)


def test_without_accuracy_there_is_nothing_per_point(tmp_path):
    document = federation(energy=True, training__rounds=1, privacy__evaluation={"every": 0})
    assert ran(tmp_path, "inline", document)["energy"]["per_point"] is None


def test_a_chunks_energy_is_divided_by_steps_among_those_that_count():

    class Sink:
        def add_all(self, nodes: Any, updates: Any) -> None:
            pass

    start = {"w": np.zeros(1, np.float32)}
    jobs: Any = [SimpleNamespace(node=n, recipe=SimpleNamespace(steps=steps)) for n, steps in ((1, 1), (2, 3))]
    flat = np.array([[1.0], [np.nan]], np.float32)  # the second diverged
    folding = Folding(start, Sink(), dtype="float32", meter=Fixed())  # type: ignore[arg-type]
    folding.measured(jobs, lambda: Updates(flat=flat, weights=np.ones(2), losses=None, like=start))
    assert folding.nodes == [1]
    assert folding.energy == Energy(joules=3.0, grams=0.75)  # a quarter of the steps
    other = Folding(start, Sink(), dtype="float32")  # type: ignore[arg-type]
    folding.aggregate = SimpleNamespace(merge=lambda other: None)  # type: ignore[assignment]
    other.energy = Energy(joules=1.0, grams=0.25)
    folding.merge(other)
    assert folding.energy == Energy(joules=4.0, grams=1.0)


def test_worker_processes_measure_what_they_train(monkeypatch, tmp_path):
    # Chunks of two clients: a measurement in each of two workers, and one of the evaluation of all.
    monkeypatch.setattr("simulations.vector.train.CHUNK_CLIENTS", 2)
    real = Workers.__init__

    def start(self: Workers, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        assert self.are_ready(wait_s=120.0)

    monkeypatch.setattr(Workers, "__init__", start)
    monkeypatch.setattr(engine, "VectorGrid", partial(VectorGrid, worth_s=-1.0))
    ran(tmp_path, "vector", federation(energy=True, training__rounds=2), workers=2)
    alone, in_workers = (event.energy["joules"] for event in read_run(tmp_path / "run").rounds)
    assert alone == in_workers == 36.0
