"""The client with a clock around its training: `cloister join` when run, and an app for Flower's runtimes.

The seconds of each round's training are appended, a line each, to the file that the environment names.
"""

from __future__ import annotations

import os
import runpy
import time
from typing import Any

from client.app import app  # noqa: F401  for Flower's runtimes
from client.training import plain

VARIABLE = "CLOISTER_BENCHMARK_TIMES"

_fit = plain.fit


def _timed(*arguments: Any, **settings: Any) -> Any:
    started = time.perf_counter()
    result = _fit(*arguments, **settings)
    seconds = time.perf_counter() - started
    with open(os.environ[VARIABLE], "a") as file:
        file.write(f"{seconds}\n")
    return result


plain.fit = _timed

if __name__ == "__main__":
    runpy.run_module("client", run_name="__main__")
