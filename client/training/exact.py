"""Opacus' optimizer with exact arithmetic: the frame of DP-SGD is Opacus', the numbers are the kernel's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from client.training.kernel import BITS, ExactMLP, Room, sensitivity
from common.document.heads import Loss
from common.errors import PrivacyError
from common.model.mlp import MLP, trained_layers, trained_of
from common.privacy.noise import NoiseSource


class ExactOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """DP-SGD's step on an MLP by kernel.py: clipped sums are integers, and so is the noise added to them.

    Usage is Opacus', but a batch is handed over by `take` instead of a backward pass, and noise comes from `source`.
    With noise of standard deviation `noise_multiplier` x S on sums of sensitivity S, in units of clip / 2^30, the step
    is the Gaussian mechanism of that multiplier, rounded. What follows (division, momentum, decay, Adam) is
    computed from it alone.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        model: MLP,
        loss: Loss,
        source: NoiseSource,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int,
        copies: int = 1,
    ) -> None:
        """`optimizer` is over the parameters of `model` that are trained, layer by layer, in their order; `copies` of
        each row come one after another, and their mean gradient is the row's."""
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._model, self._loss, self._source, self._room = model, loss, source, Room()
        self._copies, self._trained = copies, trained_layers(model)
        self._batch: tuple[Tensor, Tensor, Sequence[Tensor]] | None = None
        self._sums: list[Tensor] | None = None

    def take(self, x: Tensor, y: Tensor, masks: Sequence[Tensor] = ()) -> None:
        """The rows of the next step, with their copies: [n, inputs], [n], and dropout's masks [n, width] for each
        hidden layer."""
        self._batch = x, y, masks

    def clip_and_accumulate(self) -> None:
        assert self._batch is not None, "take() gives a step its rows"
        x, y, masks = self._batch
        self._batch = None
        activation, room = self._model.activation_name, self._room
        net = ExactMLP(self._model.weights(), activation=activation, loss=self._loss, room=room, trained=self._trained)
        sums = net.clipped_sum(x, y, clip=self.max_grad_norm, masks=masks, copies=self._copies)
        self._sums = sums if self._sums is None else [a + b for a, b in zip(self._sums, sums, strict=True)]

    def add_noise(self) -> None:
        assert self._sums is not None
        most = sensitivity(self._model.sizes, copies=self._copies, trained=self._trained)
        tau = math.nextafter(self.noise_multiplier * most, math.inf)
        parameters = iter(trained_of(self._model))
        sizes = [total.numel() for total in self._sums]
        drawn = torch.split(torch.from_numpy(self._source.rounded_normal(sum(sizes), tau)), sizes)
        for total, noise in zip(self._sums, drawn, strict=True):
            noisy = total + noise.to(total.device).view_as(total)
            for part in (noisy[:, :-1], noisy[:, -1]):
                p = next(parameters)
                p.grad = part.to(p.dtype)

    def scale_grad(self) -> None:
        for p in self.params:  # from units of clip / 2^30
            p.grad *= self.max_grad_norm / 4.0**BITS / self.expected_batch_size

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """As Opacus', which asks for per-row gradients that are not made here."""
        self.clip_and_accumulate()
        self._is_last_step_skipped = bool(self._check_skip_next_step())
        if self._is_last_step_skipped:
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self._is_last_step_skipped:
            self._sums = None
        self._plain.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One private step. There is no backward pass, and so no closure."""
        assert closure is None
        return self._plain.step() if self.pre_step() else None

    # Opacus takes the optimizer that it finds under this name out of its wrapper, to wrap it anew.

    @property
    def original_optimizer(self) -> Optimizer:
        raise PrivacyError(
            "PrivacyEngine.make_private would put Opacus' floating point in place of this optimizer's exact "
            "arithmetic; use it as it is, or give the engine a plain torch optimizer"
        )

    @original_optimizer.setter
    def original_optimizer(self, optimizer: Optimizer) -> None:
        self._plain = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._plain.param_groups

    @property
    def state(self) -> Any:
        return self._plain.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self._plain.defaults

    def state_dict(self) -> dict[str, Any]:
        return self._plain.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._plain.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"ExactOptimizer({self._plain!r})"
