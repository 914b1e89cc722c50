"""A private step in exact arithmetic beside Opacus', in turn, with secure noise on both sides; and the same bits.

python -m simulations.benchmarks.kernel [--device cuda]

Shapes: W1, 784-200-200-10 with 32 rows; W2, 10-50-2 with 28. Medians of 51 turns on one thread. With a device, its
times and Opacus' stand beside the CPU's, and whether its sums are the CPU's to the last bit.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from opacus import GradSampleModule

from client.device import describe_device, is_exact
from client.training.dpsgd import _exact_steps, _float_steps, _FloatOptimizer, _Rows
from client.training.kernel import ExactMLP
from client.training.plain import make_optimizer
from client.training.recipe import DPSGD
from common.document.federation import Training
from common.model import objective
from common.model.mlp import MLP
from common.privacy import noise

SHAPES = {"W1": ([784, 200, 200, 10], 32), "W2": ([10, 50, 2], 28)}
TURNS = 51


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, {describe_device(device)}, exact: {is_exact(device)}")
    for name, (sizes, rows) in SHAPES.items():
        places = [torch.device("cpu"), *([device] if device.type != "cpu" else [])]
        sums = [_compare(name, sizes, rows, place) for place in places]
        if len(sums) > 1:
            same = all(torch.equal(a, b) for a, b in zip(*sums, strict=True))
            print(
                f"{name} {device}: the clipped sum has {'the same bits as' if same else 'OTHER bits than'} on the CPU"
            )


def _compare(name: str, sizes: list[int], rows: int, device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = MLP(sizes[0], sizes[1:-1], sizes[-1]).to(device)
    x, y = torch.randn(rows, sizes[0]).to(device), torch.randint(0, sizes[-1], (rows,)).to(device)
    training = Training(rounds=1, local_steps=1, batch_size=32, learning_rate=0.1)
    module = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    hooked = _FloatOptimizer(
        make_optimizer(module.parameters(), training), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=32
    )

    def hooks() -> None:
        hooked.zero_grad(set_to_none=True)
        objective.row_losses(module(x), y, "cross_entropy").sum().backward()  # type: ignore[no-untyped-call]  # torch gives it none
        hooked.clip_and_accumulate()

    def exact() -> list[torch.Tensor]:
        return ExactMLP(model.weights(), activation="relu", loss="cross_entropy").clipped_sum(x, y, clip=1.0)

    clipped = _times({"exact": exact, "opacus": hooks}, device)
    _say(f"{name} {device}: clipped sum", clipped)
    dpsgd = DPSGD(steps=1, sampling_rate=1.0, clip=1.0, noise_multiplier=1.0, expected_batch_size=32)
    whole: dict[str, Callable[[], object]] = {}
    table = _Rows(x, y, None, None, noise.secure())
    with (
        _exact_steps(copy.deepcopy(model), table, training, training.loss, dpsgd) as (ours, take),
        _float_steps(copy.deepcopy(model), table, training, training.loss, dpsgd) as (theirs, pass_),
    ):
        index = torch.arange(rows)

        def exact_step() -> None:
            ours.zero_grad(set_to_none=True)
            take(index)
            ours.step()

        def opacus_step() -> None:
            theirs.zero_grad(set_to_none=True)
            pass_(index)
            theirs.step()

        whole = {"exact": exact_step, "opacus": opacus_step}
        _say(f"{name} {device}: a whole step, secure noise", _times(whole, device))
    return [part.cpu() for part in exact()]


def _times(kinds: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Milliseconds, medians."""
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(TURNS + 3):
        for name, run in kinds.items():
            _settle(device)
            started = time.perf_counter()
            run()
            _settle(device)
            if turn >= 3:
                taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(times) for name, times in taken.items()}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(what: str, times: dict[str, float]) -> None:
    ours, theirs = times["exact"], times["opacus"]
    print(f"{what}: exact {ours:.2f} ms, Opacus {theirs:.2f} ms, {theirs / ours:.2f} x")


if __name__ == "__main__":
    main()
