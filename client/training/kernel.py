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

**Copies.** With augmentation a row comes as several copies, changed at random, and the mean of their gradients is what
is clipped (De et al. 2022, arXiv:2204.13650, section 3.2), so that a row counts once. The mean is a sum of outer
products, one a copy; its norm follows from the dot products of the copies' inputs and of their errors, which are exact,

    norm^2 = sum over layers and pairs of copies i, j of (a_i a_j + 1) (d_i d_j) / copies^2

and left and right are as above, with |a| that of the longest copy and right divided by the number of copies. In S the
second half is then multiplied by that number: each copy's error is rounded. Copies may cancel, and their parts be
longer than their sum; a row whose parts are together longer than 2^36.5 units counts as zeros.

**Edge cases.** A row counts as zeros if one of its inputs is not finite, if the step of a lattice would pass 2^400, or
if its norm is above S; all of these are decided by the row and the weights. No rows give zeros, and so does a row whose
error is 0. Numbers far below 2^-400 become 0. With weights that are not finite, or beyond float32's range, rows count
as zeros. A float32 that is subnormal is taken as 0, and where the others of its lattice are below 2^-98 or so, so is a
little more: whether a processor takes it for 0 is a mode of each thread, and may differ between two halves of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from common.document.federation import WIDEST
from common.document.heads import Loss
from common.document.schema import Schema
from common.model.mlp import MLP
from common.model.objective import SCORING_BATCH, counts, parts_of, sure_of_each
from common.model.scores import Counts, count_size, is_calibrated

BITS = 15  # of each factor of a row's part in the sum
EXACT = 53  # whole numbers up to 2^53 are exact in float64
FAR = 400  # a lattice's power of two is from 2^-400 to 2^400
SMALLEST, LARGEST = 2.0**-126, 2.0**128  # of float32's normal numbers
FEW = 4  # numbers in a row
ROWS = 2**21  # summed at a time: 2^21 rows of at most 2^31 stay within 2^53
ROWS_OF_COPIES = 2**15  # ... and so do, with noise, 2^15 whose copies' parts are together at most 2^36.5
MOST_COPIES = 16

_TERMS = 9  # of exp's series

WHOLE, REAL = torch.int64, torch.float64
_FRACTION = 52  # bits; above them stands the exponent, 1023 more than it is
_EXPONENT = 0x7FF << _FRACTION


def sensitivity(sizes: Sequence[int], *, copies: int = 1, trained: Sequence[int] | None = None) -> float:
    """S, the most by which one row moves the sum in L2 norm, for layers of these widths, inputs first.

    `trained` are the layers that are in the sum, from 0; all if None.
    """
    layers = [*pairwise(sizes)]
    inputs, outs = zip(*(layers[i] for i in (trained if trained is not None else range(len(layers)))), strict=True)
    scale = 2.0**BITS * (1 + 2.0**-40)
    return (scale + math.sqrt(max(inputs) + 1) / 2) * (scale + copies * math.sqrt(sum(outs)) / 2)


def most_rows(copies: int) -> int:
    """How many rows are summed at a time."""
    return ROWS if copies == 1 else ROWS_OF_COPIES


@dataclass(frozen=True)
class _Layer:
    """Weights on the lattice: for the way there a step for each output, for the way back one for each input."""

    forward: Tensor  # [..., out, in]
    backward: Tensor | None  # [..., out, in]; none for the first layer that is trained
    bias: Tensor  # [..., 1, out]
    fits: Tensor  # bool [..., 1, 1]: are the weights within float32's range?


class Room:
    """Memory for tensors that are made again and again: each name's is kept, and grows when it must.

    Fresh memory is handed over by the operating system page by page, which takes ten times as long as a pass over it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype = REAL) -> Tensor:
        """A tensor where `like` is, with anything in it. The one last made by this name and type is gone."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or len(kept) < size or kept.device != like.device:
            kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype, device=like.device)
        return kept[:size].view(shape)


class ExactMLP:
    """A perceptron with given weights: `layers` is (weight [..., out, in], bias [..., out]) for each layer.

    Leading dimensions, if any, are those of several models, each with its own rows. Who makes one after another, for
    step after step, gives them one `room`, and then uses only the last.

    Raises:
        ValueError: an activation or loss that is not known, or more than 2^22 inputs of a layer.
    """

    @torch.inference_mode()
    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        *,
        activation: str,
        loss: Loss,
        room: Room | None = None,
        trained: Sequence[int] | None = None,
    ) -> None:
        """`trained` are the layers that have gradients, from 0; all if None."""
        if activation not in ("relu", "sigmoid", "tanh"):
            raise ValueError(f"activation must be relu, sigmoid or tanh, got {activation!r}")
        for one in [loss] if isinstance(loss, str) else [head.loss for head in loss]:
            if one not in ("cross_entropy", "binary_cross_entropy", "mse"):
                raise ValueError(f"loss must be cross_entropy, binary_cross_entropy or mse, got {one!r}")
        self.sizes = (layers[0][0].shape[-1], *(weight.shape[-2] for weight, _ in layers))
        if max(self.sizes) > WIDEST:
            raise ValueError(f"a layer may have at most 2^22 = {WIDEST} units, got {max(self.sizes)}")
        self._activation, self._loss = activation, loss
        self._trained = list(trained) if trained is not None else list(range(len(layers)))
        self._lowest = min(self._trained)
        self._room = room or Room()
        self._layers = [self._layer(i, weight, bias) for i, (weight, bias) in enumerate(layers)]

    @torch.inference_mode()
    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., n, inputs] -> float64 [..., n, outputs], and which rows [..., n] are within range. Others give 0."""
        value, alive = x, torch.ones_like(x[..., :1], dtype=torch.bool)
        for i, layer in enumerate(self._layers):
            a, fits = self._row_on_lattice(f"inputs {i}", value)
            alive &= fits & layer.fits
            value = _through(a, layer, self._like(f"outputs {i}", a, layer.bias))
            if i < len(self._layers) - 1:
                value = _activate(value, self._activation)
        alive &= value.abs().amax(-1, keepdim=True) < 2.0**FAR
        return torch.where(alive, value, 0.0), alive[..., 0]

    @torch.inference_mode()
    def predictions(self, x: Tensor) -> Tensor:
        """Class indices [..., n], or for mse the scaled target in [0, 1], float64 [..., n]; of several targets both,
        float64 [..., n, targets]. Of a row that is out of range: class 0, or NaN."""
        out, alive = self.logits(x)
        return _predictions(out, alive, self._loss)

    @torch.inference_mode()
    def sure_predictions(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`predictions`, and how probable it finds the class that it predicts, float64 [..., n]; None for mse. Of
        several targets [..., n, targets], NaN for mse. Of a row that is out of range: as probable as any."""
        out, alive = self.logits(x)
        predicted = _predictions(out, alive, self._loss)
        if isinstance(self._loss, str):
            return predicted, _confidence(out, self._loss)
        return predicted, sure_of_each(out, self._loss, _confidence)

    @torch.inference_mode()
    def clipped_sum(
        self,
        x: Tensor,
        y: Tensor,
        *,
        clip: float,
        masks: Sequence[Tensor] = (),
        present: Tensor | None = None,
        copies: int = 1,
    ) -> list[Tensor]:
        """The sum over rows of their clipped gradients, in units of clip / 2^30.

        Args:
            x: [..., n, inputs].
            y: [..., n], classes or numbers; of several targets both, [..., n, targets], NaN where a row has none.
            clip: L2 bound of one row's gradient.
            masks: for dropout, [..., n, width] for each hidden layer, by which its activations are multiplied.
            present: bool [..., n], the rows that count; all if None.
            copies: so many of each row stand one after another in all of these, and their mean gradient is the row's.

        Returns:
            int64 [..., out, in + 1] for each trained layer, the bias last. One row moves them together by at most
            `sensitivity(sizes, copies=copies, trained=trained)`.

        Raises:
            ValueError: `y` has not one number for each row, or a row not all its copies. Broadcast, they would mix
                rows.
        """
        total: list[Tensor] = []
        step = most_rows(copies) * copies
        for start in range(0, max(x.shape[-2], 1), step):
            part = slice(start, start + step)
            lefts, rights = self._factors(
                x[..., part, :],
                _of_rows(y, part, self._shape_of_y(x), not isinstance(self._loss, str)),
                clip,
                [mask[..., part, :] for mask in masks],
                None if present is None else present[..., part],
                copies,
            )
            sums = [(right.mT @ left).to(WHOLE) for left, right in zip(lefts, rights, strict=True)]
            total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        return total

    @torch.inference_mode()
    def add_clipped_sum(
        self,
        onto: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        *,
        clip: float,
        masks: Sequence[Tensor] = (),
        present: Tensor | None = None,
        copies: int = 1,
    ) -> None:
        """Adds what `clipped_sum` gives for several models, [models, n, inputs], to float64 whole numbers in place.

        `onto` is [models, out, in + 1] for each trained layer, such as noise. Exact if there are at most
        `most_rows` rows and what is there, with what is added, stays within 2^53. Raises as `clipped_sum`.
        """
        lefts, rights = self._factors(x, y, clip, masks, present, copies)
        for total, left, right in zip(onto, lefts, rights, strict=True):
            total.baddbmm_(right.mT, left)

    def _factors(
        self, x: Tensor, y: Tensor, clip: float, masks: Sequence[Tensor], present: Tensor | None, copies: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each trained layer's left [..., n, in + 1] and right [..., n, out], as the module's docstring defines them:
        whole numbers, and zeros for rows that do not count."""
        if y.shape != (wanted := self._shape_of_y(x)):
            raise ValueError(f"y must have one number for each row, {list(wanted)}, got {list(y.shape)}")
        if x.shape[-2] % copies:
            raise ValueError(f"{x.shape[-2]} rows are not {copies} copies each")
        inputs, errors, alive = self._there_and_back(x, y, masks)
        # A column stands for a layer in what is [..., n, layers].
        length = _norms(inputs)
        length = _sqrt(length.mul_(length).add_(1.0))  # with the 1 for the bias
        if copies == 1:
            sizes = _norms(errors).mul_(length)
            sizes *= sizes
            square = _total([sizes[..., layer : layer + 1] for layer in range(sizes.shape[-1])])
        else:  # what is one number a row is told to each of its copies
            alive = _each(_rows(alive, copies).all(-2), copies)
            length = _each(_rows(length, copies).amax(-2), copies)
            square = _each(_squared_norm_of_mean(inputs, errors, copies), copies)
        factor = (clip / _sqrt(square)).clamp_(max=1.0)  # infinite, and so 1, for an error of zeros
        if present is not None:  # whose right is zeros, unless it is not a number: then so is an own row's
            factor *= present[..., None]
        reach, error_scale = 2.0**BITS / length, length.mul_(factor * (2.0**BITS / clip / copies))
        lefts, rights = [], []
        for layer, (a, d) in enumerate(zip(inputs, errors, strict=True)):
            column = slice(layer, layer + 1)
            left = self._room(f"left {layer}", (*a.shape[:-1], a.shape[-1] + 1), a)
            torch.mul(a, reach[..., column], out=left[..., :-1])
            left[..., -1:] = reach[..., column]
            lefts.append(left.round_())
            rights.append(d.mul_(error_scale[..., column]).round_())
        most = sensitivity(self.sizes, copies=copies, trained=self._trained)
        if copies == 1:
            alive &= _within(_norms(lefts), _norms(rights), most)
        else:
            alive &= _each(_copies_are_within(lefts, rights, copies, most), copies)
        _silence(lefts, rights, alive)
        return lefts, rights

    def _shape_of_y(self, x: Tensor) -> tuple[int, ...]:
        """That of the targets of these rows."""
        return x.shape[:-1] if isinstance(self._loss, str) else (*x.shape[:-1], len(self._loss))

    def _there_and_back(
        self, x: Tensor, y: Tensor, masks: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Each trained layer's inputs and errors on their lattices, and which rows [..., n, 1] were within range all
        the way; what stands in the others may be anything."""
        inputs, errors, active = [], [], []
        value, alive = x, torch.ones_like(x[..., :1], dtype=torch.bool)
        for i, layer in enumerate(self._layers):
            a, fits = self._row_on_lattice(f"inputs {i}", value)
            alive &= fits & layer.fits
            inputs.append(a)
            value = _through(a, layer, self._like(f"outputs {i}", a, layer.bias))
            if i < len(self._layers) - 1:
                value = _activate(value, self._activation)
                active.append(value)
                if masks:
                    value = value * masks[i]
        error = _error(value, y, self._loss)
        for i in range(len(self._layers) - 1, self._lowest - 1, -1):
            d, fits = self._row_on_lattice(f"errors {i}", error)
            alive &= fits
            if i in self._trained:
                errors.append(d)
            if (back := self._layers[i].backward) is not None:
                error = torch.matmul(d, back, out=self._like(f"back {i}", d, back))
                if masks:
                    error *= masks[i - 1]
                _times_slope(error, active[i - 1], self._activation)
        return [inputs[i] for i in self._trained], errors[::-1], alive

    def _layer(self, i: int, weight: Tensor, bias: Tensor) -> _Layer:
        out, fan_in = weight.shape[-2:]
        top = self._top(weight, -1)
        largest = top.amax(-2, keepdim=True)
        forward, _ = self._on_lattice(f"forward {i}", weight, top, weight_bits(fan_in))
        backward = None
        if i > self._lowest:
            backward, _ = self._on_lattice(f"backward {i}", weight, self._top(weight, -2), weight_bits(out))
        fits = (largest <= LARGEST) & (bias.abs().amax(-1)[..., None, None] <= LARGEST)  # NaN does not
        return _Layer(forward, backward, _real(bias)[..., None, :], fits)

    def _row_on_lattice(self, name: str, a: Tensor) -> tuple[Tensor, Tensor]:
        """Each row [..., n, width] on a lattice of so many bits that products are exact, and is it within range?"""
        return self._on_lattice(name, a, self._top(a, -1), row_bits(a.shape[-1]))

    def _top(self, a: Tensor, dim: int) -> Tensor:
        """The largest size along `dim`, float64; NaN if one is."""
        return torch.abs(a, out=self._room("scratch", a.shape, a, a.dtype)).amax(dim, keepdim=True).to(REAL)

    def _on_lattice(self, name: str, a: Tensor, top: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Multiples of a power of two of at most `bits` bits, where no number is larger than `top`; and is that power
        within range? If it is not, they are of no use."""
        anchor, fits = _anchor(top, bits, -125 if a.dtype == torch.float32 else -FAR)
        out = self._room(name, a.shape, a)
        # A float32 is copied first: added to a float64, it would be copied to fresh memory.
        out = torch.add(a, anchor, out=out) if a.dtype == REAL else out.copy_(a).add_(anchor)
        return out.sub_(anchor), fits

    def _like(self, name: str, rows: Tensor, columns: Tensor) -> Tensor:
        """Room for as many rows as `rows` has, of as many columns as `columns`."""
        return self._room(name, (*rows.shape[:-1], columns.shape[-1]), rows)


def exact_counts(
    model: MLP, x: Tensor, y: Tensor, *, schema: Schema, loss: Loss, group: Tensor | None = None
) -> Counts:
    """Counts of the model on a table, as objective.py has them; a row adds what follows from that row alone."""
    net = ExactMLP(model.weights(), activation=model.activation_name, loss=loss)
    total = np.zeros(count_size(schema))
    for start in range(0, len(y), SCORING_BATCH):
        part = slice(start, start + SCORING_BATCH)
        predicted, sure = net.sure_predictions(x[part]) if is_calibrated(schema) else (net.predictions(x[part]), None)
        groups = None if group is None else group[part]
        total += counts(predicted, y[part], schema, group=groups, confidence=sure)
    return total


def _of_rows(y: Tensor, part: slice, wanted: tuple[int, ...], several: bool) -> Tensor:
    """The targets of some rows; what has another shape than is wanted stays whole, and is refused later."""
    if y.shape != wanted:
        return y
    return y[..., part, :] if several else y[..., part]


def _real(a: Tensor) -> Tensor:
    """In float64. A float32 that is subnormal becomes 0, and is compared as 0 where the processor takes it for that."""
    return torch.where(a.abs() < SMALLEST, 0.0, a).to(REAL) if a.dtype == torch.float32 else a.to(REAL)


def _through(a: Tensor, layer: _Layer, out: Tensor) -> Tensor:
    """[..., n, in] -> [..., n, out], in `out`. The product is exact; the bias is added to it as to a single number."""
    return torch.matmul(a, layer.forward.mT, out=out).add_(layer.bias)


def _sum_of_rows(a: Tensor) -> Tensor:
    """Exact sums [..., n, 1] of a few numbers each or of many. Of few, torch's own is several times as slow."""
    if a.shape[-1] > FEW:
        return a.sum(-1, keepdim=True)
    total = a[..., :1].clone()
    for i in range(1, a.shape[-1]):
        total += a[..., i : i + 1]
    return total


def _anchor(top: Tensor, bits: int, least: int) -> tuple[Tensor, Tensor]:
    """What numbers up to `top` are added to, and it is taken away again, to round them to multiples of a power of two
    of at most `bits` bits, ties to even; and is that power within range?

    Floats from 2^52 to 2^53 steps are one step apart, so the anchor is 1.5 x 2^52 steps. A step is 2^`least` or more:
    with -125 a subnormal float32 is less than half of one, and becomes 0 whatever a processor takes it for.
    """
    # top < 2^(exponent - 1022), and the bits of the step's exponent are 1 - bits more. NaN's exponent is the largest.
    exponent = (top.view(WHOLE) & _EXPONENT).add_((1 - bits) << _FRACTION)
    fits = exponent <= (1023 + FAR) << _FRACTION
    exponent.clamp_((1023 + least) << _FRACTION, (1023 + FAR) << _FRACTION)
    return exponent.add_((52 << _FRACTION) | (1 << _FRACTION - 1)).view(REAL), fits


def _silence(lefts: list[Tensor], rights: list[Tensor], alive: Tensor) -> None:
    """Makes zeros of the rows that are not alive, in place. Looks first where that costs less than doing it."""
    if alive.is_cuda or not bool(alive.all()):
        dead = ~alive
        for side in (*lefts, *rights):
            side.masked_fill_(dead, 0.0)


def _norms(sides: list[Tensor]) -> Tensor:
    """The length of each row, a column for each layer, [..., n, layers]: of exact squares, rounded once."""
    return torch.cat([_norm(side) for side in sides], -1)


def _norm(a: Tensor) -> Tensor:
    if a.shape[-1] > FEW:
        found: Tensor = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        return found
    return _sqrt(_sum_of_rows(a * a))


def _sqrt(a: Tensor) -> Tensor:
    """The root, correctly rounded. Torch's own on a processor is the Intel library's, of which one in 70 is not."""
    return a.sqrt() if a.is_cuda else torch.from_numpy(np.sqrt(a.numpy()))


def _within(left: Tensor, right: Tensor, most: float) -> Tensor:
    """Is the sum over layers of |left|^2 |right|^2 at most `most`^2? bool [..., n, 1], for lengths of whole numbers.

    Up to a length of 2^25, far above 2^15, squares add up exactly. Lengths, their products, squares and the sum over
    fewer than 2^12 layers are rounded by at most 2^-53 of them each, so the bound is tighter by 2^-40 of it;
    `sensitivity`, squared, is loose by about 2^-38. What is not a number is not within.
    """
    small = (left.amax(-1, keepdim=True) <= 2.0**25) & (right.amax(-1, keepdim=True) <= 2.0**25)
    products = left * right
    products *= products
    square = _total([products[..., layer : layer + 1] for layer in range(products.shape[-1])])
    return small & (square <= most * most * (1 - 2.0**-40))


def _total(parts: list[Tensor]) -> Tensor:
    """The sum, one after another: a library may add floats in another order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


# Several copies of each row


def _rows(a: Tensor, copies: int) -> Tensor:
    """[..., n x copies, width] -> [..., n, copies, width]."""
    return a.reshape(*a.shape[:-2], a.shape[-2] // copies, copies, a.shape[-1])


def _each(of_rows: Tensor, copies: int) -> Tensor:
    """[..., n, width] -> [..., n x copies, width]: what is of a row, for each of its copies."""
    return of_rows.repeat_interleave(copies, -2)


def _dots(a: Tensor, copies: int) -> Tensor:
    """The dot products of a row's copies, [..., n, copies, copies]: exact, as a row's square is."""
    by_row = _rows(a, copies)
    return by_row @ by_row.mT


def _squared_norm_of_mean(inputs: list[Tensor], errors: list[Tensor], copies: int) -> Tensor:
    """[..., n, 1]: the squared norm of the mean over copies of a row's gradient. Its parts may cancel; it is then as
    wrong as their rounding, which decides by how much a row is clipped, but not the bound of what leaves."""
    layers = []
    for a, d in zip(inputs, errors, strict=True):
        layers.append(_sum_of_pairs(_dots(a, copies).add_(1.0).mul_(_dots(d, copies))))  # with the 1 for the bias
    return _total(layers).clamp_(min=0.0) / copies**2


def _sum_of_pairs(a: Tensor) -> Tensor:
    """[..., n, copies, copies], symmetric -> the sum [..., n, 1], in one order."""
    copies = a.shape[-1]
    pairs = [a[..., i, j : j + 1] * (1.0 if i == j else 2.0) for i in range(copies) for j in range(i + 1)]
    return _total(pairs)


def _copies_are_within(lefts: list[Tensor], rights: list[Tensor], copies: int, most: float) -> Tensor:
    """Is the norm of a row's part, a sum of outer products of whole numbers, at most `most`? bool [..., n, 1].

    Dot products of lengths up to 2^25 are exact. Their products and sums are rounded by at most 2^-53 each, of terms
    whose sizes add up to `copies` times `own`, by Cauchy and Schwarz; so much more is asked for. With that sum the
    parts of a row, taken by their size, are bounded by the root of it, 2^36.5 (`ROWS_OF_COPIES`).
    """
    squares, own, small = [], [], []
    for left, right in zip(lefts, rights, strict=True):
        a, b = _dots(left, copies), _dots(right, copies)
        ends = [torch.diagonal(dots, dim1=-2, dim2=-1) for dots in (a, b)]
        small.append((ends[0].amax(-1, keepdim=True) <= 2.0**50) & (ends[1].amax(-1, keepdim=True) <= 2.0**50))
        a *= b
        squares.append(_sum_of_pairs(a))
        own.append(_total([a[..., i, i : i + 1] for i in range(copies)]))
    sizes = _total(own) * copies
    rounded = (copies * copies * len(lefts) + 8) * 2.0**-52
    fits = _total(squares) + sizes * rounded <= most * most * (1 - 2.0**-40)
    return fits & (sizes <= 2.0**73) & torch.stack(small).all(0)


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
        return h.clamp_(min=0.0)
    if activation == "sigmoid":
        return _sigmoid(h)
    z = _exp(h.abs() * -2.0)
    return torch.where(h >= 0, 1.0 - z, z - 1.0).div_(z + 1.0)


def _times_slope(error: Tensor, active: Tensor, activation: str) -> None:
    """Multiplies `error` by the activation's derivative, which follows from its value `active`."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(error, active, 0.0, grad_input=error)
    else:
        error.mul_(active * (1.0 - active) if activation == "sigmoid" else 1.0 - active * active)


def _predictions(out: Tensor, alive: Tensor, loss: Loss) -> Tensor:
    if not isinstance(loss, str):
        outs = torch.split(out, [head.width for head in loss], -1)
        found = (_predictions(own, alive, head.loss) for head, own in zip(loss, outs, strict=True))
        return torch.stack([each.to(REAL) for each in found], -1)
    if loss == "mse":
        return torch.where(alive, out[..., 0].clamp(0.0, 1.0), math.nan)
    if loss == "binary_cross_entropy":
        return (out[..., 0] > 0).to(WHOLE)
    # The first of the largest: argmax may pick another of them.
    index = torch.arange(out.shape[-1], device=out.device)
    return torch.where(out == out.amax(-1, keepdim=True), index, out.shape[-1]).amin(-1)


def _error(out: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """The loss' derivative by the logits, [..., n, outputs]. A target that a row does not have has none."""
    if not isinstance(loss, str):
        errors = []
        for head, own, target, is_there in parts_of(out, y, loss):
            errors.append(torch.where(is_there[..., None], _error(own, target, head.loss) * head.weight, 0.0))
        return torch.cat(errors, -1)
    if loss == "mse":
        return (out - _real(y)[..., None]) * 2.0
    if loss == "binary_cross_entropy":
        return _sigmoid(out) - _real(y)[..., None]
    return _softmax(out) - (torch.arange(out.shape[-1], device=out.device) == y[..., None]).to(REAL)


def _softmax(out: Tensor) -> Tensor:
    fine = 2.0 ** (EXACT - 1 - _log2(out.shape[-1]))
    whole = _exp(out - out.amax(-1, keepdim=True)).mul_(fine).round_()  # so that their sum is exact
    return whole / _sum_of_rows(whole)


def _confidence(out: Tensor, loss: str) -> Tensor | None:
    """The probability of the class that has the largest, [..., n]."""
    if loss == "mse":
        return None
    return _sigmoid(out[..., 0].abs()) if loss == "binary_cross_entropy" else _softmax(out).amax(-1)
