"""`cloister budget`: what a dataset's account has spent, on what, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cloister.verbs import JSONOption, app, print_told, verb


@app.command()
@verb
def budget(
    client: Annotated[Path, typer.Argument(metavar="CLIENT.YAML", help="The client file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the ledger's chain and its head.")] = False,
    head: Annotated[str | None, typer.Option(help="A head written down earlier, which must be in the ledger.")] = None,
    as_json: JSONOption = False,
) -> None:
    """What a dataset's privacy budget was spent on, and what is left. Writes nothing.

    Example: `cloister budget simulations/heart/cleveland.yaml --verify`
    """
    from client.account.balance import read_balance

    told = read_balance(client, verify=verify, head=head).describe()
    print_told(told, lines(told), as_json=as_json)


def lines(account: dict[str, Any]) -> list[str]:
    """`Account.describe` for a person. Runs have the names that servers gave them, in old ledgers unchecked."""
    from common.text import shown

    return [shown(line) for line in _lines(account)]


def _lines(account: dict[str, Any]) -> list[str]:
    out = [
        f"dataset {account['dataset']}: epsilon {account['epsilon']:g} at delta {account['delta']:g} bounds what a row "
        "may cost, for all federations together",
        f"spent   {account['spent']:.2f}   left {account['left']:.2f}",
    ]
    if account["refusals"]:
        out.append(f"documents that did not fit the table, and were told so: {account['refusals']}")
    if not account["runs"]:
        return [*out, "nothing was ever released"]
    if len(account["runs"]) > 1:
        out.append(
            "        (runs are chosen in the light of earlier ones: that costs other than the sum of those below)"
        )
    elif account["spent"]:
        out.append("        (counted at half of delta, because more runs may follow)")
    if account["exact"]:
        out.append(f"and {account['exact']} exact releases without privacy, which no epsilon bounds")
    for run in account["runs"]:
        out += ["", f"run {run['run']}, federation {run['federation'][:16]}...: " + _bound(run)]
        out.append(f"  {run['first']} to {run['last']}")
        for release in run["released"]:
            out.append(f"  {release['times']:>5} x {release['what']:<13} {_detail(release)}")
    chain = "; chain and head verified" if account["verified"] else "; --verify checks them"
    return [*out, "", f"{account['entries']} entries{chain}", f"head {account['head']}"]


def _bound(run: dict[str, Any]) -> str:
    if run["epsilon"] is None:
        return "no privacy"
    return f"at most epsilon {run['epsilon']:.2f}, all that was planned included"


def _detail(release: dict[str, Any]) -> str:
    """How a release was made private."""
    rows = f"of {release['part']} rows"
    if not release["private"]:
        return f"{rows}, without privacy"
    if "epsilon" in release:
        return f"{rows}, epsilon {release['epsilon']:.2f}"
    detail = f"{rows}, noise multiplier {release['noise_multiplier']:.3g}"
    if release["part"] == "train":
        detail += f", {release['steps']} steps at sampling rate {release['sampling_rate']:.3g}"
    return detail
