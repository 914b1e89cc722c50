"""The command line. One thin function a verb; what a verb needs is imported when it runs, so that help is quick."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Choice

if TYPE_CHECKING:
    from rich.console import Console

    from common.data.tables import FileFormat

app = typer.Typer(
    help="Federated learning for data that may not be shared: the data owner holds the privacy budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
schema_app = typer.Typer(help="Work on the schema of a federation.", no_args_is_help=True)
certs_app = typer.Typer(help="Make, list and revoke the certificates of a federation.", no_args_is_help=True)
app.add_typer(schema_app, name="schema")
app.add_typer(certs_app, name="certs")

FederationFile = Annotated[Path, typer.Argument(metavar="FEDERATION.YAML", help="The federation document.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder to make [default: a new one under runs/].")]
HeldOutOption = Annotated[Path | None, typer.Option(help="Table to score every round's model on, exactly.")]
EncodingOption = Annotated[str | None, typer.Option(help="Encoding of CSV that is not UTF-8, as windows-1252.")]
DecimalOption = Annotated[
    str | None, typer.Option(click_type=Choice([".", ","]), help="Decimal mark of CSV [default: , beside ; else .]")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
LogFormatOption = Annotated[str, typer.Option(click_type=Choice(["text", "json"]), help="What stderr carries.")]
JSONOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
CertsFolder = Annotated[Path, typer.Option("--folder", help="Where the authority and its certificates lie.")]
CertsDays = Annotated[int, typer.Option("--days", help="How long it is valid: 1 to 825 days.")]


def _verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turns our own errors into one clear line each; anything else is a bug and keeps its traceback."""

    @functools.wraps(function)
    def verb(*args: Any, **kwargs: Any) -> None:
        from common.errors import CloisterError, ConfigError
        from common.wire.text import shown_lines

        try:
            function(*args, **kwargs)
        except CloisterError as error:
            for line in error.problems if isinstance(error, ConfigError) else [str(error)]:
                print(f"error: {shown_lines(line)}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None

    return verb


@app.command()
@_verb
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its files.")] = Path("cloister-demo"),
) -> None:
    """Four hospitals train one model with differential privacy: a real server and four real clients, here.

    Example: `cloister demo`
    """
    from simulations.demo import run_demo

    run_demo(folder)


@app.command()
@_verb
def serve(
    federation: Annotated[Path | None, typer.Argument(metavar="FEDERATION.YAML", help="The document.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Go on with this run instead.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="With --resume: this many rounds in all.")] = None,
    address: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "127.0.0.1:8443",
    certificates: Annotated[Path | None, typer.Option(help="Folder with ca.pem, server.pem and server.key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text, on loopback only.")] = False,
    out: OutOption = None,
    held_out: HeldOutOption = None,
    wait: Annotated[float | None, typer.Option(help="Seconds to wait for enough clients [default: for ever].")] = None,
    max_clients: Annotated[int, typer.Option(min=1, help="Sessions at a time; more are told to wait.")] = 10_000,
    metrics: Annotated[int | None, typer.Option(metavar="PORT", help="Prometheus metrics on 127.0.0.1.")] = None,
    log_format: LogFormatOption = "text",
    quiet: QuietOption = False,
) -> None:
    """Coordinate a federation: the server process.

    Example: `cloister serve simulations/heart/federation.yaml --certificates simulations/heart/certs`

    After a crash or an upgrade: `cloister serve --resume runs/... --certificates simulations/heart/certs`
    """
    from common.logs import LogFormat
    from server import serve as server
    from server.sessions.gate import Limits

    if (federation is None) == (resume is None):
        raise typer.BadParameter("give either FEDERATION.YAML or --resume RUN_DIR")
    if resume is not None and out is not None:
        raise typer.BadParameter("--out is for a new run; with --resume the run stays in its folder")
    if federation is not None:
        if rounds is not None:
            raise typer.BadParameter("--rounds belongs to --resume; a new run has the rounds of its document")
        begun = server.new_run(federation, out=out)
    else:
        assert resume is not None
        begun = server.resumed_run(resume, rounds=rounds)
    result, folder = server.serve(
        begun,
        address=address,
        certificates=certificates,
        insecure=insecure,
        held_out=held_out,
        wait_s=wait,
        limits=Limits(sessions=max_clients),
        metrics_port=metrics,
        log_format=LogFormat(log_format),
        console=_console(quiet),
    )
    _finish(result, folder)


@app.command()
@_verb
def status(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.")],
    certificates: Annotated[Path | None, typer.Option(help="Folder with ca.pem and a certificate.")] = None,
    name: Annotated[str, typer.Option(help="Whose certificate in that folder.")] = "operator",
    as_json: JSONOption = False,
) -> None:
    """How a run goes: its round, its clients, and what each is doing. A client's certificate shows that client alone.

    Example: `cloister status 127.0.0.1:8443 --certificates simulations/heart/certs`
    """
    import json

    from rich.console import Console

    from server import status as statuses

    told = statuses.ask(address, certificates=certificates, name=name)
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        statuses.show(told, Console())


@app.command()
@_verb
def join(
    client: Annotated[Path, typer.Argument(metavar="CLIENT.YAML", help="The client file.")],
    wait: Annotated[float, typer.Option(help="Seconds the server may be away before giving up.")] = 300.0,
    strict: Annotated[bool, typer.Option(help="First check the table against the file's `federation`.")] = False,
    log_format: LogFormatOption = "text",
    quiet: QuietOption = False,
) -> None:
    """Take part in a federation with one table: a client process.

    Example: `cloister join simulations/heart/cleveland.yaml`
    """
    from client.join import join as run
    from common.logs import LogFormat

    code = run(client, wait_s=wait, log_format=LogFormat(log_format), console=_console(quiet), strict=strict)
    raise typer.Exit(code)


@app.command()
@_verb
def simulate(
    federation: FederationFile,
    data: Annotated[Path | None, typer.Option(help="One table, dealt to --clients by --partition.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="A folder with one table a client.")] = None,
    generate: Annotated[int | None, typer.Option(help="Rows to make up from the schema, to try it out.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients the table is dealt to.")] = None,
    partition: Annotated[str, typer.Option(help="iid, dirichlet:ALPHA, shards:PER_CLIENT or by:COLUMN.")] = "iid",
    seed: Annotated[int | None, typer.Option(help="Seed of everything random [default: the federation's].")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    out: OutOption = None,
    held_out: HeldOutOption = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run a whole federation in this process, without a network.

    Example: `cloister simulate simulations/article.yaml --generate 1000 --clients 4`
    """
    from simulations.run import simulate_files

    result, folder = simulate_files(
        federation,
        data=data,
        data_dir=data_dir,
        generate=generate,
        clients=clients,
        partition=partition,
        seed=seed,
        device=device,
        out=out,
        held_out=held_out,
        form=_form(encoding, decimal),
        console=_console(quiet),
    )
    _finish(result, folder)


@app.command()
@_verb
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A federation.yaml or a client.yaml.")],
) -> None:
    """Validate a document without running anything.

    Example: `cloister check simulations/heart/federation.yaml`
    """
    from client.checking import check_file

    for line in check_file(file):
        print(line)


@app.command()
@_verb
def audit(
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the trials: less than a minute.")] = False,
    trials: Annotated[int | None, typer.Option(min=100, help="How many trials a question gets.")] = None,
    as_json: JSONOption = False,
) -> None:
    """Measure on this machine whether private training does what it claims, with made-up rows. Ends with 1 if not.

    Example: `cloister audit --quick`
    """
    import json
    from dataclasses import asdict

    import torch

    from client.training import audit as audits
    from common.privacy import noise

    torch.set_num_threads(1)
    checks = audits.audit(noise.secure, trials=trials or (6000 if quick else 30_000))
    told = json.dumps({"checks": [asdict(check) for check in checks]}, indent=2)
    print(told if as_json else "\n".join(audits.lines(checks)))
    if not all(check.passed for check in checks):
        print(
            "error: a check failed. One audit in 500 does by chance: run it again. If it fails again, "
            "do not train with privacy here, and report it",
            file=sys.stderr,
        )
        raise typer.Exit(1)


@app.command()
@_verb
def budget(
    client: Annotated[Path, typer.Argument(metavar="CLIENT.YAML", help="The client file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the ledger's chain and its head.")] = False,
    head: Annotated[str | None, typer.Option(help="A head written down earlier, which must be in the ledger.")] = None,
    as_json: JSONOption = False,
) -> None:
    """What a dataset's privacy budget was spent on, and what is left. Writes nothing.

    Example: `cloister budget simulations/heart/cleveland.yaml --verify`
    """
    from client.account import reading as account

    told = account.read_account(client, verify=verify, head=head).describe()
    _print(told, account.lines(told), as_json)


@app.command()
@_verb
def plan(
    federation: FederationFile,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")],
    epsilon: Annotated[float | None, typer.Option(help="Instead of the federation's own, for each row.")] = None,
    as_json: JSONOption = False,
) -> None:
    """What a federation would cost each row of a table, and the noise it needs, before anything runs.

    Example: `cloister plan simulations/heart/federation.yaml --rows 199`
    """
    from common.privacy import plan as planning

    told = planning.forecast(planning.load(federation, epsilon=epsilon), rows)
    _print(told, planning.lines(told), as_json)


@app.command()
@_verb
def privacy(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
) -> None:
    """What a run has revealed about whom, in words. The figures are those of its privacy.json.

    Example: `cloister privacy runs/2026-05-01T12-00-00-heart-disease`
    """
    from server import explain

    for line in explain.lines(folder):
        print(line)


@schema_app.command("draft")
@_verb
def schema_draft(
    table: Annotated[Path, typer.Argument(metavar="DATA.CSV", help="A table with a header.")],
    target: Annotated[str | None, typer.Option(help="The column to predict [default: the last usable].")] = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
) -> None:
    """Write a first schema from a table, for a human to edit. It shows what was read from the data.

    Example: `cloister schema draft data.csv > schema.yaml`
    """
    from common.data.drafting import draft

    text = draft(table, target=target, form=_form(encoding, decimal))
    print("warning: bounds and categories were read from the data and are not private", file=sys.stderr)
    print(text, end="")


@certs_app.command("init")
@_verb
def certs_init(folder: CertsFolder = Path("certs")) -> None:
    """Make a federation's certificate authority. Keep ca.key where only its owner reads it.

    Example: `cloister certs init`
    """
    from common.certificates import authority

    authority.create_authority(folder)
    print(f"{folder / 'ca.pem'} is for everyone; {folder / 'ca.key'} signs certificates and stays with you")


@certs_app.command("server")
@_verb
def certs_server(
    hosts: Annotated[list[str], typer.Argument(metavar="HOST...", help="Names or addresses clients will use.")],
    folder: CertsFolder = Path("certs"),
    days: CertsDays = 397,
) -> None:
    """Make the server's certificate, valid for the given hosts.

    Example: `cloister certs server 127.0.0.1 localhost`
    """
    from common.certificates import authority

    authority.create_server(folder, hosts, days=days)
    print(f"{folder / 'server.pem'} and {folder / 'server.key'}, for {', '.join(hosts)}")


@certs_app.command("client")
@_verb
def certs_client(
    name: Annotated[str, typer.Argument(help="The client's name.")],
    folder: CertsFolder = Path("certs"),
    days: CertsDays = 397,
) -> None:
    """Make a client's certificate. Send it its NAME.pem, NAME.key and ca.pem, nothing else.

    Example: `cloister certs client cleveland`
    """
    from common.certificates import authority

    authority.create_client(folder, name, days=days)
    print(f"{folder / f'{name}.pem'} and {folder / f'{name}.key'}, for {name}")
    print(f"keep a copy of {name}.pem here: it is what `cloister certs revoke {name}` needs")


@certs_app.command("operator")
@_verb
def certs_operator(
    name: Annotated[str, typer.Argument(help="What to call it.")] = "operator",
    folder: CertsFolder = Path("certs"),
    days: CertsDays = 397,
) -> None:
    """Make a certificate for whoever runs the federation: it may see all clients, so it is for no client.

    Example: `cloister certs operator`
    """
    from common.certificates import authority

    authority.create_operator(folder, name, days=days)
    print(f"{folder / f'{name}.pem'} and {folder / f'{name}.key'}, for whoever runs the federation")
    print("`cloister status` shows every client to those who have them; send them to none of the clients")


@certs_app.command("revoke")
@_verb
def certs_revoke(
    name: Annotated[str, typer.Argument(help="Which certificate: NAME for NAME.pem.")],
    folder: CertsFolder = Path("certs"),
) -> None:
    """Revoke a certificate, for good: the server lets nobody in with it any more. Its files are moved aside.

    Example: `cloister certs revoke cleveland`
    """
    from common.certificates import authority

    aside, again = authority.revoke(folder, name)
    print(f"{name} is revoked, and its certificate is now {aside}; `{again}` makes a new one")
    print(
        "a running server rereads revoked.pem by itself; "
        f"copy {folder / 'revoked.pem'} to where `cloister serve` finds its certificates, if that is elsewhere"
    )
    if name == "server":
        print("warning: clients read no such list, and trust who has the old server.key until it expires")


@certs_app.command("list")
@_verb
def certs_list(folder: CertsFolder = Path("certs"), as_json: JSONOption = False) -> None:
    """Show every certificate of a folder: for whom, until when, and whether it still holds.

    Example: `cloister certs list`
    """
    from rich.console import Console

    from common.certificates import listing

    found = listing.certificates_in(folder)
    if as_json:
        _print({"certificates": [one.describe() for one in found]}, [], as_json)
    else:
        listing.show(found, Console())


def _form(encoding: str | None, decimal: str | None) -> FileFormat:
    """What the command line says of CSV files."""
    from common.data.tables import FileFormat
    from common.data.text_files import known_encoding
    from common.errors import ConfigError

    try:
        known = None if encoding is None else known_encoding(encoding)
    except ValueError as error:
        raise ConfigError([f"--encoding {error} (got {encoding})"]) from error
    return FileFormat(known, decimal)  # type: ignore[arg-type]  # one of the option's choices


def _print(value: dict[str, Any], lines: list[str], as_json: bool) -> None:
    import json

    print(json.dumps(value, indent=2) if as_json else "\n".join(lines))


def _console(quiet: bool) -> Console:
    """Progress goes to stderr; results to stdout."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


def _finish(result: dict[str, Any], folder: Path) -> None:
    """Shows the closing table. A run that was interrupted exits as interrupted programs do."""
    from server.progress import print_result

    print_result(result, folder)
    if result["status"] == "stopped":
        raise typer.Exit(143 if result["reason"].startswith("terminated") else 130)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
