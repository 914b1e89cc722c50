"""python -m simulations.results: what privacy costs on two real tables, by `cloister sweep`.

Writes docs/results.md and its pictures, in a minute or two.
"""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from simulations import digits
from simulations.sweeps.report import PICTURE, TABLE

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
SETTINGS = "<!-- from here on by simulations/settings.py -->"
WIDTH = 120
SEEDS = 5
EPSILONS = "inf,8,4,1"
WRITTEN = """
Written by `make results` ({date}, Cloister {version}); nothing here is edited by hand. Each table but the last is one
that `cloister sweep` leaves; the command above it, given in the project's folder, makes it again.
"""
FIGURES = """
Accuracy and macro F1 of the last model, exactly, on the validation rows of all clients: means of {seeds} seeds and
their standard deviations. A seed deals the rows and draws first weights, batches and noise. An epsilon of ∞ is no
privacy and no clipping; `hidden` of [] is a linear model. Nothing is spent on evaluation. Learning rates, clips and
numbers of rounds were found by `cloister sweep --search` on these same tables. On private rows such a search would have
its own cost, which is not in these epsilons.
"""
DIGITS = ("--data", "digits.csv", "--clients", "100", "--partition", "dirichlet:0.5")
HOSPITALS = ("--data-dir", "simulations/heart")
# How the digits' clients train with each row protected: all their rows in a step, and no count of them is told.
PRIVATE_DIGITS = (
    "privacy.row.delta=1e-4",
    "privacy.row.clip=0.4",
    "privacy.row.sampling_rate=1.0",
    "privacy.row.count_epsilon=null",
    "privacy.evaluation.every=0",
    "training.rounds=30",
)


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str  # of its picture
    title: str
    words: str
    document: str
    grid: Sequence[str]
    data: Sequence[str]

    @property
    def command(self) -> list[str]:
        """As a user would give it in the project's folder."""
        return ["cloister", "sweep", self.document, "--grid", *self.grid, "--seeds", str(SEEDS), *self.data]

    @property
    def shown(self) -> str:
        """... on lines that fit a page."""
        words = map(shlex.quote, self.command)
        return textwrap.fill(" ".join(words), WIDTH - 2, break_on_hyphens=False, subsequent_indent="    ").replace(
            "\n", " \\\n"
        )


STUDIES = (
    Study(
        name="digits-rows",
        title="Digits, each row protected",
        words="A hundred clients, each with 18 images on average, most of them of a few digits. Each client adds its "
        "own noise, so that the server need not be trusted. With privacy a step takes all rows of a client, without it "
        "batches of 8.",
        document="simulations/digits.yaml",
        grid=(f"privacy.row.epsilon={EPSILONS}", *PRIVATE_DIGITS, "model.hidden=[],[32]"),
        data=DIGITS,
    ),
    Study(
        name="digits-clients",
        title="Digits, each client protected as a whole",
        words="The same clients. The server, which is trusted here, adds noise once, to the sum of all updates.",
        document="simulations/digits.yaml",
        grid=(
            f"privacy.client.epsilon={EPSILONS}",
            "privacy.client.delta=1e-3",
            "privacy.client.clients=100",
            "privacy.client.clip=0.15",
            "privacy.evaluation.every=0",
            "training.rounds=40",
            "training.local_steps=8",
            "model.hidden=[],[32]",
        ),
        data=DIGITS,
    ),
    Study(
        name="hospitals-rows",
        title="Hospitals, each row protected",
        words="The four hospitals of the demo: 920 patients in all, of whom 55 % are ill.",
        document="simulations/heart/federation.yaml",
        grid=(f"privacy.row.epsilon={EPSILONS}", "privacy.evaluation.every=0", "model.hidden=[],[50]"),
        data=HOSPITALS,
    ),
    Study(
        name="hospitals-clients",
        title="Hospitals, each hospital protected as a whole",
        words="Noise that hides one hospital of four hides most of what the four say together. This unit is for "
        "federations of many clients; here one sees what it costs where there are few.",
        document="simulations/heart/federation.yaml",
        grid=(
            "privacy.row=null",
            f"privacy.client.epsilon={EPSILONS}",
            "privacy.client.delta=1e-3",
            "privacy.client.clients=4",
            "privacy.client.clip=0.1",
            "privacy.evaluation.every=0",
            "training.rounds=20",
            "training.local_steps=5",
            "training.learning_rate=0.2",
            "model.hidden=[],[50]",
        ),
        data=HOSPITALS,
    ),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        digits.write(folder / "digits.csv")
        (folder / "simulations").symlink_to(ROOT / "simulations")
        for study in STUDIES:
            run(study, folder)
            shutil.copyfile(folder / study.name / PICTURE, PAGE.parent / picture_of(study))
        rest = settings_of(PAGE.read_text()) if PAGE.exists() else ""
        PAGE.write_text("\n".join(page(folder)) + "\n" + rest)


def without_settings(text: str) -> str:
    """The page but for its last section, which is another program's."""
    return text.partition(f"\n{SETTINGS}\n")[0]


def settings_of(text: str) -> str:
    """That section, from the line on that begins it; nothing if the page has none."""
    return text.removeprefix(without_settings(text))


def run(study: Study, folder: Path) -> None:
    print(shlex.join(study.command), flush=True)
    command = [sys.executable, "-m", *study.command, "--device", "cpu", "--out", study.name]
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def picture_of(study: Study) -> str:
    return f"results-{study.name}.svg"


def page(folder: Path) -> Iterator[str]:
    yield "# Results"
    yield ""
    today = datetime.datetime.now(datetime.UTC)
    yield filled(WRITTEN.format(date=f"{today:%Y-%m-%d}", version=version("cloister")))
    yield ""
    yield filled(FIGURES.format(seeds=SEEDS))
    yield ""
    yield "The digits become a table by `python -m simulations.digits digits.csv`; scikit-learn has them."
    for study in STUDIES:
        yield ""
        yield f"## {study.title}"
        yield ""
        yield filled(study.words)
        yield ""
        yield "```console"
        yield f"$ {study.shown}"
        yield "```"
        yield ""
        yield (folder / study.name / TABLE).read_text().rstrip()
        yield ""
        yield f"![Accuracy over epsilon: {study.title.lower()}]({picture_of(study)})"


def filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    main()
