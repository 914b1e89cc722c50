"""python -m simulations.heating OUT.csv: a made-up table for regression, flats and the heat that each needs a year.

The demand, in kWh for a square metre and year, is

    230 - 1.2 x (year - 1900) - 45 if insulated + 25 if the flat has outer walls on three sides or more
        + 0.05 x (area - 80)^2 / 10 - 40 for a heat pump, + 10 for oil

and normal noise of deviation 15, between 5 and 400. So no model errs by less than 15 (root mean square), or 12.0 (mean
absolute error, 15 x sqrt(2 / pi)), on many rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl

NOISE = 15.0  # kWh / (m2 a)
ROWS = 2000


def table(rows: int = ROWS, *, seed: int = 0) -> pl.DataFrame:
    """So many flats: area (m2), year, walls (outer sides), insulated, source, demand (kWh / (m2 a))."""
    rng = np.random.default_rng([seed, 0x4EA7])
    area = np.clip(rng.lognormal(4.3, 0.35, rows), 20, 250).round()
    year = rng.integers(1900, 2026, rows)
    walls = rng.choice([1, 2, 3, 4], rows, p=[0.2, 0.45, 0.2, 0.15])
    insulated = rng.random(rows) < 0.2 + 0.6 * (year - 1900) / 125
    source = np.where(
        year > 2005, rng.choice(["gas", "heat pump", "district"], rows), rng.choice(["gas", "oil", "district"], rows)
    )
    demand = 230 - 1.2 * (year - 1900) - 45 * insulated + 25 * (walls >= 3) + 0.005 * (area - 80) ** 2
    demand += 10 * (source == "oil") - 40 * (source == "heat pump") + NOISE * rng.normal(size=rows)
    return pl.DataFrame(
        {
            "area": area.astype(int),
            "year": year,
            "walls": walls,
            "insulated": np.where(insulated, "yes", "no"),
            "source": source,
            "demand": np.clip(demand, 5, 400).round(1),
        }
    )


def write(path: Path) -> None:
    """Writes the table."""
    table().write_csv(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
