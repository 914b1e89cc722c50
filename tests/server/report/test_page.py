"""The page of a run: what is in it, of every kind of run, and that texts of others stay texts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, OutputError, RunFolderError
from common.model.scores import scores_of
from server.folder.folder import read_run
from server.report import figures, page
from server.report.card import card
from server.report.comparison import comparison, comparison_figures
from server.report.drawing import MOST_BINS, MOST_POINTS, Figure
from server.rounds.events import Ended, Refused, Started
from tests.server.report.runs import completed, explained, rounds, written
from tests.support import PRIVATE, WHOLE, federation

EVIL = "<script>alert(1)</script>"


def keys(drawn: list[Figure]) -> list[str]:
    return [figure.key for figure in drawn]


def values(figure: Figure) -> list[dict[str, Any]]:
    """All rows of a figure's data."""
    spec = figure.spec
    inline = spec.get("data", {}).get("values", [])
    return inline + [row for rows in spec.get("datasets", {}).values() for row in rows]


class Texts(HTMLParser):
    """What a reader sees, and which elements there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.scripts, self._hidden = "", 0, False

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.scripts += tag == "script"
        self._hidden = tag in ("script", "style")
        assert not any(name in ("src", "href") for name, _ in attributes), f"{tag} asks for something"

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.seen += "" if self._hidden else data


def read(html: str) -> Texts:
    texts = Texts()
    texts.feed(html)
    return texts


def test_a_private_run_has_every_chart_that_it_has_something_for(tmp_path):
    record = completed(tmp_path / "run")
    drawn = figures.figures(record)
    assert keys(drawn) == ["learning", "epsilon", "spent", "clients", "classes", "confusion", "participation", "times"]
    explained(record.path)
    assert keys(figures.figures(read_run(record.path)))[-1] == "importance"
    by_key = {figure.key: figure for figure in drawn}
    line = [row for row in values(by_key["learning"]) if row["of"].startswith("clients")]
    assert [row["round"] for row in line] == [1, 2, 3] and all(row["low"] < row["value"] < row["high"] for row in line)
    assert {"limit": 4.0}.items() <= values(by_key["spent"])[-1].items()
    assert {(row["client"], row["used"], row["planned"]) for row in values(by_key["spent"])[:2]} == {
        ("ada", 1.5, 3.0),
        ("ben", 1.5, 3.0),
    }
    cells = {(row["true"], row["predicted"]): row["rows"] for row in values(by_key["confusion"])}
    assert cells == {("0", "0"): 45, ("0", "1"): 5, ("1", "0"): 10, ("1", "1"): 40}  # the exact ones
    parts = {row["part"]: row["seconds"] for row in values(by_key["times"]) if row["round"] == "1"}
    assert parts["clients at work"] == 1.0 and parts["waiting for clients"] == 0.5
    strip = {(row["client"], row["round"]): row["state"] for row in values(by_key["participation"])}
    assert strip["ada", "1"] == "took part" and strip["cyd", "2"] == "reply did not count" and ("cyd", "1") not in strip


def test_a_run_without_privacy_has_its_loss_and_no_band(tmp_path):
    record = completed(tmp_path / "run", changes={})
    drawn = {figure.key: figure for figure in figures.figures(record)}
    assert "loss" in drawn and "epsilon" not in drawn and "spent" not in drawn
    assert all(row["low"] is None for row in values(drawn["learning"]))
    assert "can reveal rows" in read(page.report(record)).seen


def test_the_page_tells_what_a_reader_asks_first(tmp_path):
    record = completed(tmp_path / "run")
    html = page.report(record)
    seen = " ".join(read(html).seen.split())
    for words in (
        "Predicts y (0, 1) from 3 columns",
        "It completed 3 of 3 rounds.",
        "ada, ben",
        "85.0 %",  # held out: 85 of 100
        "on held-out rows, exact",
        "at most 4, at delta 0.001",
        "1 min 15 s",
        "policy.delta: asked 0.001, allowed 0.0001",
        "no reply within 30 s",
        f"Fingerprint {record.federation.fingerprint}",
        "cloister 0.1.0",
        "sees every message of every client",
    ):
        assert words in seen, words


def test_a_run_whose_statement_is_not_written_yet_is_as_private_as_its_document_says(tmp_path):
    record = completed(tmp_path / "run")
    (record.path / "privacy.json").unlink()
    seen = " ".join(read(page.report(read_run(record.path))).seen.split())
    assert "Each row of each client's table is protected" in seen and "e1.50" in seen  # what was spent so far
    assert "What clients stated stands here once the run has ended." in seen
    assert "can reveal rows" not in seen


def test_energy_is_told_in_all_a_round_and_a_point_of_accuracy(tmp_path):
    used = {"joules": 750.0, "grams": 0.125}
    told = [replace(each, energy=used) for each in rounds(federation(), count=2)]
    record = written(tmp_path / "run", federation(), [*told, Ended(status="completed")])
    accuracy = told[-1].evaluation["accuracy"]  # type: ignore[index]
    each = f"750 J, 125 mg CO2e a round; {15 / accuracy:.3g} J, {2.5 / accuracy:.3g} mg CO2e a point of accuracy"
    assert f"| energy of clients, measured or estimated | 1.5 kJ, 250 mg CO2e; {each} |" in card(record)
    seen = " ".join(read(page.report(record)).seen.split())
    assert "energy of clients" in seen and "1.5 kJ" in seen and f"about; 250 mg CO2e; {each}" in seen
    assert "energy of clients" not in read(page.report(completed(tmp_path / "plain"))).seen


def grouped(noise: float) -> list[Any]:
    """Rounds whose last one tells groups apart: 90 rows of red, 45 of green, 2 of neither."""
    place = federation(schema__group={"name": "c", "groups": ["red", "green"]}).data_schema
    counts = np.array([40.0, 5, 5, 40, 20, 10, 5, 10, 1, 0, 0, 1])
    scores = scores_of(counts, place, noise=noise) | ({"count_noise": noise} if noise else {})
    told = rounds(federation(), count=2)
    scores["gaps_between_clients"] = {"accuracy": {"gap": 0.1, "worst": "ada", "best": "ben"}}
    scores["per_client"] = {"ada": {"accuracy": 0.7}, "ben": {"accuracy": 0.8}}
    return [*told[:1], replace(told[1], evaluation=scores), Ended(status="completed")]


def test_groups_that_the_schema_declares_are_drawn_and_told(tmp_path):
    document = federation(schema__group={"name": "c", "groups": ["red", "green"]})
    record = written(tmp_path / "exact", document, grouped(0.0))
    (drawn,) = [figure for figure in figures.figures(record) if figure.key == "groups"]
    assert drawn.title == "Accuracy by c"
    assert [(row["group"], round(row["value"], 3), row["low"]) for row in values(drawn)[:3]] == [
        ("red", 0.889, None),
        ("green", 0.667, None),
        ("(other)", 1.0, None),
    ]
    assert "Gap in accuracy by c: 22.2 points; worst green, best red." in drawn.caption
    told = card(record)
    assert (
        "## Results by c" in told and "| green | 45 | 66.7 % | 66.7 % | 66.7 % |" in told and "| (other) | 2 |" in told
    )
    assert "Gap in accuracy by c: 22.2 points; worst green, best red." in told
    assert "Gap in accuracy between clients: 10.0 points; worst ada, best ben." in told
    assert "say nothing of groups" not in told and "say nothing of groups" in card(completed(tmp_path / "plain"))


def test_the_other_targets_are_told_beside_the_first(tmp_path):
    also = [{"name": "kind", "classes": ["p", "q"]}, {"name": "size", "bounds": [0, 20], "optional": True}]
    document = federation(schema__also=also)
    counts = np.array([40.0, 10, 10, 40, 30, 5, 15, 30, 60, 6, 3])
    last = replace(rounds(federation(), count=1)[0], evaluation=scores_of(counts, document.data_schema))
    record = written(tmp_path / "run", document, [last, Ended(status="completed")])
    told = card(record)
    assert "| kind | accuracy | 75.0 % |  | 80 |" in told and "| size | mean absolute error | 2 |  | 60 |" in told
    assert "| size | also predicted: a number from 0 to 20 | may be missing |" in told
    text = read(page.report(record)).seen
    assert "The other targets" in text and "Predicts y (0, 1); kind (p, q); size (a number from 0 to 20) from" in text
    noisy = replace(last, evaluation=scores_of(counts, document.data_schema) | {"count_noise": 2.0})
    with_noise = card(written(tmp_path / "noisy", document, [noisy, Ended(status="completed")]))
    # sqrt(k - 2 a k + (a k)^2) x noise / rows, with k = 2 and a = 3 / 4
    half = 1.959964 * math.sqrt(2 - 3 + 2.25) * 2 / 80
    assert (
        f"| kind | accuracy | 75.0 % | {100 * (0.75 - half):.1f} % to {100 * (0.75 + half):.1f} % | 80 |" in with_noise
    )
    without = scores_of(np.array([40.0, 10, 10, 40, 30, 5, 15, 30, 0, 0, 0]), document.data_schema)
    empty = written(tmp_path / "empty", document, [replace(last, evaluation=without), Ended(status="completed")])
    assert "| size | mean absolute error | no row has it |  | 0 |" in card(empty)
    assert "The other targets" not in read(page.report(completed(tmp_path / "plain"))).seen


def test_groups_of_noisy_counts_are_drawn_with_what_noise_makes_uncertain(tmp_path):
    document = federation(**PRIVATE, schema__group={"name": "c", "groups": ["red", "green"]})
    record = written(tmp_path / "noisy", document, grouped(5.0))
    (drawn,) = [figure for figure in figures.figures(record) if figure.key == "groups"]
    red = values(drawn)[0]
    # sqrt(k - 2 a k + (a k)^2) x noise / rows, with k = 2 and a = 8 / 9
    half = 1.959964 * math.sqrt(2 - 4 * 8 / 9 + (16 / 9) ** 2) * 5 / 90
    assert (red["low"], red["high"]) == pytest.approx((8 / 9 - half, min(8 / 9 + half, 1.0)))
    assert "(noise alone: ± " in drawn.caption and "The bars are what the noise" in drawn.caption
    lost = written(tmp_path / "lost", document, grouped(20.0))
    (drawn,) = [figure for figure in figures.figures(lost) if figure.key == "groups"]
    assert "No gaps by c: fewer than two groups have enough rows for their noise." in drawn.caption
    assert "| red | 90 | too few rows |" in card(lost)
    assert "| red | 90 | 88.9 % ± " in card(record) and "| (other) | 2 | too few rows |" in card(record)


def test_under_client_privacy_who_was_there_is_told_and_not_who_was_asked(tmp_path):
    document = federation(**WHOLE)
    record = written(tmp_path / "run", document, [Started(rounds=3), *rounds(document, noise=1.0)])
    drawn = {figure.key: figure for figure in figures.figures(record)}
    assert drawn["participation"].title == "Who was there when"
    assert "took part" not in {row["state"] for row in values(drawn["participation"])}
    assert "Each client counts as one row" in drawn["confusion"].caption
    assert "the mean over clients lies between" in card(record)


def test_a_round_that_was_told_twice_is_drawn_once(tmp_path):
    document = federation()
    first, second, third = rounds(document)
    record = written(tmp_path / "run", document, [Started(rounds=3), first, second, second, third])
    drawn = {figure.key: figure for figure in figures.figures(record)}
    seconds = [row["seconds"] for row in values(drawn["times"]) if row["part"] == "aggregation"]
    assert seconds == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    "name, content",
    [
        ("result.json", '{"held_out": 3}'),
        ("explanation.json", '{"columns": [{"column": "a"}]}'),
        ("privacy.json", '{"row": {"per_client": {"ada": 3}}}'),
    ],
)
def test_a_file_that_holds_something_else_is_a_damaged_one(tmp_path, name, content):
    record = completed(tmp_path / "run")
    (record.path / name).write_text(content)
    with pytest.raises(RunFolderError, match="a file of this run is damaged"):
        page.report(read_run(record.path))


def test_events_that_are_no_text_are_passed_over(tmp_path):
    record = completed(tmp_path / "run")
    with (record.path / "events.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"event": ["x"]}\n' + b"[" * 100_000 + b"\n")
    assert read_run(record.path).rounds == record.rounds


def test_what_others_are_called_stays_text(tmp_path):
    features = [{"name": EVIL, "type": "categorical", "categories": [EVIL, "b"]}]
    target = {"name": f"y {EVIL}", "classes": {EVIL: [1], "b": [0]}}
    document = federation(schema__features=features, schema__target=target)
    events = [
        Started(run=EVIL, rounds=2, time=1e9),
        Refused(client=EVIL, kind=EVIL, reason=EVIL),
        *rounds(document, members=(EVIL, "ben")),
        Refused(client=EVIL, kind="refused", reason=EVIL),
        Ended(status="failed", reason=EVIL),
    ]
    record = written(tmp_path / "run", document, events, status="failed", clients=[EVIL], seconds=1.0)
    (tmp_path / "run" / "explanation.json").write_text(
        json.dumps({"rows": 1, "columns": [{"column": EVIL, "worse": None, "spread": None, "attribution": 1.0}]})
    )
    record = read_run(record.path)
    for html in (page.report(record), comparison([record, record])):
        texts = read(html)
        assert texts.scripts == 4, "only the page's own"
        outside = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
        assert EVIL not in outside
        assert html.count("</script>") == 4
    assert EVIL in read(page.report(record)).seen
    assert EVIL not in card(record) and "&lt;script>" in card(record)


def test_a_run_of_many_clients_stays_readable(tmp_path):
    many = [f"client-{i}" for i in range(1000)]
    record = completed(tmp_path / "run", count=300, members=many, named=False)
    drawn = {figure.key: figure for figure in figures.figures(record)}
    assert drawn["clients"].caption.startswith("Median of the clients")
    assert drawn["participation"].title == "How many took part"
    assert max(len(values(figure)) for figure in drawn.values()) < 2 * MOST_POINTS
    assert "client-7" not in page.report(record)


def test_a_long_run_is_thinned_and_keeps_its_last_round(tmp_path):
    record = completed(tmp_path / "run", count=3000, changes={})
    drawn = {figure.key: figure for figure in figures.figures(record)}
    shown = [row["round"] for row in values(drawn["loss"])]
    assert len(shown) <= MOST_POINTS and shown[-1] == 3000 and shown == sorted(shown)
    assert len({row["round"] for row in values(drawn["times"])}) <= MOST_BINS
    assert len(page.report(record)) < 1_500_000


@pytest.mark.parametrize(
    "events, words",
    [
        ([], "It has not begun."),
        (
            [Started(rounds=3), Ended(status="failed", reason="the first round failed")],
            "This run failed: the first round failed",
        ),
    ],
)
@pytest.mark.parametrize("changes", [{}, PRIVATE, WHOLE])
def test_a_run_that_came_to_nothing_has_a_page_all_the_same(tmp_path, changes, events, words):
    record = written(tmp_path / "run", federation(**changes), events)
    assert words in " ".join(read(page.report(record)).seen.split())
    assert figures.figures(record) == []
    assert "It was not evaluated." in card(record)


def test_a_damaged_folder_is_said(tmp_path):
    record = completed(tmp_path / "run")
    (record.path / "result.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"result.json: cannot be read"):
        read_run(record.path)
    with (record.path / "events.jsonl").open("a") as file:
        file.write('{"event": "round", "round": 4, "rou')  # torn by a full disk
    (record.path / "result.json").unlink()
    assert [event.round for event in read_run(record.path).rounds] == [1, 2, 3]


def test_each_chart_becomes_a_picture(tmp_path):
    drawn = figures.figures(completed(tmp_path / "run"))
    made = page.write_pictures(tmp_path / "pictures", drawn)
    assert [path.name for path in made] == [f"{key}.png" for key in keys(drawn)]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in made)


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot be made: File exists"):
        page.write_pictures(tmp_path / "file", figures.figures(completed(tmp_path / "run")))


# Several runs


def test_runs_are_compared_by_their_figures_their_curves_and_their_privacy(tmp_path):
    records = [completed(tmp_path / "private"), completed(tmp_path / "plain", changes={"training__learning_rate": 0.5})]
    drawn = {figure.key: figure for figure in comparison_figures(records)}
    assert {row["run"] for row in values(drawn["tradeoff"])} == {"private"}
    assert values(drawn["tradeoff"])[0]["epsilon"] == 3.0
    seen = " ".join(read(comparison(records)).seen.split())
    for words in ("Comparison of 2 runs", "training.learning_rate", "no privacy", "85.0 %", "row 3.00"):
        assert words in seen, words


def test_curves_are_of_every_run(tmp_path):
    records = [completed(tmp_path / "one" / "run", changes={}), completed(tmp_path / "other" / "run")]
    for record in records:
        (record.path / "result.json").unlink()
    drawn = comparison_figures([read_run(record.path) for record in records])
    assert {row["run"] for row in values(drawn[0])} == {str(record.path) for record in records}, "by path, if need be"


def test_a_run_may_be_compared_with_itself(tmp_path):
    record = completed(tmp_path / "run")
    seen = read(comparison([record, record])).seen
    assert str(record.path) in seen and f"{record.path} (2)" in seen


def test_runs_of_classes_and_of_numbers_are_not_compared(tmp_path):
    number = federation(schema__target={"name": "y", "bounds": [0, 1]}, training__loss="mse")
    records = [completed(tmp_path / "one"), written(tmp_path / "other", number, [])]
    with pytest.raises(ConfigError, match="some of these runs predict classes, and some numbers"):
        comparison(records)


# The model card


def test_the_card_tells_data_training_results_privacy_and_limits(tmp_path):
    text = card(completed(tmp_path / "run"))
    for words in (
        "# Model card: small",
        "## Use",
        "| a | a number from -1 to 1, clamped |  |",
        "| c | red, green |  |",
        "| y | the target: one of 0, 1 |  |",
        "2 steps of batches of 8, sgd",
        "| participants | 2: ada, ben |",
        "| accuracy | 85.0 % |",
        "| ben | 60.0 % |",
        "| each row | 3.00 | 4 | 0.001 |",
        "- Without the rows of dan, who refused.",
        "- Noise for privacy costs accuracy",
    ):
        assert words in text, words


def test_the_card_of_many_clients_has_quantiles(tmp_path):
    text = card(completed(tmp_path / "run", members=[f"c{i}" for i in range(200)], named=False))
    assert "| accuracy | 10.0 % | 30.0 % | 40.0 % | 50.0 % | 70.0 % |" in text


def test_a_text_in_the_card_breaks_no_table(tmp_path):
    document = federation(schema__target={"name": "a|b\n## c", "classes": [0, 1]})
    text = card(written(tmp_path / "run", document, []))
    assert "| a\\|b ## c | the target" in text


def test_a_page_needs_no_file_beside_it(tmp_path):
    html = page.report(completed(tmp_path / "run"))
    assert "default-src 'none'" in html and Path(tmp_path / "run").exists()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", re.sub(r"<script.*?</script>", "", html, flags=re.S))
