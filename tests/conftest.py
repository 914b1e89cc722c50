"""What every test needs: quick and repeatable torch, and no Flower chatter."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Two threads on small matrices are far slower than one when the machine is busy.
torch.set_num_threads(1)
settings.register_profile("cloister", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("cloister")


@pytest.fixture(autouse=True)
def quiet_flower() -> None:
    import flwr.supercore  # noqa: F401  configures its logger on import

    logging.getLogger("flwr").setLevel(logging.ERROR)
