"""`cloister check`: a document of either kind, checked without running anything. If a client file names its owner's
copy of the federation, its table is checked against that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.verbs import app, verb

if TYPE_CHECKING:
    from client.settings import ClientFile
    from common.document.federation import Federation


@app.command()
@verb
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A federation.yaml or a client.yaml.")],
) -> None:
    """Validate a document without running anything.

    Example: `cloister check simulations/heart/federation.yaml`
    """
    for line in check_file(file):
        print(line)


def check_file(path: Path) -> list[str]:
    """What the document says, in a few lines. Raises `ConfigError` with every mistake."""
    return _client(path) if is_client_file(path) else _federation(path)


def is_client_file(path: Path) -> bool:
    """Does it have keys of a client file? Whatever cannot be read counts as a federation, whose check says why."""
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return False
    if not isinstance(node, yaml.MappingNode):
        return False
    keys = [key.value for key, _ in node.value]
    return sum(key in keys for key in ("server", "data", "policy", "state")) >= 2


def check_table(settings: ClientFile, document: Path) -> list[str]:
    """Checks the owner's table against the owner's copy of the federation, before any server is heard. Returns what
    encoding met.

    Raises:
        ConfigError: the client file names no federation, or that has mistakes.
        DataError: cells that do not fit, with their lines, or values of the schema that no cell can be.
    """
    from client import data
    from common.data import tables
    from common.data.encoding import check_values
    from common.document import federation as federations
    from common.errors import ConfigError

    if settings.federation is None:
        raise ConfigError([f"{document}: federation is missing; --strict checks the table against the file it names"])
    federation = federations.load(Path(settings.federation))
    schema, place = federation.data_schema, Path(settings.data.path)
    check_values(tables.read(place, schema, settings.data.form), schema)
    rows = data.read(place, schema, key=b"nothing is dealt", form=settings.data.form, person=settings.data.id)
    said = f"all {len(rows.y)} rows fit federation {federation.name}, fingerprint {federation.fingerprint}"
    return [said, *rows.report.lines()]


def _client(path: Path) -> list[str]:
    from client.settings import load_client_file

    settings = load_client_file(path)
    policy = settings.policy
    table = check_table(settings, path) if settings.federation is not None else []
    return [
        f"{path}: a client file, valid",
        f"server {settings.server}, {'mutual TLS' if settings.tls else 'plain text'}, device {settings.device}",
        *_floating(settings),
        f"dataset {settings.data.name}: at most epsilon {policy.epsilon:g} at delta {policy.delta:g} in all",
        *table,
        *_energy(settings),
    ]


def _energy(settings: ClientFile) -> list[str]:
    """Whether what the owner's copy of the federation asks for can be measured here."""
    from client.energy import CodeCarbon
    from common.document import federation as federations

    if settings.federation is None or not federations.load(Path(settings.federation)).energy:
        return []
    CodeCarbon(settings.energy.country).check()
    return [f"energy is measured, with electricity of {settings.energy.country or 'the world, on average'}"]


def _counted(federation: Federation) -> list[str]:
    """By what evaluations count, and by how much more noise their figures then have."""
    from common.model.scores import count_sensitivity

    schema, said = federation.data_schema, list[str]()
    if schema.group is not None:
        said.append(f"evaluations count by {schema.group.name}: {', '.join(schema.groups)}")
    alone = count_sensitivity(schema.tasks[0].ungrouped)
    factor = count_sensitivity(schema) / alone * math.sqrt(len(schema.groups))
    if factor > 1 and federation.privacy.evaluation.noise:
        said.append(
            f"with its groups and targets an evaluation's figures over all rows have {factor:.1f} times the noise that "
            "they would have without"
        )
    return said


def _floating(settings: ClientFile) -> list[str]:
    return [] if settings.arithmetic == "exact" else ["arithmetic opacus: floating point, which can tell more of a row"]


def _federation(path: Path) -> list[str]:
    from common.document import federation as federations
    from common.document.strategy import title
    from common.errors import ConfigError, PrivacyError
    from common.privacy import reach
    from common.privacy.releases import client_releases, evaluation_release

    federation = federations.load(path)
    try:
        evaluation_release(federation)
        noise = client_releases(federation)[0].noise_multiplier if federation.privacy.client else 0.0
    except PrivacyError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    training, row, whole = federation.training, federation.privacy.row, federation.privacy.client
    sizes = " - ".join(map(str, federation.layer_sizes))
    local = f"{training.local_steps} steps" if training.local_steps else f"{training.local_epochs} epochs"
    privacy = []
    if row is not None:
        privacy.append(f"each row: epsilon {row.epsilon:g}, delta {row.delta:g}, clip {row.clip:g}")
    if whole is not None:
        privacy.append(
            f"each client, by the server: epsilon {whole.epsilon:g}, delta {whole.delta:g}, clip {whole.clip:g}, "
            f"noise multiplier {noise:.2f}, asked with probability {federation.strategy.fraction:g}"
        )
    more = []
    if (rule := training.early_stopping) is not None:
        more.append(f"ends early when {rule.metric} was no better in {rule.patience} evaluations")
    if (start := federation.start) is not None:
        frozen = f", layers {', '.join(map(str, start.frozen))} frozen" if start.frozen else ""
        head = ", with a new head" if start.new_head else ""
        more.append(f"begins from the model with SHA-256 {start.sha256}{head}{frozen}")
    if training.augmentation is not None:
        more.append(f"rows are changed at random: {training.augmentation.words}")
    if training.schedule is not None:
        more.append(f"learning rate: {training.schedule.words}")
    if federation.strategy.schedule is not None:
        more.append(f"the server's step: {federation.strategy.schedule.words}")
    if (forgetting := federation.strategy.average) is not None:
        more.append(f"the model that is scored and handed out is the rounds' average, forgetting by {forgetting:g}")
    if federation.data_schema.also:
        weighed = (f"{target.name} (weight {target.weight:g})" for target in federation.data_schema.targets)
        more.append(f"several targets, a head each: {', '.join(weighed)}; the first is what the model is judged by")
    more += _counted(federation)
    if federation.energy:
        kept = "tell the server" if federation.tells_energy else "keep to themselves, for privacy,"
        more.append(f"clients measure, and {kept} what energy they take")
    if federation.wire.dtype != "float32":
        more.append(f"updates travel in {federation.wire.dtype}")
    return [
        f"{path}: a federation, valid",
        f"fingerprint {federation.fingerprint}",
        f"model {sizes}, {federation.model.activation}; {training.loss}, {training.optimizer} at "
        f"{training.learning_rate:g}",
        f"{training.rounds} rounds of {local}, batch {training.batch_size}; {title(federation.strategy)}, at least "
        f"{federation.strategy.min_clients} clients",
        *more,
        *(f"privacy of {line}" for line in privacy or ["nothing: no differential privacy"]),
        *filter(None, [reach.warning(federation)]),
    ]
