"""Weights in safetensors, whole and in shards."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.weights_file import read_weights

WEIGHTS = {"a": torch.eye(2), "b": torch.ones(3)}


def write_shards(folder, **index) -> str:
    for name, value in WEIGHTS.items():
        save_file({name: value}, folder / f"model-{name}.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return str(path)


def test_shards_are_read_together(tmp_path):
    path = write_shards(tmp_path, weight_map={n: f"model-{n}.safetensors" for n in WEIGHTS})
    found = read_weights(path)
    assert all(found[name].equal(value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no index of shards"),
        ({"weight_map": {}}, "no index of shards"),
        ({"weight_map": ["model-a.safetensors"]}, "no index of shards"),
        ({"weight_map": {"c": "model-a.safetensors"}}, "its shards have no c"),
        ({"weight_map": {"a": "../model-a.safetensors"}}, "which is no file beside it"),
        ({"weight_map": {"a": ".."}}, "which is no file beside it"),
    ],
)
def test_an_index_that_is_none_is_named(tmp_path, index, message):
    with pytest.raises(UserError, match=message):
        read_weights(write_shards(tmp_path, **index))


def test_a_file_is_known_by_its_content(tmp_path):
    """One of no weights is as long as its header's length says and eight bytes more."""
    save_file(WEIGHTS, tmp_path / "weights.bin")
    assert read_weights(str(tmp_path / "weights.bin"))["a"].equal(WEIGHTS["a"])
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        read_weights(os.fspath(tmp_path / "cut.safetensors"))
