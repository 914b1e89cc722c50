"""Differentially private local training, in Opacus' frame. Apart from plain.py because importing Opacus takes
seconds, which a client that trains without privacy need not wait for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.training.augment import Augmenter
from client.training.exact import ExactOptimizer
from client.training.plain import add_proximal_term, copies, make_optimizer, set_rate, torch_seed
from client.training.recipe import DPSGD
from client.training.row_draws import KEY, RowIds, masks
from common.document.federation import Training
from common.document.heads import Loss
from common.model import objective
from common.model.mlp import MLP, trained_of
from common.privacy.noise import NoiseSource

Steps = tuple[DPOptimizer, Callable[[Tensor], None]]  # an optimizer, and what hands it the rows of a step by index


def fit_privately(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    training: Training,
    dpsgd: DPSGD,
    noise: NoiseSource,
    proximal_mu: float,
    loss: Loss | None = None,
    learning_rate: Callable[[int], float] | None = None,
    augmenter: Augmenter | None = None,
    ids: RowIds | None = None,
) -> None:
    """Trains `model` in place by DP-SGD.

    An empty batch takes its noisy step like any other. A row whose gradient is not finite counts as 0, which is within
    every clip.

    Args:
        x: [rows, inputs].
        y: [rows], or of several targets [rows, targets].
        loss: that of several targets; by default the document's one.
        learning_rate: of each step, from 0; by default always the document's. It is public, and so are noisy gradients.
        augmenter: changes the rows of each step, if they are to be changed; it mixes none.
        ids: of the rows (client/training/row_draws.py); augmentation needs them, and dropout in exact arithmetic.

    Raises:
        ValueError: exact arithmetic is asked for a module that is not our MLP, or ids are missing.
    """
    start = copies(model)
    model.train()
    steps = _exact_steps if dpsgd.arithmetic == "exact" else _float_steps
    rows = _Rows(x, y, ids, augmenter, noise)
    with steps(model, rows, training, loss or training.loss, dpsgd) as (optimizer, take):
        if proximal_mu:  # after the noise, and before the step
            optimizer.attach_step_hook(lambda _: add_proximal_term(model, start, proximal_mu))
        for step in range(dpsgd.steps):
            if learning_rate is not None:
                set_rate(optimizer, learning_rate(step))
            optimizer.zero_grad(set_to_none=True)
            take(torch.from_numpy(noise.poisson_sample(len(y), dpsgd.sampling_rate)))
            optimizer.step()


class _Rows:
    """The training rows, from which steps take some, changed if they are to be."""

    def __init__(
        self, x: Tensor, y: Tensor, ids: RowIds | None, augmenter: Augmenter | None, noise: NoiseSource
    ) -> None:
        self._x, self._y, self._ids, self._augmenter, self.noise = x, y, ids, augmenter, noise
        self.copies = 1 if augmenter is None else augmenter.copies
        if augmenter is not None:
            self.ids_for("augmentation")

    @property
    def device(self) -> torch.device:
        return self._x.device

    def ids_for(self, what: str) -> RowIds:
        """The rows' ids. Raises `ValueError` if there are none."""
        if self._ids is None or len(self._ids) != len(self._y):
            raise ValueError(f"{what} needs the ids of the rows")
        return self._ids

    def key(self, *, wanted: bool) -> bytes:
        """A step's, by which rows draw; none is drawn where nobody needs it."""
        return self.noise.bytes(KEY) if wanted or self._augmenter is not None else b""

    def take(self, index: Tensor, key: bytes) -> tuple[Tensor, Tensor]:
        """[n] -> [n x copies, inputs] and the targets of these."""
        at = index.to(self.device)
        if self._augmenter is None:
            return self._x[at], self._y[at]
        return self._augmenter.rows(self._x[at], self._y[at], self.ids_for("augmentation")[index.numpy()], key)


@contextmanager
def _exact_steps(model: nn.Module, rows: _Rows, training: Training, loss: Loss, dpsgd: DPSGD) -> Iterator[Steps]:
    if not isinstance(model, MLP):
        raise ValueError(f"exact arithmetic is for our MLP, not for {type(model).__name__}: use arithmetic opacus")
    rate, widths = model.dropout.p, model.sizes[1:-1]
    ids = rows.ids_for("dropout in exact arithmetic") if rate else None
    optimizer = ExactOptimizer(
        make_optimizer(trained_of(model), training),
        model=model,
        loss=loss,
        source=rows.noise,
        noise_multiplier=dpsgd.noise_multiplier,
        max_grad_norm=dpsgd.clip,
        expected_batch_size=dpsgd.expected_batch_size,
        copies=rows.copies,
    )

    def take(index: Tensor) -> None:
        key, drawn = rows.key(wanted=bool(rate)), list[Tensor]()
        if ids is not None:
            drawn = masks(ids[index.numpy()], widths, rate=rate, key=key, copies=rows.copies)
        optimizer.take(*rows.take(index, key), [mask.to(rows.device) for mask in drawn])

    yield optimizer, take


@contextmanager
def _float_steps(model: nn.Module, rows: _Rows, training: Training, loss: Loss, dpsgd: DPSGD) -> Iterator[Steps]:
    """Opacus' own arithmetic, for any module that it can wrap."""
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = _FloatOptimizer(
        make_optimizer(trained_of(model), training),
        noise_multiplier=dpsgd.noise_multiplier,
        max_grad_norm=dpsgd.clip,
        expected_batch_size=dpsgd.expected_batch_size,
        loss_reduction="mean",
    )
    optimizer.source, optimizer.copies = rows.noise, rows.copies

    def take(index: Tensor) -> None:
        x, y = rows.take(index, rows.key(wanted=False))
        total = objective.row_losses(module(x), y, loss).sum()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            total.backward()  # type: ignore[no-untyped-call]  # torch gives it none

    try:
        with torch_seed(rows.noise.integer(), rows.device):
            yield optimizer, take
    finally:
        module.to_standard_module()


class _FloatOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimizer with noise from our source, and rows without a finite gradient left out. A row's gradient is
    the mean of its copies'."""

    source: NoiseSource
    copies: int = 1

    def clip_and_accumulate(self) -> None:
        if self.copies > 1:
            for p in self.params:
                g = p.grad_sample
                p.grad_sample = g.reshape(len(g) // self.copies, self.copies, *g.shape[1:]).mean(1)
        if len(self.grad_samples[0]):
            finite = torch.stack([g.flatten(1).isfinite().all(dim=1) for g in self.grad_samples]).all(dim=0)
            if not finite.all():
                for p in self.params:
                    p.grad_sample[~finite] = 0.0
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        for p in self.params:
            noise = self.source.gaussian(p.summed_grad, self.noise_multiplier * self.max_grad_norm)
            p.grad = (p.summed_grad + noise).view_as(p)
