"""A model that a run has left, with all that its use needs: the federation's document (its schema above all), and what
the model cost in privacy.

As a file it is one safetensors file, so that whoever copies it has all of it. Run folders keep the same in files apart
(server/folder/folder.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from common.document import federation as federations
from common.document.federation import Federation
from common.errors import ConfigError, ModelError
from common.model.weights import Weights, check_fit, is_finite

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """`privacy` is what privacy.json of a run folder holds; empty where nothing is known of it."""

    federation: Federation
    weights: Weights
    round: int  # the last complete one
    run: str = ""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    whole: str = ""  # the fingerprint of the document that was agreed on, if this is one of several targets' (`task`)

    def checked(self, source: str) -> SavedModel:
        """The same. Raises `ModelError` unless the weights are the document's, finite, and made by a round."""
        if self.round < 1:
            raise ModelError(f"{source}: no round is complete yet; what is there is a model that knows nothing")
        try:
            check_fit(self.weights, self.federation)
        except ValueError as error:
            raise ModelError(f"{source}: the model does not fit its federation's document: {error}") from error
        if not is_finite(self.weights):
            raise ModelError(f"{source}: the model has values that are not finite; its training diverged")
        return self

    def task(self, target: str | None = None) -> SavedModel:
        """The model of one of its targets, by default the first: the body, and that target's head. Raises
        `ConfigError` if there is none of this name."""
        federation, schema = self.federation, self.federation.data_schema
        alone = federation.alone(target or schema.target.name)
        if not schema.also:
            return self
        first = [one.name for one in schema.targets].index(alone.data_schema.target.name)
        start = sum(head.width for head in federation.heads[:first])
        own = slice(start, start + federation.heads[first].width)
        head = {name: np.ascontiguousarray(self.weights[name][own]) for name in list(self.weights)[-2:]}
        return replace(self, federation=alone, weights={**self.weights, **head}, whole=federation.fingerprint)

    @property
    def about(self) -> dict[str, Any]:
        """All but the weights, as JSON values."""
        return {
            "format": FORMAT,
            "round": self.round,
            "run": self.run,
            "fingerprint": self.federation.fingerprint,
            "federation": self.federation.canonical,
            "privacy": dict(self.privacy),
            **({"whole": self.whole} if self.whole else {}),
        }


def to_bytes(model: SavedModel) -> bytes:
    """The model as one file."""
    # One entry: safetensors writes several in any order.
    metadata = {"cloister": json.dumps(model.about | {"order": list(model.weights)})}
    return safetensors.save({k: np.ascontiguousarray(v) for k, v in model.weights.items()}, metadata=metadata)


def from_bytes(data: bytes, source: str) -> SavedModel:
    """What `to_bytes` was given. Raises `ModelError` naming `source` if that is no such model, or damaged."""
    try:
        about, weights = read_arrays(data)
        return from_about(about, {name: weights[name] for name in about["order"]}, source)
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:  # a peer may send anything
        raise ModelError(f"{source}: not a model that Cloister saved, or damaged") from error


def from_about(about: Mapping[str, Any], weights: Weights, source: str) -> SavedModel:
    """A model from `SavedModel.about` and its weights. Raises `ModelError` where they do not fit, and LookupError,
    TypeError or ValueError where `about` is something else."""
    if about["format"] != FORMAT:
        raise ModelError(f"{source}: saved by another version of Cloister (format {about['format']})")
    try:
        federation = federations.from_canonical(about["federation"])
    except ConfigError as error:
        raise ModelError(f"{source}: its federation's document is not valid here: {error.problems[0]}") from error
    made = SavedModel(
        federation=federation,
        weights=weights,
        round=int(about["round"]),
        run=str(about["run"]),
        privacy=dict(about["privacy"]),
        whole=str(about.get("whole", "")),
    )
    return made.checked(source)


def read_arrays(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What a safetensors file of ours says of itself, and its arrays. Raises SafetensorError, ValueError, LookupError
    or TypeError if it is none."""
    arrays = safetensors.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about: dict[str, Any] = json.loads(header["__metadata__"]["cloister"])
    return about, arrays


def read_bytes(path: Path) -> bytes:
    """A model's file. Raises `ModelError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
