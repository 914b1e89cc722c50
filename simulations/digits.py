"""python -m simulations.digits OUT.csv: scikit-learn's bundled digits as a table, a row for each image.

1,797 images of 8 x 8 pixels, each a count from 0 to 16 of the 16 points that were inked, and the digit (Alpaydin and
Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998, CC BY 4.0; its test part).
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl


def table() -> pl.DataFrame:
    """The table: columns p00 to p77 (row and column of a pixel) and digit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = [f"p{row}{column}" for row in range(8) for column in range(8)]
    pixels = pl.DataFrame(digits.data.astype(int), schema=names, orient="row")
    return pixels.with_columns(pl.Series("digit", digits.target))


def write(path: Path) -> None:
    """Writes the table."""
    table().write_csv(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
