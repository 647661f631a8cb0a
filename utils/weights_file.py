"""Weights in the kinds of files that this field has, read by what is in them."""

import contextlib
import json
import os
from typing import Any

from safetensors import safe_open

from utils.errors import UserError, reading
from utils.torch_file import read_torch_file

# what a folder of Hugging Face holds, the first is taken
IN_FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
INDEX = ".index.json"
MOST_BYTES = 10**8  # of an index


def read_weights(path: str) -> dict[str, Any]:
    """Read a checkpoint: a file of torch (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), of safetensors,
    the index of either's shards, or a folder with one of these.

    Returns:
        what the file holds. Of safetensors: the tensors, their ``metadata``, and the
        ``provenance`` in it if there is one. ``hugging_face`` is what config.json beside a file
        of Hugging Face says.

    Raises:
        UserError: none of these, or a shard is missing.
    """
    if os.path.isdir(path):
        inside = [os.path.join(path, name) for name in IN_FOLDER]
        found = next(filter(os.path.exists, inside), None)
        if not found:
            raise UserError(f"{path}: a folder without {' or '.join(IN_FOLDER[1::2])}: name a file")
        return read_weights(found)
    state = _read_shards(path) if path.endswith(INDEX) else _read_file(path)
    if os.path.basename(path) in IN_FOLDER:
        with contextlib.suppress(UserError):
            beside = os.path.join(os.path.dirname(path), "config.json")
            state["hugging_face"] = _read_json(beside)
    return state


def _read_shards(path: str) -> dict[str, Any]:
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path}: no index of shards")
    state: dict[str, Any] = {}
    for name in sorted(set(map(str, shards.values()))):
        if name in ("", ".", "..") or os.path.basename(name) != name:
            raise UserError(f"{path}: it names {name[:80]!r}, which is no file beside it")
        shard = os.path.join(os.path.dirname(path), name)
        state |= _read_file(shard)
    missing = sorted(shards.keys() - state.keys())
    if missing:
        raise UserError(f"{path}: its shards have no {missing[0][:80]}")
    return state


def _read_file(path: str) -> dict[str, Any]:
    return _read_safetensors(path) if _is_safetensors(path) else read_torch_file(path, dict, "cpu")


def _is_safetensors(path: str) -> bool:
    """A header of JSON behind its length; a file that cannot be read is left to the reader."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        return start[8:] == b"{" and length <= os.path.getsize(path)
    return False


def _read_safetensors(path: str) -> dict[str, Any]:
    with reading(path, "cannot read the weights"), safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    with contextlib.suppress(ValueError, RecursionError):
        state["provenance"] = json.loads(metadata.get("provenance", "null"))
    return state | {"metadata": metadata}


def _read_json(path: str) -> dict[str, Any]:
    with reading(path, "not a JSON file"), open(path, encoding="utf-8") as file:
        content = json.loads(file.read(MOST_BYTES))
    return content if isinstance(content, dict) else {}
