"""A smaller model that does as a given one does: pruned, or distilled into fewer units.

Both see what the given model puts out for rows (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, at temperature 1), and
never a target. So where the rows are public, all of this is post-processing of a model that was released, and costs no
privacy.

Pruning takes the smallest weights of all layers together (Han et al. 2015, arXiv:1506.02626), a few at a time (Zhu and
Gupta 2017, arXiv:1710.01878), and after each time trains the rest. Biases stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from common.document.federation import Federation
from common.model import mlp
from common.model.mlp import MLP
from common.model.weights import Weights

BATCH = 256
PRUNING_ROUNDS = 4  # from one sparsity to the next
PRUNING_STEPS = 250  # of a round
PRUNING_RATE = 3e-3
DISTILLING_STEPS = 2000
DISTILLING_RATE = 1e-2

Rows = NDArray[np.float32]  # encoded, [rows, inputs]
Masks = list[Tensor]  # of each layer's weight, bool [out, in]: which are kept


def pruned(
    federation: Federation, weights: Weights, x: Rows, *, sparsities: Sequence[float], seed: int
) -> Iterator[tuple[float, Weights]]:
    """The federation's model with these shares of its weights at 0, in rising order, each made from the one before."""
    with one_thread():
        model, inputs = mlp.with_weights(federation, weights).eval(), torch.from_numpy(x)
        taught = targets(model, inputs, federation.training.loss)
        generator = torch.Generator().manual_seed(seed)
        before = 0.0
        for sparsity in sparsities:
            for share in rising(before, sparsity, PRUNING_ROUNDS):
                masks = prune(model, share)
                fit(
                    model,
                    inputs,
                    taught,
                    loss=federation.training.loss,
                    steps=PRUNING_STEPS,
                    rate=PRUNING_RATE,
                    generator=generator,
                    masks=masks,
                )
            before = sparsity
            yield sparsity, mlp.weights_of(model)


def distilled(federation: Federation, weights: Weights, x: Rows, *, hidden: Sequence[int], seed: int) -> Weights:
    """A perceptron with other hidden layers that learned what the federation's puts out for rows."""
    with one_thread():
        inputs, loss = torch.from_numpy(x), federation.training.loss
        taught = targets(mlp.with_weights(federation, weights).eval(), inputs, loss)
        model = mlp.build(resized(federation, hidden), seed=seed).eval()
        generator = torch.Generator().manual_seed(seed)
        fit(model, inputs, taught, loss=loss, steps=DISTILLING_STEPS, rate=DISTILLING_RATE, generator=generator)
        return mlp.weights_of(model)


def resized(federation: Federation, hidden: Sequence[int]) -> Federation:
    """The federation with other hidden layers, to build models by; no party ever agreed on it."""
    model = federation.model.model_copy(update={"hidden": tuple(hidden)})
    return federation.model_copy(update={"model": model})


def rising(start: float, end: float, rounds: int) -> list[float]:
    """The sparsity after each round: fast at first, by a cubic, while there is much that nothing depends on."""
    return [end + (start - end) * (1 - (i + 1) / rounds) ** 3 for i in range(rounds)]


@torch.no_grad()
def prune(model: MLP, sparsity: float) -> Masks:
    """Puts the share `sparsity` of all weights, the smallest, to 0, and says which are kept. Of equal ones the first
    go."""
    weights = [weight for weight, _ in model.weights()]
    sizes = torch.cat([weight.abs().ravel() for weight in weights])
    keep = torch.ones(len(sizes), dtype=torch.bool)
    keep[torch.argsort(sizes, stable=True)[: round(sparsity * len(sizes))]] = False
    parts = torch.split(keep, [weight.numel() for weight in weights])
    masks = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    _hold(model, masks)
    return masks


def fit(
    model: MLP,
    x: Tensor,
    taught: Tensor,
    *,
    loss: str,
    steps: int,
    rate: float,
    generator: torch.Generator,
    masks: Masks | None = None,
) -> None:
    """Trains the model on what it is taught, `targets` of the rows, by Adam; weights outside the masks stay 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss_to(taught[batch], model(x[batch]), loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if masks is not None:
            _hold(model, masks)


@torch.no_grad()
def targets(model: MLP, x: Tensor, loss: str) -> Tensor:
    """What a model teaches about rows: probabilities [rows, classes], or of one output, or a number, [rows]."""
    logits = model(x)
    if loss == "cross_entropy":
        return torch.softmax(logits, dim=1)
    return torch.sigmoid(logits[:, 0]) if loss == "binary_cross_entropy" else logits[:, 0].clamp(0.0, 1.0)


def loss_to(taught: Tensor, logits: Tensor, loss: str) -> Tensor:
    """How far outputs are from what was taught: the cross-entropy of its probabilities, or the squared error."""
    if loss == "cross_entropy":
        return functional.cross_entropy(logits, taught)
    if loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(logits[:, 0], taught)
    return functional.mse_loss(logits[:, 0], taught)


@torch.no_grad()
def _hold(model: MLP, masks: Masks) -> None:
    for (weight, _), mask in zip(model.weights(), masks, strict=True):
        weight.mul_(mask)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are in one order, so that a seed gives one model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
