"""What a grid on the command line means, and the documents that come of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.document import federation as federations
from common.errors import ConfigError
from simulations.sweeps.points import Axis, Range, grid, labels_of, parse, point, preset, told
from tests.support import PRIVATE, WHOLE, document, federation


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(document(**changes)))
    return path


@pytest.mark.parametrize(
    "text, key, values",
    [
        ("training.learning_rate=0.1,3e-1", ("training", "learning_rate"), (0.1, 0.3)),
        ("model.hidden=[],[50],[20, 10]", ("model", "hidden"), ([], [50], [20, 10])),
        ("training.optimizer=sgd, adam", ("training", "optimizer"), ("sgd", "adam")),
        ("privacy.row=null,{epsilon: 1, clip: 2}", ("privacy", "row"), (None, {"epsilon": 1, "clip": 2})),
        ("training.nesterov=true,false", ("training", "nesterov"), (True, False)),
        ("training.rounds=5,5,6", ("training", "rounds"), (5, 6)),
        ("training.learning_rate=1e-4..1", ("training", "learning_rate"), Range(1e-4, 1)),
        ("training.local_steps=1..20", ("training", "local_steps"), Range(1, 20)),
    ],
)
def test_a_grid_is_read_as_the_document_is(text, key, values):
    assert parse([text]) == [Axis(key, values)]


@pytest.mark.parametrize(
    "texts, said",
    [
        (["training.rounds"], "expected KEY=VALUE,VALUE"),
        (["=3"], "expected KEY=VALUE,VALUE"),
        (["training..rounds=3"], "expected KEY=VALUE,VALUE"),
        (["training.rounds="], "expected KEY=VALUE,VALUE"),
        (["training.rounds=1", "training.rounds=2"], "stands twice"),
        (["training.seed=1,2"], "give --seeds"),
        (["model.hidden=[50"], "not valid YAML"),
        (["training.rounds=5..2"], "two numbers of which the second is larger"),
        (["training.rounds=a..b"], "two numbers of which the second is larger"),
    ],
)
def test_what_is_no_grid_is_said(texts, said):
    with pytest.raises(ConfigError, match=said.replace("..", r"\.\.")):
        parse(texts)


@pytest.mark.parametrize(
    "ends, whole, log",
    [((1, 9), True, False), ((1, 10), True, True), ((0.1, 0.5), False, False), ((0, 1e3), False, False)],
)
def test_a_range_of_several_orders_of_magnitude_is_searched_by_them(ends, whole, log):
    assert (Range(*ends).is_whole, Range(*ends).is_log) == (whole, log)


def test_a_grid_has_all_combinations_each_a_document(tmp_path):
    axes = parse(["training.learning_rate=0.1,0.3", "model.hidden=[4],[5,6],[]"])
    points = grid(written(tmp_path), axes)
    found = [(p.federation.training.learning_rate, p.federation.model.hidden) for p in points]
    assert found == [(0.1, (4,)), (0.1, (5, 6)), (0.1, ()), (0.3, (4,)), (0.3, (5, 6)), (0.3, ())]
    assert len({p.name for p in points}) == 6 and not any(set("/[] ") & set(p.name) for p in points)
    (alone,) = grid(written(tmp_path), [])
    assert alone.name == f"as-it-is-{alone.federation.fingerprint[:8]}"
    assert len(grid(written(tmp_path), parse(["training.learning_rate=1,1.0,1e0"]))) == 1


def test_points_of_equal_label_have_folders_of_their_own(tmp_path):
    whole = {**PRIVATE, "privacy__client": WHOLE["privacy"]["client"]}
    names = [
        grid(written(tmp_path, **whole), parse([f"privacy.{unit}.epsilon=7"]))[0].name for unit in ("row", "client")
    ]
    assert all(name.startswith("epsilon=7-") for name in names) and names[0] != names[1]


def test_a_setting_of_a_mapping_counts_wherever_it_stands(tmp_path):
    texts = [
        "privacy.row={epsilon: 4, delta: 0.001, clip: 1}",
        "privacy.row.clip=0.1,0.2",
        "privacy.evaluation.noise=9",
    ]
    for some in (texts, texts[::-1]):
        found = grid(written(tmp_path), parse(some))
        clips = [p.federation.privacy.row.clip for p in found if p.federation.privacy.row]
        assert clips == [0.1, 0.2]
        assert {repr(p.settings["privacy", "row"]) for p in found} == {"{'epsilon': 4, 'delta': 0.001, 'clip': 1}"}


def test_all_that_is_wrong_with_a_grid_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        grid(written(tmp_path), parse(["training.learning_rate=0.1,-1", "training.batch_size=0,8"]))
    assert len(caught.value.problems) == 4  # with -1 alone, with 0 alone, and two with both
    assert any("with training.learning_rate=-1, training.batch_size=8: " in line for line in caught.value.problems)
    with pytest.raises(ConfigError, match="a range is for --search"):
        grid(written(tmp_path), parse(["training.learning_rate=0.1..1"]))


@pytest.mark.parametrize("infinite", ["inf", ".inf", math.inf])
def test_an_infinite_epsilon_is_no_privacy(tmp_path, infinite):
    path = written(tmp_path, **PRIVATE)
    settings = {("privacy", "row", "epsilon"): infinite, ("privacy", "row", "clip"): 0.5}
    free = point(path, settings)
    assert free.federation.privacy.row is None and free.federation.privacy.evaluation.noise == 0.0
    assert told(("privacy", "row", "epsilon"), settings) == "∞"
    bound = point(path, {("privacy", "row", "epsilon"): 2, ("privacy", "row", "clip"): 0.5}).federation.privacy
    assert bound.row is not None and (bound.row.epsilon, bound.row.clip) == (2, 0.5)
    assert bound.evaluation.noise > 0


def test_evaluation_keeps_its_noise_while_any_unit_is_private(tmp_path):
    both = written(tmp_path, **{**PRIVATE, "privacy__client": WHOLE["privacy"]["client"]})
    noise = point(both, {}).federation.privacy.evaluation.noise
    assert noise > 0
    one = point(both, {("privacy", "client"): None}).federation.privacy
    assert one.client is None and one.row is not None and one.evaluation.noise == noise
    none = point(both, {("privacy", "client"): None, ("privacy", "row"): None}).federation.privacy
    assert none.evaluation.noise == 0.0


def test_keys_are_called_by_as_little_as_tells_them_apart():
    row, client, rate = ("privacy", "row", "epsilon"), ("privacy", "client", "epsilon"), ("training", "learning_rate")
    assert labels_of([row, rate]) == {row: "epsilon", rate: "learning_rate"}
    assert labels_of([row, client]) == {row: "row.epsilon", client: "client.epsilon"}


@pytest.mark.parametrize(
    "name, changes, settings",
    [
        ("rate", {}, ["training.learning_rate=0.025,0.05,0.1,0.2,0.4"]),
        ("batch", {}, ["training.batch_size=2,4,8,16,32"]),
        ("batch", {"training__batch_size": 2}, ["training.batch_size=1,2,4,8"]),
        ("regularisation", {}, ["training.weight_decay=0,1e-4,1e-3,1e-2", "model.dropout=0,0.2"]),
        ("clip", PRIVATE, ["privacy.row.clip=0.25,0.5,1,2,4"]),
        ("clip", WHOLE, ["privacy.client.clip=0.25,0.5,1,2,4"]),
    ],
)
def test_a_preset_looks_around_the_documents_own_value(tmp_path, name, changes, settings):
    path = written(tmp_path, **changes)
    found = preset(name, federations.load(path))
    assert found == settings
    points = grid(path, parse(found))  # all of which are documents
    assert len(points) == math.prod(len(setting.split(",")) for setting in settings)
    own = federations.load(path).fingerprint
    assert own in {p.federation.fingerprint for p in points}


def test_a_document_without_a_clip_has_no_preset_of_clips():
    with pytest.raises(ConfigError, match=r"--preset clip: the document has no privacy\.row or privacy\.client"):
        preset("clip", federation())
