"""`cloister compress`: a smaller model that does nearly the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.models import ForceOption, ModelArgument, TargetOption
from cloister.verbs import DecimalOption, EncodingOption, JSONOption, QuietOption, app, file_format, verb

if TYPE_CHECKING:
    from common.inference.compression.candidates import Measured
    from common.inference.compression.public_rows import PublicRows

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(|b|kb|mb)")
UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1_000_000}


@app.command()
@verb
def compress(
    model: ModelArgument,
    target_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Choose the best of at most so many bytes, as 50kB [default: see above]."),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Public rows to train on, without targets [default: made up from the schema].")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="A table with targets to choose by.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="What to write [default: NAME.onnx].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of made-up rows, first weights and batches.")] = 0,
    force: ForceOption = False,
    as_json: JSONOption = False,
    target: TargetOption = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    quiet: QuietOption = False,
) -> None:
    """Try smaller models that do as a finished one does, and write the one that suits as an ONNX file.

    Example: `cloister compress runs/heart --target-size 50kB -o small.onnx`

    It is pruned, distilled into fewer units, and rounded to int8. Training sees what the model itself puts out for rows
    that are public or made up, so it costs no privacy. Without --target-size the smallest is written that loses no more
    than 1 point of accuracy (of numbers: 1 % of the error), or without --table differs from the model in no more than
    1 % of rows.
    """
    import json

    from cloister import exported, models
    from cloister.terminal import progress_console
    from common.errors import ConfigError, ModelError

    limit = None if target_size is None else bytes_of(target_size)
    saved = models.load(model, target)
    path = out or Path(f"{models.named(saved)}.onnx")
    if path.suffix.lower() != ".onnx":
        raise ConfigError([f"{path}: its name must end in .onnx"])
    example = path.with_name(f"{path.stem}_onnx.py")
    given = tuple(file for file in (rows, table) if file is not None)
    for file in (path, example):
        models.check_out(file, force=force, inputs=(model, *given))
    models.needs("export", "onnx", "onnxruntime")
    from common.data import tables
    from common.document.schema import NumericTarget
    from common.inference.compression import public_rows
    from common.inference.compression.candidates import candidates, choose, measure, predictor_of, shell
    from common.inference.onnx_predictor import OnnxPredictor
    from common.inference.probes import compare
    from common.text import in_bytes

    schema, form = saved.federation.data_schema, file_format(encoding, decimal)
    scored = None if table is None else tables.read(table, schema, form)
    if rows is None:
        public = public_rows.generated(schema, seed=seed)
    else:
        public = public_rows.of_table(tables.read(rows, schema, form, with_target=False), schema, seed=seed)
    with progress_console(quiet).status("") as live:
        tried = []
        for candidate in candidates(saved, public, seed=seed, judged=scored is not None):
            tried.append(candidate)
            live.update(f"tried {len(tried)}: {candidate.name}")
        live.update("measuring them")
        measured = measure(tried, public, scored)
    chosen = choose(measured, target_size=limit)
    if chosen is not None:
        agreement = compare(predictor_of(saved, chosen.candidate), OnnxPredictor(chosen.candidate.data, str(path)))
        if not agreement.largest <= exported.TOLERANCE:
            raise ModelError(f"{path}: not written: it differs from what was made by {agreement.largest:.2g}")
        exported.write(path, chosen.candidate.data, example, "example_onnx.py")
    number = isinstance(schema.target, NumericTarget)
    lines = basis(public, rows, table, number=number)
    if "personal" in saved.privacy:
        lines.append("the original was made of its owner's rows without noise: what comes of it can reveal them, too")
    if chosen is measured[0] and limit is not None:
        lines.append(f"the original itself is no larger than {in_bytes(limit)}: nothing was compressed")
    if as_json:
        told = [m.to_json() for m in measured]
        name = None if chosen is None else chosen.candidate.name
        written = None if chosen is None else str(path)
        print(json.dumps({"models": told, "chosen": name, "written": written, "basis": lines}, indent=2))
    else:
        if chosen is not None:
            lines.append(
                f"{path}: {exported.size(path)}, {chosen.candidate.name}; `python {example} {path} TABLE.csv` uses it"
            )
        _show(measured, chosen, lines, number=number)
    if chosen is None:
        least = min(measured, key=lambda m: m.size)
        rest = shell(saved, tried[0])
        raise ConfigError(
            [
                f"--target-size {target_size}: nothing is written: the smallest found is {least.candidate.name}, of "
                f"{in_bytes(least.size)}; encoding, document and privacy statement alone take about "
                f"{in_bytes(rest)}"
            ]
        )


def bytes_of(text: str) -> int:
    """`50kB`, `2MB` or `50000` in bytes. Raises `ConfigError`."""
    from common.errors import ConfigError

    found = SIZE.fullmatch(text.strip().lower())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise ConfigError([f"--target-size: must be bytes, kB or MB, as in 50000, 50kB or 2MB (got {text})"])
    return size


def basis(public: PublicRows, rows: Path | None, table: Path | None, *, number: bool) -> list[str]:
    """What the figures are of, and what holds for privacy."""
    held = f"{public.apart.most_rows:,} more of them"
    lines = [
        f"trained on what the original puts out for {public.source}: that costs no privacy"
        + ("" if rows is None else f", as long as {rows} is public"),
        f"off by: the mean distance to the original on {held}, as a share of the target's range"
        if number
        else f"same: the share of {held} for which a model says what the original does",
    ]
    if table is None:
        return [*lines, "to agree with the original on such rows is not to be right; --table says how often it is"]
    figure = "error: the mean absolute error" if number else "right: accuracy"
    return [*lines, f"{figure} on {table}, by which is chosen: figures and choice tell a little of its rows"]


def _show(measured: Sequence[Measured], chosen: Measured | None, lines: Sequence[str], *, number: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # else wider than a terminal of 80
    table.add_column("model", no_wrap=True)
    figures = {"accuracy": "right", "mae": "error"}
    headings = ["size", "kept", "1 row", "1000 rows", *(figures[name] for name in measured[0].scores)]
    for heading in (*headings, "off by" if number else "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in measured:
        mark = "> " if each is chosen else "  "
        table.add_row(mark + each.candidate.name, *_cells(each, number=number), style="bold" if each is chosen else "")
    console = Console()
    console.print(table, highlight=False)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(each: Measured, *, number: bool) -> list[str]:
    from common.text import in_bytes

    scores = [f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.4g}" for name, value in each.scores.items()]
    return [
        in_bytes(each.size),
        f"{each.candidate.parameters:,}",
        f"{1e6 * each.row_s:.0f} µs",
        f"{1e3 * each.thousand_s:.2f} ms",
        *scores,
        f"{100 * (each.apart if number else 1 - each.apart):.1f} %",
    ]
