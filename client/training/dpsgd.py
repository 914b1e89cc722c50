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

from client.training.dropout import KEY, RowIds, masks
from client.training.exact import ExactOptimizer
from client.training.plain import add_proximal_term, copies, make_optimizer, set_rate, torch_seed
from client.training.recipe import DPSGD
from common.document.federation import Training
from common.model import objective
from common.model.mlp import MLP
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
    learning_rate: Callable[[int], float] | None = None,
    ids: RowIds | None = None,
) -> None:
    """Trains `model` in place by DP-SGD.

    An empty batch takes its noisy step like any other. A row whose gradient is not finite counts as 0, which is within
    every clip.

    Args:
        x: [rows, inputs].
        y: [rows].
        learning_rate: of each step, from 0; by default always the document's. It is public, and so are noisy gradients.
        ids: of the rows (client/training/dropout.py); only dropout in exact arithmetic needs them.

    Raises:
        ValueError: exact arithmetic is asked for a module that is not our MLP.
    """
    start = copies(model)
    model.train()
    steps = _exact_steps if dpsgd.arithmetic == "exact" else _float_steps
    with steps(model, x, y, training, dpsgd, noise, ids) as (optimizer, take):
        if proximal_mu:  # after the noise, and before the step
            optimizer.attach_step_hook(lambda _: add_proximal_term(model, start, proximal_mu))
        for step in range(dpsgd.steps):
            if learning_rate is not None:
                set_rate(optimizer, learning_rate(step))
            optimizer.zero_grad(set_to_none=True)
            take(torch.from_numpy(noise.poisson_sample(len(y), dpsgd.sampling_rate)))
            optimizer.step()


@contextmanager
def _exact_steps(
    model: nn.Module, x: Tensor, y: Tensor, training: Training, dpsgd: DPSGD, noise: NoiseSource, ids: RowIds | None
) -> Iterator[Steps]:
    if not isinstance(model, MLP):
        raise ValueError(f"exact arithmetic is for our MLP, not for {type(model).__name__}: use arithmetic opacus")
    rate = model.dropout.p
    if rate and (ids is None or len(ids) != len(y)):
        raise ValueError("dropout in exact arithmetic needs the ids of the rows")
    optimizer = ExactOptimizer(
        make_optimizer(model.parameters(), training),
        model=model,
        loss=training.loss,
        source=noise,
        noise_multiplier=dpsgd.noise_multiplier,
        max_grad_norm=dpsgd.clip,
        expected_batch_size=dpsgd.expected_batch_size,
    )

    def take(index: Tensor) -> None:
        drawn: list[Tensor] = []
        if rate and ids is not None:
            drawn = [
                mask.to(x.device)
                for mask in masks(ids[index.numpy()], model.sizes[1:-1], rate=rate, key=noise.bytes(KEY))
            ]
        index = index.to(x.device)
        optimizer.take(x[index], y[index], drawn)

    yield optimizer, take


@contextmanager
def _float_steps(
    model: nn.Module, x: Tensor, y: Tensor, training: Training, dpsgd: DPSGD, noise: NoiseSource, ids: RowIds | None
) -> Iterator[Steps]:
    """Opacus' own arithmetic, for any module that it can wrap."""
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = _FloatOptimizer(
        make_optimizer(model.parameters(), training),
        noise_multiplier=dpsgd.noise_multiplier,
        max_grad_norm=dpsgd.clip,
        expected_batch_size=dpsgd.expected_batch_size,
        loss_reduction="mean",
    )
    optimizer.source = noise

    def take(index: Tensor) -> None:
        index = index.to(x.device)
        loss = objective.row_losses(module(x[index]), y[index], training.loss).sum()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it none

    try:
        with torch_seed(noise.integer(), x.device):
            yield optimizer, take
    finally:
        module.to_standard_module()


class _FloatOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimizer with noise from our source, and rows without a finite gradient left out."""

    source: NoiseSource

    def clip_and_accumulate(self) -> None:
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
