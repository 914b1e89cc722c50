from __future__ import annotations

import json
import math
import struct
from typing import Any

import flwr.app
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import numpy as safetensors

from common.errors import ProtocolError
from common.wire import codec, protocol, records
from common.wire.codec import decode, encode
from common.wire.protocol import CHUNK, Assembly, parts

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
WHOLE = st.integers(-(2**70), 2**70)
FLOATS = st.floats(allow_nan=False)

ARRAYS = arrays.arrays(
    dtype=st.sampled_from(["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool"]),
    shape=arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
ARRAY_RECORDS = st.lists(st.tuples(NAMES, ARRAYS), max_size=4, unique_by=lambda pair: pair[0]).map(
    lambda pairs: ArrayRecord({name: Array(value) for name, value in pairs})
)
METRIC_RECORDS = st.dictionaries(NAMES, WHOLE | FLOATS | st.lists(WHOLE) | st.lists(FLOATS), max_size=4).map(
    MetricRecord
)
SCALARS = (WHOLE, FLOATS, st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.binary())
CONFIG_RECORDS = st.dictionaries(NAMES, st.one_of(*SCALARS, *(st.lists(s) for s in SCALARS)), max_size=4).map(
    ConfigRecord
)
CONTENTS = st.dictionaries(NAMES, ARRAY_RECORDS | METRIC_RECORDS | CONFIG_RECORDS, max_size=4).map(RecordDict)


def plain(content: RecordDict) -> list[Any]:
    """A content as values that can be compared exactly: order, types and bits included."""
    result: list[Any] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            ndarrays = ((key, array.numpy()) for key, array in record.items())
            result.append((name, [(key, str(v.dtype), v.shape, v.tobytes()) for key, v in ndarrays]))
        else:
            values = {key: (type(value).__name__, repr(value)) for key, value in record.items()}
            result.append((name, type(record).__name__, values))
    return result


def forged(records: Any, tensors: dict[str, Any] | None = None) -> bytes:
    """A file whose header says `records`, as text or as a value."""
    text = records if isinstance(records, str) else json.dumps(records)
    return safetensors.save(tensors or {}, metadata={"cloister": text})


def sample() -> bytes:
    return encode(
        RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(np.arange(6, dtype=np.float32)), "b": Array(np.float32([1]))}),
                "metrics": MetricRecord({"num-examples": 3, "counts": [1.0, 2.0]}),
                "config": ConfigRecord({"run": "r", "key": b"\x00\xff", "keys": [b"a", b""]}),
            }
        )
    )


@given(CONTENTS)
def test_what_is_encoded_is_decoded_as_it_was(content):
    assert plain(decode(encode(content))) == plain(content)


def test_arrays_keep_their_order():
    names = ["z", "a", "m", "10", "9"]
    record = ArrayRecord({name: Array(np.zeros(1, np.float32)) for name in names})
    assert list(decode(encode(RecordDict({"arrays": record})))["arrays"]) == names


@pytest.mark.parametrize(
    "array",
    [
        np.array(1.5),
        np.zeros((0, 3), np.float32),
        np.arange(6.0).reshape(2, 3).T,
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">f4"),
    ],
    ids=["0-d", "empty", "transposed", "fortran", "big-endian"],
)
def test_an_array_of_any_layout_arrives_with_its_shape_and_values(array):
    arrived = decode(encode(RecordDict({"a": ArrayRecord({"x": Array(array)})})))["a"]["x"].numpy()
    assert arrived.shape == array.shape
    assert np.array_equal(arrived, array)


def test_values_that_are_not_finite_arrive_as_they_are():
    metrics = MetricRecord({"nan": math.nan, "inf": -math.inf})
    weights = ArrayRecord({"w": Array(np.array([math.nan, math.inf], np.float32))})
    arrived = decode(encode(RecordDict({"m": metrics, "a": weights})))
    assert math.isnan(arrived["m"]["nan"])
    assert arrived["m"]["inf"] == -math.inf
    assert np.array_equal(arrived["a"]["w"].numpy(), [math.nan, math.inf], equal_nan=True)


def test_any_safetensors_reader_can_look_inside():
    tensors = safetensors.load(sample())
    assert tensors["0/w"].tolist() == [0, 1, 2, 3, 4, 5]


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(data):
    with pytest.raises(ProtocolError, match="content of a message cannot be read"):
        decode(data)


@given(st.integers(0, len(sample()) - 1))
def test_a_truncated_message_is_a_protocol_error(length):
    with pytest.raises(ProtocolError, match="content of a message cannot be read"):
        decode(sample()[:length])


@given(st.lists(st.tuples(st.integers(0, len(sample()) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_message_is_decoded_or_a_protocol_error_and_nothing_else(changes):
    data = bytearray(sample())
    for place, value in changes:
        data[place] = value
    try:
        decode(bytes(data))
    except ProtocolError:
        pass


HEADERS = st.recursive(
    st.none() | st.booleans() | WHOLE | FLOATS | st.sampled_from(["arrays", "metrics", "config", "x", "é"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "kind", "keys", "values", "bytes"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(HEADERS)
def test_a_header_of_any_json_is_decoded_or_a_protocol_error_and_nothing_else(header):
    try:
        decode(forged(header))
    except ProtocolError:
        pass


@pytest.mark.parametrize("header", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "objects"])
def test_a_header_nested_too_deeply_is_a_protocol_error(header):
    with pytest.raises(ProtocolError, match="recursion"):
        decode(forged(header))


def test_a_header_that_claims_a_huge_size_is_a_protocol_error():
    with pytest.raises(ProtocolError, match="content of a message cannot be read"):
        decode(struct.pack("<Q", 2**64 - 1) + sample()[8:])


@pytest.mark.parametrize("shape", [[2**40], [2**62, 4], [3]])
def test_a_tensor_larger_than_the_file_is_a_protocol_error(shape):
    header = {
        "__metadata__": {"cloister": json.dumps([{"name": "a", "kind": "arrays", "keys": ["x"]}])},
        "0/x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]},
    }
    text = json.dumps(header).encode()
    with pytest.raises(ProtocolError, match="content of a message cannot be read"):
        decode(struct.pack("<Q", len(text)) + text + bytes(8))


ONE = {"name": "a", "kind": "arrays", "keys": ["x"]}


@pytest.mark.parametrize(
    "records, tensors, message",
    [
        ([ONE], {}, "0/x"),
        ([], {"0/x": np.zeros(1)}, "belong to no record"),
        ([ONE], {"0/x": np.zeros(1), "0/y": np.zeros(1)}, "belong to no record: 0/y"),
        ([{"name": "a", "kind": "pickle", "values": {}}], {}, "pickle"),
        ([{"name": "a", "kind": "config", "values": {"x": {"bytes": "é"}}}], {}, "cannot be read"),
        ([{"name": "a", "kind": "config", "values": {"x": [1, "y"]}}], {}, "cannot be read"),
        ([{"name": "a", "kind": "config", "values": {}}] * 2, {}, "two records are called a"),
    ],
)
def test_a_header_that_does_not_fit_its_tensors_is_a_protocol_error(records, tensors, message):
    with pytest.raises(ProtocolError, match=message):
        decode(forged(records, tensors))


def test_a_safetensors_file_that_is_no_message_is_a_protocol_error():
    with pytest.raises(ProtocolError, match="content of a message cannot be read"):
        decode(safetensors.save({"w": np.zeros(2)}))


@pytest.mark.parametrize("size, pieces", [(0, 1), (1, 1), (CHUNK, 1), (CHUNK + 1, 2), (3 * CHUNK, 3)])
def test_parts_are_bounded_and_together_the_payload(size, pieces):
    data = np.random.default_rng(0).bytes(size)
    first, others = parts(data)
    assert len(others) == pieces - 1
    assert all(0 < len(part) <= CHUNK for part in others)
    assert len(first) <= CHUNK
    assert first + b"".join(others) == data


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=8))
def test_an_assembly_gives_the_payload_with_its_last_chunk_and_not_before(pieces):
    assembly = Assembly(sum(map(len, pieces)))
    assert [assembly.add(piece) for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert assembly.add(pieces[-1]) == b"".join(pieces)


def test_more_bytes_than_announced_are_a_protocol_error():
    assembly = Assembly(5)
    assert assembly.add(b"abc") is None
    with pytest.raises(ProtocolError, match="announced with 5 bytes has at least 6"):
        assembly.add(b"def")


def test_a_payload_above_the_limit_is_refused_before_any_byte_of_it():
    Assembly(10, limit=10)
    with pytest.raises(ProtocolError, match="a payload of 11 bytes is not accepted; from 1 to 10 are"):
        Assembly(11, limit=10)
    with pytest.raises(ProtocolError, match="is not accepted"):
        Assembly(protocol.LARGEST_CONTENT + 1)


def test_pieces_that_nobody_wants_are_counted_and_not_kept():
    assembly = Assembly(5, keep=False)
    assert assembly.add(b"abc") is None
    assert assembly.add(b"de") == b""
    with pytest.raises(ProtocolError, match="announced with 5 bytes has at least 6"):
        assembly.add(b"f")


def test_an_empty_payload_is_refused():
    with pytest.raises(ProtocolError, match="a payload of 0 bytes is not accepted"):
        Assembly(0)


def test_arrays_are_not_copied_until_flower_asks_for_their_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    record = records.from_weights({"w": array})
    seen = records.to_weights(record)["w"]
    assert np.shares_memory(seen, array)
    with pytest.raises(ValueError, match="read-only"):
        seen[0, 0] = 9
    array[0, 0] = 7  # the owner's own view is as it was
    record["w"].numpy()[0, 0] = 9  # and what a strategy computes in is its own
    assert array[0, 0] == 7


def test_flowers_runtimes_read_our_arrays_as_their_own():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours, theirs = records.Array(array), flwr.app.Array(array)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (theirs.dtype, theirs.shape, theirs.stype, theirs.data)
    assert ours.deflate() == theirs.deflate()
    assert ours.object_id == theirs.object_id


def test_a_header_that_would_take_long_to_read_is_refused_unread():
    data = (codec.LARGEST_HEADER + 1).to_bytes(8, "little") + b"{}"
    with pytest.raises(ProtocolError, match=r"a header of 1048577 bytes; at most 1048576 are accepted"):
        decode(data)
