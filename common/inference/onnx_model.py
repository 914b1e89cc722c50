"""A model as one ONNX file with the encoding inside, so that whoever uses it needs neither Cloister nor torch.

    inputs   one a feature, by its column's name, [rows, 1]: tensor(double) of a number as it stands in the table, NaN
             where it is missing; tensor(string) of a category in its canonical spelling, "" where it is missing
    outputs  `prediction` [rows], a class or a number in the target's units, and of classes `probabilities`
             [rows, classes]

The file's metadata hold the federation's document, its fingerprint, the schema and the privacy statement, as JSON. A
compressed model's hold `compression`, too: how it was made, and the sizes of its layers, which may be other than the
document's.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from common.document.schema import Categorical, Classes, Numeric, Schema
from common.document.values import spelled
from common.inference.canonical import MISSING
from common.inference.onnx_graph import Graph
from common.inference.onnx_weights import AS_IT_IS, Storage, add_weight
from common.inference.saved import SavedModel
from common.model.weights import Weights

OPSET, ML_OPSET, IR = 17, 3, 8  # of 2022, which runtimes of any age read
PREDICTION, PROBABILITIES = "prediction", "probabilities"
ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def to_onnx(
    model: SavedModel,
    *,
    weights: Weights | None = None,
    storage: Storage = AS_IT_IS,
    compression: Mapping[str, Any] | None = None,
) -> bytes:
    """The model as an ONNX file.

    Args:
        weights: what stands in place of the model's own; hidden layers may be of other sizes than its document's.
        storage: how they lie in the file.
        compression: what the metadata say of how these weights came of the model's own.
    """
    schema = model.federation.data_schema
    graph = Graph(schema.feature_names)
    encoded = _encode(graph, schema)
    logits = _layers(graph, model, model.weights if weights is None else weights, storage, encoded)
    outputs = _outputs(graph, model, logits)
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.STRING if isinstance(feature, Categorical) else TensorProto.DOUBLE, ["rows", 1]
        )
        for feature, name in zip(schema.features, input_names(schema), strict=True)
    ]
    made = helper.make_model(
        helper.make_graph(graph.nodes, model.federation.name, inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)],
        producer_name="cloister",
        ir_version=IR,
    )
    told = {} if compression is None else {"compression": json.dumps(dict(compression))}
    helper.set_model_props(made, metadata(model) | told)
    onnx.checker.check_model(made, full_check=True)
    data: bytes = made.SerializeToString()
    return data


def quantized(data: bytes) -> bytes:
    """The same with weights in int8, and sums of products in int32 (onnxruntime's dynamic quantization)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(data)
        logging.disable(logging.WARNING)  # it recommends what a graph of matrix products does not need
        try:
            quantize_dynamic(before, after, weight_type=QuantType.QInt8, per_channel=True)
        finally:
            logging.disable(logging.NOTSET)
        made = onnx.load(after)
    made.metadata_props.extend(p for p in onnx.load_from_string(data).metadata_props if p not in made.metadata_props)
    quantized_data: bytes = made.SerializeToString()
    return quantized_data


def metadata(model: SavedModel) -> dict[str, str]:
    """What the file says of itself; `cloister` is all of it, for Cloister (common/inference/saved.py)."""
    schema = model.federation.data_schema
    named = dict(zip(schema.feature_names, input_names(schema), strict=True))
    return {
        "cloister": json.dumps(model.about),
        "fingerprint": model.whole or model.federation.fingerprint,
        "target": schema.target.name,
        "schema": json.dumps(json.loads(model.federation.canonical)["schema"]),
        "privacy": json.dumps(dict(model.privacy)),
        "inputs": json.dumps(named),
    }


def input_names(schema: Schema) -> list[str]:
    """The inputs, by feature: its column's name, unless that is an output's."""
    taken = {PREDICTION, PROBABILITIES}
    names = []
    for feature in schema.features:
        name = feature.name
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _encode(graph: Graph, schema: Schema) -> str:
    """The model's inputs, float [rows, inputs], as common/data/encoding.py makes them: all numbers together, then the
    categories, put in the schema's order at the end."""
    named = list(zip(schema.features, input_names(schema), strict=True))
    numbers = [(feature, name) for feature, name in named if isinstance(feature, Numeric)]
    parts: list[str] = []
    places: dict[tuple[str, int], int] = {}  # a feature and which of its inputs -> where it is among the parts
    if numbers:
        value, absent = _numbers(graph, numbers)
        parts.append(value)
        places |= {(feature.name, 0): i for i, (feature, _) in enumerate(numbers)}
        may = [i for i, (feature, _) in enumerate(numbers) if feature.inputs > 1]
        if may:
            columns = graph.constant(np.array(may, np.int64))
            parts.append(graph.add("Gather", [graph.add("Cast", [absent], to=TensorProto.FLOAT), columns], axis=1))
            places |= {(numbers[i][0].name, 1): len(numbers) + k for k, i in enumerate(may)}
    for feature, name in named:
        if isinstance(feature, Categorical):
            start = len(places)
            parts.append(_category(graph, feature, name))
            places |= {(feature.name, i): start + i for i in range(feature.inputs)}
    together = graph.add("Concat", parts, axis=1)
    order = [places[feature.name, i] for feature in schema.features for i in range(feature.inputs)]
    if order == sorted(order):
        return together
    return graph.add("Gather", [together, graph.constant(np.array(order, np.int64))], axis=1)


def _numbers(graph: Graph, numbers: Sequence[tuple[Numeric, str]]) -> tuple[str, str]:
    """All numbers, scaled, float [rows, numbers], and which are missing, bool. In double until they are scaled: a float
    has too few digits for a number that is far from 0, beside the distance of its bounds."""
    low, high = (np.array([feature.bounds[i] for feature, _ in numbers]) for i in (0, 1))
    may = np.array([feature.may_be_missing for feature, _ in numbers])
    raw = graph.add("Concat", [name for _, name in numbers], axis=1)
    absent = graph.add("IsNaN", [raw])
    bottom, span = graph.constant(low), graph.constant(high - low)
    above = graph.add("Max", [raw, bottom])
    clamped = graph.add("Min", [above, graph.constant(high)])
    position = graph.add("Div", [graph.add("Sub", [clamped, bottom]), span])
    doubled = graph.add("Mul", [position, graph.constant(np.array(2.0))])
    scaled = graph.add("Sub", [doubled, graph.constant(np.array(1.0))])
    # Where a column may be missing, 0 stands for it; elsewhere NaN stays, so that the prediction shows it.
    instead = graph.constant(np.where(may, 0.0, np.nan))
    filled = graph.add("Where", [absent, instead, scaled])
    return graph.add("Cast", [filled], to=TensorProto.FLOAT), absent


def _category(graph: Graph, feature: Categorical, name: str) -> str:
    """One input a category and one for any other value, float [rows, categories + 1]."""
    k = len(feature.categories)
    numbers = {spelled(category): i for i, category in enumerate(feature.categories)} | {MISSING: k + 1}
    number = graph.add(
        "LabelEncoder",
        [name],
        domain="ai.onnx.ml",
        keys_strings=list(numbers),
        values_int64s=list(numbers.values()),
        default_int64=k,
    )
    flat = graph.add("Squeeze", [number, graph.constant(np.array([1], np.int64))])
    depth, ends = graph.constant(np.array([k + 2], np.int64)), graph.constant(np.array([0.0, 1.0], np.float32))
    hot = graph.add("OneHot", [flat, depth, ends], axis=1)
    return graph.add("Gather", [hot, graph.constant(np.arange(k + 1))], axis=1)


def _layers(graph: Graph, model: SavedModel, weights: Weights, storage: Storage, x: str) -> str:
    """The perceptron: logits, float [rows, outputs]."""
    activation = ACTIVATIONS[model.federation.model.activation]
    arrays: list[NDArray[np.float32]] = list(weights.values())
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    for i, (weight, bias) in enumerate(pairs):
        product = graph.add("MatMul", [x, add_weight(graph, weight, storage)])
        x = graph.add("Add", [product, graph.constant(bias)])
        if i < len(pairs) - 1:
            x = graph.add(activation, [x])
    return x


def _outputs(graph: Graph, model: SavedModel, logits: str) -> list[Any]:
    schema, loss = model.federation.data_schema, model.federation.training.loss
    target = schema.target
    wide = graph.add("Cast", [logits], to=TensorProto.DOUBLE)
    if not isinstance(target, Classes):
        low, high = target.bounds
        scaled = graph.add("Clip", [wide, graph.constant(np.array(0.0)), graph.constant(np.array(1.0))])
        units = graph.add("Mul", [scaled, graph.constant(np.array(high - low))])
        number = graph.add("Add", [units, graph.constant(np.array(float(low)))])
        graph.add("Squeeze", [number, graph.constant(np.array([1], np.int64))], output=PREDICTION)
        return [helper.make_tensor_value_info(PREDICTION, TensorProto.DOUBLE, ["rows"])]
    if loss == "binary_cross_entropy":
        other = graph.add("Sigmoid", [graph.add("Neg", [wide])])
        graph.add("Concat", [other, graph.add("Sigmoid", [wide])], axis=1, output=PROBABILITIES)
    else:
        graph.add("Softmax", [wide], axis=1, output=PROBABILITIES)
    best = graph.add("ArgMax", [PROBABILITIES], axis=1, keepdims=0)
    # Where there are no probabilities there is no class: the largest of NaN would be the first.
    first = graph.add("Gather", [PROBABILITIES, graph.constant(np.array(0, np.int64))], axis=1)
    none = graph.constant(np.array(len(target.classes), np.int64))
    chosen = graph.add("Where", [graph.add("IsNaN", [first]), none, best])
    labels = graph.constant(np.array([*target.classes, ""], object))
    graph.add("Gather", [labels, chosen], axis=0, output=PREDICTION)
    return [
        helper.make_tensor_value_info(PREDICTION, TensorProto.STRING, ["rows"]),
        helper.make_tensor_value_info(PROBABILITIES, TensorProto.DOUBLE, ["rows", len(target.classes)]),
    ]
