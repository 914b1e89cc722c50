"""A device is tried, not believed. There is only the CPU here; a device that errs is one whose products are rounded."""

from __future__ import annotations

import pytest
import torch

from client import device as devices
from client.device import is_exact, resolve_device
from client.training import kernel
from common.errors import DeviceError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    is_exact.cache_clear()
    yield
    is_exact.cache_clear()


@pytest.mark.parametrize("threads", [1, 2])
def test_this_machine_computes_the_known_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert is_exact(CPU)
    finally:
        torch.set_num_threads(before)


def rounds_products(a, layer, out):
    return out.copy_((a.float() @ layer.forward.float().mT).double() + layer.bias)


def errs_in_some_batches(a, layer, out):
    exact = a @ layer.forward.mT + layer.bias
    return out.copy_(exact * (1 + 2.0**-20) if a.shape[-2] == 7 else exact)


@pytest.mark.parametrize("bits", [50, 51, 52, 52.5])
def test_a_product_that_is_rounded_near_the_top_is_found(monkeypatch, bits):
    exact = torch.Tensor.__matmul__

    def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = exact(a, b)
        if a.dtype != torch.float64:
            return found
        return torch.where(exact(a.abs(), b.abs()) > 2.0**bits, (found / 4).round() * 4, found)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not is_exact(CPU)


def test_a_product_that_errs_where_it_is_wide_is_found(monkeypatch):
    exact = torch.Tensor.__matmul__

    def erring(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return exact(a, b) + (1 if a.shape[-1] > 128 and a.dtype == torch.float64 else 0)

    monkeypatch.setattr(torch.Tensor, "__matmul__", erring)
    assert not is_exact(CPU)


@pytest.mark.parametrize("wrong", [rounds_products, errs_in_some_batches])
def test_a_device_that_errs_is_found_and_refused(monkeypatch, wrong):
    monkeypatch.setattr(kernel, "_through", wrong)
    assert not is_exact(CPU)
    with pytest.raises(DeviceError, match="device cpu does not compute exactly, as a test at the start showed"):
        resolve_device("cpu", exact=True)
    with pytest.raises(DeviceError, match="this CPU does not compute exactly"):
        resolve_device("auto", exact=True)
    assert resolve_device("cpu") == CPU  # nothing rests on it without privacy


def test_apples_gpu_is_left_for_the_cpu_under_privacy_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    assert resolve_device("auto", exact=True) == CPU
    with pytest.raises(DeviceError, match=r"device mps has no float64, and privacy\.row rests on that; use device cpu"):
        resolve_device("mps", exact=True)


@pytest.mark.parametrize("exact, taken", [(True, "cpu"), (False, "cuda")])
def test_a_gpu_that_errs_is_not_taken_by_itself(monkeypatch, exact, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "is_exact", lambda device: device.type == "cpu")
    assert resolve_device("auto", exact=exact).type == taken


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_here_is_named(name):
    with pytest.raises(DeviceError, match=f"device {name} is not here"):
        resolve_device(name)
