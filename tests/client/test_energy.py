"""What tasks take: measured, told where that may be, and kept by the owner."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import energy as energies
from client.account.policy import Policy
from client.app import client_app
from client.energy import CodeCarbon, EnergyBook, grams_a_kwh
from client.settings import ClientFile, DataFile, EnergySource, load_client_file
from client.site import Site, open_site
from cloister.check import check_file
from common.document.federation import Federation
from common.errors import ConfigError
from common.model.energy import Energy, amount, sum_of
from common.model.weights import initial_weights
from common.wire import codec, records
from common.wire.identity import identify_process
from common.wire.records import ARRAYS, CONFIG, GRAMS, JOULES, METRICS, RUN
from tests.client.scripted import Link, play
from tests.support import PRIVATE, ROOT, WHOLE, federation, table

CPU = torch.device("cpu")
Result = TypeVar("Result")
identify_process("energy")


class Fixed:
    """A meter by which every task takes the same."""

    def measure(self, work: Callable[[], Result]) -> tuple[Result, Energy]:
        return work(), Energy(joules=2.0, grams=0.5)

    def at(self, device: torch.device) -> Fixed:
        return self


def site(folder: Path, fed: Federation, *, country: str | None = None) -> Site:
    folder.mkdir(exist_ok=True)
    table(80).write_csv(folder / "ada.csv")
    settings = ClientFile(
        server="localhost:4433",
        tls=None,
        name="ada",
        data=DataFile(path=str(folder / "ada.csv"), name="ada"),
        device="cpu",
        state=str(folder / "state"),
        policy=Policy(epsilon=8.0, delta=1e-3, without_privacy=True),
        energy=EnergySource(country=country),
    )
    return open_site(settings, fed, name="ada")


def answer(its: Site, kind: str, *, round: int = 1) -> RecordDict:
    """What a site answers to a task of run "r"."""
    content = RecordDict(
        {
            ARRAYS: records.from_weights(initial_weights(its.federation)),
            CONFIG: ConfigRecord({RUN: "r", "server-round": round}),
        }
    )
    message = Message(content, dst_node_id=1, message_type=kind, group_id=str(round))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply = client_app(lambda context: nullcontext(its))(message, context)
    assert not reply.has_error()
    return reply.content


def kept(folder: Path) -> Any:
    return json.loads((folder / "state" / "ada.energy.json").read_text())


def test_a_document_without_energy_is_the_text_that_it_was_before_there_was_any():
    assert "energy" not in federation().canonical
    assert federation(energy=False).fingerprint == federation().fingerprint != federation(energy=True).fingerprint


@pytest.mark.parametrize("privacy, told", [({}, True), (PRIVATE, False), (WHOLE, False)])
def test_only_without_privacy_may_the_server_be_told(privacy, told):
    assert federation(energy=True, **privacy).tells_energy is told
    assert not federation(**privacy).tells_energy


def test_codecarbon_measures_work_and_its_grams_are_the_countrys():
    meter = CodeCarbon.on(CPU, country="DEU")
    result, energy = meter.measure(lambda: sum(i * i for i in range(300_000)))
    assert result == sum(i * i for i in range(300_000))
    assert 0 < energy.joules < 1e6 and math.isfinite(energy.grams)
    # 1 kWh is 3.6 MJ.
    assert energy.grams == pytest.approx(energy.joules / 3.6e6 * grams_a_kwh("DEU"), rel=1e-6)
    assert grams_a_kwh("DEU") != grams_a_kwh(None) == 475.0


def test_trackers_are_used_again_but_not_for_ever_since_they_keep_something_of_each_task(monkeypatch):
    meter, made = CodeCarbon(device="cpu:0"), []

    class Counting:
        def __init__(self, meter: CodeCarbon) -> None:
            self.tasks = 0
            made.append(self)

        def begin(self) -> None:
            self.tasks += 1

        def end(self) -> Energy:
            return Energy(joules=1.0, grams=1.0)

    monkeypatch.setattr(energies, "_Tracker", Counting)
    monkeypatch.setattr(energies, "MOST_TASKS", 2)
    for _ in range(4):
        meter.measure(lambda: None)
    assert [each.tasks for each in made] == [2, 2]
    meter.measure(lambda: meter.measure(lambda: None))  # two at once have one each
    assert [each.tasks for each in made] == [2, 2, 1, 1]


def test_work_that_fails_ends_its_measurement_too():
    meter = CodeCarbon.on(CPU)
    with pytest.raises(ValueError, match="of the work's own"):
        meter.measure(_fails)
    assert meter.measure(lambda: 7)[0] == 7


def _fails() -> None:
    raise ValueError("of the work's own")


@pytest.mark.parametrize("broken", ["start_task", "stop_task"])
def test_a_task_that_cannot_be_measured_is_done_all_the_same(monkeypatch, caplog, broken):
    def fail(*_: Any) -> None:
        raise OSError("no counters")

    meter = CodeCarbon("FRA", "cpu")
    meter.check()
    monkeypatch.setattr(f"codecarbon.emissions_tracker.BaseEmissionsTracker.{broken}", fail)
    assert meter.measure(lambda: 7) == (7, Energy(joules=0.0, grams=0.0))
    assert "could not be measured, and counts as nothing: OSError: no counters" in caplog.text
    with pytest.raises(ConfigError, match="codecarbon cannot measure energy here: OSError: no counters"):
        meter.check()


def test_of_gpus_the_one_in_use_is_measured_by_its_uuid(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-{device.index}")
    )
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("codecarbon.OfflineEmissionsTracker", lambda **asked: made.append(asked))
    for device in ("cuda:1", "cpu"):
        energies._Tracker(CodeCarbon("DEU", device))
    assert [asked["gpu_ids"] for asked in made] == [["GPU-uuid-1"], []]


def test_an_unknown_country_and_a_missing_package_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"energy\.country: codecarbon knows no country XYZ; leave it out"):
        CodeCarbon.on(CPU, country="XYZ")
    monkeypatch.setattr(energies, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`energy` needs codecarbon: pip install 'cloister\[energy\]'"):
        site(tmp_path, federation(energy=True))
    site(tmp_path, federation()).close()  # who is not asked needs nothing


def test_a_country_is_three_letters(tmp_path):
    text = "server: localhost:4433\ntls: null\nname: a\ndata: {path: a.csv, name: a}\nstate: s\nenergy: {country: de}\n"
    (tmp_path / "a.yaml").write_text(text + "policy: {epsilon: 1.0, delta: 1.0e-3}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:6: energy\.country"):
        load_client_file(tmp_path / "a.yaml")


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_a_task_took_travels_with_its_reply_and_is_kept(tmp_path, kind):
    its = site(tmp_path, federation(energy=True))
    its.meter = Fixed()
    metrics = answer(its, kind).metric_records[METRICS]
    assert (metrics[JOULES], metrics[GRAMS]) == (2.0, 0.5)
    answer(its, kind, round=2)
    its.close()
    assert kept(tmp_path) == {"r": {"joules": 4.0, "grams": 1.0, "rounds": 2 if kind == "train" else 0}}
    assert (tmp_path / "state" / "ada.energy.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("privacy", [PRIVATE, WHOLE])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_under_privacy_no_reply_has_a_figure_and_the_owner_has_it(tmp_path, privacy, kind):
    plain = site(tmp_path / "plain", federation(**privacy))
    expected = answer(plain, kind)
    plain.close()
    its = site(tmp_path, federation(energy=True, **privacy))
    its.meter = Fixed()
    told = answer(its, kind)
    its.close()
    assert set(told) == set(expected)
    assert set(told.metric_records[METRICS]) == set(expected.metric_records[METRICS])
    assert not {JOULES, GRAMS} & {name for record in told.values() for name in record}
    assert kept(tmp_path)["r"]["joules"] == 2.0


@pytest.mark.parametrize("privacy", [{}, PRIVATE], ids=["exact", "private"])
def test_a_client_tells_its_owner_what_a_run_took_and_the_server_only_without_privacy(tmp_path, monkeypatch, privacy):
    fed = federation(energy=True, **privacy)
    monkeypatch.setattr(CodeCarbon, "on", lambda device, *, country: Fixed())
    told: list[Any] = []

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        for number in (1, 2):
            await link.ask(fed, server_round=number)
            told.append(codec.decode((await link.answer())[1]).metric_records[METRICS])
        await link.finish()

    result, said = play(tmp_path, server)
    assert result == "completed"
    (line,) = (line for line in said if "took" in line)
    assert "run run took 4 J, 1 g CO2e in 2 rounds, about" in line and "ada.energy.json" in line
    assert [(JOULES in metrics, GRAMS in metrics) for metrics in told] == [(not privacy, not privacy)] * 2


@pytest.mark.parametrize("energy, expected", [(True, True), (False, False)])
def test_check_tries_what_the_owners_copy_of_the_federation_asks(tmp_path, monkeypatch, energy, expected):
    table(80).write_csv(tmp_path / "a.csv")
    (tmp_path / "fed.yaml").write_text(federation(energy=energy).canonical)
    text = "server: localhost:4433\ntls: null\nname: a\ndata: {path: a.csv, name: a}\nstate: s\nfederation: fed.yaml\n"
    (tmp_path / "a.yaml").write_text(text + "energy: {country: FRA}\npolicy: {epsilon: 1.0, delta: 1.0e-3}\n")
    assert ("energy is measured, with electricity of FRA" in check_file(tmp_path / "a.yaml")) is expected
    assert any("clients measure" in line for line in check_file(tmp_path / "fed.yaml")) is expected
    monkeypatch.setattr(energies, "find_spec", lambda name: None)
    if expected:
        with pytest.raises(ConfigError, match="needs codecarbon"):
            check_file(tmp_path / "a.yaml")


def test_a_book_goes_on_after_a_restart_and_a_damaged_one_begins_anew(tmp_path, caplog):
    one = Energy(joules=2.0, grams=0.5)
    EnergyBook.open(tmp_path / "book").note(one, run="r", trained=True)
    again = EnergyBook.open(tmp_path / "book")
    again.note(one, run="r", trained=False)
    assert again.of("r") == Energy(joules=4.0, grams=1.0)
    assert again.describe("r") == "4 J, 1 g CO2e in 1 rounds"
    assert (again.of("other"), again.describe("other")) == (None, "")
    for damaged in ("{", "[]", '{"r": {}}', '{"r": {"joules": NaN, "grams": 1, "rounds": 1}}'):
        (tmp_path / "book").write_text(damaged)
        caplog.clear()
        assert EnergyBook.open(tmp_path / "book").runs == {}
        assert "cannot be read, and begins anew" in caplog.text


def test_a_book_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    book = EnergyBook.open(tmp_path / "no folder" / "book")
    book.note(Energy(joules=2.0, grams=0.5), run="r", trained=True)
    assert "cannot be written" in caplog.text
    assert book.of("r") == Energy(joules=2.0, grams=0.5)


def test_energy_adds_up_and_is_told_per_point_of_accuracy():
    one, other = Energy(joules=10.0, grams=2.0), Energy(joules=30.0, grams=6.0)
    assert sum_of(one, None, other) == Energy(joules=40.0, grams=8.0)
    assert sum_of(None) is None
    assert other.per_point({"accuracy": 0.6}) == Energy(joules=0.5, grams=0.1)  # 30 / 60 and 6 / 60
    assert [one.per_point(scores) for scores in (None, {}, {"mae": 1.0}, {"accuracy": 0.0})] == [None] * 4
    assert [amount(v, "J") for v in (0.0, 2e-6, 0.0125, 3.0, 1234.0, 5.5e6)] == [
        "0 J",
        "2 \N{MICRO SIGN}J",
        "12.5 mJ",
        "3 J",
        "1.23 kJ",
        "5.5 MJ",
    ]


def test_measuring_leaves_no_file_opens_no_connection_and_hears_no_configuration(tmp_path):
    # In a process of its own, whose home has a configuration of codecarbon that asks for all of that.
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    asks = "[codecarbon]\nsave_to_file = true\nsave_to_api = true\noutput_dir = .\npue = 1e6\n"
    asks += "emissions_endpoint = http://localhost:9\n"
    asks += "co2_signal_api_token = token\nallow_multiple_runs = false\nlog_level = debug\nforce_cpu_power = 1e6\n"
    (tmp_path / "home" / ".codecarbon.config").write_text(asks)
    code = """
import socket, threading
from client.energy import CodeCarbon
import torch
def refuse(*a, **k): raise AssertionError("a connection")
socket.socket.connect = socket.create_connection = refuse
joules = CodeCarbon.on(torch.device("cpu")).measure(lambda: sum(range(10**6)))[1].joules
assert 0 < joules < 1000, joules
assert not [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
"""
    environment = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path / "here"),
    }
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert list((tmp_path / "here").iterdir()) == []
