"""`cloister export`: a finished model as one file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cloister.models import ForceOption, ModelArgument, TargetOption
from cloister.verbs import DecimalOption, EncodingOption, app, file_format, verb

if TYPE_CHECKING:
    from common.data.tables import FileFormat
    from common.inference.predictor import Predictor


@app.command()
@verb
def export(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write [default: NAME.onnx or NAME.pt].")
    ] = None,
    format: Annotated[
        Literal["onnx", "torch"], typer.Option(help="onnx: for any runtime, encoding inside; torch: a state dict.")
    ] = "onnx",
    quantize: Annotated[Literal["int8"] | None, typer.Option(help="Weights of ONNX in int8.")] = None,
    table: Annotated[Path | None, typer.Option(help="With --quantize: a table to say what it costs on.")] = None,
    force: ForceOption = False,
    target: TargetOption = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
) -> None:
    """Write a finished model as one file that needs no Cloister, and a short program beside it that uses it.

    Example: `cloister export runs/heart -o heart.onnx`

    An ONNX file takes rows as they stand in a table and gives classes with their probabilities, or numbers in the
    target's units. It carries the schema and the privacy statement, and is checked against `cloister predict`.
    """
    from cloister import exported, models
    from common.errors import ConfigError, ModelError

    if quantize and format == "torch":
        raise ConfigError(["--quantize: is for --format onnx"])
    if table is not None and not quantize:
        raise ConfigError(["--table: is for --quantize, which changes what the model predicts"])
    saved = models.load(model, target)
    ending = ".onnx" if format == "onnx" else ".pt"
    path = out or Path(f"{models.named(saved)}{ending}")
    if path.suffix.lower() != ending:
        raise ConfigError([f"{path}: its name must end in {ending}"])
    example = path.with_name(f"{path.stem}_{format}.py")
    for file in (path, example):
        models.check_out(file, force=force)
    if format == "torch":
        from common.inference.torch_file import to_torch

        exported.write(path, to_torch(saved), example, "example_torch.py")
        print(f"{path}: {exported.size(path)}; `python {example} {path}` uses it")
        return
    models.needs("export", "onnx", "onnxruntime")
    from common.inference.onnx_model import quantized, to_onnx
    from common.inference.onnx_predictor import OnnxPredictor
    from common.inference.predictor import TorchPredictor
    from common.inference.probes import compare

    exact, data = TorchPredictor(saved), to_onnx(saved)
    agreement = compare(exact, OnnxPredictor(data, str(path)))
    if not agreement.largest <= exported.TOLERANCE:
        raise ModelError(f"{path}: not written: it differs from `cloister predict` by {agreement.largest:.2g}")
    lines = [f"checked against predict on {agreement.rows:,} made-up rows: at most {agreement.largest:.1g} apart"]
    if quantize:
        whole, data = len(data), quantized(data)
        packed = OnnxPredictor(data, str(path))
        agreement = compare(exact, packed)
        lines += [
            f"int8: {len(data):,} bytes, in float32 {whole:,}; on {agreement.rows:,} made-up rows at most "
            f"{agreement.largest:.2g} apart, {100 * agreement.same:.1f} % with the same class"
        ]
        if table is not None:
            lines.append(_costs(exact, packed, table, file_format(encoding, decimal)))
    exported.write(path, data, example, "example_onnx.py")
    print("\n".join([f"{path}: {exported.size(path)}; `python {example} {path} TABLE.csv` uses it", *lines]))


def _costs(exact: Predictor, packed: Predictor, table: Path, form: FileFormat) -> str:
    """What int8 costs on a table."""
    from common.data import tables
    from common.inference.evaluation import evaluate

    given = tables.read(table, exact.federation.data_schema, form)
    before, after = (evaluate(given, predictor).to_json() for predictor in (exact, packed))
    if "accuracy" in before:
        return (
            f"{table}: accuracy {100 * after['accuracy']:.2f} %, in float32 {100 * before['accuracy']:.2f} %, of "
            f"{before['rows']:,} rows"
        )
    return (
        f"{table}: mean absolute error {after['mae']:.5g}, in float32 {before['mae']:.5g}, of {before['rows']:,} rows"
    )
