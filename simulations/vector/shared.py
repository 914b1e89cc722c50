"""Arrays that several processes have at once, and only one copy of."""

from __future__ import annotations

import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SharedArray:
    """An array in memory that child processes can map: of no name, so nothing is left when the last of them ends."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._dtype, self._shape = array.dtype, array.shape
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("cloister")
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        os.ftruncate(self._file, max(array.nbytes, 1))
        self.array()[...] = array

    def array(self) -> NDArray[Any]:
        memory = mmap.mmap(self._file, 0)
        count = int(np.prod(self._shape))
        return np.frombuffer(memory, self._dtype, count=count).reshape(self._shape)

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.array())

    def close(self) -> None:
        """What is mapped stays."""
        os.close(self._file)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _file=state["_file"].detach())
