"""Weights in an ONNX file: what comes back of them, and how large they are."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper

from common.inference.onnx_graph import Graph
from common.inference.onnx_weights import NODES, Storage, _unpacked, add_weight, levels, rounded, scales

KINDS = [Storage(packed=packed, int8=int8) for packed, int8 in product((False, True), repeat=2)]
FLOATS = st.floats(-4, 4, width=32, allow_subnormal=False)


def file_of(graph: Graph, name: str, shape: tuple[int, ...], kind: int) -> bytes:
    graph.add("Identity", [name], output="out")
    made = helper.make_model(
        helper.make_graph(
            graph.nodes, "g", [], [helper.make_tensor_value_info("out", kind, list(shape))], graph.constants
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(made, full_check=True)
    data: bytes = made.SerializeToString()
    return data


def read(data: bytes) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {})[0]
    return found


def stored(weight: NDArray[np.float32], storage: Storage) -> bytes:
    graph = Graph(["column"])
    return file_of(graph, add_weight(graph, weight, storage), weight.shape[::-1], TensorProto.FLOAT)


def sparse(shape: tuple[int, int], kept: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return np.where(rng.random(shape) < kept, rng.normal(size=shape), 0).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=2, max_side=11), elements=FLOATS | st.just(0))
)
def test_what_is_packed_comes_back_whole(values):
    graph = Graph(["column"])
    made = read(file_of(graph, _unpacked(graph, values), values.shape, TensorProto.FLOAT))
    assert np.array_equal(made, values)


@pytest.mark.parametrize("storage", KINDS)
@pytest.mark.parametrize("kept", [0, 0.1, 1])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (50, 61)])
def test_a_matrix_comes_back_in_every_kind_of_storage(shape, kept, storage):
    weight = sparse(shape, kept)
    wanted = rounded(weight) if storage.int8 else weight
    assert np.array_equal(read(stored(weight, storage)), wanted.T)


@pytest.mark.parametrize("kept", [0, 0.05, 0.5])
def test_a_pruned_file_is_a_bit_a_weight_and_what_is_kept(kept):
    weight = sparse((100, 203), kept)
    n, left = weight.size, np.count_nonzero(weight)
    assert 0 <= len(stored(weight, Storage(packed=True))) - (-(-n // 8) + 4 * left) < NODES + 300
    levels = np.count_nonzero(rounded(weight))
    size = len(stored(weight, Storage(packed=True, int8=True)))
    assert 0 <= size - (-(-n // 8) + levels + 4 * 100) < NODES + 500  # 4 bytes for each output's scale


def test_nothing_is_packed_that_would_grow():
    for weight in (sparse((5, 7), 0.1), sparse((60, 60), 1)):
        assert len(stored(weight, Storage(packed=True))) == len(stored(weight, Storage()))


@given(arrays.arrays(np.float32, (3, 9), elements=FLOATS))
def test_int8_is_off_by_at_most_half_a_step_of_its_output_and_zero_stays_zero(weight):
    steps = np.abs(weight.astype(np.float64)).max(axis=1, keepdims=True) / 127
    off = np.abs(rounded(weight).astype(np.float64) - weight)
    hardly_there = 127 * float(np.finfo(np.float32).tiny)  # what has no normal step becomes 0
    assert (off <= steps / 2 * (1 + 1e-5) + hardly_there).all()
    assert (rounded(weight)[weight == 0] == 0).all()


def test_an_output_with_small_weights_keeps_its_digits_beside_one_with_large():
    weight = np.array([[100, -50], [1e-3, 5e-4]], np.float32)
    assert rounded(weight)[1] == pytest.approx(weight[1], rel=0.01)


def test_a_runtime_folds_what_unpacks_into_constants(tmp_path):
    graph = Graph(["column"])
    name = add_weight(graph, sparse((50, 61), 0.1), Storage(packed=True, int8=True))
    graph.add("MatMul", ["x", name], output="y")
    shape = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", k]) for n, k in (("x", 61), ("y", 50))]
    made = helper.make_model(
        helper.make_graph(graph.nodes, "g", shape[:1], shape[1:], graph.constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "loaded.onnx"), 4
    onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node] == ["MatMul"]


def test_weights_that_are_hardly_there_are_zeros_in_int8():
    tiny = np.array([[1e-44, 0.0, -1e-44], [1.0, -0.5, 0.0]], np.float32)
    assert (scales(tiny)[0], levels(tiny)[0].tolist()) == (1.0, [0, 0, 0])
    assert not rounded(tiny)[0].any() and rounded(tiny)[1, 0] == 1.0
