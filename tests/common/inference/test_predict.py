"""Predictions are the model's, row by row, whatever the file, its blocks and the rows that cannot be read."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from common.data import tables
from common.errors import ConfigError, DataError, OutputError
from common.inference.predict import predict
from common.inference.predictor import TorchPredictor
from common.inference.saved import SavedModel
from tests.common.inference.oracle import logits, softmax
from tests.support import ROOT, saved_model, table

ROWS = [(0.5, -0.25, "red"), (-3.0, 1.0, "blue"), (0.0, 0.0, "green")]
NUMBER = {"schema__target": {"name": "y", "bounds": [100, 300]}, "training__loss": "mse"}


def run(model: SavedModel, path: Path, out: Path, **how: object) -> tuple[pl.DataFrame, object]:
    given = tables.read(path, model.federation.data_schema, with_target=False)
    report = predict(given, TorchPredictor(model), out, **how)  # type: ignore[arg-type]
    return (pl.read_parquet(out) if out.suffix == ".parquet" else pl.read_csv(out)), report


def written(folder: Path, rows: list[tuple[object, ...]] = ROWS, name: str = "new.csv") -> Path:  # type: ignore[assignment]
    path = folder / name
    path.write_text("a,b,c\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def test_probabilities_are_the_softmax_of_what_the_layers_give(tmp_path):
    model = saved_model()
    made, _ = run(model, written(tmp_path), tmp_path / "out.csv")
    assert made.columns == ["prediction", "probability_0", "probability_1"]
    for row, given in zip(made.iter_rows(), ROWS, strict=True):
        expected = softmax(logits(model, *given))
        assert row[1:] == pytest.approx(tuple(expected), abs=1e-6)
        assert row[0] == expected.argmax()


def test_one_output_gives_the_probability_of_the_second_class(tmp_path):
    model = saved_model(training__loss="binary_cross_entropy")
    made, _ = run(model, written(tmp_path), tmp_path / "out.csv")
    for row, given in zip(made.iter_rows(), ROWS, strict=True):
        second = 1 / (1 + math.exp(-logits(model, *given)[0]))
        assert row[1:] == pytest.approx((1 - second, second), abs=1e-6)
        assert row[0] == int(second > 0.5)


def test_a_number_comes_in_the_units_of_its_target_within_its_bounds(tmp_path):
    model = saved_model(**NUMBER)
    made, _ = run(model, written(tmp_path), tmp_path / "out.csv")
    assert made.columns == ["prediction"]
    expected = [100 + 200 * min(max(logits(model, *row)[0], 0), 1) for row in ROWS]
    assert made["prediction"].to_list() == pytest.approx(expected, abs=1e-4)
    model.weights["layers.1.bias"][:] = 7  # far above the upper bound
    made, _ = run(model, written(tmp_path), tmp_path / "out2.csv")
    assert made["prediction"].to_list() == [300.0] * 3


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_small_blocks_large_blocks_and_formats_give_the_same_rows(tmp_path, monkeypatch, ending):
    model, frame = saved_model(), table(3000).with_row_index("id")
    frame.write_parquet(tmp_path / "new.parquet")
    given, out = tmp_path / "new.parquet", tmp_path / f"out{ending}"

    def read(path: Path) -> pl.DataFrame:
        return (
            pl.read_parquet(path)
            if ending == ".parquet"
            else pl.read_csv(path, separator="\t" if "t" in ending else ",")
        )

    run_once = tables.read(given, model.federation.data_schema, with_target=False)
    predict(run_once, TorchPredictor(model), out, keep=["id", "c"])
    monkeypatch.setattr(tables, "BLOCK_CELLS", 500)
    by_blocks = tables.read(given, model.federation.data_schema, with_target=False)
    predict(by_blocks, TorchPredictor(model), tmp_path / f"parts{ending}", keep=["id", "c"])
    whole, parts = read(out), read(tmp_path / f"parts{ending}")
    assert whole.columns == ["id", "c", "prediction", "probability_0", "probability_1"]
    assert whole["id"].to_list() == list(range(3000))
    assert whole["c"].to_list() == frame["c"].to_list()
    assert_frame_equal(whole, parts)


def test_bad_cells_are_told_with_their_lines_and_nothing_is_written(tmp_path):
    path = written(tmp_path, [*ROWS, ("x", 0, "red"), (0, "", "red")])
    with pytest.raises(DataError) as raised:
        run(saved_model(), path, tmp_path / "out.csv")
    assert "2 cells do not fit" in str(raised.value)
    assert "line 5: a: expected a number, found 'x'" in str(raised.value)
    assert "line 6: b: is empty" in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["new.csv"]


def test_a_bad_table_leaves_a_parquet_file_that_was_there_as_it_was(tmp_path):
    (tmp_path / "out.parquet").write_bytes(b"old")
    with pytest.raises(DataError, match="1 cell does not fit"):
        run(saved_model(), written(tmp_path, [("x", 0, "red")]), tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_skipped_rows_keep_their_place_without_a_prediction(tmp_path, ending):
    path = written(tmp_path, [ROWS[0], ("x", 0, "red"), ROWS[2]])
    made, report = run(saved_model(), path, tmp_path / f"out{ending}", skip_bad=True, keep=["a"])
    assert made["a"].to_list() == ["0.5", "x", "0.0"]
    assert made["prediction"].is_null().to_list() == [False, True, False]
    assert made["probability_1"].is_null().to_list() == [False, True, False]
    assert report.left_out == 1  # type: ignore[attr-defined]
    (line,) = report.lines(use="left empty")  # type: ignore[attr-defined]
    assert line == "left empty: 1 row that does not fit the schema: line 3: a: expected a number, found 'x'"


def test_a_table_without_rows_gives_one_without_rows(tmp_path):
    made, _ = run(saved_model(), written(tmp_path, []), tmp_path / "out.csv")
    assert made.height == 0 and made.columns == ["prediction", "probability_0", "probability_1"]
    made, _ = run(saved_model(), written(tmp_path, []), tmp_path / "out.parquet")
    assert made.height == 0 and made.columns == ["prediction", "probability_0", "probability_1"]


def test_a_file_without_a_header_may_lack_the_target_or_have_it(tmp_path):
    model = saved_model(schema__columns=["a", "y", "b", "c"])
    (tmp_path / "without.csv").write_text("0.5,-0.25,red\n0,0,green\n")
    (tmp_path / "with.csv").write_text("0.5,1,-0.25,red\n0,0,0,green\n")
    one, _ = run(model, tmp_path / "without.csv", tmp_path / "one.csv")
    notes = [
        tables.read(tmp_path / name, model.federation.data_schema, with_target=False).note
        for name in ("without.csv", "with.csv")
    ]
    assert "it is read as one that lacks the target, y" in notes[0] and notes[1] == ""
    other, _ = run(model, tmp_path / "with.csv", tmp_path / "other.csv")
    assert one.rows() == other.rows()
    assert one.row(0)[1:] == pytest.approx(tuple(softmax(logits(model, 0.5, -0.25, "red"))), abs=1e-6)


@pytest.mark.parametrize(
    "keep, error, message",
    [
        (["d"], DataError, "--keep d: the table has no column d"),
        (["A"], DataError, r"--keep A: the table has no column A \(did you mean a\?\)"),
        (["prediction"], ConfigError, "a column of predictions has this name"),
    ],
)
def test_a_column_that_cannot_be_kept_is_said_before_anything_is_written(tmp_path, keep, error, message):
    path = tmp_path / "new.csv"
    path.write_text("a,b,c,prediction\n0,0,red,1\n")
    with pytest.raises(error, match=message):
        run(saved_model(), path, tmp_path / "out.csv", keep=keep)
    assert not (tmp_path / "out.csv").exists()


def test_another_table_is_said_and_another_ending_too(tmp_path):
    (tmp_path / "new.csv").write_text("a,bb,c\n0,0,red\n")
    with pytest.raises(DataError, match=r"the table lacks b \(did you mean bb\?\)"):
        run(saved_model(), tmp_path / "new.csv", tmp_path / "out.csv")
    with pytest.raises(ConfigError, match=r"out.xlsx: its name must end in one of .csv, .tsv, .parquet, .pq"):
        run(saved_model(), written(tmp_path), tmp_path / "out.xlsx")


FULL = """
import resource, signal, sys
from pathlib import Path
from common.data import tables
from common.errors import OutputError
from common.inference.predict import predict
from common.inference.predictor import TorchPredictor
from tests.support import saved_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = saved_model()
predictor = TorchPredictor(model)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
table = tables.read(Path("new.parquet"), model.federation.data_schema, with_target=False)
try:
    predict(table, predictor, Path(sys.argv[1]))
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_a_full_disk_leaves_no_half_file(tmp_path, name):
    table(20_000).write_parquet(tmp_path / "new.parquet")
    done = subprocess.run(
        [sys.executable, "-c", FULL, name],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{name}: cannot be written: " in done.stdout and "nothing is left of it" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["new.parquet"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        run(saved_model(), written(tmp_path), tmp_path / "none" / "out.csv")
