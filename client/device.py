"""Where a site trains, and a test that private training there is what it says.

Exact arithmetic (client/training/kernel.py) rests on IEEE 754 in float64 and on matrix products of whole numbers
within 2^53. Whether a device keeps to that is not believed but tried, at each start: a sum over rows must have the same
bits as everywhere, and be the sum of its parts.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from client.training.kernel import ExactMLP, row_bits, weight_bits
from common.errors import DeviceError

CPU = torch.device("cpu")
WIDTHS = (1, 2, 7, 64, 129, 785, 3000)  # of the products that are tried
# SHA-256 of the sums below, which are the same on every machine.
EXPECTED = "83db9bf1efd8f1e0e75240c14c9bfb579a1804ac6deac9cf6b5a5bbdff703096"


def resolve_device(name: str, *, exact: bool = False) -> torch.device:
    """The device of that name. `auto` is a GPU if there is one that can be used, else the CPU.

    Args:
        exact: it must pass `is_exact`.

    Raises:
        DeviceError: what was asked for is not here, or not exact.
    """
    if name == "auto":
        return _best(exact)
    device = torch.device(name)
    if device.type == "cuda":
        here = torch.cuda.device_count()
        if (device.index or 0) >= here:
            raise DeviceError(f"device {name} is not here ({here} CUDA devices found); use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps is not here; use auto or cpu")
    if exact and not is_exact(device):
        what = "has no float64" if device.type == "mps" else "does not compute exactly, as a test at the start showed"
        raise DeviceError(f"device {name} {what}, and privacy.row rests on that; use device cpu")
    return device


def _best(exact: bool) -> torch.device:
    for kind, here in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if here and not (exact and not is_exact(torch.device(kind))):
            return torch.device(kind)
    if exact and not is_exact(CPU):
        raise DeviceError("this CPU does not compute exactly, as a test at the start showed; privacy.row rests on that")
    return CPU


def describe_device(device: torch.device) -> str:
    """The device for a person: `cuda:0 (NVIDIA H100)`, `cpu`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


@lru_cache(maxsize=16)
def is_exact(device: torch.device) -> bool:
    """Are clipped sums and predictions on the device the known ones, and sums over rows those of their parts?"""
    if device.type == "mps":
        return False
    if not all(_multiplies_exactly(width, rows, device) for width in WIDTHS for rows in (1, 2, 33)):
        return False
    digest = hashlib.sha256()
    for activation, loss, outputs in (
        ("relu", "cross_entropy", 3),
        ("tanh", "mse", 1),
        ("sigmoid", "binary_cross_entropy", 1),
    ):
        layers = [
            (_numbers(64 * 37, 1, device).view(64, 37), _numbers(64, 2, device)),
            (_numbers(outputs * 64, 3, device).view(outputs, 64), _numbers(outputs, 4, device)),
        ]
        net = ExactMLP(layers, activation=activation, loss=loss)
        x, y = _numbers(101 * 37, 5, device).view(101, 37), torch.arange(101, device=device) % 2
        x[50] *= 1e-44  # subnormal
        sums = net.clipped_sum(x, y, clip=0.5)
        for cut in (1, 7, 64, 100):
            parts = [net.clipped_sum(x[part], y[part], clip=0.5) for part in (slice(cut), slice(cut, None))]
            if not all(torch.equal(a + b, whole) for a, b, whole in zip(*parts, sums, strict=True)):
                return False
        for each in (*sums, (net.predictions(x) * 2.0**30).round()):
            digest.update(each.cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest() == EXPECTED


def _multiplies_exactly(width: int, rows: int, device: torch.device) -> bool:
    """Are products of whole numbers that fill 2^53 those that integers give, where all add up and where they cancel?"""
    bits = row_bits(width), weight_bits(width)
    for signs in (1, 2):
        a, b = (
            ((_numbers(size * width, seed, CPU).double() + 1.0) * 2.0 ** (most - 1)).to(torch.int64).view(-1, width)
            for size, seed, most in ((rows, 6, bits[0]), (8, 7, bits[1]))
        )
        a[:, 0], b[:, 0] = 2 ** bits[0] - 1, 2 ** bits[1] - 1
        if signs == 2:
            b[:, width // 2 :] = -b[:, width // 2 :]
        found = a.double().to(device) @ b.double().to(device).mT
        if not torch.equal(found.cpu().to(torch.int64), a @ b.mT):
            return False
    return True


def _numbers(size: int, seed: int, device: torch.device) -> Tensor:
    """[size] float32 numbers in [-1, 1) that look like chance, made from whole numbers: the same everywhere."""
    index = torch.arange(size, dtype=torch.int64) * 2654435761 + seed * 40503
    mixed = (index ^ (index >> 15)) * 2246822519 & 0xFFFFFF
    return (mixed.to(torch.float32) * 2.0**-23 - 1.0).to(device)
