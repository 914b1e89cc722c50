"""A run that is cut off anywhere and resumed equals one that was not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from numpy.testing import assert_array_equal

from common.document.federation import Federation
from common.errors import ConfigError, RunFolderError
from common.model.weights import Weights
from common.privacy.noise import seeded
from common.privacy.statement import Statement
from common.wire import records
from common.wire.records import ARRAYS, CONFIG, COUNTS, FAILED, LOSS, METRICS, RATE, REFUSED, WEIGHT
from server import serve
from server.app import execute
from server.folder import checkpoint as checkpoints
from server.folder.folder import RunFolder, load_model, read_run
from server.rounds import strategies
from server.rounds.client_privacy import Charged, Spent
from server.rounds.events import Event, Rejected, RoundEnded
from server.rounds.run import Progress, Run
from server.serve import resumed_run
from simulations.inline import InlineGrid
from tests.server.rounds.test_strategies import CLIENTS, NAMES, document
from tests.support import WHOLE, federation, stated


class Killed(BaseException):
    """Ends a process here and now: nothing after it is written."""


class Fleet:
    """Deterministic clients: what each does depends on the model, the round and itself alone."""

    def __init__(self, *, die: Callable[[str, int, int], bool] = lambda kind, server_round, node: False) -> None:
        self._die = die
        self.asked: list[tuple[str, int, int]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        kind, server_round, node = message.metadata.message_type, int(message.metadata.group_id), context.node_id
        self.asked.append((kind, server_round, node))
        if self._die(kind, server_round, node):
            raise Killed
        rng = np.random.default_rng([server_round, node])
        if kind == "evaluate":
            counts = [float(c) for c in rng.integers(1, 50, 4)]
            return Message(RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: counts})}), reply_to=message)
        state = records.to_weights(message.content.array_records[ARRAYS])
        rate = np.float32(message.content.config_records[CONFIG].get(RATE, 1.0))
        moved = {k: v * np.float32(0.9) + rate * rng.normal(size=v.shape).astype(np.float32) for k, v in state.items()}
        metrics = MetricRecord({WEIGHT: float(node), LOSS: float(rng.uniform())})
        return Message(RecordDict({ARRAYS: records.from_weights(moved), METRICS: metrics}), reply_to=message)


def begin(path: Path, fed: Federation, fleet: Fleet, **options: Any) -> dict[str, Any]:
    folder = RunFolder.create(fed, path=path)
    return run(folder, fed, fleet, name="run", **options)


def resume(path: Path, fleet: Fleet, *, rounds: int | None = None, **options: Any) -> dict[str, Any]:
    """As `cloister serve --resume` does, without its sockets."""
    begun = resumed_run(path, rounds=rounds)
    folder = begun.folder()
    with folder.lock():
        begun.prepare(folder)
        return run(folder, begun.federation, fleet, name=begun.name, checkpoint=begun.checkpoint, **options)


def run(folder: RunFolder, fed: Federation, fleet: Fleet, **options: Any) -> dict[str, Any]:
    grid = InlineGrid(fleet, range(1, CLIENTS + 1), run="run")  # type: ignore[arg-type]
    return execute(fed, grid, folder, wait_s=0.0, settle=lambda: None, **options)


def told(path: Path) -> list[dict[str, Any]]:
    """The rounds' events without what is told of time."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in e.items() if k not in ("time", "times", "seconds", "waiting")}
        for e in events
        if e["event"] == "round"
    ]


def equal(one: Weights, other: Weights) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[k], other[k]) for k in one)


def long(name: str, **changes: Any) -> Federation:
    return document(name, **{"training__rounds": 6, "privacy__evaluation": {"every": 2}} | changes)


CUTS = [("train", 1), ("train", 4), ("evaluate", 4), ("evaluate", 6)]
WITH_MEMORY = ["fedadagrad", "fedadam", "fedavg", "fedavgm", "fedyogi"]


@pytest.mark.parametrize(
    "name, kind, server_round",
    [*((name, *cut) for name in WITH_MEMORY for cut in CUTS), *((name, "train", 2) for name in NAMES)],
)
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(tmp_path, name, kind, server_round):
    _resumed_equals_whole(tmp_path, long(name, training__rounds=6 if name in WITH_MEMORY else 3), kind, server_round)


@pytest.mark.parametrize("kind, server_round", CUTS)
def test_rates_that_fell_and_an_average_outlive_the_server(tmp_path, kind, server_round):
    plateau = {"name": "plateau", "metric": "accuracy", "patience": 1, "min_change": 0.9}
    rates = {"training__schedule": plateau, "strategy__schedule": {**plateau, "factor": 0.3}, "strategy__average": 0.7}
    _resumed_equals_whole(tmp_path, long("fedavgm", **rates), kind, server_round)
    plain = long("fedavgm", training__schedule=plateau, strategy__schedule={**plateau, "factor": 0.3})
    begin(tmp_path / "plain", plain, Fleet())
    assert not equal(load_model(tmp_path / "plain"), load_model(tmp_path / "whole"))
    plateaus = checkpoints.load(tmp_path / "whole").progress.plateaus
    assert [plateaus[of]["factor"] for of in ("training", "strategy")] == pytest.approx([0.25, 0.09])  # fell twice


def _resumed_equals_whole(tmp_path: Path, fed: Federation, kind: str, server_round: int) -> None:
    begin(tmp_path / "whole", fed, Fleet())
    with pytest.raises(Killed):
        begin(tmp_path / "cut", fed, Fleet(die=lambda *at: at == (kind, server_round, 3)))
    result = resume(tmp_path / "cut", Fleet())
    assert result["status"] == "completed"
    assert equal(load_model(tmp_path / "cut"), load_model(tmp_path / "whole"))
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/result.json").read_text())
    assert {k: v for k, v in result.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}


def test_a_held_out_score_outlives_the_server(tmp_path):
    def stop(state: Weights) -> dict[str, Any]:
        raise KeyboardInterrupt

    scores = iter([{"accuracy": 0.6}, {"accuracy": 0.7}])
    with pytest.raises(Killed):
        die = Fleet(die=lambda *at: at == ("train", 3, 1))
        begin(tmp_path / "run", long("fedavg"), die, held_out=lambda state: next(scores))
    result = resume(tmp_path / "run", Fleet(), held_out=stop)
    assert (result["status"], result["rounds"], result["held_out"]) == ("stopped", 2, {"accuracy": 0.7})


def test_a_checkpoint_of_before_held_out_scores_were_kept_still_resumes(tmp_path, monkeypatch):
    before = tuple(name for name in checkpoints._KEPT if name != "held_out_score")
    with monkeypatch.context() as old, pytest.raises(Killed):
        old.setattr(checkpoints, "_KEPT", before)
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("train", 3, 1)))
    result = resume(tmp_path / "run", Fleet())
    assert (result["status"], result["held_out"]) == ("completed", None)


def test_all_of_a_runs_progress_comes_back(tmp_path):
    progress = Progress(
        weights={"b": np.ones(2, np.float32), "a": np.zeros((), np.float32)},
        average={"b": np.zeros(2, np.float32), "a": np.full((), 3, np.float32)},
        averaged=4,
        round=7,
        tried=8,
        event=RoundEnded(round=7, rounds=9, rejected=(Rejected("ben", "late", "slow"),), evaluation={"accuracy": 0.5}),
        pending=True,
        evaluation={"accuracy": 0.5},
        held_out_score={"accuracy": 0.25},
        best=0.5,
        stale=2,
        plateaus={"training": {"best": 0.25, "stale": 1, "factor": 0.5}},
        advised=True,
        statements={"ada": Statement.from_wire(stated())},
        clients={"ada", "ben"},
        present={"ben"},
        gone={3: 1001},
        strikes={4: 2},
        resting={4: 11},
        memory={"m_t/a": np.full(3, 2.0)},
        spent=Spent(Charged(updates=7, evaluations=2), clip=0.75),
    )
    untouched = Progress(weights=progress.weights)
    unset = [
        f.name
        for f in fields(Progress)
        if f.name != "weights" and getattr(progress, f.name) == getattr(untouched, f.name)
    ]
    assert unset == []  # so that a field that is added is tried here
    run = Run(federation=long("fedavg"), name="run", progress=progress, observe=print)
    checkpoints.save(tmp_path, run, number=0, seconds=1.5)
    found = checkpoints.load(tmp_path).progress
    assert list(found.weights) == list(progress.weights) and equal(found.weights, progress.weights)
    assert equal(found.memory, progress.memory)
    assert found.average is not None and progress.average is not None
    assert list(found.average) == list(progress.average) and equal(found.average, progress.average)
    for name in (f.name for f in fields(Progress) if f.name not in ("weights", "average", "memory")):
        assert getattr(found, name) == getattr(progress, name), name


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_without_its_moments_a_resumed_strategy_would_be_another(tmp_path, name, monkeypatch):
    fed = long(name)
    begin(tmp_path / "whole", fed, Fleet())
    with pytest.raises(Killed):
        begin(tmp_path / "cut", fed, Fleet(die=lambda *at: at == ("train", 4, 3)))
    monkeypatch.setattr(strategies, "restore", lambda strategy, kept: None)
    resume(tmp_path / "cut", Fleet())
    assert not equal(load_model(tmp_path / "cut"), load_model(tmp_path / "whole"))


def test_a_resumed_run_asks_nobody_again_what_is_on_disk(tmp_path):
    with pytest.raises(Killed):
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("evaluate", 4, 1)))
    fleet = Fleet()
    resume(tmp_path / "run", fleet)
    assert {(kind, server_round) for kind, server_round, _ in fleet.asked} == {
        ("evaluate", 4), ("train", 5), ("train", 6), ("evaluate", 6),
    }  # fmt: skip


def test_a_resumed_run_samples_whom_it_would_have_sampled(tmp_path):
    fed = long("fedavg", strategy={"name": "fedavg", "fraction": 0.4, "min_clients": 2, "round_timeout": 30})
    first, cut, again = Fleet(), Fleet(die=lambda kind, r, node: (kind, r) == ("train", 4)), Fleet()
    begin(tmp_path / "whole", fed, first)
    with pytest.raises(Killed):
        begin(tmp_path / "cut", fed, cut)
    resume(tmp_path / "cut", again)
    late = [asked for asked in first.asked if asked[:2] != ("train", 4) and asked[1] >= 4]
    assert sorted(a for a in again.asked if a[:2] != ("train", 4)) == sorted(late)
    asked = [{node for kind, r, node in fleet.asked if (kind, r) == ("train", 4)} for fleet in (first, again)]
    assert asked[0] == asked[1]
    assert len({frozenset(n for k, r, n in first.asked if (k, r) == ("train", i)) for i in range(1, 7)}) > 1


def test_an_event_that_was_lost_between_checkpoint_and_file_is_told_on_resuming(tmp_path):
    begin(tmp_path / "whole", long("fedavg"), Fleet())

    def die(event: Event) -> None:
        if getattr(event, "round", 0) == 3:
            raise Killed

    with pytest.raises(Killed):
        begin(tmp_path / "cut", long("fedavg"), Fleet(), observe=die)
    lines = (tmp_path / "cut/events.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut/events.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # and the last one is torn
    resume(tmp_path / "cut", Fleet())
    assert told(tmp_path / "cut") == told(tmp_path / "whole")


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, damage, caplog):
    begin(tmp_path / "whole", long("fedadam"), Fleet())
    with pytest.raises(Killed):
        begin(tmp_path / "cut", long("fedadam"), Fleet(die=lambda *at: at == ("train", 4, 3)))
    newest = max((tmp_path / "cut/checkpoint").glob("*.safetensors"))
    newest.write_bytes(damage(newest.read_bytes()))
    assert checkpoints.load(tmp_path / "cut").round == 2
    assert "torn or damaged" in caplog.text
    resume(tmp_path / "cut", Fleet())
    assert equal(load_model(tmp_path / "cut"), load_model(tmp_path / "whole"))


def test_two_checkpoints_are_kept_and_no_more(tmp_path):
    begin(tmp_path / "run", long("fedavg"), Fleet())
    assert len(list((tmp_path / "run/checkpoint").iterdir())) == 2


def test_a_folder_without_a_whole_checkpoint_cannot_be_resumed(tmp_path):
    with pytest.raises(RunFolderError, match=r"nowhere: not the folder of a run: it has no federation\.yaml"):
        resumed_run(tmp_path / "nowhere", rounds=None)
    with pytest.raises(Killed):
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("train", 4, 3)))
    for path in (tmp_path / "run/checkpoint").iterdir():
        path.write_bytes(b"")
    with pytest.raises(RunFolderError, match="cannot be resumed: none of its 2 checkpoints is whole"):
        resumed_run(tmp_path / "run", rounds=None)
    for path in (tmp_path / "run/checkpoint").iterdir():
        path.unlink()
    with pytest.raises(RunFolderError, match="cannot be resumed: it has no checkpoint"):
        resumed_run(tmp_path / "run", rounds=None)


def test_a_document_that_was_changed_since_is_refused(tmp_path):
    with pytest.raises(Killed):
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("train", 4, 3)))
    RunFolder(tmp_path / "run").write_document(long("fedavg", training__learning_rate=0.7))
    with pytest.raises(RunFolderError, match=r"its federation\.yaml is not the one that its checkpoint was made with"):
        resumed_run(tmp_path / "run", rounds=None)


def test_a_checkpoint_of_another_format_is_not_taken(tmp_path, monkeypatch, caplog):
    with pytest.raises(Killed):
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("train", 4, 3)))
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    with pytest.raises(RunFolderError, match="none of its 2 checkpoints is whole"):
        resumed_run(tmp_path / "run", rounds=None)
    assert "format 1; this version of Cloister reads 2" in caplog.text


def test_a_completed_run_has_nothing_left_to_do_unless_it_is_given_more_rounds(tmp_path):
    fed = long("fedadam")
    begin(tmp_path / "run", fed, Fleet())
    with pytest.raises(RunFolderError, match=r"has completed its 6 rounds; --rounds N goes on to N of them"):
        resumed_run(tmp_path / "run", rounds=None)
    with pytest.raises(ConfigError, match=r"--rounds: must be more than the 6 rounds that the run has \(got 6\)"):
        resumed_run(tmp_path / "run", rounds=6)
    result = resume(tmp_path / "run", Fleet(), rounds=9)
    assert (result["status"], result["rounds"]) == ("completed", 9)
    begin(tmp_path / "long", long("fedadam", training__rounds=9), Fleet())
    assert equal(load_model(tmp_path / "run"), load_model(tmp_path / "long"))
    with pytest.raises(Killed):  # and what was extended can be resumed as well
        resume(tmp_path / "run", Fleet(die=lambda *at: at == ("train", 11, 3)), rounds=12)
    assert resume(tmp_path / "run", Fleet())["rounds"] == 12


@pytest.mark.parametrize("privacy", [WHOLE["privacy"], {"row": {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0}}])
def test_more_rounds_than_the_noise_was_chosen_for_are_refused(privacy):
    privacy = {**privacy, "evaluation": {"every": 3, "noise": 3.0}}
    with pytest.raises(ConfigError, match="the noise was chosen so that 3 rounds cost the epsilon that the document"):
        serve._extended(federation(privacy=privacy), 9, done=3)


def test_two_servers_cannot_be_at_work_in_one_folder(tmp_path):
    folder = RunFolder.create(long("fedavg"), path=tmp_path / "run")
    with folder.lock(), pytest.raises(RunFolderError, match="another server is at work in this folder"):
        with RunFolder.open(tmp_path / "run").lock():
            pass
    with folder.lock():
        pass


def whole_clients(**changes: Any) -> Federation:
    adaptive = {"quantile": 0.5, "learning_rate": 0.3, "share": 0.1}
    return federation(**{**WHOLE, "training__rounds": 6, "privacy__client__adaptive": adaptive, **changes})


@pytest.mark.parametrize("kind, server_round", [("train", 4), ("evaluate", 3)])
def test_a_resumed_server_goes_on_with_its_account_and_its_clip(tmp_path, kind, server_round):
    fed = whole_clients()
    with pytest.raises(Killed):
        begin(tmp_path / "run", fed, Fleet(die=lambda *at: at == (kind, server_round, 3)), noise=seeded(1))
    spent = checkpoints.load(tmp_path / "run").progress.spent
    assert spent is not None and spent.charged == Charged(updates=3, evaluations=int(kind == "train"))
    assert spent.clip != 1.0
    clips: list[float] = []

    def note(event: Event) -> None:
        if getattr(event, "round", 0) == 5:  # whose charge tells the clip that round 4 left
            updates = json.loads((tmp_path / "run/privacy.json").read_text())["client"]["released"][0]
            clips.append(updates["adaptive_clip"]["clip_now"])

    result = resume(tmp_path / "run", Fleet(), noise=seeded(2), observe=note)
    statement = json.loads((tmp_path / "run/privacy.json").read_text())["client"]
    assert [r["steps"] for r in statement["released"]] == [6, 2]
    assert 0 < abs(np.log(clips[0] / spent.clip)) <= 0.3 + 1e-9  # one step of the clip from where it was
    assert result["status"] == "completed"
    assert result["privacy"]["client"]["epsilon"] <= 4.0


def test_nothing_of_a_private_round_leaves_before_it_is_on_disk(tmp_path):
    # Else a restart would make the round again with other noise, and two noisy models cost more than one.
    fed, seen = whole_clients(), []

    class Watching(Fleet):
        def __call__(self, message: Message, context: Context) -> Message:
            kept = checkpoints.load(tmp_path / "run")
            sent = records.to_weights(message.content.array_records[ARRAYS])
            seen.append(equal(sent, kept.progress.weights))
            return super().__call__(message, context)

    begin(tmp_path / "run", fed, Watching(), noise=seeded(1))
    assert len(seen) > 6 * 3 and all(seen)


def test_a_disk_that_is_full_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    begin(tmp_path / "whole", long("fedavg"), Fleet())
    real, count = os.fsync, [0]

    def full(file: int) -> None:
        count[0] += 1
        if count[0] > 9:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match=r"cannot be written: No space left.* --resume .*run` goes on from"):
            begin(tmp_path / "run", long("fedavg"), Fleet())
    assert checkpoints.load(tmp_path / "run").round >= 2
    resume(tmp_path / "run", Fleet())
    assert equal(load_model(tmp_path / "run"), load_model(tmp_path / "whole"))


def test_drafts_of_servers_that_died_are_taken_away(tmp_path):
    with pytest.raises(Killed):
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("train", 3, 1)))
    draft = tmp_path / "run/checkpoint/000000009-0123456789abcdef.safetensors.new"
    draft.write_bytes(b"a part")
    assert checkpoints.load(tmp_path / "run").round == 2
    resume(tmp_path / "run", Fleet())
    assert not draft.exists() and len(list(draft.parent.iterdir())) == checkpoints.KEPT


def test_a_model_is_the_checkpoints(tmp_path):
    begin(tmp_path / "run", long("fedavg"), Fleet())
    kept = checkpoints.load(tmp_path / "run")
    for name, array in load_model(tmp_path / "run").items():
        assert_array_equal(array, kept.progress.weights[name])


# Nothing that was not saved is told


def test_a_private_round_that_was_cut_off_is_not_told_since_it_is_made_again(tmp_path):
    fed = whole_clients()
    held = [0]

    def interrupted(state: Weights) -> dict[str, Any]:
        held[0] += 1
        if held[0] == 4:  # round 4 has its noisy model, which is not on disk
            raise KeyboardInterrupt("terminated")
        return {}

    result = begin(tmp_path / "run", fed, Fleet(), noise=seeded(1), held_out=interrupted)
    assert (result["status"], result["rounds"]) == ("stopped", 3)
    kept = checkpoints.load(tmp_path / "run")
    assert equal(load_model(tmp_path / "run"), kept.progress.weights)
    statement = json.loads((tmp_path / "run/privacy.json").read_text())["client"]
    assert [r["steps"] for r in statement["released"]] == [3, 1]
    assert resume(tmp_path / "run", Fleet(), noise=seeded(2))["status"] == "completed"


def test_the_clip_that_a_cut_off_round_found_is_not_told(tmp_path):
    fed, told = whole_clients(), []

    class Watching(Fleet):
        def __call__(self, message: Message, context: Context) -> Message:
            if (tmp_path / "run/privacy.json").exists():
                now = json.loads((tmp_path / "run/privacy.json").read_text())["client"]["released"][0]
                spent = checkpoints.load(tmp_path / "run").progress.spent
                assert spent is not None
                told.append((now["adaptive_clip"]["clip_now"], spent.clip))
            return super().__call__(message, context)

    begin(tmp_path / "run", fed, Watching(), noise=seeded(1))
    clips = {kept for _, kept in told}
    assert len(clips) > 2 and all(clip in {1.0, *clips} for clip, _ in told)
    order = [1.0, *dict.fromkeys(kept for _, kept in told)]
    assert all(order.index(clip) < order.index(kept) or clip == kept for clip, kept in told)  # never ahead of the disk


def test_with_privacy_for_clients_a_damaged_checkpoint_ends_the_run(tmp_path):
    with pytest.raises(Killed):
        begin(tmp_path / "run", whole_clients(), Fleet(die=lambda *at: at == ("train", 4, 3)), noise=seeded(1))
    newest = max((tmp_path / "run/checkpoint").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(RunFolderError, match=r"would release a round of privacy\.client twice and charge it once"):
        resumed_run(tmp_path / "run", rounds=None)


def test_a_run_that_was_killed_at_its_very_end_can_be_finished(tmp_path):
    begin(tmp_path / "whole", long("fedavg"), Fleet())

    def die(event: Event) -> None:
        if getattr(event, "round", 0) == 6:
            raise Killed

    with pytest.raises(Killed):
        begin(tmp_path / "cut", long("fedavg"), Fleet(), observe=die)
    assert not (tmp_path / "cut/result.json").exists()
    fleet = Fleet()
    result = resume(tmp_path / "cut", fleet)
    assert (result["status"], result["rounds"], fleet.asked) == ("completed", 6, [])
    assert told(tmp_path / "cut") == told(tmp_path / "whole")


def test_a_run_that_goes_on_does_not_say_how_it_ended_before(tmp_path):
    def stop(event: Event) -> None:
        if getattr(event, "round", 0) == 2:
            raise KeyboardInterrupt

    begin(tmp_path / "run", long("fedavg"), Fleet(), observe=stop)
    assert (tmp_path / "run/result.json").exists()
    with pytest.raises(Killed):
        resume(tmp_path / "run", Fleet(die=lambda *at: at == ("train", 4, 3)))
    assert not (tmp_path / "run/result.json").exists()


def test_who_said_no_and_who_rests_is_remembered_over_a_restart(tmp_path):
    class Grumpy(Fleet):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = super().__call__(message, context)
            if message.metadata.message_type == "train" and context.node_id in (3, 5):
                code = REFUSED if context.node_id == 3 else FAILED
                return Message(Error(code=code, reason="no"), reply_to=message)
            return reply

    strategy = {"name": "fedavg", "fraction": 0.7, "min_clients": 2, "round_timeout": 30}
    fed = long("fedavg", strategy=strategy, training__rounds=12)
    whole, again = Grumpy(), Grumpy()
    begin(tmp_path / "whole", fed, whole)
    with pytest.raises(Killed):
        begin(tmp_path / "cut", fed, Grumpy(die=lambda kind, r, node: (kind, r) == ("train", 9)))
    resume(tmp_path / "cut", again)
    assert sorted(again.asked) == sorted(asked for asked in whole.asked if asked[1] >= 9)
    assert equal(load_model(tmp_path / "cut"), load_model(tmp_path / "whole"))


def test_an_extended_run_whose_last_round_was_not_evaluated_tells_it_once(tmp_path):
    fed = long("fedavg", training__rounds=3, privacy__evaluation={"every": 4})
    with pytest.raises(Killed):
        begin(tmp_path / "run", fed, Fleet(die=lambda *at: at == ("evaluate", 3, 1)))
    with pytest.raises(Killed):
        resume(tmp_path / "run", Fleet(die=lambda *at: at == ("train", 4, 3)), rounds=7)
    resume(tmp_path / "run", Fleet())
    assert [event["round"] for event in told(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_server_that_comes_second_takes_no_stale_checkpoint(tmp_path):
    with pytest.raises(Killed):
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("train", 4, 3)))
    slow = resumed_run(tmp_path / "run", rounds=None)
    with pytest.raises(Killed):
        resume(tmp_path / "run", Fleet(die=lambda *at: at == ("train", 6, 3)))
    with pytest.raises(RunFolderError, match="another server went on with this run meanwhile; try again"):
        slow.prepare(slow.folder())


def test_a_line_that_a_full_disk_tore_does_not_end_a_resumed_run(tmp_path):
    with pytest.raises(Killed):
        begin(tmp_path / "run", long("fedavg"), Fleet(die=lambda *at: at == ("train", 4, 3)))
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"event": "rou\n')
    assert read_run(tmp_path / "run").standing.round == 3
    assert resume(tmp_path / "run", Fleet())["status"] == "completed"


def test_the_model_of_a_checkpoint_is_the_one_of_its_round(tmp_path):
    path, fed = tmp_path / "run", federation()
    begin(path, fed, Fleet())
    newest, before = sorted((path / "checkpoint").iterdir(), reverse=True)
    last = checkpoints.saved_model(newest)
    assert last.federation == fed and (last.round, last.run) == (3, "run")
    model = load_model(path)
    assert all(np.array_equal(last.weights[name], array) for name, array in model.items())
    assert checkpoints.saved_model(before).round in (2, 3)

    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match="torn or damaged"):
        checkpoints.saved_model(newest)
    with pytest.raises(RunFolderError, match="used where it lies: in checkpoint/ of its run folder"):
        checkpoints.saved_model(before.rename(tmp_path / before.name))
