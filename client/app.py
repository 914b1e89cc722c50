"""The Flower ClientApp: train and evaluate, for a site.

`client_app(site_of)` makes the app for sites that are already open (`cloister join`, `cloister simulate`).
`app` is the same app for Flower's own runtimes: it finds its site by the run's configuration.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client import data
from client.account.ledger import Ledger
from client.device import resolve_device
from client.settings import load_client_file
from client.site import Site, name_of, open_site, simulated_site
from client.training.recipe import Pace
from client.training.train import evaluate, train
from common.document import federation as federations
from common.document.federation import Federation
from common.document.schedule import Plateau
from common.errors import BudgetExhausted, CloisterError, ConfigError, DataError, OutOfMemory, Refusal
from common.model.memory import room_for
from common.model.scores import Counts
from common.model.weights import Weights, check_fit, is_finite
from common.privacy import noise
from common.privacy.noise import NoiseSource
from common.text import shown
from common.wire import compression, records
from common.wire.identity import task_name
from common.wire.records import ARRAYS, COMPLETE, CONFIG, COUNTS, METRICS, PRIVACY, RATE, ROUND, RUN, WEIGHT

SiteOf = Callable[[Context], AbstractContextManager[Site]]

log = logging.getLogger("cloister.client")


def client_app(site_of: SiteOf, *, says_name: bool = False) -> ClientApp:
    """The app, for the sites that `site_of` finds. `says_name`: do its answers say the site's name? A server of ours
    knows it by the certificate; one on a grid of Flower's knows numbers alone."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, context, site_of, _train, says_name=says_name)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, context, site_of, _evaluate, says_name=says_name)

    return app


def _answer(
    message: Message,
    context: Context,
    site_of: SiteOf,
    work: Callable[[Site, Message, str], RecordDict],
    *,
    says_name: bool,
) -> Message:
    """Does the work, or says why not. What is not our own error is logged here and not told: it may quote data."""
    try:
        with site_of(context) as site:
            run = str(_config(message).get(RUN, context.run_id))
            if site.run not in (None, run):
                raise Refusal("this task is of another run than the one that this client was welcomed to")
            with room_for(site.federation):
                trains = message.metadata.message_type == "train"
                content, energy = site.metered(lambda: work(site, message, run), run=run, trains=trains)
                if energy is not None:
                    records.add_energy(content, energy)
                if says_name and site.federation.privacy.client is None:  # there nothing may tell who answered
                    records.add_name(content, site.name)
                return Message(content, reply_to=message)
    except Exception as error:
        return Message(told_of(error), reply_to=message)


def told_of(error: Exception) -> Error:
    """What the server is told of an error in a task. What else there is to say is logged here."""
    if isinstance(error, BudgetExhausted):
        log.error("a task was refused: %s", error)
        return Error(code=records.BUDGET_EXHAUSTED, reason=error.public)
    if isinstance(error, OutOfMemory):
        log.error("a task failed: %s", error)
        return Error(code=records.FAILED, reason=error.public or records.CLIENT_FAILED)
    if isinstance(error, Refusal):
        return Error(code=records.REFUSED, reason=error.public)
    # Our own errors say what is wrong, others where.
    log.error("a task failed: %s", error, exc_info=error if not isinstance(error, CloisterError) else None)
    return Error(code=records.FAILED, reason=records.CLIENT_FAILED)


def _train(site: Site, message: Message, run: str) -> RecordDict:
    start, pace = _weights(site, message), pace_of(message, site.federation)
    recipe = replace(site.account.charge_update(run, _task(message, run)), pace=pace)
    _keep(site, message, start, run)
    noise = _noise(site, message)
    update = train(recipe, start, site.dataset, noise=noise)
    packed = compression.pack(update.weights, start, site.federation.wire.dtype, noise.uniform)
    return _with_statement(records.from_update(replace(update, weights=packed)), site, run)


def _evaluate(site: Site, message: Message, run: str) -> RecordDict:
    weights = _weights(site, message)
    scoring = site.account.charge_evaluation(run, _task(message, run))
    _keep(site, message, weights, run)
    return counted(evaluate(scoring, weights, site.dataset, noise=_noise(site, message)), site, run)


def counted(counts: Counts, site: Site, run: str) -> RecordDict:
    """What a site answers to an evaluation."""
    content = RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: counts.tolist()})})
    return _with_statement(content, site, run)


def _weights(site: Site, message: Message) -> Weights:
    """The message's weights. Raises `Refusal` if they do not fit the federation's model, or are not finite."""
    arrays = message.content[ARRAYS]
    assert isinstance(arrays, ArrayRecord)
    try:
        weights = records.to_weights(arrays)
        check_fit(weights, site.federation)
    except (AttributeError, TypeError, ValueError) as error:  # what numpy reads may be no array
        raise Refusal("the arrays that were sent do not fit the federation's model") from error
    if not is_finite(weights):
        raise Refusal("the weights that were sent are not finite")
    return weights


def pace_of(message: Message, federation: Federation) -> Pace:
    """What a message to train says of the learning rate. Raises `Refusal` where the document's has another range."""
    schedule, config = federation.training.schedule, _config(message)
    if schedule is None:
        return Pace()
    number, factor = config.get(ROUND), config.get(RATE, 1.0)
    if not isinstance(number, int) or not 1 <= number <= federation.training.rounds:
        raise Refusal(f"the learning rate's schedule has no round {shown(str(number))}")
    if not isinstance(factor, float) or not 0 < factor <= 1 or (factor < 1 and not isinstance(schedule, Plateau)):
        raise Refusal(f"the learning rate's schedule has no factor {shown(str(factor))}")
    return Pace(round=number, factor=factor)


def _keep(site: Site, message: Message, weights: Weights, run: str) -> None:
    """Keeps what was sent, for the owner."""
    complete = _config(message).get(COMPLETE)
    if isinstance(complete, int):
        site.keep(weights, run=run, complete=complete)


def _noise(site: Site, message: Message) -> NoiseSource:
    return site.noise_of(f"{message.metadata.message_type}/{message.metadata.group_id}")


def _task(message: Message, run: str) -> str:
    """A task's name in the ledger: the same when the server asks again."""
    return task_name(run, message.metadata.message_type, message.metadata.group_id)


def _config(message: Message) -> ConfigRecord:
    record = message.content.get(CONFIG)
    return record if isinstance(record, ConfigRecord) else ConfigRecord()


def _with_statement(content: RecordDict, site: Site, run: str) -> RecordDict:
    if (statement := site.account.statement(run)) is not None:
        content[PRIVACY] = ConfigRecord({**statement.to_wire()})
    return content


# Flower's own runtimes start a process a message, so a site is opened and closed around each.


@contextmanager
def _configured_site(context: Context) -> Iterator[Site]:
    """The site that the run's configuration (or CLOISTER_* in the environment, where a runtime passes none) names.

    `federation` is the document. A SuperNode names its `client-file`, which no run's configuration can change: whoever
    submits a run must not choose the owner's policy. Flower's simulation numbers its nodes, and each takes one file of
    `data-dir`.
    """
    federation = federations.load(Path(_setting(context, "federation")))
    if "partition-id" not in context.node_config:
        settings = load_client_file(Path(_setting(context, "client-file", by_run=False)))
        site = open_site(settings, federation, name=name_of(settings))
    else:
        site = _simulated_site(context, federation)
    try:
        yield site
    finally:
        site.close()


def _simulated_site(context: Context, federation: Federation) -> Site:
    number = int(context.node_config["partition-id"])
    files = table_files(Path(_setting(context, "data-dir")))
    if number >= len(files):
        raise DataError(f"node {number} has no table: the data folder holds {len(files)}")
    key = hashlib.sha256(f"{federation.training.seed}".encode()).digest()
    device = resolve_device("auto", exact=federation.privacy.row is not None)
    rows = data.read(files[number], federation.data_schema, key=key)
    source = noise.secure()
    own = f"cloister-{os.getuid()}" if os.name == "posix" else "cloister"  # elsewhere each user has a folder for them
    state = Path(tempfile.gettempdir()) / own / f"run-{context.run_id}"
    return simulated_site(
        federation,
        data.split(rows, federation.data_schema, key=key, device=device, use_up=True),
        name=files[number].stem,
        ledger=Ledger(state / f"{number}.ledger"),
        noise_of=lambda task: source,
        device=device,
    )


def table_files(folder: Path) -> list[Path]:
    """The tables in a folder, by name. Raises `DataError` if there is none."""
    endings = {".csv", ".tsv", ".data", ".parquet", ".pq"}
    # Other systems leave files of their own beside tables, such as ._a.csv.
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in endings and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no tables ({', '.join(sorted(endings))}) in this folder")
    return found


def _setting(context: Context, name: str, *, by_run: bool = True) -> str:
    for place in (context.run_config, context.node_config) if by_run else (context.node_config,):
        if name in place:
            return str(place[name])
    variable = f"CLOISTER_{name.upper().replace('-', '_')}"
    if variable in os.environ:
        return os.environ[variable]
    where = "the run's" if by_run else "the node's"
    raise ConfigError([f"{name}: not in {where} configuration, nor in {variable}"])


app = client_app(_configured_site, says_name=True)
