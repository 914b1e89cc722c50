"""A client's update on its way to the server, in the numbers that `wire.dtype` names.

    dtype       what travels                                                      bytes
    float32     the new weights themselves, unchanged                               4 a number
    bfloat16    the update, as the upper 16 bits of each float32 (in uint16)      2 a number
    int8        the update, in whole steps of its array's scale, max|update|/127  1 a number and 4 an array

int8 is QSGD (Alistarh et al. 2017, arXiv:1610.02132) with 127 levels a sign, an array as its bucket and the largest
number in place of the norm. An array NAME is followed by its scale, `NAME.scale`, float32 of shape [].

Rounding is stochastic: a number between two that can be sent becomes one of them, the likelier the nearer, so the
mean of what arrives is what was meant, and the errors of many clients and rounds cancel. Each is less than one step.

Under `privacy.row` what is rounded carries its noise already: rounding is post-processing, and privacy does not depend
on where its random numbers come from. Under `privacy.client` the server clips what it has unpacked, as it clips what
was never packed: sensitivity, noise and charge stay.

    an update of zeros                        arrives as zeros; the scale is 0
    NaN, infinity                             arrive as such (bfloat16), or as a scale that `unpack` refuses (int8)
    an update too large for its type          arrives as infinity, which the server does not admit
    subnormal numbers                         rounded without bias like all others
    an array without numbers                  arrives as it was; the scale is 0
    other names, order, shapes or types       refused by `unpack`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.document.federation import Dtype
from common.errors import ProtocolError
from common.model.weights import Weights

LEVELS = 127  # of one sign


class NotFinite(ProtocolError):
    """An update has NaN or infinite values. Training that diverged sends such."""


Uniform = Callable[[int], NDArray[np.float64]]  # so many numbers, uniform in (0, 1]: `NoiseSource.uniform`

_SCALE = ".scale"
_TYPES: dict[Dtype, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}


def pack(weights: Weights, start: Weights, dtype: Dtype, uniform: Uniform) -> dict[str, NDArray[Any]]:
    """What is sent of `weights`, which was trained from `start`: the arrays that `expected` names.

    Neither argument is changed. float32 draws no random number.
    """
    if dtype == "float32":
        return {**weights}
    packed: dict[str, NDArray[Any]] = {}
    for name, array in weights.items():
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite must arrive, to be refused
            update = np.subtract(array, start[name], dtype=np.float32).ravel()
        if dtype == "bfloat16":
            packed[name] = _to_bfloat16(update, uniform).reshape(array.shape)
        else:
            whole, scale = _to_int8(update, uniform)
            packed |= {name: whole.reshape(array.shape), name + _SCALE: np.array(scale)}
    return packed


def unpack(arrays: Mapping[str, NDArray[Any]], start: Weights, dtype: Dtype) -> Weights:
    """The weights that `pack` was given, but for rounding; exactly those for float32.

    Values may be NaN or infinite, if those sent were, or if they are too large for float32.

    Raises:
        ProtocolError: names, order, shapes or types are not `expected`, or a scale is negative or not finite.
    """
    _check(arrays, expected(start, dtype))
    if dtype == "float32":
        return {name: arrays[name] for name in start}
    weights: Weights = {}
    for name, before in start.items():
        with np.errstate(over="ignore", invalid="ignore"):
            if dtype == "bfloat16":
                update = _from_bfloat16(arrays[name])
            else:
                update = arrays[name].astype(np.float32) * _checked_scale(name + _SCALE, arrays[name + _SCALE])
            weights[name] = np.asarray(before + update)  # numpy makes a plain number of shape []
    return weights


def expected(weights: Weights, dtype: Dtype) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of each array that is sent for weights like these, by name and in order."""
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for name, array in weights.items():
        arrays[name] = (_TYPES[dtype], array.shape)
        if dtype == "int8":
            arrays[name + _SCALE] = (np.dtype(np.float32), ())
    return arrays


def _to_bfloat16(update: NDArray[np.float32], uniform: Uniform) -> NDArray[np.uint16]:
    """Floats of one sign are ordered as their bits are, and the upper half's neighbours are one step apart."""
    bits = update.view(np.uint32)
    upper = (bits >> 16).astype(np.uint16)
    upper += _up((bits & 0xFFFF) / 2.0**16, uniform)
    upper[np.isnan(update)] = 0x7FC0  # its lower half alone may say that it is no infinity
    return upper


def _from_bfloat16(upper: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (upper.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_int8(update: NDArray[np.float32], uniform: Uniform) -> tuple[NDArray[np.int8], np.float32]:
    largest = float(np.max(np.abs(update), initial=0.0))
    scale = np.float32(largest / LEVELS)
    if float(scale) * LEVELS < largest:  # rounded down: the largest number would not fit, subnormals least of all
        scale = np.nextafter(scale, np.float32(math.inf))
    if scale == 0 or not np.isfinite(scale):
        return np.zeros(update.shape, np.int8), scale
    steps = update.astype(np.float64) / float(scale)
    below = np.floor(steps)
    return (below + _up(steps - below, uniform)).astype(np.int8), scale


def _up(fraction: NDArray[np.float64], uniform: Uniform) -> NDArray[np.bool_]:
    """True with each probability. Never where it is 0, so what can be sent exactly is, and nothing leaves its range."""
    return uniform(len(fraction)) <= fraction


def _check(arrays: Mapping[str, NDArray[Any]], wanted: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
    if list(arrays) != list(wanted):
        raise ProtocolError(f"arrays must be {', '.join(wanted)}; got {', '.join(arrays) or 'none'}")
    for name, (dtype, shape) in wanted.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):  # numpy's reader gives other things too: archives
            raise ProtocolError(f"array {name} cannot be read")
        if (array.dtype, array.shape) != (dtype, shape):
            raise ProtocolError(f"array {name} must be {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}")


def _checked_scale(name: str, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    if not math.isfinite(scale):
        raise NotFinite(f"array {name} must be finite and at least 0, got {float(scale):g}")
    if scale < 0:
        raise ProtocolError(f"array {name} must be finite and at least 0, got {float(scale):g}")
    return scale
