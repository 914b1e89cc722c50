"""`cloister audit`: is private training, on this machine, what it claims to be?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.verbs import JSONOption, app, print_told, verb

if TYPE_CHECKING:
    from client.training.audit import Check


@app.command()
@verb
def audit(
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the trials: less than a minute.")] = False,
    trials: Annotated[int | None, typer.Option(min=100, help="How many trials a question gets.")] = None,
    as_json: JSONOption = False,
) -> None:
    """Measure on this machine whether private training does what it claims, with made-up rows. Ends with 1 if not.

    Example: `cloister audit --trials 300`
    """
    from dataclasses import asdict

    import torch

    from client.training.audit import audit as measure
    from common.privacy import noise

    torch.set_num_threads(1)
    checks = measure(noise.secure, trials=trials or (6000 if quick else 30_000))
    print_told({"checks": [asdict(check) for check in checks]}, lines(checks), as_json=as_json)
    if not all(check.passed for check in checks):
        print(
            "error: a check failed. One audit in 500 does by chance: run it again. If it fails again, "
            "do not train with privacy here, and report it",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def lines(checks: list[Check]) -> list[str]:
    """A table for a person."""
    width = max(len(check.measured) for check in checks)
    claims = max(len(check.claimed) for check in checks)
    head = f"{'':<6} {'check':<13} {'measured':<{width}}  {'claimed':<{claims}}"
    out = [head.rstrip()]
    for check in checks:
        verdict = "ok" if check.passed else "FAILED"
        out.append(f"{verdict:<6} {check.name:<13} {check.measured:<{width}}  {check.claimed}")
    return out
