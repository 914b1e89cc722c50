"""The command line: one file for each verb, which may import any package; nothing imports this one.

What a verb needs is imported when it runs, so that help is quick.
"""
# ruff: noqa: F401, I001
# Each of these is imported for what it does: it adds its verbs, in the order in which help shows them.

import sys
from io import TextIOWrapper

from cloister import demo, init, serve, status, join, fetch, simulate, sweep
from cloister import report, track, predict, evaluate, explain, personalise, export, compress
from cloister import check, doctor, audit, budget, plan, privacy, schema, certs
from cloister.verbs import app, put_examples_last

__all__ = ["app", "main"]


put_examples_last(app)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter of a table's shows another for it
    app()
