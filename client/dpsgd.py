"""Differentially private local training, with Opacus. Apart from client/training.py because importing Opacus takes
seconds, which a client that trains without privacy need not wait for."""

from __future__ import annotations

import warnings

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.training import DPSGD, add_proximal_term, copies, make_optimizer, torch_seed
from common import objective
from common.federation import Training
from common.noise import NoiseSource


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
    start = copies(model)
    model.train()
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = _NoisyOptimizer(
        make_optimizer(model, training),
        noise_multiplier=dpsgd.noise_multiplier,
        max_grad_norm=dpsgd.clip,
        expected_batch_size=dpsgd.expected_batch_size,
        loss_reduction="mean",
    )
    optimizer.source = noise
    try:
        with torch_seed(noise.integer(), x.device):
            for _ in range(dpsgd.steps):
                optimizer.zero_grad(set_to_none=True)
                index = torch.from_numpy(noise.poisson_sample(len(y), dpsgd.sampling_rate)).to(x.device)
                loss = objective.row_losses(module(x[index]), y[index], training.loss).sum()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Full backward hook is firing")
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.pre_step()
                add_proximal_term(model, start, proximal_mu)
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
