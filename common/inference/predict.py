"""A table in, a table of predictions out, block by block: neither need fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import polars as pl
from polars.io.plugins import register_io_source

from common import files
from common.data.encoding import EncodedBlock, RowEncoder, check_column
from common.data.encoding_report import EncodingReport
from common.data.tables import PARQUET, Table
from common.document.schema import Schema
from common.errors import ConfigError, OutputError
from common.inference.predictor import Predictor, frame_of, output_names

CSV = (".csv", ".tsv")


def predict(
    table: Table, predictor: Predictor, out: Path, *, keep: Sequence[str] = (), skip_bad: bool = False
) -> EncodingReport:
    """Writes the columns `keep` of a table, as they are, and beside them what the model makes of each row.

    Args:
        out: a .csv, .tsv or .parquet file. It appears whole, or not at all.
        skip_bad: rows with a cell that does not fit have no prediction; they are in the report.

    Returns:
        what encoding met.

    Raises:
        DataError: columns are not there, or (without `skip_bad`) cells do not fit; the first ten are quoted.
        ConfigError: `out` has another ending, or a column of `keep` is named like one that is written.
        OutputError: it cannot be written.
    """
    schema, keep = predictor.federation.data_schema, list(dict.fromkeys(keep))
    check_ending(out)
    _check_kept(table, schema, keep)
    encoder = RowEncoder(table, schema, with_target=False)

    def frames() -> Iterator[pl.DataFrame]:
        bad = False
        for rows in encoder.blocks():
            bad |= not rows.fits.all()
            if skip_bad or not bad:  # else all that is still wanted is which other cells do not fit
                yield _predicted(rows, predictor, schema, keep)
        encoder.end(leave_out=skip_bad)

    try:
        with files.replacing(out) as file:
            if out.suffix.lower() in PARQUET:
                _write_parquet(frames(), file)
            else:
                _write_csv(frames(), file, "\t" if out.suffix.lower() == ".tsv" else ",")
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OutputError(f"{out}: cannot be written: {reason}; nothing is left of it") from error
    return encoder.report


def check_ending(out: Path) -> None:
    """Raises `ConfigError` for a file that is none of those that can be written."""
    if out.suffix.lower() not in (*CSV, *PARQUET):
        raise ConfigError([f"{out}: its name must end in one of {', '.join((*CSV, *PARQUET))}"])


def _check_kept(table: Table, schema: Schema, keep: Sequence[str]) -> None:
    for name in keep:
        check_column(table, name, asked=f"--keep {name}")
        if name in output_names(schema):
            raise ConfigError([f"--keep {name}: a column of predictions has this name; rename the table's"])


def _predicted(rows: EncodedBlock, predictor: Predictor, schema: Schema, keep: Sequence[str]) -> pl.DataFrame:
    made = frame_of(predictor.outputs(rows), schema, where=rows.fits)
    return pl.concat([rows.block.frame.select(keep), made], how="horizontal") if keep else made


def _write_csv(frames: Iterator[pl.DataFrame], file: BinaryIO, separator: str) -> None:
    header = True
    for frame in frames:
        frame.write_csv(file, include_header=header, separator=separator)
        header = False


def _write_parquet(frames: Iterator[pl.DataFrame], file: BinaryIO) -> None:
    first = next(frames, None)
    if first is None:
        return  # cells did not fit, and `frames` has said so

    def source(*_: object) -> Iterator[pl.DataFrame]:
        yield first
        yield from frames

    register_io_source(source, schema=first.schema, is_pure=True).sink_parquet(file)
