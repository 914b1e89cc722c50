"""The command line, verb by verb, in processes of their own or through typer's runner."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

import cloister
from client.account.ledger import Ledger
from common.privacy.forecast import forecast
from simulations.sweeps.points import grid, parse
from tests.client.account.test_ledger import entry
from tests.support import HEART, PRIVATE, ROOT, WHOLE, document, table


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a federation file and a table, as the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("federation.yaml").write_text(yaml.safe_dump(document()))
    Path("private.yaml").write_text(yaml.safe_dump(document(**PRIVATE)))
    table().write_csv("table.csv")
    return tmp_path


TWO = ("--data", "table.csv", "--clients", 2)


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def test_help_loads_nothing_heavy():
    # What is heavy, and not how long it took: timings never decide a test.
    code = "import sys, cloister; print(sorted({'torch', 'flwr', 'opacus', 'polars', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shown = run("--help")
    assert shown.exit_code == 0
    for verb in ("demo", "serve", "join", "simulate", "check", "budget", "plan", "privacy", "schema", "certs"):
        assert verb in shown.output


@pytest.mark.parametrize("package", ["client.app", "server.app", "simulations.engine"])
def test_nothing_we_use_reports_home_unless_it_is_asked_to(package):
    names = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    code = f"import os, {package}; print(*(os.environ[name] for name in {list(names)}))"
    silent = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=silent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == list(names.values())


@pytest.mark.parametrize("package, verb", [("server", "serve"), ("client", "join"), ("simulations", "simulate")])
def test_a_package_run_as_a_module_is_its_verb(package, verb):
    done = subprocess.run([sys.executable, "-m", package, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"   cloister {verb} ")


def test_simulate_deals_a_table_and_writes_the_run_folder(files):
    done = run("simulate", "private.yaml", "--data", "table.csv", "--clients", 4, "--partition", "dirichlet:5")
    assert done.exit_code == 0, done.output
    folder = only_run(files)
    assert {p.name for p in folder.iterdir()} == {
        "federation.yaml",
        "events.jsonl",
        "model.safetensors",
        "result.json",
        "privacy.json",
        "report.html",
        "model_card.md",
    }
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["clients"] == [f"client-{i}" for i in range(4)]
    assert set(result["privacy"]["row"]["per_client"]) == set(result["clients"])
    assert str(Path("runs") / folder.name) in done.output


def test_equal_seeds_give_equal_simulations_and_others_do_not(files):
    models = []
    for i, seed in enumerate([1, 1, 2]):
        arguments = ["--data", "table.csv", "--clients", 2, "--seed", seed, "--out", f"run-{i}"]
        assert run("simulate", "private.yaml", *arguments).exit_code == 0
        models.append(Path(f"run-{i}/model.safetensors").read_bytes())
    assert models[0] == models[1]
    assert models[0] != models[2]


def test_simulate_takes_one_file_a_client(files):
    Path("tables").mkdir()
    for i in range(3):
        table(seed=i).write_csv(f"tables/site-{i}.csv")
    done = run("simulate", "federation.yaml", "--data-dir", "tables", "--held-out", "table.csv")
    assert done.exit_code == 0, done.output
    result = json.loads((only_run(files) / "result.json").read_text())
    assert result["clients"] == ["site-0", "site-1", "site-2"]
    events = [json.loads(line) for line in (only_run(files) / "events.jsonl").read_text().splitlines()]
    scores = [e["held_out"] for e in events if e["event"] == "round"]
    assert result["held_out"] == scores[-1]
    shown = f"{100 * scores[-1]['accuracy']:.1f} %"
    assert any("accuracy on held-out rows" in line and shown in line for line in done.output.splitlines())


def test_a_run_without_a_held_out_table_has_none_to_tell_of(files):
    done = run("simulate", "federation.yaml", "--data", "table.csv", "--clients", 2)
    assert json.loads((only_run(files) / "result.json").read_text())["held_out"] is None
    assert "held-out" not in done.output


def test_the_articles_example_prints_its_loss_and_final_accuracy(files):
    done = run("simulate", ROOT / "simulations/article.yaml", "--generate", 300, "--clients", 2)
    assert done.exit_code == 0, done.output
    losses = [line for line in done.output.splitlines() if " loss " in line]
    assert [line.split()[1] for line in losses] == [f"{n}/100" for n in range(10, 101, 10)]
    first, last = (float(line.split(" loss ")[1].split()[0]) for line in (losses[0], losses[-1]))
    assert last < first
    accuracy = next(line for line in done.output.splitlines() if line.startswith("│ accuracy"))
    assert float(accuracy.split("│")[2].strip(" %")) > 60


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give exactly one of --data TABLE, --data-dir FOLDER and --generate ROWS"),
        (["--data", "table.csv", "--generate", 9], "give exactly one of"),
        (["--data", "missing.csv", "--clients", 2], "missing.csv: no such file"),
        (["--data", "table.csv"], "--clients is needed with --partition iid"),
        (["--data", "table.csv", "--clients", 2, "--partition", "iod"], "--partition iod: not known"),
        (["--data", "table.csv", "--clients", 1], "strategy.min_clients is 2, but there are only 1 clients"),
        (["--data", "table.csv", "--clients", 2, "--device", "cuda:7"], "device cuda:7 is not here"),
        (["--data", "table.csv", "--clients", 2, "--held-out", "missing.csv"], "missing.csv: no such file"),
        (["--data", "table.csv", "--clients", 2, "--ray-address", "auto"], "--ray-address belongs to --engine ray"),
        ([*TWO, "--set", "training.rounds"], "--set training.rounds: expected KEY=VALUE, as training.rounds=10"),
        ([*TWO, "--set", "model=1", "--set", "model=2"], "--set model=2: stands twice"),
        ([*TWO, "--set", "training.rounds=[1"], "--set training.rounds=[1: not valid YAML"),
        ([*TWO, "--set", "training.round=3"], "federation.yaml:"),
        ([*TWO, "--set", "start.sha256=" + 64 * "f", "--start-from", "x"], "x: cannot be read: No such file"),
        (
            ["--data", "table.csv", "--clients", 2, "--engine", "ray", "--ray-address", "127.0.0.1:9"],
            "no Ray cluster at 127.0.0.1:9: ",
        ),
    ],
)
def test_a_wrong_simulation_is_one_clear_line_and_writes_nothing(files, arguments, message):
    before = sorted(files.iterdir())
    done = run("simulate", "federation.yaml", *arguments)
    assert done.exit_code == 2
    assert f"error: {message}" in done.output
    assert "Traceback" not in done.output
    assert sorted(files.iterdir()) == before


def test_a_simulation_may_change_its_document(files):
    assert (
        run(
            "simulate",
            "federation.yaml",
            *TWO,
            "--set",
            "training={rounds: 1, local_steps: 2, batch_size: 4, learning_rate: 0.1}",
            "--set",
            "training.rounds=2",
            "--out",
            "two",
        ).exit_code
        == 0
    )
    federation = yaml.safe_load((files / "two/federation.yaml").read_text())
    assert (federation["training"]["rounds"], federation["training"]["batch_size"]) == (2, 4)


def test_a_simulation_goes_on_from_another(files):
    assert run("simulate", "federation.yaml", *TWO, "--out", "first").exit_code == 0
    named = run("simulate", "federation.yaml", *TWO, "--start-from", "first")
    digest = re.search(r'start: \{sha256: "([0-9a-f]{64})"\}', named.output.replace("\n", ""))
    assert named.exit_code == 2 and digest is not None
    done = run("simulate", "federation.yaml", *TWO, "--set", f"start.sha256={digest[1]}", "--set", "start.frozen=[0]",
               "--start-from", "first", "--out", "second")  # fmt: skip
    assert done.exit_code == 0, done.output
    one, other = (load_file(files / folder / "model.safetensors") for folder in ("first", "second"))
    assert [name for name in one if (one[name] == other[name]).all()] == ["layers.0.bias", "layers.0.weight"]
    checked = run("check", "second/federation.yaml").output
    assert f"begins from the model with SHA-256 {digest[1]}, layers 0 frozen" in checked


def test_clients_that_all_have_no_row_to_train_on_are_refused_before_anything_is_written(files):
    Path("few.yaml").write_text(yaml.safe_dump(document(schema__validation_fraction=0.9999)))
    done = run("simulate", "few.yaml", "--data", "table.csv", "--clients", 2)
    assert done.exit_code == 2
    assert re.search(r"error: 2 of 2 clients refuse, and 2 are needed; client-0: all \d+ rows fell into", done.output)
    assert not Path("runs").exists()


def test_clients_too_small_to_take_part_are_named_and_the_others_go_on(files):
    arguments = ["--data", "table.csv", "--clients", 60, "--partition", "dirichlet:0.1", "--seed", 1]
    done = run("simulate", "federation.yaml", *arguments)
    assert done.exit_code == 0, done.output
    left_out = [line.split()[0] for line in done.output.splitlines() if "is left out: all " in line]
    assert left_out
    result = json.loads((only_run(files) / "result.json").read_text())
    assert len(result["clients"]) == 60 - len(left_out)
    assert not set(left_out) & set(result["clients"])


def test_what_encoding_met_is_told_before_a_simulation(files):
    rows = table(60).with_columns(a=pl.col("a") + 9, c=pl.lit("Red"))
    rows.write_csv("far.csv")
    done = run("simulate", "federation.yaml", "--data", "far.csv", "--clients", 2, "--held-out", "table.csv")
    assert done.exit_code == 0, done.output
    said = done.output.split("simulating")[0]
    assert "warning: column a: 60 of 60 cells are outside its bounds, and are clamped" in said
    assert "warning: column c: 60 of 60 cells are none of its categories, and count as other" in said
    assert "\nheld-out table: classes: 0 " in said
    Path("tables").mkdir()
    for name in ("ada", "ben"):
        rows.write_csv(f"tables/{name}.csv")
    said = run("simulate", "federation.yaml", "--data-dir", "tables").output.split("simulating")[0]
    assert "warning: ada: column a: 60 of 60" in said and "\nwarning: ben: column c: 60 of 60" in said


@pytest.mark.parametrize("encoding", ["windows-1252", "utf-16-le"])
def test_a_table_in_another_encoding_is_simulated_and_drafted_where_it_is_named(files, encoding):
    text = table(60).with_columns(größe=pl.lit("groß")).write_csv().replace(",", ";").replace("0.", "0,")
    Path("odd.csv").write_bytes(text.encode(encoding))
    arguments = ["--encoding", encoding]
    done = run("simulate", "federation.yaml", "--data", "odd.csv", "--clients", 2, *arguments)
    assert done.exit_code == 0, done.output
    drafted = run("schema", "draft", "odd.csv", "--target", "y", *arguments)
    assert 'name: "größe", type: categorical, categories: ["groß"]' in drafted.output
    assert run("schema", "draft", "odd.csv").exit_code == 2
    wrong = run("schema", "draft", "odd.csv", "--encoding", "utf-7.5")
    assert "error: --encoding must be an encoding that Python knows, such as utf-8" in wrong.output


def test_an_existing_run_folder_is_left_alone(files):
    Path("mine").mkdir()
    Path("mine/kept").write_text("kept")
    done = run("simulate", "federation.yaml", "--data", "table.csv", "--clients", 2, "--out", "mine")
    assert done.exit_code == 2
    assert "error: mine: exists already" in done.output
    assert [p.name for p in Path("mine").iterdir()] == ["kept"]


def test_every_mistake_in_a_document_is_one_line(files):
    Path("wrong.yaml").write_text(
        yaml.safe_dump(document(training__learning_rate=-1, training__rounds=0, strategy__name="fedavgg"))
    )
    done = run("check", "wrong.yaml")
    assert done.exit_code == 2
    lines = done.output.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: wrong.yaml:") for line in lines)
    assert any("training.learning_rate must be greater than 0 (got -1)" in line for line in lines)


def test_check_describes_a_valid_document_of_either_kind():
    shown = run("check", HEART / "federation.yaml")
    assert shown.exit_code == 0
    assert "a federation, valid" in shown.output
    shown = run("check", HEART / "cleveland.yaml")
    assert shown.exit_code == 0
    assert "a client file, valid" in shown.output


def test_a_drafted_schema_makes_a_federation_that_runs(files):
    drafted = run("schema", "draft", "table.csv")
    assert drafted.exit_code == 0
    assert "READ FROM THE DATA" in drafted.output
    schema = yaml.safe_load("\n".join(line for line in drafted.output.splitlines() if not line.startswith("warning")))
    Path("drafted.yaml").write_text(yaml.safe_dump(document(**schema)))
    assert run("simulate", "drafted.yaml", "--data", "table.csv", "--clients", 2).exit_code == 0


def test_certificates_are_made_once(files):
    assert run("certs", "init").exit_code == 0
    assert run("certs", "server", "127.0.0.1", "localhost").exit_code == 0
    assert run("certs", "client", "ada").exit_code == 0
    made = {p.name for p in Path("certs").iterdir()}
    assert made == {"ca.pem", "ca.key", "server.pem", "server.key", "ada.pem", "ada.key"}
    again = run("certs", "init")
    assert again.exit_code == 2
    assert "exists; move it away first" in again.output


def test_serve_wants_certificates_or_an_explicit_plain_text(files):
    done = run("serve", "federation.yaml")
    assert done.exit_code == 2
    assert "give --certificates FOLDER (made by `cloister certs`), or --insecure" in done.output
    missing = run("serve", "federation.yaml", "--certificates", "nowhere")
    assert missing.exit_code == 2
    assert "nowhere/ca.pem: cannot be read" in missing.output


def test_a_dashboard_that_cannot_be_is_one_line_before_there_is_a_run_folder(files):
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        for address, problem in (
            (where, f"error: --dashboard {where}: cannot be served: Address already in use"),
            (
                "0.0.0.0:8090",
                "error: --dashboard 0.0.0.0:8090: others than this machine can reach it: give --certificates",
            ),
            ("http://127.0.0.1:8090", "error: --dashboard must be HOST:PORT, without http:// before it"),
        ):
            done = run("serve", "federation.yaml", "--insecure", "--address", "127.0.0.1:0", "--dashboard", address)
            assert done.exit_code == 2
            assert done.stderr.startswith(problem) and done.stderr.count("\n") == 1
    signal.signal(signal.SIGTERM, before)
    assert not (files / "runs").exists()


def test_a_bug_keeps_its_traceback(files, monkeypatch):
    def broken(path: Path) -> list[str]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("cloister.check.check_file", broken)
    done = run("check", "federation.yaml")
    assert isinstance(done.exception, ZeroDivisionError)


@pytest.mark.integration
def test_interrupting_a_simulation_keeps_the_last_complete_round(files):
    Path("long.yaml").write_text(yaml.safe_dump(document(training__rounds=1_000_000)))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cloister",
            "simulate",
            "long.yaml",
            "--data",
            "table.csv",
            "--clients",
            "2",
            "--out",
            "run",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    events = Path("run/events.jsonl")
    deadline = time.monotonic() + 60
    while not (events.exists() and events.read_text().count('"round"') >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    result = json.loads(Path("run/result.json").read_text())
    assert result["status"] == "stopped"
    assert result["rounds"] >= 2


# What was spent, what it would cost, what was revealed


@pytest.fixture
def client_file(files):
    value = {
        "server": "localhost:1",
        "tls": None,
        "name": "ada",
        "data": {"path": "table.csv", "name": "hearts"},
        "state": "state",
        "policy": {"epsilon": 8.0, "delta": 1e-3},
    }
    Path("client.yaml").write_text(yaml.safe_dump(value))
    ledger = Ledger(Path("state/hearts.ledger"))
    ledger.charge(entry(noise_multiplier=2.0))
    ledger.close()
    return Path("client.yaml")


def test_budget_shows_what_was_spent_for_people_and_for_programs(client_file):
    shown = run("budget", client_file, "--verify")
    assert shown.exit_code == 0, shown.output
    told = json.loads(run("budget", client_file, "--json").stdout)
    assert f"spent   {told['spent']:.2f}   left {told['left']:.2f}" in shown.output
    assert 1 < told["spent"] < 8
    assert run("budget", client_file, "--head", told["head"]).exit_code == 0


def test_budget_exits_with_2_if_the_ledger_cannot_be_trusted(client_file):
    Path("state/hearts.head").write_text("7:" + 64 * "a")
    assert run("budget", client_file).exit_code == 0
    refused = run("budget", client_file, "--verify")
    assert refused.exit_code == 2
    assert "has 1 entries, but has had 7" in refused.stderr
    assert "restore the newest copies" in refused.stderr


def test_plan_answers_for_people_and_for_programs(files):
    shown = run("plan", "private.yaml", "--rows", 200)
    assert shown.exit_code == 0, shown.output
    told = json.loads(run("plan", "private.yaml", "--rows", 200, "--epsilon", 2, "--json").stdout)
    assert f"{told['rounds']} rounds of {told['steps']} steps" in shown.output
    assert 1.9 < told["epsilon"] <= 2.0


@pytest.mark.parametrize("arguments, said", [(("--rows", 3), "fewer than training.batch_size"), ((), "--rows")])
def test_plan_refuses_with_2(files, arguments, said):
    refused = run("plan", "private.yaml", *arguments)
    assert refused.exit_code == 2
    assert said in refused.stderr


def test_plan_suggests_settings_and_plans_with_them(files):
    asked = ("plan", "private.yaml", "--rows", 200, "--clients", 4, "--epsilon", 2, "--suggest")
    told = json.loads(run(*asked, "--json").stdout)
    assert told["plan"]["limit"] == 2.0 and told["plan"]["epsilon"] <= 2.0
    assert told["suggestion"]["changes"]["training.rounds"] == told["plan"]["rounds"]
    shown = run(*asked)
    assert shown.exit_code == 0, shown.output
    assert "The rules know nothing of your rows." in " ".join(shown.output.split())
    # The sweep that it names is of the document that it planned, with the epsilon that was asked about.
    (command,) = [line for line in shown.output.splitlines() if line.startswith("  cloister sweep")]
    words = shlex.split(command)
    (point,) = grid(Path(words[2]), parse(words[words.index("--grid") + 1 :]))
    assert point.federation.privacy.row.epsilon == 2.0
    assert point.federation.training.learning_rate == told["suggestion"]["changes"]["training.learning_rate"]
    assert forecast(point.federation, 200) == told["plan"]


def test_plan_suggests_without_privacy_where_there_is_nothing_to_plan(files):
    told = json.loads(run("plan", "federation.yaml", "--rows", 200, "--suggest", "--json").stdout)
    assert told["plan"] is None and told["suggestion"]["clients"] == 2  # strategy.min_clients
    refused = run("plan", "federation.yaml", "--rows", 200, "--clients", 4)
    assert refused.exit_code == 2 and "--clients is for --suggest" in refused.stderr


def test_privacy_reads_a_run_folder(files):
    assert run("simulate", "private.yaml", "--data", "table.csv", "--clients", 2, "--quiet").exit_code == 0
    shown = run("privacy", only_run(files))
    assert shown.exit_code == 0, shown.output
    assert "Each row: epsilon" in shown.output
    refused = run("privacy", files)
    assert refused.exit_code == 2
    assert "is this a run folder?" in refused.stderr


def test_a_simulation_may_protect_whole_clients(files):
    Path("whole.yaml").write_text(yaml.safe_dump(document(**WHOLE)))
    done = run("simulate", "whole.yaml", "--data", "table.csv", "--clients", 9)
    assert done.exit_code == 0, done.output
    assert "epsilon of a whole client" in done.output
    assert "of a client" in done.stderr


def test_a_question_to_the_owner_is_answered_on_the_terminal(files):
    """What `policy.approved: ask` reads: anything but yes, the end of input among it, is no."""
    code = (
        "import asyncio\n"
        "from cloister.terminal import ask\n"
        "answers = [asyncio.run(ask('? ')) for _ in range(3)]\n"
        "print(answers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input="yes\nno\n", capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("[True, False, False]\n"), done.stderr


def test_a_letter_that_the_output_cannot_take_is_replaced(tmp_path):
    """As where a pipe on Windows takes its own code page."""
    (tmp_path / "federation.yaml").write_text(
        yaml.safe_dump(document(schema__group={"name": "color", "groups": {"grün": ["red"]}}), allow_unicode=True),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "cloister", "check", "federation.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "evaluations count by color: gr?n" in done.stdout


def test_every_flag_that_the_operators_page_names_exists(files):
    text = (ROOT / "docs/operations.md").read_text()
    verbs = ("serve", "join", "status", "track", "doctor", ("certs", "list"), ("certs", "client"))
    helps = " ".join(run(*([verb] if isinstance(verb, str) else verb), "--help").output for verb in verbs)
    named = set(re.findall(r"`?(--[a-z][a-z-]+)", text))
    assert named >= {"--resume", "--certificates", "--metrics", "--log-format", "--max-clients", "--wait"}
    assert [flag for flag in sorted(named) if flag not in helps] == []


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ((), "give either FEDERATION.YAML or --resume RUN_DIR"),
        (("federation.yaml", "--resume", "runs"), "give either FEDERATION.YAML or --resume RUN_DIR"),
        (("federation.yaml", "--rounds", 9), "--rounds belongs to --resume"),
        (("--resume", "runs", "--out", "other"), "--out is for a new run"),
        (("--resume", "runs", "--start-from", "other"), "--start-from is for a new run"),
        (("federation.yaml", "--log-format", "xml"), "'xml' is not one of 'text', 'json'"),
        (("federation.yaml", "--dashboard-token", "f"), "--dashboard-token belongs to --dashboard HOST:PORT"),
    ],
)
def test_serve_says_which_arguments_go_together(files, arguments, problem):
    done = run("serve", *arguments, "--insecure")
    assert done.exit_code == 2
    assert problem in " ".join(re.sub(r"[│╭╮╰╯─\n]", " ", done.output).split())


def test_a_folder_that_cannot_be_resumed_is_one_clear_line(files):
    done = run("serve", "--resume", "nowhere", "--insecure")
    assert (done.exit_code, done.output) == (2, "error: nowhere: not the folder of a run: it has no federation.yaml\n")


def test_a_simulations_result_may_be_json_for_a_program(files):
    done = run("simulate", "federation.yaml", *TWO, "--json", "--quiet")
    told = json.loads(done.stdout)
    assert (told["status"], told["clients"]) == ("completed", ["client-0", "client-1"])
    assert json.loads((Path(told["run_folder"]) / "result.json").read_text())["rounds"] == told["rounds"]


def test_the_service_of_the_operations_page_begins_a_run_and_then_goes_on_with_it(tmp_path):
    """Its ExecStart, with a program in place of ours that says what it was told."""
    (command,) = re.findall(r"^ExecStart=/bin/sh -c '(.*serve.*)'$", (ROOT / "docs/operations.md").read_text(), re.M)
    program = tmp_path / "cloister"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o700)
    command = command.replace("/opt/cloister/.venv/bin/cloister", str(program))

    def told() -> str:
        return subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    rest = "--certificates certs --address 0.0.0.0:8443 --log-format json\n"
    assert told() == f"serve federation.yaml --out run {rest}"
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    assert told() == f"serve --resume run {rest}"
