"""The model that a run begins from: read from its file, and held against the document that knows it by its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import numpy as safetensors

from common.document.federation import Federation
from common.errors import ConfigError, ModelError
from common.inference import saved
from common.inference.saved import SavedModel, read_arrays
from common.model.weights import Weights, initial_weights, is_finite
from server.folder import folder as folders

NAME = "model.safetensors"
COSTS = "what the start has cost the rows and clients that it was trained on is in addition to what stands here"
NO_OUTPUT = {"weight", "missing", "optional"}  # what of a target moves none of a model's outputs


@dataclass(frozen=True, kw_only=True)
class StartModel:
    """A run's first weights, and what start.json says of where they are from."""

    weights: Weights
    about: Mapping[str, Any]


def read_start(path: Path | None, federation: Federation) -> StartModel | None:
    """The model of a run folder or of a safetensors file, as the start that the document names; None if it names none.

    Raises:
        ConfigError: the document names a start and none is given, or another, or one is given and it names none.
        CloisterError: the file is damaged, or its model does not fit the document.
    """
    if path is None:
        if federation.start is not None:
            raise ConfigError(
                [f"the document begins from the model with SHA-256 {federation.start.sha256}; give --start-from PATH"]
            )
        return None
    file, source = _source(path)
    data, given = _read(file), f"--start-from {path}: "
    digest = hashlib.sha256(data).hexdigest()
    if federation.start is None:
        raise ConfigError([f'{given}the document names no start; add to it: start: {{sha256: "{digest}"}}'])
    if federation.start.sha256 != digest:
        named = f"start.sha256 of the document is {federation.start.sha256}"
        raise ConfigError([f"{given}has SHA-256 {digest}, and {named}"])
    known = folders.saved_model(source) if source is not None else _saved(data, file)
    if known is not None:
        _check_schema(known.federation, federation, file)
    weights = _first_weights(known.weights if known is not None else _arrays(data, file), federation, file)
    return StartModel(weights=weights, about={"sha256": digest, **_origin(known), "note": COSTS})


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        wanted = "--start-from takes a run folder or a safetensors file"
        raise ModelError(f"{file}: cannot be read: {error.strerror}; {wanted}") from error


def _source(path: Path) -> tuple[Path, Path | None]:
    """The model's file, and its run folder if it lies in one."""
    if path.is_dir():
        return path / NAME, path
    in_folder = path.name == NAME and (path.parent / "federation.yaml").is_file()
    return path, path.parent if in_folder else None


def _saved(data: bytes, file: Path) -> SavedModel | None:
    """What Cloister saved with its document; None of another program's file."""
    try:
        about, _ = read_arrays(data)
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return saved.from_bytes(data, str(file)) if "federation" in about else None


def _arrays(data: bytes, file: Path) -> Weights:
    try:
        return safetensors.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file}: no safetensors file, or damaged") from error


def _check_schema(theirs: Federation, ours: Federation, file: Path) -> None:
    """Raises `ModelError` unless equal rows are equal inputs to both, and equal outputs if the head stays."""
    assert ours.start is not None
    one, other = theirs.data_schema, ours.data_schema
    for mine, its in zip(other.features, one.features, strict=False):
        if mine != its:
            raise ModelError(f"{file}: was trained on another column {its.name}: its schema must be the document's")
    if len(one.features) != len(other.features):
        has = f"{len(one.features)} columns, and the document has {len(other.features)}"
        raise ModelError(f"{file}: was trained on {has}")
    # As text, in which classes have an order: it says which output is which.
    heads = [
        ([target.model_dump_json(exclude=NO_OUTPUT) for target in of.data_schema.targets], of.training.loss)
        for of in (theirs, ours)
    ]
    if not ours.start.new_head and heads[0] != heads[1]:
        raise ModelError(f"{file}: was trained for another target or loss; set start.new_head to true")
    if theirs.model.activation != ours.model.activation:
        raise ModelError(
            f"{file}: was trained with activation {theirs.model.activation}, and the document has "
            f"{ours.model.activation}"
        )


def _first_weights(arrays: Weights, federation: Federation, file: Path) -> Weights:
    """The start's arrays in the document's order, with a head from the seed if it is to be new."""
    assert federation.start is not None
    first = initial_weights(federation)
    kept = list(first)[: -2 if federation.start.new_head else None]
    for name in kept:
        if name not in arrays:
            raise ModelError(f"{file}: lacks the array {name}, which the document's model has")
        if arrays[name].shape != first[name].shape or arrays[name].dtype != first[name].dtype:
            raise ModelError(
                f"{file}: {name} is {arrays[name].dtype}{list(arrays[name].shape)}, and the document's model has "
                f"{first[name].dtype}{list(first[name].shape)}"
            )
        first[name] = arrays[name]
    layers = sum(name.endswith(".weight") for name in arrays)
    if layers != len(first) // 2:
        raise ModelError(f"{file}: has {layers} layers, and the document's model {len(first) // 2}")
    if not is_finite(first):
        raise ModelError(f"{file}: has values that are not finite; its training diverged")
    return first


def _origin(known: SavedModel | None) -> dict[str, Any]:
    """`epsilon`, by unit, is empty for a model that was trained without privacy, and None where nothing is known."""
    if known is None:
        return {"federation": None, "epsilon": None}
    cost = {
        unit: {"epsilon": told.get("epsilon"), "delta": told.get("delta")}
        for unit in ("row", "client")
        if isinstance(told := known.privacy.get(unit), Mapping)
    }
    return {
        "federation": known.federation.name,
        "fingerprint": known.federation.fingerprint,
        "run": known.run,
        "rounds": known.round,
        "epsilon": cost,
    }


def in_words(about: Mapping[str, Any]) -> str:
    """What start.json holds, as two sentences."""
    what = f"the model with SHA-256 {about['sha256']}"
    if about["federation"] is None:
        return f"The run began from {what}, a file of which nothing else is known. What it had cost is not known."
    said = f"The run began from {what}: {about['federation']}, run {about['run']}, after {about['rounds']} rounds."
    costs = [
        f"epsilon {told['epsilon']:.2f} at delta {told['delta']:g} for each {unit}"
        for unit, told in about["epsilon"].items()
        if told["epsilon"] is not None
    ]
    if not costs:
        return f"{said} It was trained without differential privacy, and can reveal the rows that made it."
    return f"{said} It had cost {' and '.join(costs)}, for those that made it; that is in addition to this run's."
