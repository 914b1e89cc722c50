"""Updates in fewer bytes: what rounding keeps, what it may change, and what is refused."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, get_args

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from client.app import client_app
from common.document.federation import Dtype
from common.errors import ProtocolError
from common.model.weights import Weights, initial_weights
from common.privacy.noise import seeded
from common.wire import records
from common.wire.codec import decode, encode
from common.wire.compression import expected, pack, unpack
from common.wire.identity import number
from common.wire.records import ARRAYS, CONFIG, RUN
from simulations.inline import InlineGrid
from simulations.sources import sites_from_table
from tests.support import PRIVATE, federation

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
ROUNDED: tuple[Dtype, ...] = ("bfloat16", "int8")
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149  # the first subnormal number

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
UPDATES = arrays.arrays(np.float32, SHAPES, elements=NUMBERS)


def zeros(like: NDArray[np.float32]) -> Weights:
    return {"w": np.zeros(like.shape, np.float32)}


def sent(update: Any, dtype: Dtype, uniform: Any = None) -> dict[str, NDArray[Any]]:
    """An update of one array as it travels; the model was at zero."""
    update = np.asarray(update, np.float32)
    return pack({"w": update}, zeros(update), dtype, uniform or seeded(1).uniform)


def arrived(update: Any, dtype: Dtype, uniform: Any = None) -> NDArray[np.float32]:
    """The same on the other side."""
    update = np.asarray(update, np.float32)
    return unpack(sent(update, dtype, uniform), zeros(update), dtype)["w"]


def bits(state: Weights) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [(name, str(a.dtype), a.shape, a.tobytes()) for name, a in state.items()]


def model(seed: int = 0) -> Weights:
    return initial_weights(federation(), seed=seed)


# What arrives is what was sent


@given(arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32)))
def test_float32_arrives_to_the_last_bit_whatever_it_is(array):
    start = {"w": np.ones(array.shape, np.float32)}
    packed = pack({"w": array}, start, "float32", never)
    assert bits(unpack(packed, start, "float32")) == bits({"w": array})


def never(size: int) -> NDArray[np.float64]:
    raise AssertionError("no random number is needed")


@pytest.mark.parametrize("dtype", ROUNDED)
@given(update=UPDATES)
def test_shape_and_type_are_kept(dtype, update):
    result = arrived(update, dtype)
    assert isinstance(result, np.ndarray)
    assert (result.dtype, result.shape) == (np.float32, update.shape)


@given(UPDATES)
def test_bfloat16_is_torchs_and_exact_where_torchs_is(update):
    representable = torch.from_numpy(update.copy()).bfloat16().float().numpy()
    representable = np.where(np.isfinite(representable), representable, np.float32(0))
    packed = sent(representable, "bfloat16")["w"]
    by_torch = torch.from_numpy(packed.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    assert np.array_equal(by_torch, representable)
    assert np.array_equal(arrived(representable, "bfloat16"), representable)


@given(UPDATES)
def test_bfloat16_gives_one_of_the_two_neighbours(update):
    low = np.asarray(update.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # towards zero
    high = np.asarray((update.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    result = arrived(update, "bfloat16")
    assert np.all((result == low) | ((result == high) & (update != low)))


@given(UPDATES)
def test_an_int8_is_less_than_one_scale_away(update):
    packed = sent(update, "int8")
    scale = float(packed["w.scale"])
    error = np.abs(packed["w"] * scale - update.astype(np.float64))
    assert np.all((error < scale) | (update == 0))
    assert np.all(np.abs(packed["w"].astype(int)) <= 127)
    # The least float32 that reaches the largest number in 127 steps.
    largest = float(np.max(np.abs(update), initial=0))
    assert scale * 127 >= largest
    assert scale == 0 or float(np.nextafter(np.float32(scale), np.float32(0))) * 127 < largest


@pytest.mark.parametrize("scale", [1.0, 0.0625, SMALLEST, 2.0**120])
def test_whole_steps_of_a_scale_are_exact(scale):
    update = np.arange(-127, 128, dtype=np.float32) * np.float32(scale)
    packed = sent(update, "int8")
    assert packed["w"].tolist() == list(range(-127, 128))
    assert float(packed["w.scale"]) == scale
    assert np.array_equal(arrived(update, "int8"), update)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
def test_an_update_of_zeros_arrives_as_zeros(dtype, shape):
    assert np.array_equal(arrived(np.zeros(shape), dtype, lambda n: np.full(n, 2.0**-53)), np.zeros(shape))


def test_an_update_of_zeros_has_scale_zero():
    packed = sent(np.zeros(3), "int8")
    assert (packed["w"].tolist(), float(packed["w.scale"])) == ([0, 0, 0], 0.0)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_the_update_travels_and_is_added_to_where_it_started(dtype):
    start = {name: 100 + array for name, array in model().items()}
    state = {name: array + np.float32(0.5) for name, array in start.items()}  # the same step everywhere: no rounding
    result = unpack(pack(state, start, dtype, seeded(1).uniform), start, dtype)
    assert all(np.allclose(result[name], state[name], rtol=1e-6, atol=0) for name in state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_packing_nor_unpacking_changes_what_it_is_given(dtype):
    state, start = model(1), model(0)
    before = bits(state), bits(start)
    packed = pack(state, start, dtype, seeded(1).uniform)
    packed_before = bits(packed)
    unpack(packed, start, dtype)
    assert (bits(state), bits(start)) == before
    assert bits(packed) == packed_before


@pytest.mark.parametrize("dtype", ROUNDED)
def test_permuting_an_update_with_its_random_numbers_permutes_what_arrives(dtype):
    rng = np.random.default_rng(0)
    update, draws, order = rng.normal(size=500), seeded(1).uniform(500), rng.permutation(500)
    plain = arrived(update, dtype, lambda n: draws)
    assert np.array_equal(arrived(update[order], dtype, lambda n: draws[order]), plain[order])


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_layout_in_memory_does_not_matter(dtype, order):
    update = np.asarray(np.random.default_rng(0).normal(size=(4, 6)), np.float32, order=order)
    plain = arrived(np.ascontiguousarray(update), dtype)
    assert np.array_equal(arrived(update, dtype), plain)
    assert np.array_equal(arrived(np.repeat(update, 2, axis=1)[:, ::2], dtype), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_packed_travels_as_it_is(dtype):
    state, start = {**model(1), "s": np.array(2.5, np.float32), "e": np.zeros((0, 2), np.float32)}, {}
    start = {name: np.ones(array.shape, np.float32) for name, array in state.items()}
    packed = pack(state, start, dtype, seeded(1).uniform)
    message = decode(encode(RecordDict({ARRAYS: records.from_weights(packed)})))
    assert bits(records.to_weights(message.array_records[ARRAYS])) == bits(packed)
    assert {name: (a.dtype, a.shape) for name, a in packed.items()} == expected(start, dtype)


# Without bias

STEP = {"bfloat16": 2.0**-8, "int8": 1.0}  # between 0.5 and 1; and where the largest number is 127
DRAWS = 20_000

Packer = Callable[[NDArray[np.float32], Dtype], NDArray[np.float64]]


def ours(update: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float64]:
    return arrived(update, dtype).astype(np.float64)


def half_to_even(update: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float64]:
    if dtype == "int8":
        return np.rint(update).astype(np.float64)
    return torch.from_numpy(update).bfloat16().double().numpy()


def truncated(update: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float64]:
    if dtype == "int8":
        return np.trunc(update).astype(np.float64)
    return (update.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def bias(packer: Packer, dtype: Dtype, part: float, sign: int) -> float:
    """The mean error over many draws of a number that is `part` of a step past another, in standard errors.

    Its rounding is a step up with probability `part`, so its standard deviation is sqrt(part (1 - part)) steps.
    """
    at = 0.5 if dtype == "bfloat16" else 3.0
    value = sign * (at + part * STEP[dtype])
    update = np.full(DRAWS + 1, value, np.float32)
    update[-1] = 127.0
    assert float(update[0]) == value  # so that rounding to float32 has no part in the error
    error = packer(update, dtype)[:-1].mean() - value
    return abs(error) / (STEP[dtype] * math.sqrt(part * (1 - part) / DRAWS))


PARTS = [2.0**-6, 0.25, 0.5, 0.75, 1 - 2.0**-6]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_has_no_bias(dtype, part, sign):
    assert bias(ours, dtype, part, sign) < 5


@pytest.mark.parametrize("packer", [half_to_even, truncated])
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("part", PARTS)
def test_rounding_that_draws_nothing_has_a_bias(packer, dtype, part):
    assert bias(packer, dtype, part, 1) > 5


@pytest.mark.parametrize("dtype", ROUNDED)
def test_subnormal_numbers_are_rounded_without_bias(dtype):
    # The first number that can be sent: 2^-133 in bfloat16. In int8 that of 2^-149, of which 190 are not 127 steps.
    update = np.full(DRAWS, 2.0**-135 if dtype == "bfloat16" else 3 * SMALLEST, np.float32)
    step, largest = (2.0**-133, 0.0) if dtype == "bfloat16" else (2 * SMALLEST, 190 * SMALLEST)
    update[-1] = largest
    result = arrived(update, dtype)[:-1].astype(np.float64)
    assert len(np.unique(result)) == 2
    assert abs(result.mean() - float(update[0])) < 5 * step / 2 / math.sqrt(DRAWS)


def test_the_rounding_errors_of_different_numbers_are_independent():
    result = arrived(np.full(DRAWS, 0.5 + 2.0**-9), "bfloat16").astype(np.float64)
    up = (result > 0.5).astype(float)
    assert abs(up.var() - 0.25) < 0.01
    assert abs(np.corrcoef(up[:-1], up[1:])[0, 1]) < 5 / math.sqrt(DRAWS)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("draw", [2.0**-53, 1.0])
def test_no_draw_takes_a_number_out_of_its_range(dtype, draw):
    update = [127.0, -127.0, 0.0, 1.0]
    assert arrived(update, dtype, lambda n: np.full(n, draw)).tolist() == update


# What is not finite stays so


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_so_in_bfloat16(value):
    result = arrived([1.0, value, 2.0], "bfloat16")
    assert np.array_equal(result, np.array([1.0, value, 2.0], np.float32), equal_nan=True)


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
@pytest.mark.parametrize("draw", [2.0**-53, 1.0])
def test_every_nan_arrives_as_one_in_bfloat16(pattern, draw):
    nan = np.array([pattern], np.uint32).view(np.float32)
    assert np.isnan(arrived(nan, "bfloat16", lambda n: np.full(n, draw))).all()


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
def test_what_is_not_finite_is_refused_in_int8(value, shown):
    with pytest.raises(ProtocolError, match=rf"^array w\.scale must be finite and at least 0, got {shown}$"):
        arrived([1.0, value, 2.0], "int8")


@pytest.mark.parametrize("dtype", ROUNDED)
def test_an_update_that_float32_cannot_hold_is_not_finite(dtype):
    state, start = {"w": np.float32([LARGEST, 1])}, {"w": np.float32([-LARGEST, 0])}
    packed = pack(state, start, dtype, seeded(1).uniform)
    if dtype == "int8":
        with pytest.raises(ProtocolError, match=r"^array w\.scale must be finite and at least 0, got inf$"):
            unpack(packed, start, dtype)
    else:
        assert unpack(packed, start, dtype)["w"].tolist() == [math.inf, 1.0]


@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_state_that_float32_cannot_hold_is_not_finite(dtype):
    start = {"w": np.float32([LARGEST])}
    packed = sent([LARGEST], dtype, lambda n: np.ones(n))
    assert unpack(packed, start, dtype)["w"].tolist() == [math.inf]


def test_the_largest_numbers_become_infinite_or_stay_within_a_step():
    # The largest bfloat16 is (2 - 2^-7) 2^127; above it only infinity is left.
    assert arrived([LARGEST], "bfloat16", lambda n: np.ones(n)).tolist() == [(2 - 2.0**-7) * 2.0**127]
    assert arrived([LARGEST], "bfloat16", lambda n: np.full(n, 2.0**-53)).tolist() == [math.inf]
    (most,) = arrived([LARGEST], "int8").tolist()
    assert most == math.inf or most == pytest.approx(LARGEST, rel=1e-6)


# What is refused

START: Weights = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}


def changed(dtype: Dtype, **arrays: Any) -> dict[str, NDArray[Any]]:
    return {**pack(START, START, dtype, seeded(1).uniform), **arrays}


@pytest.mark.parametrize(
    "dtype, arrays, message",
    [
        ("float32", {}, "arrays must be w, b; got none"),
        ("bfloat16", {"w": np.zeros((2, 3), np.uint16)}, "arrays must be w, b; got w"),
        ("float32", {**changed("float32"), "c": np.zeros(1)}, "arrays must be w, b; got w, b, c"),
        ("float32", dict(reversed(changed("float32").items())), "arrays must be w, b; got b, w"),
        ("bfloat16", changed("int8"), "arrays must be w, b; got w, w.scale, b, b.scale"),
        ("int8", changed("float32"), "arrays must be w, w.scale, b, b.scale; got w, b"),
        ("float32", changed("bfloat16"), "array w must be float32 [2, 3], got uint16 [2, 3]"),
        ("bfloat16", changed("float32"), "array w must be uint16 [2, 3], got float32 [2, 3]"),
        ("bfloat16", changed("bfloat16", b=np.zeros(2, np.int16)), "array b must be uint16 [2], got int16 [2]"),
        ("float32", changed("float32", b=np.zeros(3, np.float32)), "array b must be float32 [2], got float32 [3]"),
        ("float32", changed("float32", b=np.zeros(2)), "array b must be float32 [2], got float64 [2]"),
        ("int8", changed("int8", b=np.zeros(2, np.uint8)), "array b must be int8 [2], got uint8 [2]"),
        (
            "int8",
            changed("int8", **{"w.scale": np.zeros(1, np.float32)}),
            "array w.scale must be float32 [], got float32 [1]",
        ),
        (
            "int8",
            changed("int8", **{"b.scale": np.array(-1e-9, np.float32)}),
            "array b.scale must be finite and at least 0, got -1e-09",
        ),
        (
            "int8",
            changed("int8", **{"b.scale": np.array(math.inf, np.float32)}),
            "array b.scale must be finite and at least 0, got inf",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_the_array_named(dtype, arrays, message):
    with pytest.raises(ProtocolError) as caught:
        unpack(arrays, START, dtype)
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_array_is_refused(dtype):
    archive = io.BytesIO()
    np.savez(archive, w=np.zeros(1))
    archive.seek(0)
    with np.load(archive) as read, pytest.raises(ProtocolError, match=r"^array b cannot be read$"):
        unpack(changed(dtype, b=read), START, dtype)


# Bytes


def size(weights: Weights, dtype: Dtype) -> int:
    """Bytes of what is expected to be sent."""
    return sum(kind.itemsize * math.prod(shape) for kind, shape in expected(weights, dtype).values())


def test_bytes_are_a_half_and_a_quarter():
    numbers, arrays = 9 * 5 + 9 + 7 * 9 + 7, 4
    state = initial_weights(federation(model__hidden=[9, 7]))
    state = {name: array for name, array in state.items() if not name.startswith("layers.2")}
    assert [size(state, dtype) for dtype in DTYPES] == [4 * numbers, 2 * numbers, numbers + 4 * arrays]


@pytest.mark.parametrize("dtype", DTYPES)
@given(update=UPDATES)
def test_the_size_is_that_of_what_is_sent(dtype, update):
    assert size({"w": update}, dtype) == sum(array.nbytes for array in sent(update, dtype).values())


def test_neither_torch_nor_flower_is_needed():
    program = "import sys, common.wire.compression; sys.exit(bool({'torch', 'flwr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# What a client sends


def trained(dtype: Dtype, **document: Any) -> tuple[Weights, dict[str, NDArray[Any]]]:
    """A model, and the arrays of a client's answer to the task of training it."""
    fed = federation(**document, wire={"dtype": dtype})
    sites = sites_from_table(fed, 200, clients=2, how="iid", seed=0, device=torch.device("cpu"))
    node = number("client")
    grid = InlineGrid(client_app(lambda context: nullcontext(sites[0])), [node], run="run")
    start = initial_weights(fed)
    content = RecordDict({ARRAYS: records.from_weights(start), CONFIG: ConfigRecord({RUN: "run"})})
    (reply,) = grid.send_and_receive([grid.create_message(content, "train", node, "1")])
    assert not reply.has_error()
    record = reply.content[ARRAYS]
    assert isinstance(record, ArrayRecord)
    return start, records.to_weights(record)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("privacy", [{}, PRIVATE], ids=["plain", "private"])
def test_a_client_sends_its_update_as_the_federation_says(dtype, privacy):
    start, exact = trained("float32", **privacy)
    same_start, packed = trained(dtype, **privacy)
    assert bits(start) == bits(same_start)
    assert bits(exact) != bits(start)
    result = unpack(packed, start, dtype)
    for name, before in start.items():
        update = exact[name] - before
        step = np.abs(update) * 2.0**-7 if dtype == "bfloat16" else np.abs(update).max() / 127
        assert np.all(np.abs(result[name] - exact[name]) <= step + 2.0**-23)
    assert bits(result) != bits(exact)
