"""Reading what ``torch.save`` wrote, without running it, and naming what it did not write."""

import pickle
import re
import zipfile
from typing import Any

import torch

from utils.errors import UserError, reading
from utils.stand_in import StandIn, stand_ins

# How what is no checkpoint often begins, and what it is.
BEGINNINGS = (
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (rb"\s*<(!doctype|html|\?xml|head|body)", "a web page, as a failed download leaves it"),
    (rb"\x1f\x8b|.{257}ustar", "a packed archive: unpack it"),
    (rb"\x80[\x03-\x05]", "a pickle that torch did not write"),
    (rb"[\t\r\n\x20-\x7e]{16}", "a text file"),
)


def read_torch_file(path: str, kind: type, map_location: str | torch.device) -> Any:
    """Read a file of ``torch.save``: tensors, and plain data beside them.

    An object of any other class, such as a configuration, becomes a ``StandIn``. Its class is not
    imported, and nothing is run.

    Args:
        path: the file, of any version of torch.
        kind: what the file must hold: ``dict`` or ``torch.Tensor``.
        map_location: the device.

    Raises:
        UserError: missing, damaged, or another kind of file, which is named.
    """
    with reading(path, "damaged, or no checkpoint"):
        _refuse_other_files(path)
        _check_sums(path)
        state = _load(path, map_location)
    if isinstance(state, StandIn) or not isinstance(state, kind):
        found = getattr(state, "kind", type(state).__name__)
        whole = "_modules" in getattr(state, "entries", ())
        hint = ", a whole model as an object: save its state_dict() instead" if whole else ""
        raise UserError(f"{path}: expected a {kind.__name__}, found a {found}{hint}")
    return state


def _refuse_other_files(path: str) -> None:
    """Name what is no checkpoint at all, in a ``UserError``."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path}: an empty file, not a checkpoint")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise UserError(f"{path}: a zip archive of other files, not a checkpoint")
        if any(name.endswith("constants.pkl") for name in names):
            raise UserError(f"{path}: a TorchScript program, not a checkpoint")
        return
    for pattern, kind in BEGINNINGS:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            what, _, advice = kind.partition(": ")
            raise UserError(f"{path}: {what}, not a checkpoint{advice and ': '}{advice}")


def _load(path: str, map_location: str | torch.device) -> Any:
    try:
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            known = stand_ins(path)
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # torch's reason, without its advice to run what the file holds
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        unknown = "it holds what cannot be read"
        raise ValueError(unknown if "weights_only" in text else text) from error


def _check_sums(path: str) -> None:
    """Compare each record with its CRC-32, which torch writes but does not look at.

    So no separate digest is needed, which could not be replaced in the same instant as the
    checkpoint. Files in the format before torch 1.6 have no CRC-32.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
