"""`cloister simulate`: files to a simulation."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from client.device import describe_device, resolve_device
from client.site import Site
from common.data.tables import AS_IT_SEEMS, FileFormat
from common.document import federation as federations
from common.errors import ConfigError, DataError
from common.logs import quiet_flower, tell
from server.folder.folder import RunFolder
from server.observers.scoring import HeldOut
from server.progress import ProgressDisplay
from simulations.engine import simulate, sites_from_files, sites_from_table, willing

MOST_TABLES = 10  # of which all is told; of more only what is hardly meant
MOST_LINES = 20


def simulate_files(
    document: Path,
    *,
    data: Path | None,
    data_dir: Path | None,
    generate: int | None,
    clients: int | None,
    partition: str,
    seed: int | None,
    device: str,
    out: Path | None,
    held_out: Path | None,
    console: Console,
    form: FileFormat = AS_IT_SEEMS,
) -> tuple[dict[str, Any], Path]:
    """Runs a simulation to its end. Returns what result.json holds, and the run folder.

    Raises:
        CloisterError: anything wrong with the document or the tables, before the run folder is made.
    """
    federation = federations.load(document)
    if seed is not None:
        training = federation.training.model_copy(update={"seed": seed})
        federation = federation.model_copy(update={"training": training})
    seed = federation.training.seed
    if sum(source is not None for source in (data, data_dir, generate)) != 1:
        raise ConfigError(["give exactly one of --data TABLE, --data-dir FOLDER and --generate ROWS"])
    where = resolve_device(device, exact=federation.privacy.row is not None)
    scorer = HeldOut(federation, held_out, form) if held_out else None
    if data_dir is not None:
        if clients is not None or partition != "iid":
            raise DataError("--data-dir has one client a file; --clients and --partition belong to --data")
        sites = sites_from_files(federation, data_dir, seed=seed, device=where, form=form)
    else:
        table = data if data is not None else generate
        assert table is not None
        sites = sites_from_table(federation, table, clients=clients, how=partition, seed=seed, device=where, form=form)
    quiet_flower()
    run = f"{federation.name}-{secrets.token_hex(8)}"
    sites, refused = willing(sites, run=run)
    for name, reason in refused.items():
        console.print(f"{name} is left out: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for line in _met(sites, one_table=data_dir is None) + (scorer.report.lines(of="held-out table") if scorer else []):
        tell(console, line)
    folder = RunFolder.create(federation, path=out)
    console.print(f"simulating {federation.name}: {len(sites)} clients on {describe_device(where)}", highlight=False)
    with ProgressDisplay(console, limits=federation.privacy.limits) as display:
        result = simulate(federation, sites, folder, run=run, observe=display, held_out=scorer)
    return result, folder.path


def _met(sites: Sequence[Site], *, one_table: bool) -> list[str]:
    """What encoding met in the tables, which are whoever simulates' own."""
    if one_table:
        return sites[0].dataset.report.lines()
    if len(sites) <= MOST_TABLES:
        return [line for site in sites for line in site.dataset.report.lines(of=site.name)]
    lines = [line for site in sites for line in site.dataset.report.warnings(of=site.name)]
    more = [f"and {len(lines) - MOST_LINES} more such lines"] if len(lines) > MOST_LINES else []
    return lines[:MOST_LINES] + more
