"""Every mistake in a document is told at once, in words, at its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from common.document import documents
from common.document import federation as federations
from common.document.documents import Document
from common.document.federation import Federation
from common.errors import ConfigError
from tests.support import document


class Stone(Document):
    weight: int = 1


class Leaf(Document):
    kind: Literal["leaf"]
    area: float = 1.0
    stone: Stone | None = None


class Bag(Document):
    title: str = ""
    size: float = 0.0
    open: bool = False
    count: int = 0
    choice: Literal["any"] | tuple[int, ...] = "any"
    leaf: Leaf | None = None


def written(folder: Path, content: str | bytes | dict[str, Any]) -> Path:
    path = folder / "it.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(content, sort_keys=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def bag(folder: Path, text: str) -> Bag:
    return documents.load(written(folder, text), Bag)


def problems(folder: Path, content: str | bytes | dict[str, Any], model: type[Document] = Federation) -> list[str]:
    """What loading complains of, each without the file's path: `3: training.rounds must be ...`."""
    path = written(folder, content)
    with pytest.raises(ConfigError, match=r"it.yaml") as caught:
        documents.load(path, model)
    assert all(problem.startswith(str(path)) and "\n" not in problem for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}:").lstrip() for problem in caught.value.problems]


def told(folder: Path, **changes: Any) -> list[str]:
    """What is wrong with the small federation after changes, without the lines."""
    return [problem.partition(": ")[2] for problem in problems(folder, document(**changes))]


def test_a_mapping_takes_over_the_keys_of_another_that_it_does_not_have(tmp_path):
    text = """\
title: &base {kind: leaf, area: 2.0, stone: {weight: 3}}
leaf: {<<: *base, area: 5.0}
"""
    assert problems(tmp_path, text, Bag) == ["1: title must be text (got a mapping)"]
    text = text.replace("title: &base", "leaf: &base").replace("leaf: {<<", "more: {<<")
    value = documents._Text(text).value  # what the models are given
    assert value["more"] == {"kind": "leaf", "area": 5.0, "stone": {"weight": 3}}
    assert value["leaf"]["area"] == 2.0


def test_the_first_of_several_mappings_wins_and_what_they_took_over_themselves_counts(tmp_path):
    text = """\
a: &a {x: 1, y: 1}
b: &b {<<: *a, y: 2, z: 2}
c: {<<: [*b, *a, {x: 9, w: 9}], z: 3}
d: {"<<": 4}
"""
    value = documents._Text(text).value
    assert value["c"] == {"x": 1, "y": 2, "z": 3, "w": 9}
    assert value["d"] == {"<<": 4}


def test_a_mistake_in_what_was_taken_over_is_told_where_it_is_written(tmp_path):
    text = yaml.safe_dump(document(schema=...), sort_keys=False) + (
        "schema:\n"
        "  features:\n"
        "    - &a\n"
        "      name: a\n"
        "      type: numeric\n"
        "      bounds: [1, 0]\n"
        "    - <<: *a\n"
        "      name: 7\n"
        "  target: {name: y, classes: [0, 1]}\n"
    )
    lines = text.splitlines()
    bounds, name = lines.index("      bounds: [1, 0]") + 1, lines.index("      name: 7") + 1
    assert problems(tmp_path, text) == [f"{name}: schema.features[1].name must be text (got 7)"]
    found = problems(tmp_path, text.replace("name: 7", "name: b"))
    assert [problem.split(" must")[0] for problem in found] == [
        f"{bounds}: schema.features[0].bounds",
        f"{bounds}: schema.features[1].bounds",
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("leaf: {<<: 5}\n", "1: not valid YAML: << must be given a mapping, or a list of mappings"),
        ("size: 1\nleaf: {<<: [{}, 5]}\n", "2: not valid YAML: << must be given a mapping, or a list of mappings"),
        ("leaf:\n  <<: {}\n  <<: {}\n", "3: not valid YAML: << stands twice; give one, with a list of mappings"),
        ("leaf: &a {<<: *a}\n", "not valid YAML: nested too deeply, or in itself"),
    ],
)
def test_a_merge_that_is_none_is_told_with_its_line(tmp_path, text, expected):
    assert problems(tmp_path, text, Bag) == [expected]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "more", ["[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]", "{{<<: [{0}, {0}, {0}, {0}, {0}, {0}, {0}]}}"]
)
def test_aliases_of_aliases_do_not_take_over_the_machine(tmp_path, more):
    text = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {more.format(f'*a{i - 1}')}\n" for i in range(1, 20))
    assert problems(tmp_path, text, Bag)[0].endswith(
        "aliases that repeat more than 1,000,000 characters are not accepted"
    )


def test_aliases_of_a_long_text_are_bounded_too_and_a_long_document_without_any_is_not(tmp_path):
    long = "x" * 100_000
    text = f"a: &a {long}\n" + "".join(f"b{i}: *a\n" for i in range(20))
    assert "repeat more than 1,000,000 characters" in problems(tmp_path, text, Bag)[0]
    value = documents._Text("".join(f"b{i}: {long}\n" for i in range(20))).value
    assert len(value) == 20


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("1E3", 1000.0), (".5", 0.5), ("-2.", -2.0), ("+3", 3.0)])
def test_a_number_is_a_number_however_it_is_written(tmp_path, text, value):
    assert bag(tmp_path, f"size: {text}\n").size == value


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "y", "2026-11-23", "1:30", "1_000", "0x10", "0o7", "'1e-5'", "1e", "<<", "="]
)
def test_what_only_old_yaml_takes_for_more_is_text(tmp_path, text):
    assert bag(tmp_path, f"title: {text}\n").title == text.strip("'")


def test_true_and_false_are_the_only_booleans(tmp_path):
    assert bag(tmp_path, "open: true\n").open is True
    assert problems(tmp_path, "open: yes\n", Bag) == ["1: open must be true or false (got yes)"]


def test_keys_are_text_as_they_are_written(tmp_path):
    classes = {"name": "y", "classes": "HERE"}
    text = yaml.safe_dump(document(schema__target=classes)).replace("HERE", "{true: [1], no: [0], 1.0: [2], null: [3]}")
    loaded = documents.load(written(tmp_path, text), Federation)
    assert list(loaded.data_schema.target.classes) == ["true", "no", "1.0", "null"]


def test_a_repeated_key_names_both_lines(tmp_path):
    text = "title: a\nsize: 1\nleaf:\n  kind: leaf\n  area: 1\n  area: 2\ntitle: b\n"
    assert problems(tmp_path, text, Bag) == [
        "1: title stands twice (again on line 7); keep one of them",
        "5: leaf.area stands twice (again on line 6); keep one of them",
    ]


def test_a_repeated_key_is_told_beside_other_mistakes(tmp_path):
    assert problems(tmp_path, "size: big\ncount: 1\ncount: 2\ncuont: 1\n", Bag) == [
        "1: size must be a number (got big)",
        "2: count stands twice (again on line 3); keep one of them",
        "4: cuont is an unknown key; did you mean count?",
    ]


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path):
    text = """\
name: a b
schema:
  features:
    - {name: age, type: numeric, bound: [20, 90]}
    - name: cp
      type: categorical
      categories: [1, null]
  target: {name: num, classes: [0, 1]}
model: {hidden: [8, 0], activation: relu6}
training:
  rounds: 0
  local_steps: 2
  learning_rate: "1"
  batchsize: 32
  batch_size: 8
strategy: {name: fedavg}
privacy:
  row: {epsilon: 0, delta: 1, clip: -1}
"""
    assert problems(tmp_path, text) == [
        "1: name must match ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ (got a b)",
        "4: schema.features[0].bound is an unknown key; did you mean bounds?",
        "4: schema.features[0].bounds is missing",
        "7: schema.features[1].categories[1] must be true or false, a number or text (got nothing)",
        "9: model.activation must be one of 'relu', 'sigmoid' or 'tanh' (got relu6; did you mean relu?)",
        "9: model.hidden[1] must be at least 1 (got 0)",
        "11: training.rounds must be at least 1 (got 0)",
        '13: training.learning_rate must be a number (got "1")',
        "14: training.batchsize is an unknown key; did you mean batch_size?",
        "18: privacy.row.clip must be at least 1e-06 (got -1)",
        "18: privacy.row.delta must be less than 1 (got 1)",
        "18: privacy.row.epsilon must be greater than 0 (got 0)",
    ]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"traning": {}}, "traning is an unknown key; did you mean training?"),
        ({"schema__feature": []}, "schema.feature is an unknown key; did you mean features?"),
        ({"privacy__row": {"epsilon": 1, "delta": 0.1, "clip": 1, "epsilom": 1}}, "did you mean epsilon?"),
        ({"strategy": {"name": "fedadam", "betta_1": 0.5}}, "strategy.betta_1 is an unknown key; did you mean beta_1?"),
        ({"strategy": {"name": "fedprox", "mu": 1}}, "known here: fraction, min_clients, over_selection"),
        ({"schema__target": {"name": "y", "bound": [0, 1]}}, "schema.target.bound is an unknown key; did you mean bou"),
        ({"schema__target": {"name": "y", "class": [0, 1]}}, "did you mean classes?"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(tmp_path, changes, expected):
    assert any(expected in problem for problem in told(tmp_path, **changes))


def test_keys_of_another_strategy_are_not_suggested(tmp_path):
    (problem,) = told(tmp_path, strategy={"name": "krum", "min_clients": 3, "proximal_mu": 1})
    assert problem.startswith("strategy.proximal_mu is an unknown key") and "did you mean" not in problem
    assert "num_malicious_nodes" in problem


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"schema__features": [{"name": "a", "type": "number", "bounds": [0, 1]}]},
            "schema.features[0].type must be one of 'numeric', 'categorical' (got number; did you mean numeric?)",
        ),
        (
            {"schema__features": [{"name": "a", "bounds": [0, 1]}]},
            "schema.features[0].type is missing; it is one of numeric, categorical",
        ),
        ({"schema__features": ["a"]}, "schema.features[0] must be a mapping (got a)"),
        ({"schema__features": []}, "schema.features must have 1 or more entries (got [])"),
        ({"schema__target": None}, "schema.target must be a mapping (got nothing)"),
        ({"schema__target": {"name": "y"}}, "schema.target.classes is missing"),
        ({"schema__target": {"name": "y", "classes": [1]}}, "schema.target.classes must have 2 or more entries"),
        (
            {"schema__target": {"name": "y", "classes": [0, 1], "bounds": [0, 1]}},
            "schema.target.classes cannot stand beside bounds",
        ),
        ({"schema__target": {"name": "y", "bounds": ["x", 1]}}, "schema.target.bounds[0] must be a number (got x)"),
        ({"schema__target": {"name": "y", "bounds": [0]}}, "schema.target.bounds has too few entries (got [0])"),
        ({"strategy__name": "fedavgg"}, "strategy.name must be one of 'fedavg', 'fedavgm'"),
        ({"strategy": {}}, "strategy.name is missing; it is one of fedavg, fedavgm, fedadam"),
        ({"privacy__client": 1}, "privacy.client must be a mapping (got 1)"),
        ({"training__rounds": True}, "training.rounds must be a whole number (got true)"),
        ({"training__batch_size": 8.0}, "training.batch_size must be a whole number (got 8.0)"),
        ({"model": ...}, "model is missing"),
        ({"model__hidden": 50}, "model.hidden must be a list (got 50)"),
    ],
)
def test_a_mistake_is_told_once_and_precisely(tmp_path, changes, expected):
    (problem,) = told(tmp_path, **changes)
    assert problem.startswith(expected)


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", ".NaN", "1e999"])
@pytest.mark.parametrize("place", ["learning_rate: 0.1", "- red", "- -1"])
def test_what_is_no_finite_number_is_refused_anywhere(tmp_path, text, place):
    good = yaml.safe_dump(document())
    bad = good.replace(place, place.rpartition(" ")[0] + " " + text, 1)
    assert bad != good
    (problem,) = problems(tmp_path, bad)
    assert "must be a finite number (got " in problem


def test_a_union_of_a_word_and_a_list_is_one_mistake(tmp_path):
    assert problems(tmp_path, "choice: some\n", Bag) == ["1: choice must be one of 'any' or a list (got some)"]
    assert problems(tmp_path, "choice: [1, x]\n", Bag) == ["1: choice[1] must be a whole number (got x)"]


def test_an_optional_part_knows_its_own_keys(tmp_path):
    assert problems(tmp_path, "leaf:\n  kind: leaf\n  are: 2\n  stone: {wait: 1}\n", Bag) == [
        "3: leaf.are is an unknown key; did you mean area?",
        "4: leaf.stone.wait is an unknown key; did you mean weight?",
    ]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "expected a mapping with the keys name, schema, model, start, training, .*, wire, energy; found nothing"),
        ("# only words\n", "expected a mapping with the keys name, .*; found nothing"),
        ("- 1\n", r"expected a mapping .*; found \[1\]"),
        ("hello", "expected a mapping .*; found hello"),
        ("a: [1, 2\nb: 3\n", "2: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n b: 2\n", "2: not valid YAML: mapping values are not allowed here"),
        ("a:\n\tb: 2\n", "2: not valid YAML: .*cannot start any token"),
        ("a: 1\n---\nb: 2\n", "2: not valid YAML: expected a single document in the stream"),
        ("a: 1\nb: *x\n", "2: not valid YAML: found undefined alias 'x'"),
        ("a: &x [*x]\n", "not valid YAML: nested too deeply, or in itself"),
        ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML: nested too deeply"),
        ("a: 1\n? [b, c]\n: 2\n", "2: not valid YAML: a key must be text"),
        ("a: !!int x\n", "1: not valid YAML: the tag tag:yaml.org,2002:int is not accepted"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", "2: not valid YAML: the tag .*os.getcwd is not accepted"),
        ("a: " + "1" * 5000, "not valid YAML: Exceeds the limit"),
        (b"a: \x00\x01\n", "not valid YAML: unacceptable character #x0000"),
        (bytes(range(256)), "cannot be read: 'utf-8' codec can't decode byte 0x80"),
        ("name: a".encode("utf-16"), "cannot be read: 'utf-8' codec"),
    ],
)
def test_what_is_no_document_is_one_clear_line(tmp_path, content, expected):
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=f"it.yaml:? ?{expected}") as caught:
        documents.load(path, Federation)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        documents.load(tmp_path / "nowhere.yaml", Bag)


def test_a_folder_is_no_document(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*Is a directory"):
        documents.load(tmp_path, Bag)


def test_a_byte_order_mark_and_windows_lines_do_no_harm(tmp_path):
    assert bag(tmp_path, "\ufefftitle: a\r\nsize: 2\r\n") == Bag(title="a", size=2.0)


def test_an_anchor_may_be_used_twice(tmp_path):
    text = yaml.safe_dump(document(schema__features=["HERE"])).replace(
        "- HERE",
        "- {name: a, type: numeric, bounds: &b [-1, 1]}\n  - {name: b, type: numeric, bounds: *b}",
    )
    features = documents.load(written(tmp_path, text), Federation).data_schema.features
    assert [feature.bounds for feature in features] == [(-1, 1), (-1, 1)]


def test_plain_values_are_checked_as_files_are():
    with pytest.raises(documents.Mistakes, match=r"^size must be a number \(got nothing\); open must be true or false"):
        documents.validate({"size": None, "open": 1}, Bag)
    with pytest.raises(documents.Mistakes, match=r"^must be a mapping \(got nothing\)$"):
        documents.validate(None, Bag)


def test_a_document_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Bag().size = 2.0


def test_values_can_be_changed_when_a_document_is_read(tmp_path):
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(document(privacy={"row": None})))
    changes = {
        ("training", "learning_rate"): 0.25,
        ("model", "hidden"): [7, 3],
        ("privacy", "row"): {"epsilon": 2.0, "delta": 1e-3, "clip": 1.0},
        ("privacy", "row", "clip"): 0.5,
        ("privacy", "evaluation", "noise"): 3.0,
    }
    changed = federations.load(path, changes=changes)
    assert changed.training.learning_rate == 0.25
    assert changed.model.hidden == (7, 3)
    assert changed.privacy.row is not None and (changed.privacy.row.epsilon, changed.privacy.row.clip) == (2.0, 0.5)
    assert changed.training.rounds == federations.load(path).training.rounds


@pytest.mark.parametrize(
    "key, value, said",
    [
        (("training", "learning_rate"), -1, "training.learning_rate must be greater than 0"),
        (("training", "lerning_rate"), 1, "did you mean learning_rate"),
        (("training", "rounds", "most"), 1, "training.rounds.most: training.rounds is not a mapping, and has no keys"),
    ],
)
def test_a_change_that_does_not_fit_is_a_mistake(tmp_path, key, value, said):
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(document()))
    with pytest.raises(ConfigError) as caught:
        federations.load(path, changes={key: value})
    assert said in str(caught.value)
