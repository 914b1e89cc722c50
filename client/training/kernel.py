"""The multilayer perceptron in exact arithmetic: what a row adds is a function of that row alone, to the last bit.

A matrix product in floating point adds in another order when the batch has another size. So a row changes what other
rows add, and weights that a server chooses turn that into a change of several clips in a sum that is said to change by
one (Casacuberta et al. 2022, arXiv:2207.10635). Here every number about a row is made of

- +, -, *, /, sqrt and rint on single numbers, which IEEE 754 defines to the last bit, and powers of two by the bits of
  their exponents (exp, sigmoid and tanh are made of these: a library's vector code differs from its scalar code);
- products of whole numbers held in float64, whose partial sums stay within 2^53: exact, in whatever order they are
  added.

So it depends on neither the batch, nor a row's place in it, nor threads, BLAS or device. Inputs, activations and
errors are put on a lattice, multiples of a power of two that the row itself determines; weights, which the server sent
and which are no secret, on one for each unit.

**The clipped sum.** A row's gradient of a linear layer is the outer product of its error d [out] and its input with a 1
for the bias, a [in + 1] (Goodfellow 2015, arXiv:1510.01799); its norm is |d| |a|. Both become whole numbers,

    left = rint(2^15 a / |a|),    right = rint(2^15 d |a| min(1, clip / norm) / clip),

where norm^2 is the sum of |d|^2 |a|^2 over the layers. The sum over rows of right x left is one product of whole
numbers a layer, in units of clip / 2^30. Rounding moves each entry by at most 1/2, so a row's part has a norm of at
most

    S = (2^15 + sqrt(in + 1) / 2) (2^15 + sqrt(sum of outs) / 2)    with the in of the widest layer,

but for the rounding of floats before, which a factor of 1 + 2^-40 on each 2^15 covers. It is checked for each row, in
64-bit integers.

**Edge cases.** A row counts as zeros if one of its inputs is not finite, if the step of a lattice would pass 2^400, or
if its norm is above S; all of these are decided by the row and the weights. No rows give zeros, and so does a row whose
error is 0. Numbers far below 2^-400 become 0. With weights that are not finite, or beyond float32's range, rows count
as zeros. A float32 that is subnormal is taken as 0: whether a processor does that anyway is a mode of each thread, and
may differ between two halves of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.document.federation import WIDEST
from common.document.schema import Schema
from common.model.mlp import MLP
from common.model.objective import SCORING_BATCH, counts
from common.model.scores import Counts, count_size

BITS = 15  # of each factor of a row's part in the sum
EXACT = 53  # whole numbers up to 2^53 are exact in float64
FAR = 400  # a lattice's power of two is from 2^-400 to 2^400
SMALLEST, LARGEST = 2.0**-126, 2.0**128  # of float32's normal numbers
ROWS = 2**21  # summed at a time: 2^21 rows of at most 2^31 stay within 2^53

_TERMS = 9  # of exp's series

WHOLE, REAL = torch.int64, torch.float64
_FRACTION = 52  # bits; above them stands the exponent, 1023 more than it is
_EXPONENT = 0x7FF << _FRACTION


def sensitivity(sizes: Sequence[int]) -> float:
    """S, the most by which one row moves the sum in L2 norm, for layers of these widths, inputs first."""
    *inputs, _ = sizes
    scale = 2.0**BITS * (1 + 2.0**-40)
    return (scale + math.sqrt(max(inputs) + 1) / 2) * (scale + math.sqrt(sum(sizes[1:])) / 2)


@dataclass(frozen=True)
class _OnLattice:
    """Whole numbers in float64, and the powers of two that they are multiples of."""

    whole: Tensor
    step: Tensor


@dataclass(frozen=True)
class _Layer:
    forward: _OnLattice  # [..., out, in], a step for each output: [..., 1, out]
    backward: _OnLattice | None  # [..., out, in], a step for each input: [..., 1, in]; none for the first layer
    bias: Tensor  # [..., 1, out]
    fits: Tensor  # bool [..., 1, 1]: are the weights within float32's range?


class ExactMLP:
    """A perceptron with given weights: `layers` is (weight [..., out, in], bias [..., out]) for each layer.

    Leading dimensions, if any, are those of several models, each with its own rows.

    Raises:
        ValueError: an activation or loss that is not known, or more than 2^22 inputs of a layer.
    """

    @torch.inference_mode()
    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], *, activation: str, loss: str) -> None:
        if activation not in ("relu", "sigmoid", "tanh"):
            raise ValueError(f"activation must be relu, sigmoid or tanh, got {activation!r}")
        if loss not in ("cross_entropy", "binary_cross_entropy", "mse"):
            raise ValueError(f"loss must be cross_entropy, binary_cross_entropy or mse, got {loss!r}")
        self.sizes = (layers[0][0].shape[-1], *(weight.shape[-2] for weight, _ in layers))
        if max(self.sizes) > WIDEST:
            raise ValueError(f"a layer may have at most 2^22 = {WIDEST} units, got {max(self.sizes)}")
        self._activation, self._loss = activation, loss
        self._layers = [_layer(_real(weight), _real(bias), first=i == 0) for i, (weight, bias) in enumerate(layers)]

    @torch.inference_mode()
    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., n, inputs] -> float64 [..., n, outputs], and which rows [..., n] are within range. Others give 0."""
        rows = _Rows(x)
        for i, layer in enumerate(self._layers):
            rows.alive = rows.alive & layer.fits
            rows.value = _through(rows.on_lattice(rows.value), layer)
            if i < len(self._layers) - 1:
                rows.value = _activate(rows.value, self._activation)
        alive = rows.alive & (rows.value.abs().amax(-1, keepdim=True) < 2.0**FAR)
        return torch.where(alive, rows.value, 0.0), alive[..., 0]

    @torch.inference_mode()
    def predictions(self, x: Tensor) -> Tensor:
        """Class indices [..., n], or for mse the scaled target in [0, 1], float64 [..., n]. Of a row that is out of
        range: class 0, or NaN."""
        out, alive = self.logits(x)
        if self._loss == "mse":
            return torch.where(alive, out[..., 0].clamp(0.0, 1.0), math.nan)
        if self._loss == "binary_cross_entropy":
            return (out[..., 0] > 0).to(WHOLE)
        # The first of the largest: argmax may pick another of them.
        index = torch.arange(out.shape[-1], device=out.device)
        return torch.where(out == out.amax(-1, keepdim=True), index, out.shape[-1]).amin(-1)

    @torch.inference_mode()
    def clipped_sum(
        self, x: Tensor, y: Tensor, *, clip: float, masks: Sequence[Tensor] = (), present: Tensor | None = None
    ) -> list[Tensor]:
        """The sum over rows of their clipped gradients, in units of clip / 2^30.

        Args:
            x: [..., n, inputs].
            y: [..., n], classes or numbers.
            clip: L2 bound of one row's gradient.
            masks: for dropout, [..., n, width] for each hidden layer, by which its activations are multiplied.
            present: bool [..., n], the rows that count; all if None.

        Returns:
            int64 [..., out, in + 1] for each layer, the bias last. One row moves them together by at most
            `sensitivity(sizes)`.

        Raises:
            ValueError: `y` has not one number for each row. Broadcast, it would mix rows.
        """
        if y.shape != x.shape[:-1]:
            raise ValueError(f"y must have one number for each row, {list(x.shape[:-1])}, got {list(y.shape)}")
        total: list[Tensor] = []
        for start in range(0, max(x.shape[-2], 1), ROWS):
            part = slice(start, start + ROWS)
            rows = _Rows(x[..., part, :], None if present is None else present[..., part])
            inputs, errors = self._there_and_back(rows, y[..., part], [mask[..., part, :] for mask in masks])
            sums = _sum_of_parts(rows.alive, inputs, errors, clip, sensitivity(self.sizes))
            total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        return total

    def _there_and_back(
        self, rows: _Rows, y: Tensor, masks: Sequence[Tensor]
    ) -> tuple[list[_OnLattice], list[_OnLattice]]:
        """Each layer's inputs and errors."""
        inputs, errors, active = [], [], []
        for i, layer in enumerate(self._layers):
            rows.alive = rows.alive & layer.fits
            inputs.append(rows.on_lattice(rows.value))
            rows.value = _through(inputs[-1], layer)
            if i < len(self._layers) - 1:
                rows.value = _activate(rows.value, self._activation)
                active.append(rows.value)
                if masks:
                    rows.value = rows.value * masks[i]
        error = _error(rows.value, y, self._loss)
        for i in range(len(self._layers) - 1, -1, -1):
            errors.append(rows.on_lattice(error))
            if (back := self._layers[i].backward) is not None:
                error = (errors[-1].whole @ back.whole) * errors[-1].step * back.step
                if masks:
                    error = error * masks[i - 1]
                error = error * _slope(active[i - 1], self._activation)
        return inputs, errors[::-1]


def exact_counts(model: MLP, x: Tensor, y: Tensor, *, schema: Schema, loss: str) -> Counts:
    """Counts of the model on a table, as objective.py has them; a row adds what follows from that row alone."""
    net = ExactMLP(model.weights(), activation=model.activation_name, loss=loss)
    total = np.zeros(count_size(schema))
    for start in range(0, len(y), SCORING_BATCH):
        part = slice(start, start + SCORING_BATCH)
        total += counts(net.predictions(x[part]), y[part], schema)
    return total


class _Rows:
    """A batch on its way through the layers, and which of its rows still count."""

    def __init__(self, x: Tensor, present: Tensor | None = None) -> None:
        self.value = _real(x)
        self.alive = torch.ones_like(self.value[..., :1], dtype=torch.bool) if present is None else present[..., None]

    def on_lattice(self, a: Tensor) -> _OnLattice:
        """Each row [..., n, width] as whole numbers of so many bits that products of them are exact, and its step
        [..., n, 1]. A row that is too large, or not finite, becomes zeros and counts no more."""
        found, fits = _on_lattice(a, -1, row_bits(a.shape[-1]))
        self.alive = self.alive & fits
        return _OnLattice(torch.where(fits, found.whole, 0.0), found.step)


def _layer(weight: Tensor, bias: Tensor, *, first: bool) -> _Layer:
    out, fan_in = weight.shape[-2:]
    forward, _ = _on_lattice(weight, -1, weight_bits(fan_in))
    backward = None if first else _on_lattice(weight, -2, weight_bits(out))[0]
    largest = weight.abs().amax((-2, -1), keepdim=True)
    fits = (largest <= LARGEST) & (bias.abs().amax(-1)[..., None, None] <= LARGEST)  # NaN does not
    return _Layer(_OnLattice(forward.whole, forward.step.mT), backward, bias[..., None, :], fits)


def _real(a: Tensor) -> Tensor:
    """In float64. A float32 that is subnormal becomes 0, and is compared as 0 where the processor takes it for that."""
    return torch.where(a.abs() < SMALLEST, 0.0, a).to(REAL) if a.dtype == torch.float32 else a.to(REAL)


def _through(rows: _OnLattice, layer: _Layer) -> Tensor:
    """[..., n, in] -> [..., n, out]."""
    return (rows.whole @ layer.forward.whole.mT) * rows.step * layer.forward.step + layer.bias


def _on_lattice(a: Tensor, dim: int, bits: int) -> tuple[_OnLattice, Tensor]:
    """Along `dim`, whole numbers of at most `bits` bits and their step; and whether the step is within range."""
    top = a.abs().amax(dim, keepdim=True).view(WHOLE)  # NaN if one of them is, whose exponent is the largest
    # top < 2^(exponent - 1022), and the bits of the step's exponent are 1 - bits more than its own.
    exponent = top.bitwise_and_(_EXPONENT).add_((1 - bits) << _FRACTION)
    fits = exponent <= (1023 + FAR) << _FRACTION
    exponent.clamp_((1023 - FAR) << _FRACTION, (1023 + FAR) << _FRACTION)
    inverse = ((2046 << _FRACTION) - exponent).view(REAL)
    return _OnLattice((a * inverse).round_(), exponent.view(REAL)), fits


def _sum_of_parts(
    alive: Tensor, inputs: list[_OnLattice], errors: list[_OnLattice], clip: float, most: float
) -> list[Tensor]:
    """The sum over rows of right x left, as the module's docstring defines them. A column stands for a layer in what
    is [..., n, layers]."""
    in_step, error_step = (torch.cat([each.step for each in side], -1) for side in (inputs, errors))
    length = _squares([each.whole for each in inputs]).sqrt_() * in_step
    length = (length * length).add_(1.0).sqrt_()  # with the 1 for the bias
    size = _squares([each.whole for each in errors]).sqrt_().mul_(error_step).mul_(length)
    size = size * size
    square = size[..., :1]
    for layer in range(1, size.shape[-1]):  # one after another: a library may add floats in another order
        square = square + size[..., layer : layer + 1]
    factor = (clip / square.sqrt()).clamp_(max=1.0)  # infinite, and so 1, for an error of zeros
    reach = 2.0**BITS / length
    in_scale, error_scale = in_step * reach, length * error_step * factor * (2.0**BITS / clip)
    lefts, rights = [], []
    for layer, (a, d) in enumerate(zip(inputs, errors, strict=True)):
        column = slice(layer, layer + 1)
        lefts.append(torch.cat([a.whole * in_scale[..., column], reach[..., column]], -1).round_())
        rights.append((d.whole * error_scale[..., column]).round_())
    alive = alive & _within(_squares(lefts), _squares(rights), most)
    return [
        (torch.where(alive, right, 0.0).mT @ torch.where(alive, left, 0.0)).to(WHOLE)
        for left, right in zip(lefts, rights, strict=True)
    ]


def _squares(sides: list[Tensor]) -> Tensor:
    """The sum of squares of each row's whole numbers, exact: a column for each layer, [..., n, layers]."""
    return torch.cat([(side * side).sum(-1, keepdim=True) for side in sides], -1)


def _within(left: Tensor, right: Tensor, most: float) -> Tensor:
    """Is the sum over layers of |left|^2 |right|^2 at most `most`^2? bool [..., n, 1], decided in integers."""
    # First, that the products stay within 2^62. What is not a number is not within.
    small = (left.amax(-1, keepdim=True) <= 2.0**31) & (right.sum(-1, keepdim=True) <= 2.0**31)
    square = (torch.where(small, left, 0.0).to(WHOLE) * torch.where(small, right, 0.0).to(WHOLE)).sum(-1, keepdim=True)
    return small & (square <= math.floor(most * most))


def _log2(width: int) -> int:
    """The bits by which a sum of so many numbers can exceed them."""
    return math.ceil(math.log2(max(width, 1)))


def row_bits(width: int) -> int:
    """The bits of a row of this width: its square, and its product with weights of no fewer bits, stay within 2^53."""
    return (EXACT - _log2(width)) // 2


def weight_bits(width: int) -> int:
    """The bits of weights beside a row of this width."""
    return EXACT - _log2(width) - row_bits(width)


# Activations and losses


def _exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, to about 1e-11 of it: Taylor's series where it converges fast, times a power of two."""
    x = x.clamp(min=-700.0)
    n = (x * (1 / math.log(2))).round_()
    # ln(2) in two parts, the first of which n multiplies without rounding (Cody and Waite 1980).
    r = (x - n * 0.6931471803691238).sub_(n * 1.9082149292705877e-10)
    p = torch.full_like(r, 1 / math.factorial(_TERMS))
    for i in range(_TERMS - 1, -1, -1):
        p = p.mul_(r).add_(1 / math.factorial(i))
    return p.mul_((n.to(WHOLE) + 1023 << _FRACTION).view(REAL))


def _sigmoid(h: Tensor) -> Tensor:
    z = _exp(-h.abs())
    return torch.where(h >= 0, 1.0, z).div_(z + 1.0)


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return h.clamp(min=0.0)
    if activation == "sigmoid":
        return _sigmoid(h)
    z = _exp(h.abs() * -2.0)
    return torch.where(h >= 0, 1.0 - z, z - 1.0).div_(z + 1.0)


def _slope(active: Tensor, activation: str) -> Tensor:
    """The activation's derivative, from its value."""
    if activation == "relu":
        return (active > 0).to(REAL)
    return active * (1.0 - active) if activation == "sigmoid" else 1.0 - active * active


def _error(out: Tensor, y: Tensor, loss: str) -> Tensor:
    """The loss' derivative by the logits, [..., n, outputs]."""
    if loss == "mse":
        return (out - _real(y)[..., None]) * 2.0
    if loss == "binary_cross_entropy":
        return _sigmoid(out) - _real(y)[..., None]
    fine = 2.0 ** (EXACT - 1 - _log2(out.shape[-1]))
    whole = _exp(out - out.amax(-1, keepdim=True)).mul_(fine).round_()  # so that their sum is exact
    share = whole / whole.sum(-1, keepdim=True)
    return share - (torch.arange(out.shape[-1], device=out.device) == y[..., None]).to(REAL)
