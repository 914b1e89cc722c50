"""What the wire costs, beside Flower's own processes where they can do the same. All on loopback, nothing downloaded.

    latency   a round of two real clients beside their training, and the same apps under SuperLink and SuperNodes
    load      thousands of sessions: the server's memory, and the time of a round
    memory    the mean of a thousand replies: Flower's FedAvg, and our running sum
    bytes     what a round sends beside the bare tensors

    OMP_NUM_THREADS=1 python -m simulations.benchmarks.wire [PART...] [-v]

All parts by default; `-v` shows what the processes of the benchmark log. Every process is ended with it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from simulations.benchmarks import wire_bytes, wire_latency, wire_load, wire_memory

PARTS: dict[str, Callable[[], None]] = {
    "latency": wire_latency.main,
    "load": wire_load.main,
    "memory": wire_memory.main,
    "bytes": wire_bytes.main,
}


def main() -> int:
    chosen = [word for word in sys.argv[1:] if word != "-v"]
    if unknown := [word for word in chosen if word not in PARTS]:
        print(f"error: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in chosen or PARTS:
            PARTS[name]()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
