"""An ONNX graph while it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper, numpy_helper


class Graph:
    """Nodes and constants as they are added. Their names begin with more line feeds than any column's does."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._mark = "\n" * (1 + max(len(name) - len(name.lstrip("\n")) for name in columns))

    def add(self, kind: str, inputs: Sequence[str], *, output: str = "", domain: str = "", **attributes: Any) -> str:
        """A node; returns the name of its output."""
        name = output or f"{self._mark}{kind} {len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"{self._mark}constant {len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name
