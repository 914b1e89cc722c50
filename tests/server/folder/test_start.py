"""A run that begins from another model: which it takes, what it refuses, and that frozen layers stay."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors

from client.app import client_app
from cloister.privacy import lines
from cloister.report import after_run
from common.document.federation import Federation, load
from common.errors import ConfigError, ModelError, RunFolderError
from common.inference.saved import SavedModel, to_bytes
from common.model.weights import Weights, initial_weights
from server.app import execute
from server.folder.folder import RunFolder, load_model, saved_model
from server.folder.start import in_words, read_start
from server.serve import resumed_run
from simulations.engine import simulate
from simulations.inline import InlineGrid
from simulations.sources import sites_from_table
from tests.support import PRIVATE, WHOLE, document, federation, recomputed

HIDDEN = {"model__hidden": [8, 5]}


def run(fed: Federation, folder: Path, **how: Any) -> Path:
    sites = sites_from_table(fed, 300, clients=4, how="iid", seed=0, device=torch.device("cpu"))
    simulate(fed, sites, RunFolder.create(fed, path=folder), run="test", **how)
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run's folder."""
    return run(federation(**PRIVATE, **HIDDEN), tmp_path_factory.mktemp("before") / "run")


def begun(path: Path, **changes: Any) -> Federation:
    """A federation that begins from the file at `path`."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    start = {"sha256": digest, **{k.removeprefix("start__"): v for k, v in changes.items() if k.startswith("start__")}}
    others = {k: v for k, v in changes.items() if not k.startswith("start__")}
    return federation(**{**HIDDEN, **others}, start=start)


def test_a_run_goes_on_from_the_model_of_another_and_says_what_that_had_cost(before, tmp_path):
    fed = begun(before / "model.safetensors", **PRIVATE)
    start = read_start(before, fed)
    assert start is not None
    theirs = load_model(before)
    assert all(np.array_equal(start.weights[name], theirs[name]) for name in theirs)
    folder = run(fed, tmp_path / "run", start=start)
    statement = json.loads((folder / "privacy.json").read_text())
    earlier = json.loads((before / "privacy.json").read_text())
    told = statement["start"]
    assert (told["sha256"], told["federation"], told["rounds"]) == (fed.start.sha256, "small", 3)
    assert told["epsilon"] == {"row": {"epsilon": earlier["row"]["epsilon"], "delta": 1e-3}}
    assert told["note"].startswith("what the start has cost the rows")
    assert json.loads((folder / "start.json").read_text()) == told
    for client in statement["row"]["per_client"].values():  # this run's own cost is as ever
        assert client["epsilon"] == pytest.approx(recomputed(client), rel=0.01)


def test_a_file_of_another_program_will_do_and_of_its_cost_nothing_is_known(tmp_path):
    weights = initial_weights(federation(**HIDDEN), seed=3)
    path = tmp_path / "other.safetensors"
    safetensors.save_file(weights, path)
    start = read_start(path, begun(path))
    assert start is not None and all(np.array_equal(start.weights[name], weights[name]) for name in weights)
    assert (start.about["federation"], start.about["epsilon"]) == (None, None)


def test_a_model_as_a_client_keeps_it_will_do(before, tmp_path):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(to_bytes(saved_model(before)))
    start = read_start(path, begun(path))
    assert start is not None and start.about["run"] == "test"


def test_a_new_head_is_drawn_from_the_seed_and_the_rest_is_the_starts(before):
    fed = begun(before / "model.safetensors", start__new_head=True, schema__target={"name": "y", "classes": [0, 1, 2]})
    start, theirs, drawn = read_start(before, fed), load_model(before), initial_weights(fed)
    assert start is not None and list(start.weights) == list(drawn)
    for name, array in start.weights.items():
        assert np.array_equal(array, drawn[name] if name.startswith("layers.2") else theirs[name])


def frozen_run(before: Path, tmp_path: Path, **changes: Any) -> tuple[Weights, Weights]:
    fed = begun(before / "model.safetensors", start__frozen=[0, 1], **changes)
    start = read_start(before, fed)
    return load_model(run(fed, tmp_path / "run", start=start)), load_model(before)


@pytest.mark.parametrize("privacy", [{}, PRIVATE, WHOLE], ids=["none", "row", "client"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_layers_stay_as_they_are_to_the_last_bit(before, tmp_path, privacy, strategy, optimizer):
    how = {"training__optimizer": optimizer, "training__weight_decay": 0.1, "strategy__name": strategy}
    found, theirs = frozen_run(before, tmp_path, **privacy, **how)
    for name in found:
        assert np.array_equal(found[name], theirs[name]) == (not name.startswith("layers.2"))


def test_a_resumed_run_needs_no_start_and_still_says_what_it_had_cost(before, tmp_path):
    fed = begun(before / "model.safetensors", training__rounds=2)
    sites = sites_from_table(fed, 300, clients=4, how="iid", seed=0, device=torch.device("cpu"))
    app = client_app(lambda context: nullcontext(sites.asked(context.node_id, run="test")))
    grid = InlineGrid(app, sites.nodes, run="test")
    folder = RunFolder.create(fed, path=tmp_path / "run")
    start = read_start(before, fed)
    execute(fed, grid, folder, name="test", wait_s=0.0, settle=lambda: None, start=start)
    again = resumed_run(tmp_path / "run", rounds=3)
    again.prepare(folder)
    execute(again.federation, grid, folder, name="test", wait_s=0.0, settle=lambda: None, checkpoint=again.checkpoint)
    assert json.loads((tmp_path / "run/privacy.json").read_text())["start"]["sha256"] == fed.start.sha256


def test_the_statement_the_report_and_the_model_card_say_what_the_start_had_cost(before, tmp_path):
    fed = begun(before / "model.safetensors")
    folder = run(fed, tmp_path / "run", start=read_start(before, fed))
    epsilon = json.loads((before / "privacy.json").read_text())["row"]["epsilon"]
    said = f"It had cost epsilon {epsilon:.2f} at delta 0.001 for each row, for those that made it; that is in addition"
    assert said in " ".join(" ".join(lines(folder)).split())
    after_run(folder)
    assert said in (folder / "report.html").read_text()
    assert said in (folder / "model_card.md").read_text()


def test_what_a_start_had_cost_is_put_into_words():
    known = {"sha256": "ab", "federation": "f", "run": "r", "rounds": 3}
    assert in_words({**known, "epsilon": {}}).endswith(
        "without differential privacy, and can reveal the rows that made it."
    )
    both = {"row": {"epsilon": 4.0, "delta": 1e-3}, "client": {"epsilon": 2.5, "delta": 0.01}}
    assert "epsilon 4.00 at delta 0.001 for each row and epsilon 2.50 at delta 0.01 for each client" in in_words(
        {**known, "epsilon": both}
    )
    assert in_words({"sha256": "ab", "federation": None, "epsilon": None}).endswith("What it had cost is not known.")


THEIR_ROWS = "the rows that made it."


# What is refused


def test_the_document_and_the_file_must_name_each_other(before, tmp_path):
    path = before / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_start(None, federation()) is None
    with pytest.raises(ConfigError, match=f"begins from the model with SHA-256 {digest}; give --start-from PATH"):
        read_start(None, begun(path))
    with pytest.raises(ConfigError, match=f'names no start; add to it: start: {{sha256: "{digest}"}}'):
        read_start(before, federation(**HIDDEN))
    other = federation(**HIDDEN, start={"sha256": "0" * 64})
    with pytest.raises(ConfigError, match=f"has SHA-256 {digest}, and start.sha256 of the document is 0000"):
        read_start(path, other)


OTHER_COLUMN = [{"name": n, "type": "numeric", "bounds": [-1, 1]} for n in "ab"] + [
    {"name": "c", "type": "categorical", "categories": ["red", "blue"]}
]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"schema__features": OTHER_COLUMN}, "was trained on another column c"),
        ({"schema__features": OTHER_COLUMN[:2]}, "was trained on 3 columns, and the document has 2"),
        ({"schema__target": {"name": "y", "classes": [1, 0]}}, r"another target or loss; set start\.new_head to true"),
        ({"schema__also": [{"name": "z", "bounds": [0, 1]}]}, r"another target or loss; set start\.new_head to true"),
        ({"training__loss": "binary_cross_entropy"}, r"another target or loss; set start\.new_head to true"),
        ({"model__activation": "tanh"}, "with activation relu, and the document has tanh"),
        ({"model__hidden": [8, 6]}, r"layers\.1\.weight is float32\[5, 8\], .* model has float32\[6, 8\]"),
        ({"model__hidden": [8]}, r"layers\.1\.weight is float32\[5, 8\], .* model has float32\[2, 8\]"),
        ({"model__hidden": [8], "start__new_head": True}, "has 3 layers, and the document's model 2"),
        ({"model__hidden": [8, 5, 4]}, r"lacks the array|layers\.2\.weight is"),
    ],
)
def test_a_model_that_is_not_of_the_document_is_refused(before, changes, said):
    with pytest.raises(ModelError, match=said):
        read_start(before, begun(before / "model.safetensors", **changes))


def test_what_of_a_target_moves_no_output_may_change(before):
    changed = {"name": "y", "classes": [0, 1], "weight": 0.3, "missing": ["?"], "optional": True}
    also = [{"name": "z", "bounds": [0, 1], "weight": 2.0}]
    theirs = federation(schema__also=also, model__hidden=[8])
    model = SavedModel(federation=theirs, weights=initial_weights(theirs, seed=7), round=3)
    path = before / "several.safetensors"
    path.write_bytes(to_bytes(model))
    fed = begun(path, schema__target=changed, schema__also=[{**also[0], "weight": 0.5}], model__hidden=[8])
    start = read_start(path, fed)
    assert start is not None and np.array_equal(start.weights["layers.1.bias"], model.weights["layers.1.bias"])


def test_what_is_no_model_is_refused(before, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="no safetensors file, or damaged"):
        read_start(path, begun(path))
    with pytest.raises(ModelError, match=r"cannot be read: No such file .*takes a run folder or a safetensors file"):
        read_start(tmp_path / "nowhere", federation(start={"sha256": "0" * 64}))
    weights = initial_weights(federation(**HIDDEN))
    safetensors.save_file({**weights, "layers.0.bias": np.full(8, np.nan, np.float32)}, path)
    with pytest.raises(ModelError, match="not finite"):
        read_start(path, begun(path))
    empty = RunFolder.create(federation(), path=tmp_path / "empty")
    with pytest.raises((ModelError, RunFolderError), match=r"cannot be read|there is none"):
        read_start(empty.path, federation(start={"sha256": "0" * 64}))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sha256": "abc"}, r"start\.sha256"),
    ({"sha256": "0" * 64, "frozen": [3]}, "names layer 3, and the model has 3, counted from 0"),
    ({"sha256": "0" * 64, "frozen": [0, 0]}, "must all differ"),
    ({"sha256": "0" * 64, "frozen": [0, 1, 2]}, "are all layers, so that nothing is left to train"),
    ({"sha256": "0" * 64, "frozen": [2], "new_head": True}, "names layer 2, the head, which is new and would never"),
]


@pytest.mark.parametrize("start, said", BAD, ids=[said for _, said in BAD])
def test_a_start_that_makes_no_sense_is_said(tmp_path, start, said):
    path = tmp_path / "federation.yaml"
    path.write_text(json.dumps(document(**HIDDEN, start=start)))
    with pytest.raises(ConfigError, match=said):
        load(path)


def test_a_saved_model_of_a_run_that_began_elsewhere_is_a_model_like_any_other(before, tmp_path):
    fed = begun(before / "model.safetensors")
    folder = run(fed, tmp_path / "run", start=read_start(before, fed))
    found: SavedModel = saved_model(folder)
    assert found.federation == fed and found.privacy["start"]["run"] == "test"
