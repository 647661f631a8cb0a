"""Features on disk: those of two encoders are never mixed, and nothing in a file is trusted."""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from models.pretrained import describe_origin
from utils.checkpoint import read_tensor, save_checkpoint
from utils.errors import UserError, reading
from utils.provenance import tensor_digest
from utils.run import write_text

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # is there while features are written
LARGEST_CLASS = 99_999  # the votes of k-NN take memory for each class

FEATURE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--dump-features`` and ``--load-features``."""
    parser.add_argument("--dump-features", metavar="DIR", help="write the features there")
    parser.add_argument("--load-features", metavar="DIR", help="use the features there")


def dump_features(folder: str, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write features and labels, then a manifest; on the first process only.

    Until the manifest is there, a file ``unfinished`` marks the folder.

    Args:
        folder: is made if it is missing.
        tensors: by the names of their files.
        about: what the manifest says besides their digests: ``protocol`` and ``provenance``, with
            the digest of the encoder's weights.

    Raises:
        UserError: a file cannot be written.
    """
    manifest, mark = os.path.join(folder, MANIFEST), os.path.join(folder, UNFINISHED)
    with reading(folder, "cannot write the features"):
        os.makedirs(folder, exist_ok=True)
        write_text(mark, "features are being written here, or their writer was stopped\n")
        Path(manifest).unlink(missing_ok=True)
        for name, tensor in tensors.items():
            save_checkpoint(tensor, os.path.join(folder, name))
        # of the tensors, not the files: another writer may have replaced those
        files = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        write_text(manifest, json.dumps({"files": files, **about}, indent=2))
        Path(mark).unlink(missing_ok=True)


def load_features(
    folder: str, names: tuple[str, ...], logger: logging.Logger
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Read features and labels, and what their manifest says.

    Files without a manifest, as v0.1 and DINO write them, are read with a warning.

    Args:
        folder: where they are.
        names: of the files; those with ``labels`` in their name hold labels.
        logger: is told which encoder they are of.

    Returns:
        features in float32 and labels in int64, and ``protocol`` and ``provenance``, which are
        empty without a manifest.

    Raises:
        UserError: an unfinished dump, a file that disagrees with the manifest, or one that holds
            anything but dense numbers of the kinds above on the CPU.
    """
    manifest = read_manifest(folder)
    if not manifest:
        logger.warning("%s: no %s, so the encoder of these features is unknown", folder, MANIFEST)
    tensors = []
    for name in names:
        path = os.path.join(folder, name)
        tensor = read_tensor(path)
        kind = "labels" if "labels" in name else "features"
        check_kind(tensor, kind, path)
        if manifest and manifest["files"].get(name) != tensor_digest(tensor):
            raise UserError(
                f"{path}: not the {kind} that {MANIFEST} tells of: dump all features again"
            )
        tensors.append(tensor.long() if kind == "labels" else tensor.float())
    about = {name: manifest.get(name, {}) for name in ("protocol", "provenance")}
    if manifest:
        logger.info("%s: features of %s", folder, describe_origin(about["provenance"]))
    return tensors, about


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of ``folder``, or nothing if it has none.

    Raises:
        UserError: it is damaged, or the dump was not finished.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        if os.path.exists(os.path.join(folder, UNFINISHED)):
            raise UserError(f"{folder}: writing its features was not finished: dump them again")
        return {}
    with reading(path, "not a manifest of features"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        parts = [content[part] for part in ("files", "protocol", "provenance")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: not a manifest of features")
    return content


def check_kind(tensor: torch.Tensor, kind: str, path: str) -> None:
    """Refuse a tensor that cannot be used, or whose memory is not in its file.

    Args:
        tensor: from ``path``.
        kind: ``features``, which are real numbers, or ``labels``, which are class numbers.
        path: what to call it.

    Raises:
        UserError: another kind of tensor, or a number that is no class.
    """
    types = FEATURE_TYPES if kind == "features" else LABEL_TYPES
    known = tensor.layout == torch.strided and not tensor.is_nested and tensor.dtype in types
    if not known or tensor.device.type != "cpu":
        wanted = "real numbers" if kind == "features" else "whole numbers"
        raise UserError(
            f"{path}: {kind} must be dense {wanted}, found {tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {tuple(tensor.shape)} {kind} share memory: store each row")
    if kind == "labels" and tensor.numel():
        least, most = int(tensor.min()), int(tensor.max())
        if least < 0 or most > LARGEST_CLASS:
            raise UserError(
                f"{path}: labels must be class numbers from 0 to {LARGEST_CLASS}, found "
                f"{least if least < 0 else most}"
            )
