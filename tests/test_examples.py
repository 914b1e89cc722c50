"""The example that each verb's help ends with runs as it is pasted, in the project's folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

import cloister
from cloister.verbs import split_example
from tests.integration.federation import Process
from tests.support import ROOT, port_8443


def verbs(commands: typer.Typer, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each verb, and the example in its help."""
    for command in commands.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        yield (*before, name), split_example(command.callback)[1]
    for group in commands.registered_groups:
        assert group.typer_instance is not None and group.name is not None
        yield from verbs(group.typer_instance, (*before, group.name))


EXAMPLES = {" ".join(verb): example for verb, example in verbs(cloister.app)}

# In this order what each needs is there; those of a federation's processes are run by the second test.
ALONE = [
    "init",
    "certs init",
    "certs server",
    "certs client",
    "certs operator",
    "certs list",
    "check",
    "plan",
    "schema draft",
    "simulate",
    "status",
    "report",
    "privacy",
    "predict",
    "evaluate",
    "explain",
    "export",
    "compress",
    "track",
    "personalise",
    "sweep",
    "audit",
    "certs revoke",
]
TOGETHER = ["serve", "doctor", "join", "fetch", "budget"]
ELSEWHERE = ["demo"]  # tests/test_readme.py


def test_every_verb_has_an_example_that_a_test_runs():
    assert sorted([*ALONE, *TOGETHER, *ELSEWHERE]) == sorted(EXAMPLES)
    for verb, example in EXAMPLES.items():
        assert example.startswith(f"cloister {verb}")


@pytest.mark.parametrize("verb", EXAMPLES)
def test_help_ends_with_the_example_on_one_line_however_narrow_the_terminal(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = CliRunner().invoke(cloister.app, [*verb.split(), "--help"])
    assert shown.exit_code == 0
    assert shown.output.rstrip().splitlines()[-1].strip() == EXAMPLES[verb]
    assert CliRunner().invoke(cloister.app, [*verb.split(), "-h"]).output == shown.output


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What of the project's folder the examples look at."""
    kept = shutil.ignore_patterns("__pycache__", "state", "certs", "runs", "*.py")
    shutil.copytree(ROOT / "simulations", tmp_path / "simulations", ignore=kept)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pasted(verb: str) -> Result:
    return CliRunner().invoke(cloister.app, shlex.split(EXAMPLES[verb])[1:])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_examples_run_as_they_are_pasted(project):
    for verb in ALONE:
        done = pasted(verb)
        assert done.exit_code == 0, f"{EXAMPLES[verb]}\n{done.output}"


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_the_examples_of_a_federations_processes_run_as_they_are_pasted(project):
    for verb in ("certs init", "certs server", "certs client"):
        assert pasted(verb).exit_code == 0
    others = ("hungarian", "switzerland", "va")
    for name in others:
        arguments = shlex.split(EXAMPLES["certs client"].replace("cleveland", name))[1:]
        assert CliRunner().invoke(cloister.app, arguments).exit_code == 0
    with port_8443(), ExitStack() as processes:

        def start(line: str) -> Process:
            process = Process(shlex.split(line)[1:], project)
            processes.callback(process.end)
            return process

        server = start(EXAMPLES["serve"])
        server.until("waiting for clients")
        assert start(EXAMPLES["doctor"]).output().endswith("ready\n")
        joins = [start(EXAMPLES["join"].replace("cleveland", name)) for name in ("cleveland", *others)]
        for client in joins:
            assert "the run is over: completed" in client.output()
        server.output()
        (run,) = (project / "runs").iterdir()
        staying = start(f"cloister serve --resume {run} --stay --certificates simulations/heart/certs")
        staying.until("clients can fetch its model")
        assert "is kept: " in start(EXAMPLES["fetch"]).output()
        assert "30 x model update" in start(EXAMPLES["budget"]).output()


# Completion


def completed(shell: str, typed: str, **environment: str) -> list[str]:
    """What a shell is told that may follow."""
    words = typed.split(" ")
    asked = {
        "_CLOISTER_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": typed,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": words[-1],
    }
    program = Path(sys.executable).with_name("cloister")
    done = subprocess.run(
        [program], env={**os.environ, **asked, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_options_and_choices(shell):
    assert any("predict" in word for word in completed(shell, "cloister pre"))
    assert any("--held-out" in word for word in completed(shell, "cloister simulate --held"))
    assert any("inline" in word for word in completed(shell, "cloister simulate --engine in"))


def test_a_real_bash_completes_with_the_script_that_is_installed():
    program = Path(sys.executable).with_name("cloister")
    script = f"""
        PATH={shlex.quote(str(program.parent))}:$PATH
        eval "$(_CLOISTER_COMPLETE=source_bash cloister)"
        COMP_WORDS=(cloister pers); COMP_CWORD=1
        _cloister_completion cloister
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["personalise"], done.stderr


def test_the_version_is_shown(monkeypatch):
    from importlib.metadata import version

    shown = CliRunner().invoke(cloister.app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"cloister {version('cloister')}\n")
