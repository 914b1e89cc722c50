"""`cloister init`: what it writes is valid, runs as it is, and is written whole or not at all."""

from __future__ import annotations

import errno
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner, Result

import cloister
from client.settings import load_client_file
from cloister import layout
from cloister.check import check_file
from common.document import federation as federations
from tests.support import ROOT


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def people(rows: int = 400) -> pl.DataFrame:
    """Who bought something, by age and colour; the id is nobody's business."""
    return pl.DataFrame(
        {
            "id": [f"p{i:04}" for i in range(rows)],
            "age": [20 + (i * 37) % 60 for i in range(rows)],
            "colour": [("red", "blue", "green")[i % 3] for i in range(rows)],
            "bought": ["yes" if (i * 37) % 60 > 25 else "no" for i in range(rows)],
        }
    )


def written(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "example, participants, target",
    [("heart", ("cleveland", "hungarian", "switzerland", "va"), "num"), ("regression", ("a", "b"), "demand")],
)
def test_an_example_is_valid_in_each_of_its_documents_and_a_simulation_of_it_runs(
    folder, example, participants, target
):
    done = run("init", "fed", "--example", example, "--participants", ",".join(participants))
    assert done.exit_code == 0, done.output
    each = {
        f"participants/{name}/{file}" for name in participants for file in ("client.yaml", "README.md", "table.csv")
    }
    own = {"federation.yaml", "certificates.sh", "README.md", *(f"tables/{name}.csv" for name in participants)}
    assert written(folder / "fed") == each | own
    for path in (folder / "fed").rglob("*.yaml"):
        check_file(path)
    federation = federations.load(folder / "fed/federation.yaml")
    assert federation.data_schema.target.name == target
    assert federation.strategy.min_clients == len(participants)
    assert federation.privacy.row is not None and federation.privacy.row.epsilon == 4
    told = next(line for line in done.output.splitlines() if " simulate federation.yaml " in line)
    arguments = told.split(" simulate ")[1].split()
    os.chdir(folder / "fed")
    simulated = run("simulate", *arguments, "--out", "run", "--set", "training.rounds=2")
    assert simulated.exit_code == 0, simulated.output


def test_the_digits_are_dealt_so_that_every_row_is_somebodys(folder):
    assert run("init", "fed", "--example", "digits", "--participants", "a,b,c,d").exit_code == 0
    sizes = [pl.read_csv(path).height for path in sorted((folder / "fed/tables").iterdir())]
    assert sizes == [450, 449, 449, 449]  # 1,797 in all
    assert federations.load(folder / "fed/federation.yaml").data_schema.inputs == 64


def test_from_a_table_the_schema_is_drafted_with_its_warning_and_no_row_is_copied(folder):
    people().write_csv("people.csv")
    done = run("init", "shop", "--from", "people.csv", "--target", "bought", "--server", "fed.example.org:9000")
    assert done.exit_code == 0, done.output
    assert "warning: bounds and categories were read from the data and are not private" in done.stderr
    text = (folder / "shop/federation.yaml").read_text()
    assert "READ FROM THE DATA" in text and "left out: column id" in text and "name: shop" in text
    assert [f.name for f in check_and_load(folder / "shop").data_schema.features] == ["age", "colour"]
    settings = load_client_file(folder / "shop/participants/site-2/client.yaml")
    assert (settings.server, settings.data.name) == ("fed.example.org:9000", "site-2-shop")
    assert not list(folder.rglob("table.csv")) and "p0001" not in "".join(
        p.read_text() for p in folder.rglob("shop/*.*")
    )
    assert "certs server fed.example.org 127.0.0.1 localhost" in (folder / "shop/certificates.sh").read_text()
    assert "--address 0.0.0.0:9000" in (folder / "shop/README.md").read_text()
    guide = (folder / "shop/participants/site-2/README.md").read_text()
    assert "- `colour`: one of blue, green, red" in guide and "- `bought`: one of no, yes; what is predicted" in guide


def check_and_load(root: Path):
    for path in root.rglob("*.yaml"):
        check_file(path)
    return federations.load(root / "federation.yaml")


def test_a_word_that_some_yaml_takes_for_a_truth_value_stays_the_tables_own(folder):
    people().rename({"colour": "no"}).write_csv("people.csv")
    done = run("init", "shop", "--from", "people.csv", "--target", "bought")
    assert done.exit_code == 0, done.output
    schema = federations.load(folder / "shop/federation.yaml").data_schema
    assert [feature.name for feature in schema.features] == ["age", "no"]
    assert (
        "- `bought`: one of no, yes; what is predicted" in (folder / "shop/participants/site-1/README.md").read_text()
    )


def test_names_of_tables_and_columns_stay_words_and_add_no_lines(folder):
    people().rename({"colour": "c\n8. run rm"}).write_csv("p\nprivacy: null\nq.csv")
    done = run("init", "shop", "--from", "p\nprivacy: null\nq.csv", "--target", "bought")
    assert done.exit_code == 0, done.output
    federation = check_and_load(folder / "shop")
    assert federation.privacy.row is not None and federation.data_schema.features[1].name == "c\n8. run rm"
    assert "\n8." not in (folder / "shop/participants/site-1/README.md").read_text()


@pytest.mark.parametrize(
    "server, listen, host",
    [("[::1]:9", "[::1]:9", "::1"), ("[2001:db8::7]:9", "[::]:9", "2001:db8::7"), ("localhost:9", "localhost:9", "")],
)
def test_a_server_may_have_an_ipv6_address(folder, server, listen, host):
    done = run("init", "fed", "--example", "regression", "--participants", "a,b", "--server", server)
    assert done.exit_code == 0, done.output
    assert load_client_file(folder / "fed/participants/a/client.yaml").server == server
    assert (
        f"cloister serve federation.yaml --certificates certs --address {listen}\n"
        in (folder / "fed/README.md").read_text()
    )
    assert f" certs server {host}" in (folder / "fed/certificates.sh").read_text()


def test_the_script_calls_cloister_wherever_it_lies(folder, monkeypatch):
    """A path is a path: nothing in it is run, and a blank does not end it."""
    place = folder / "my $(touch ran)`touch ran` 'apps'"
    place.mkdir()
    (place / "cloister").write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/../called"\n')
    (place / "cloister").chmod(0o755)
    monkeypatch.setattr("cloister.init._called", lambda: str(place / "cloister"))
    assert run("init", "fed", "--example", "regression", "--participants", "a,b").exit_code == 0
    subprocess.run(["sh", "fed/certificates.sh"], capture_output=True, timeout=20)
    assert (folder / "called").read_text().startswith("certs init\ncerts server 127.0.0.1 localhost\n")
    assert not list(folder.rglob("ran"))


def test_a_dealt_table_is_shared_out_whole_also_with_decimal_commas(folder):
    frame = people().with_columns(
        height=(pl.col("age") / 7).round(2).cast(pl.String).str.replace(".", ",", literal=True)
    )
    frame.write_csv("people.csv", separator=";")
    done = run("init", "shop", "--from", "people.csv", "--target", "bought", "--deal", "--participants", "a,b,c")
    assert done.exit_code == 0, done.output
    shares = [pl.read_csv(path, separator=";") for path in sorted((folder / "shop/participants").glob("*/table.csv"))]
    assert [share.height for share in shares] == [134, 133, 133]
    assert pl.concat(shares).sort("id").equals(frame.sort("id").with_columns(pl.col("age").cast(pl.Int64)))
    assert not (folder / "shop/tables").exists()
    clients = [load_client_file(path) for path in (folder / "shop/participants").glob("*/client.yaml")]
    for settings in clients:
        assert check_table(settings, folder / "shop/federation.yaml") == []


def check_table(settings, document: Path) -> list[str]:
    """What does not fit in a participant's table."""
    from client.doctor import table
    from common.findings import State
    from tests.client.doctor.support import of

    return of(table.look(settings, federations.load(document)), State.WRONG)


def test_settings_are_for_the_rows_that_each_participant_has(folder):
    people().write_csv("people.csv")
    batches = []
    for i, more in enumerate([(), ("--rows", 1000)]):
        assert run("init", f"fed-{i}", "--from", "people.csv", "--target", "bought", *more).exit_code == 0
        batches.append(check_and_load(folder / f"fed-{i}").training.batch_size)
    assert batches == [107, 800]  # of 400 / 3 rows and of 1000, those to train on: 4 of 5


def test_without_privacy_the_document_says_so_and_the_owners_policy_allows_it(folder):
    people().write_csv("people.csv")
    assert run("init", "shop", "--from", "people.csv", "--target", "bought", "--epsilon", "none").exit_code == 0
    federation = check_and_load(folder / "shop")
    assert federation.privacy.row is None
    load_client_file(folder / "shop/participants/site-1/client.yaml").policy.check(federation)
    assert "NO differential privacy" in (folder / "shop/federation.yaml").read_text()


@pytest.mark.parametrize("epsilon", ["1", "8"])
def test_the_owners_policy_has_room_for_the_whole_run(folder, epsilon):
    people().write_csv("people.csv")
    assert run("init", "s", "--from", "people.csv", "--target", "bought", "--epsilon", epsilon, "--deal").exit_code == 0
    done = run("doctor", "s/participants/site-1/client.yaml", "--json")
    assert '"what": "ledger"' in done.output
    from tests.client.doctor.test_examination import plan_in

    assert plan_in(folder / "s/participants/site-1", folder / "s/federation.yaml") == []


@pytest.mark.parametrize("rows, delta", [(5, 1e-1), (6, 1e-2), (50, 1e-2), (51, 1e-3), (500, 1e-3), (501, 1e-4)])
def test_delta_is_a_power_of_ten_of_at_most_half_a_row(rows, delta):
    assert layout.delta_for(rows) == pytest.approx(delta)
    assert layout.delta_for(rows) * 2 * rows <= 1 < layout.delta_for(rows) * 20 * rows * 1.0001


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ((), "--from TABLE or --example NAME is missing"),
        (("--from", "people.csv", "--example", "heart"), "give --from TABLE or --example NAME, not both"),
        (("--example", "heart", "--deal"), "--target, --rows and --deal belong to --from"),
        (("--example", "heart", "--participants", "a,b"), "the example heart has its own four"),
        (("--example", "regression", "--participants", "a,a"), "--participants must be different names (got a,a)"),
        (
            ("--example", "regression", "--participants", "a, CA"),
            "must be other names than ca, server, revoked, operator",
        ),
        (("--example", "regression", "--participants", "a b"), "must be letters, digits, dots"),
        (("--example", "regression", "--server", "http://x"), "must be HOST:PORT, without http://"),
        (("--example", "regression", "--epsilon", "-1"), "must be a number greater than 0, or none"),
        (("--example", "regression", "--epsilon", "nan"), "must be a number greater than 0, or none"),
        (("--from", "people.csv", "--target", "age of"), "no column age of"),
        (("--from", "people.csv", "--rows", "1" + 400 * "0"), "--rows"),
        (("--from", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_bad_input_is_said_and_nothing_is_written(folder, arguments, problem):
    people().write_csv("people.csv")
    done = run("init", "fed", *arguments)
    assert done.exit_code == 2 and problem in done.output, done.output
    assert written(folder) == {"people.csv"}


def test_what_is_there_already_stays_and_nothing_is_added(folder):
    (folder / "fed").mkdir()
    (folder / "fed/README.md").write_text("mine")
    done = run("init", "fed", "--example", "regression")
    assert done.exit_code == 2 and "README.md is there already; nothing is written" in done.output
    assert written(folder) == {"fed/README.md"} and (folder / "fed/README.md").read_text() == "mine"


def test_nothing_beside_the_folder_is_touched_whatever_it_is_called(folder):
    (folder / ".fed.new").mkdir()
    (folder / ".fed.new" / "notes").write_text("mine")
    done = run("init", "fed", "--example", "regression", "--participants", "a,b")
    assert done.exit_code == 0, done.output
    assert (folder / ".fed.new" / "notes").read_text() == "mine"
    assert sorted(path.name for path in (folder / "fed").iterdir()) == [
        "README.md",
        "certificates.sh",
        "federation.yaml",
        "participants",
        "tables",
    ]


def test_the_root_of_a_disk_is_a_folder_like_any_other(folder, monkeypatch):
    monkeypatch.setattr(layout.tempfile, "TemporaryDirectory", _full)
    done = run("init", "/", "--example", "regression", "--name", "fed")
    assert (done.exit_code, done.stderr) == (2, "error: /: cannot be written: No space left on device\n")


def _full(**_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_after_an_error_half_way_nothing_is_left(folder, monkeypatch):
    rename = Path.rename

    def torn(self: Path, target: Path) -> Path:
        if target.name == "participants":  # the fourth of five
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", torn)
    done = run("init", "fed", "--example", "regression", "--participants", "a,b")
    assert done.exit_code == 2 and "cannot be written" in done.stderr
    assert list(folder.iterdir()) == []


def test_a_folder_that_holds_other_files_takes_a_federation_beside_them(folder):
    people().write_csv("people.csv")
    assert run("init", "--from", "people.csv", "--target", "bought", "--name", "shop").exit_code == 0
    assert {"people.csv", "federation.yaml"} < written(folder)
    assert not [path for path in folder.parent.iterdir() if path.name.endswith(".new")]


def test_on_a_terminal_it_asks_and_asks_again_until_an_answer_can_be_taken(folder):
    """Through a pseudo-terminal: for nobody who can answer are there questions."""
    people().write_csv("people.csv")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cloister", "init", "shop", "--target", "bought"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with process:
        os.write(ours, b"people.csv\nada, ada\nada, ben\n\nmarket\n2.5\n")
        output, _ = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    text = output.decode()
    assert process.returncode == 0, text
    assert "must be different names" in text and text.count("Who takes part") == 2
    federation = federations.load(folder / "shop/federation.yaml")
    assert (federation.name, federation.privacy.row and federation.privacy.row.epsilon) == ("market", 2.5)
    assert sorted(p.name for p in (folder / "shop/participants").iterdir()) == ["ada", "ben"]


def test_every_command_in_the_guides_is_one_that_exists(folder):
    assert run("init", "fed", "--example", "regression").exit_code == 0
    helps = run("--help").output
    for guide in (folder / "fed").rglob("README.md"):
        verbs = set(re.findall(r"cloister ([a-z]+)", guide.read_text()))
        assert len(verbs) >= 4
        assert [verb for verb in verbs if not re.search(rf"│ {verb} ", helps)] == []


def test_the_text_that_is_written_is_the_document_that_was_planned(folder):
    """Comments and numbers in another spelling change no fingerprint."""
    assert run("init", "fed", "--example", "regression", "--epsilon", "0.7").exit_code == 0
    text = (folder / "fed/federation.yaml").read_text()
    assert federations.load(folder / "fed/federation.yaml").privacy.row.epsilon == 0.7  # type: ignore[union-attr]
    assert yaml.safe_load(text)["privacy"]["row"]["delta"] == 1e-4


def test_epsilon_is_written_as_it_was_given_and_not_rounded_up(folder):
    assert run("init", "fed", "--example", "regression", "--epsilon", "1.23456789").exit_code == 0
    row = federations.load(folder / "fed/federation.yaml").privacy.row
    assert row is not None and row.epsilon == 1.23456789
