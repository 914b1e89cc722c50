"""Flower messages as bytes.

A message's content is one safetensors file: the arrays are its tensors, and everything else (metrics, config,
the order of the arrays, which safetensors does not keep) is JSON in its header. No pickle, no code, and any
safetensors reader can look inside.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from common.errors import ProtocolError
from common.wire.records import from_weights, look_at

LARGEST_HEADER = 1 << 20  # bytes: reading JSON takes many times its size

_HEADER = "cloister"
_KINDS: dict[str, type[MetricRecord | ConfigRecord]] = {"metrics": MetricRecord, "config": ConfigRecord}


def encode(content: RecordDict) -> bytes:
    """A message's content as one safetensors file."""
    tensors: dict[str, NDArray[Any]] = {}
    records: list[dict[str, Any]] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                tensors[f"{len(records)}/{key}"] = np.ascontiguousarray(look_at(array)).reshape(array.shape)
            records.append({"name": name, "kind": "arrays", "keys": list(record)})
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            records.append({"name": name, "kind": kind, "values": {k: _plain(v) for k, v in record.items()}})
    return safetensors.save(tensors, metadata={_HEADER: json.dumps(records)})


def decode(data: bytes) -> RecordDict:
    """The content that `encode` made. Raises `ProtocolError` for anything else."""
    try:
        size = int.from_bytes(data[:8], "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes; at most {LARGEST_HEADER} are accepted")
        records = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_HEADER])
        tensors = safetensors.load(data)
        content = RecordDict()
        for i, record in enumerate(records):
            if record["name"] in content:
                raise ValueError(f"two records are called {record['name']}")
            if record["kind"] == "arrays":
                content[record["name"]] = from_weights({key: tensors.pop(f"{i}/{key}") for key in record["keys"]})
            else:
                values = {k: _value(v) for k, v in record["values"].items()}
                content[record["name"]] = _KINDS[record["kind"]](values)
        if tensors:
            raise ValueError(f"arrays that belong to no record: {', '.join(sorted(tensors))}")
        return content
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"content of a message cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [_plain(v) for v in value]
    return value


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["bytes"])
    if isinstance(value, list):
        return [_value(v) for v in value]
    return value
