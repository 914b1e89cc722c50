"""The multilayer perceptron in torch, and its weights (common/model/weights.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.document.federation import Federation
from common.model.weights import Weights, initial_weights

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Linear layers with an activation, and dropout if any, between them: [batch, inputs] -> [batch, outputs]."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.sizes = (inputs, *hidden, outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(self.sizes))
        self.activation_name = activation
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.dropout(self.activation(layer(x)))
        out: Tensor = self.layers[-1](x)
        return out

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's weight [out, in] and bias [out], without gradients. They share the model's memory."""
        detached = [p.detach() for p in self.parameters()]
        return list(zip(detached[::2], detached[1::2], strict=True))


def build(federation: Federation, *, seed: int | None = None) -> MLP:
    """The federation's model with weights drawn from `seed` (the federation's own by default)."""
    return with_weights(federation, initial_weights(federation, seed=seed))


def with_weights(federation: Federation, weights: Mapping[str, NDArray[np.float32]]) -> MLP:
    """The federation's model with these weights. Raises RuntimeError where names or shapes differ.

    torch's global generator is left as it was.
    """
    inputs, *hidden, outputs = federation.layer_sizes
    settings = federation.model
    with torch.random.fork_rng(devices=[]):  # torch draws weights of its own, which are overwritten
        model = MLP(inputs, hidden, outputs, activation=settings.activation, dropout=settings.dropout)
    load_weights(model, weights)
    return model


def frozen(model: MLP, federation: Federation) -> MLP:
    """The model, of which training is to leave the layers alone that the document freezes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in federation.frozen_arrays)
    return model


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves."""
    return [p for p in model.parameters() if p.requires_grad]


def trained_layers(model: MLP) -> list[int]:
    """The layers that training moves, from 0."""
    return [i for i, layer in enumerate(model.layers) if layer.weight.requires_grad]


def weights_of(model: nn.Module) -> Weights:
    """The model's parameters as named arrays, copied to the CPU."""
    return {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Overwrites the model's parameters. Raises RuntimeError where names or shapes differ."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
