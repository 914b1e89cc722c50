"""Local training and scoring. Everything here runs on tensors and knows neither network nor ledger."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from common import objective
from common.federation import Training
from common.noise import NoiseSource


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Differentially private SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    Each of `steps` steps draws rows by Poisson sampling at `sampling_rate`, clips each row's gradient to L2
    norm `clip`, adds N(0, (noise_multiplier * clip)^2 I) to the sum, and divides by `expected_batch_size`, a
    public number.
    """

    steps: int
    sampling_rate: float
    clip: float
    noise_multiplier: float
    expected_batch_size: int


def fit_privately(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    training: Training,
    dpsgd: DPSGD,
    noise: NoiseSource,
    proximal_mu: float,
) -> None:
    """Trains `model` in place by DP-SGD with Opacus' per-row gradients and clipping.

    An empty batch takes its noisy step like any other. A row whose gradient is not finite counts as 0, which
    is within every clip.
    """
    start = _copies(model)
    model.train()
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = _NoisyOptimizer(
        _optimizer(model, training),
        noise_multiplier=dpsgd.noise_multiplier,
        max_grad_norm=dpsgd.clip,
        expected_batch_size=dpsgd.expected_batch_size,
        loss_reduction="mean",
    )
    optimizer.source = noise
    try:
        with _torch_seed(noise.integer(), x.device):
            for _ in range(dpsgd.steps):
                optimizer.zero_grad(set_to_none=True)
                index = torch.from_numpy(noise.poisson_sample(len(y), dpsgd.sampling_rate)).to(x.device)
                loss = objective.row_losses(module(x[index]), y[index], training.loss).sum()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Full backward hook is firing")
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.pre_step()
                _add_proximal_term(model, start, proximal_mu)
                optimizer.original_optimizer.step()
    finally:
        module.to_standard_module()


class _NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
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


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    training: Training,
    steps: int,
    noise: NoiseSource,
    proximal_mu: float,
) -> float:
    """Trains `model` in place without privacy, on shuffled batches, and returns the mean loss of a row."""
    start = _copies(model)
    model.train()
    optimizer = _optimizer(model, training)
    rng = np.random.default_rng(noise.integer())
    total, rows = 0.0, 0
    with _torch_seed(noise.integer(), x.device):
        batches = _batches(len(y), training.batch_size, rng)
        for _ in range(steps):
            index = torch.from_numpy(next(batches)).to(x.device)
            optimizer.zero_grad(set_to_none=True)
            losses = objective.row_losses(model(x[index]), y[index], training.loss)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            _add_proximal_term(model, start, proximal_mu)
            optimizer.step()
            total += losses.detach().sum().item()
            rows += len(index)
    return total / rows


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=rate,
        momentum=training.momentum,
        nesterov=training.nesterov,
        weight_decay=decay,
    )


def _batches(rows: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    while True:
        order = rng.permutation(rows)
        for start in range(0, rows, size):
            yield order[start : start + size]


def _copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _add_proximal_term(model: nn.Module, start: list[Tensor], mu: float) -> None:
    """Adds mu (w - w_start), the gradient of FedProx' term (Li et al. 2020, arXiv:1812.06127, equation 2).

    Under privacy it comes after the noise: it is a function of what was released, and costs nothing.
    """
    if mu:
        for parameter, before in zip(model.parameters(), start, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - before, alpha=mu)


@contextmanager
def _torch_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's own generator, which only dropout uses, and restores it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
