"""Time and disk of a charge: 1,000 of them on a ledger on disk.

python -m simulations.benchmarks.charge [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from client.account.entries import Entry
from client.account.ledger import Ledger

CHARGES = 1000


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        path = Path(folder) / "table.ledger"
        ledger = Ledger(path)
        empty, times = path.stat().st_size, []
        one = Entry(
            part="train",
            split=64 * "s",
            run="heart-disease-293ac3667e97aa68",
            task="heart-disease-293ac3667e97aa68/train/1",
            attempt=1,
            mechanism="gaussian",
            federation=64 * "f",
            content=64 * "c",
            noise_multiplier=8.0,
            sampling_rate=1.0,
            steps=1,
        )
        for _ in range(CHARGES):
            started = time.perf_counter()
            ledger.charge(one)
            times.append(time.perf_counter() - started)
        size = path.stat().st_size - empty
        started = time.perf_counter()
        ledger.verify()
        verified = time.perf_counter() - started
        ledger.close()
    print(f"a charge: median {1e3 * median(times):.2f} ms, 95 % within {1e3 * quantiles(times, n=20)[-1]:.2f} ms")
    print(f"on disk: {size / CHARGES:.0f} bytes a charge; verifying {CHARGES}: {1e3 * verified:.1f} ms")


if __name__ == "__main__":
    main()
