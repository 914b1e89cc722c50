"""An exported ONNX file as a predictor: its own encoding and its own arithmetic, by onnxruntime."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from common.data.encoding import EncodedBlock
from common.document import federation as federations
from common.document.schema import Classes
from common.errors import ConfigError, ModelError
from common.inference.canonical import canonical
from common.inference.onnx_model import PREDICTION, PROBABILITIES
from common.inference.predictor import Outputs

Inputs = dict[str, NDArray[Any]]  # [rows, 1] each: numbers or texts


class OnnxPredictor:
    """Predicts as the file does, whatever was done to it since."""

    def __init__(self, data: bytes, source: str, *, threads: int = 0) -> None:
        """`threads` of one operation; 0 is as many as the machine has. Raises `ModelError` naming `source` if that is
        no ONNX file which Cloister exported."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what is wrong, the error says
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            held = self._session.get_modelmeta().custom_metadata_map
            about = json.loads(held["cloister"])
            self._inputs: dict[str, str] = json.loads(held["inputs"])
            self.federation = federations.from_canonical(about["federation"])
        except ConfigError as error:
            raise ModelError(f"{source}: its federation's document is not valid here: {error.problems[0]}") from error
        except Exception as error:  # onnxruntime has a tree of errors of its own
            raise ModelError(f"{source}: not an ONNX file that Cloister exported, or damaged") from error
        self.about = about

    def outputs(self, rows: EncodedBlock) -> Outputs:
        return self.run(self.inputs_of(rows))

    def inputs_of(self, rows: EncodedBlock) -> Inputs:
        """Rows as the file is given them."""
        given = canonical(rows, self.federation.data_schema)
        return {self._inputs[name]: np.asarray(column)[:, None] for name, column in given.items()}

    def run(self, given: Inputs) -> Outputs:
        """What the file makes of `inputs_of` rows."""
        if isinstance(self.federation.data_schema.target, Classes):
            probabilities: Outputs = self._session.run([PROBABILITIES], given)[0]
            return probabilities
        numbers: Outputs = self._session.run([PREDICTION], given)[0][:, None]
        return numbers
