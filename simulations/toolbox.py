"""python -m simulations.toolbox [NAME...]: what each setting of the toolbox does to accuracy, by `cloister sweep`.

Writes the tables of docs/toolbox.md, or only those of the trials that are named; the words around them are written by
hand. Each table stands between two lines, `<!-- figures: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.logs import quiet_flower
from simulations import HEART, digits, fairness, personal, smaller
from simulations.results import DIGITS, HOSPITALS, PRIVATE_DIGITS, ROOT, SEEDS
from simulations.sweeps.report import RUNS, gained, markdown

PAGE = ROOT / "docs" / "toolbox.md"
EPSILON = "privacy.row.epsilon"
PUBLIC_DIGITS = 300  # rows

# Columns of the hospitals' files that are no features, and that most rows lack.
SLOPE = "{name: slope, classes: [1, 2, 3], missing: ['?'], optional: true, weight: 0.3}"
VESSELS = "{name: ca, bounds: [0, 3], missing: ['?', -9], optional: true, weight: 0.3}"

DIGEST = "f" * 64  # in place of the digest that a first model turns out to have
Seeds = list[float]  # accuracy, in %, of one seed after another


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where a setting is tried: a document, its data, and settings that go with each epsilon."""

    name: str
    document: str
    epsilons: str
    grid: Sequence[str]
    data: Sequence[str]
    public: Sequence[str] = ()  # rows that a first model is trained on, for transfer


TABLES = (
    Table(
        name="digits",
        document="simulations/digits.yaml",
        epsilons="inf,4",
        grid=(*PRIVATE_DIGITS, "model.hidden=[]"),
        data=DIGITS,
    ),
    Table(
        name="hospitals",
        document="simulations/heart/federation.yaml",
        epsilons="inf,1,0.25",
        grid=("privacy.evaluation.every=0",),
        data=HOSPITALS,
    ),
    # For several targets: a column that says which digits are even.
    Table(
        name="digits with evenness",
        document="simulations/digits.yaml",
        epsilons="inf,4",
        grid=(*PRIVATE_DIGITS, "model.hidden=[32]"),
        data=("--data", "even.csv", "--clients", "100", "--partition", "dirichlet:0.5"),
    ),
    # For transfer: a first model is trained without privacy on what is public, and others go on from it.
    Table(
        name="other digits",
        document="simulations/digits.yaml",
        epsilons="inf,4",
        grid=(*PRIVATE_DIGITS, "model.hidden=[32]"),
        data=("--data", "private.csv", "--clients", "80", "--partition", "dirichlet:0.5"),
        public=("--data", "public.csv", "--clients", "1", "--set", "model.hidden=[32]"),
    ),
    Table(
        name="three hospitals",
        document="simulations/heart/federation.yaml",
        epsilons="inf,1,0.25",
        grid=("privacy.evaluation.every=0", "strategy.min_clients=3"),
        data=("--data-dir", "others"),
        public=("--data", "simulations/heart/cleveland.data", "--clients", "1"),
    ),
)
WITHOUT_PRIVACY = ("privacy.row=null", "privacy.evaluation.noise=0", "strategy.min_clients=1")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Settings beside the documents as they are, which come first: `vary` is what `--grid` takes."""

    name: str
    vary: str
    fixed: Sequence[str] = ()  # for all of them, also in place of a table's own
    tables: Sequence[str] = ("digits", "hospitals")
    epsilons: str = ""  # in place of the tables'

    def grid(self, table: Table) -> list[str]:
        """What `--grid` is given."""
        keys = {setting.partition("=")[0] for setting in self.fixed}
        own = [setting for setting in table.grid if setting.partition("=")[0] not in keys]
        return [f"{EPSILON}={self.epsilons or table.epsilons}", self.vary, *self.fixed, *own]


TRIALS = (
    Trial(
        name="schedule",
        vary="training.schedule=null,{name: cosine},{name: exponential, factor: 0.9},{name: step, every: 10},"
        "{name: constant, warmup: 5}",
    ),
    Trial(
        name="schedule-fast",
        vary="training.schedule=null,{name: cosine}",
        fixed=("training.learning_rate=2.0",),
    ),
    Trial(
        name="plateau",
        vary="training.schedule=null,{name: plateau, metric: accuracy, patience: 3}",
        fixed=("privacy.evaluation.every=3",),
        tables=("hospitals",),  # whose document has noise for evaluations, of which ten cost less than epsilon 4
        epsilons="inf,4",
    ),
    Trial(name="server-schedule", vary="strategy.schedule=null,{name: cosine}"),
    Trial(
        name="augmentation",
        vary="training.augmentation=null,{jitter: 0.1},{drop: 0.1},{jitter: 0.1, drop: 0.1, copies: 4}",
    ),
    Trial(
        name="mixup",
        vary="training.augmentation=null,{mixup: 0.2},{mixup: 1.0}",
        epsilons="inf",
    ),
    Trial(
        name="image",
        vary="training.augmentation=null,{shift: 1},{shift: 1, copies: 4},{shift: 1, copies: 16}",
        fixed=("schema.image={first: p00, height: 8, width: 8}", "model.hidden=[32]"),
        tables=("digits",),
    ),
    Trial(
        name="transfer",
        vary=f"start=null,{{sha256: {DIGEST}}},{{sha256: {DIGEST}, frozen: [0]}},{{sha256: {DIGEST}, new_head: true}}",
        tables=("other digits", "three hospitals"),
    ),
    Trial(
        name="targets-digits",
        vary="schema.also=[],[{name: even, classes: [0, 1], weight: 0.3}],[{name: even, classes: [0, 1]}]",
        tables=("digits with evenness",),
    ),
    Trial(
        name="targets-hospitals",
        vary=f"schema.also=[],[{SLOPE}],[{SLOPE},{VESSELS}]",
        tables=("hospitals",),
    ),
    Trial(name="average", vary="strategy.average=null,0.8,0.9,0.95"),
)


def main(names: Sequence[str]) -> None:
    known: dict[str, Callable[[Path], Iterator[str]]] = {trial.name: partial(figures, trial) for trial in TRIALS}
    known |= {"personal": personal.figures, "fairness": fairness.figures, "groups": fairness.groups}
    known["compression"] = smaller.figures
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: no trial {', '.join(unknown)}; there are {', '.join(known)}")
    quiet_flower()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        prepare(folder)
        for name in names or known:
            text = "\n".join(known[name](folder))
            PAGE.write_text(placed(PAGE.read_text(), name, text))


def prepare(folder: Path) -> None:
    """The tables, and those parts of them that are public for transfer."""
    digits.write(folder / "digits.csv")
    (folder / "simulations").symlink_to(ROOT / "simulations")
    head, *rows = (folder / "digits.csv").read_text().splitlines(keepends=True)
    with_even = [f"{1 - int(row.rpartition(',')[2]) % 2},{row}" for row in rows]
    (folder / "even.csv").write_text("".join([f"even,{head}", *with_even]))
    (folder / "public.csv").write_text(head + "".join(rows[:PUBLIC_DIGITS]))
    (folder / "private.csv").write_text(head + "".join(rows[PUBLIC_DIGITS:]))
    (folder / "others").mkdir()
    for table in HEART.glob("*.data"):
        if "cleveland" not in table.name:
            (folder / "others" / table.name).symlink_to(table)


def placed(page: str, name: str, text: str) -> str:
    """The page with a trial's table put in its place. Raises LookupError if it has none."""
    pattern = re.compile(rf"(<!-- figures: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise LookupError(f"{PAGE}: has no place for the figures of {name}")
    return pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def figures(trial: Trial, folder: Path) -> Iterator[str]:
    columns: dict[str, dict[str, Seeds]] = {}
    for table in TABLES:
        if table.name in trial.tables:
            columns |= swept(trial, table, folder)
    settings = list(next(iter(columns.values())))
    key = trial.vary.partition("=")[0]
    rows = []
    for setting in settings:
        cells = [gained(of[setting], of[settings[0]], " %") for of in columns.values()]
        rows.append([f"`{setting}`", *cells])
    yield ""
    yield from markdown([f"`{key}`", *columns], rows)
    yield ""


def swept(trial: Trial, table: Table, folder: Path) -> dict[str, dict[str, Seeds]]:
    """{table and epsilon: {setting: each seed's accuracy}}."""
    out = f"{trial.name}-{table.name}".replace(" ", "-")
    digest, more = DIGEST, list[str]()
    if table.public:
        changes = [word for setting in WITHOUT_PRIVACY for word in ("--set", setting)]
        first = f"{out}-first"
        run(
            folder,
            "simulate",
            table.document,
            *table.public,
            *changes,
            "--no-report",
            "--device",
            "cpu",
            "--out",
            first,
        )
        digest = hashlib.sha256((folder / first / "model.safetensors").read_bytes()).hexdigest()
        more = ["--start-from", first]
    grid = [setting.replace(DIGEST, digest) for setting in trial.grid(table)]
    how = ["--seeds", str(SEEDS), *table.data, *more, "--device", "cpu", "--out", out]
    run(folder, "sweep", table.document, "--grid", *grid, *how)
    found: dict[str, dict[str, Seeds]] = {}
    with (folder / out / RUNS).open(newline="") as file:
        for row in csv.DictReader(file):
            if row["error"]:
                sys.exit(f"error: {out}: {row['error']}")
            epsilon = "no privacy" if row[EPSILON] == "inf" else f"epsilon {row[EPSILON]}"
            column = found.setdefault(f"{table.name}, {epsilon}", {})
            setting = column.setdefault(row[trial.vary.partition("=")[0]].replace(digest, "..."), [])
            setting.append(100 * float(row["accuracy"]))  # runs of a point come in the order of their seeds
    return found


def run(folder: Path, *arguments: str) -> None:
    """A command, as a user would give it there."""
    command = ["cloister", *arguments]
    print(shlex.join(command), flush=True)
    subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


if __name__ == "__main__":
    main(sys.argv[1:])
