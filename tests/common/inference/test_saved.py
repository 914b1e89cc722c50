"""A saved model is one file with all in it, and what is none is said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import numpy as safetensors

from common.errors import ModelError
from common.inference import saved
from tests.support import PRIVATE, saved_model


def test_a_model_comes_back_as_it_was():
    model = replace(saved_model(**PRIVATE), privacy={"row": {"epsilon": 3.5}})
    data = saved.to_bytes(model)
    back = saved.from_bytes(data, "it")
    assert back.federation == model.federation and back.federation.fingerprint == model.federation.fingerprint
    assert (back.round, back.run, back.privacy) == (3, "small-1", {"row": {"epsilon": 3.5}})
    assert list(back.weights) == list(model.weights)
    assert all(np.array_equal(back.weights[name], array) for name, array in model.weights.items())
    assert data == saved.to_bytes(model), "equal models are equal files"


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_is_damaged(size):
    with pytest.raises(ModelError, match="it: not a model that Cloister saved, or damaged"):
        saved.from_bytes(saved.to_bytes(saved_model())[:size], "it")


def test_a_header_that_never_ends_is_damage_and_no_crash():
    data = safetensors.save({"w": np.zeros(1, np.float32)}, metadata={"cloister": "[" * 100_000})
    with pytest.raises(ModelError, match="not a model that Cloister saved, or damaged"):
        saved.from_bytes(data, "it")


def test_weights_of_another_document_are_refused():
    other = replace(saved_model(), federation=saved_model(model__hidden=[9]).federation)
    with pytest.raises(ModelError, match="does not fit its federation's document"):
        saved.from_bytes(saved.to_bytes(other), "it")


def test_a_model_that_diverged_is_refused():
    model = saved_model()
    model.weights["layers.0.bias"][0] = np.nan
    with pytest.raises(ModelError, match="not finite; its training diverged"):
        saved.from_bytes(saved.to_bytes(model), "it")


def test_a_model_that_no_round_has_made_is_refused():
    with pytest.raises(ModelError, match="it: no round is complete yet"):
        saved.from_bytes(saved.to_bytes(replace(saved_model(), round=0)), "it")


@pytest.mark.parametrize(
    "change, message",
    [({"format": 2}, "another version of Cloister"), ({"federation": "{}"}, "document is not valid here")],
)
def test_what_this_version_cannot_read_is_said(change, message):
    model = saved_model()
    about = json.loads(json.dumps(model.about)) | change
    with pytest.raises(ModelError, match=message):
        saved.from_about(about, model.weights, "it")
