"""A model as one torch file: a state dict, and beside it all else that its use needs, as JSON."""

from __future__ import annotations

import io
import json
import pickle

import torch

from common.document.schema import Categorical, Schema
from common.document.values import spelled
from common.errors import ModelError
from common.inference.saved import SavedModel, from_about


def to_torch(model: SavedModel) -> bytes:
    """A file that `torch.load(weights_only=True)` reads: `state_dict`, and `cloister`, JSON of all else."""
    state = {name: torch.from_numpy(array.copy()) for name, array in model.weights.items()}
    about = model.about | {"inputs": inputs_of(model.federation.data_schema)}
    file = io.BytesIO()
    torch.save({"state_dict": state, "cloister": json.dumps(about)}, file)
    return file.getvalue()


def from_torch(data: bytes, source: str) -> SavedModel:
    """What `to_torch` was given. Raises `ModelError` naming `source` if that is no such file, or damaged."""
    try:
        held = torch.load(io.BytesIO(data), weights_only=True)
        about = json.loads(held["cloister"])
        weights = {name: array.numpy() for name, array in held["state_dict"].items()}
        return from_about(about, weights, source)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise ModelError(f"{source}: not a torch file that Cloister exported, or damaged") from error


def inputs_of(schema: Schema) -> list[str]:
    """What each of the model's inputs is, in their order."""
    named = []
    for feature in schema.features:
        if isinstance(feature, Categorical):
            named += [f"{feature.name} is {spelled(category)}: 1 or 0" for category in feature.categories]
            named.append(f"{feature.name} is another: 1 or 0")
            continue
        low, high = feature.bounds
        scaled = f"{feature.name}: -1 at {low:g}, 1 at {high:g}, clamped"
        named += [f"{scaled}, 0 if missing", f"{feature.name} is missing: 1 or 0"] if feature.inputs > 1 else [scaled]
    return named
