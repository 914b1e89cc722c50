"""How a layer's weights lie in an ONNX file: as they are, without their zeros, or in int8.

    packed   a bit for each weight, 1 where it is kept, and the kept values: n / 8 + 4 * kept bytes for n weights
    int8     each output's weights by a scale of their own, max|w| / 127 (1 byte a value), and the scales
    both     n / 8 + kept bytes, and the scales

The graph begins by making the whole float32 matrix from these. Nothing of that depends on a row, so a runtime folds it
into one constant when it loads the file: a small file, but neither less memory nor less time than any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from common.inference.onnx_graph import Graph

NODES = 700  # bytes of the nodes that unpack a matrix, about
LEVELS = 127  # of int8, on either side of 0


@dataclass(frozen=True)
class Storage:
    """`packed` leaves zeros out wherever that is smaller; `int8` rounds to a byte (`rounded`)."""

    packed: bool = False
    int8: bool = False


AS_IT_IS = Storage()


def add_weight(graph: Graph, weight: NDArray[np.float32], storage: Storage) -> str:
    """Adds a layer's weight [out, in]; returns the name of its transpose [in, out], float32."""
    matrix, scale = np.ascontiguousarray(weight.T), scales(weight)[None, :]
    values: NDArray[Any] = levels(weight).T if storage.int8 else matrix
    kept = int(np.count_nonzero(values))
    bits = -(-values.size // 8)
    small = storage.packed and bits + NODES + (kept + 1) * values.itemsize < values.nbytes
    name = _unpacked(graph, values) if small else graph.constant(np.ascontiguousarray(values))
    if not storage.int8:
        return name
    return graph.add("Mul", [graph.add("Cast", [name], to=TensorProto.FLOAT), graph.constant(scale)])


def _unpacked(graph: Graph, values: NDArray[Any]) -> str:
    """Values of any shape, of which the file has only those that are not 0."""
    flat = values.ravel()
    keep = flat != 0
    packed = graph.constant(np.packbits(keep, bitorder="little")[:, None])
    shifted = graph.add("BitShift", [packed, graph.constant(np.arange(8, dtype=np.uint8)[None])], direction="RIGHT")
    bits = graph.add("Mod", [shifted, graph.constant(np.array(2, np.uint8))])
    row = graph.add("Reshape", [bits, graph.constant(np.array([-1], np.int64))])
    whole = graph.add("Cast", [row], to=TensorProto.INT32)
    counted = graph.add("CumSum", [whole, graph.constant(np.array(0, np.int64))])
    # Where a bit is 1 stands its value's number, from 1; elsewhere 0, where there is a 0.
    places = graph.add("Mul", [counted, whole])
    held = graph.constant(np.concatenate([np.zeros(1, flat.dtype), flat[keep]]))
    filled = graph.add("Gather", [held, places])
    ends = [graph.constant(np.array([end], np.int64)) for end in (0, flat.size)]  # the last byte may have bits to spare
    return graph.add("Reshape", [graph.add("Slice", [filled, *ends]), graph.constant(np.array(values.shape, np.int64))])


def rounded(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A layer's weight [out, in] as it comes back from int8: off by at most half a scale of its output."""
    back: NDArray[np.float32] = levels(weight).astype(np.float32) * scales(weight)[:, None]
    return back


def scales(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each output [out], what one step of int8 is; 1 where all its weights are 0."""
    step = np.abs(weight).max(axis=1, initial=0.0) / np.float32(LEVELS)
    # Of weights that are hardly there a step would not be a normal number.
    return np.where(step >= np.finfo(np.float32).tiny, step, 1.0).astype(np.float32)


def levels(weight: NDArray[np.float32]) -> NDArray[np.int8]:
    """The weight in steps of `scales`, int8 [out, in]."""
    steps: NDArray[np.float32] = np.rint(weight / scales(weight)[:, None])
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8)
