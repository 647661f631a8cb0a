"""Checkpoints: written whole or not at all, read without running what they hold."""

import contextlib
import os
import pickle
import shutil
import zipfile
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from utils.errors import UserError
from utils.update import Update

LATEST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"


def save_checkpoint(
    state: dict[str, Any] | torch.Tensor,
    path: str,
    previous: str | None = None,
    also: str | None = None,
) -> None:
    """Write ``state`` to ``path``: on return it is on the disk, on failure nothing has changed.

    It is first written to a temporary file, which then replaces ``path``. So at every instant a
    whole file has that name.

    Args:
        state: what ``torch.save`` takes.
        path: the file.
        previous: a new name for the old file at ``path``, if that is to be kept.
        also: a second name for the new file.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            _write(state, file)
            file.flush()
            os.fsync(file.fileno())
        if also:  # first, so that whoever finds the new ``path`` finds this one too
            link_file(temporary, also)
        if previous and os.path.exists(path):
            link_file(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    _sync_folder(path)


def link_file(path: str, name: str) -> None:
    """Give the file at ``path`` a second ``name``, which stays when ``path`` is replaced.

    It is a copy where the file system has no links.
    """
    if os.path.exists(name) and os.path.samefile(path, name):
        return  # renaming one name of a file to another would do nothing
    temporary = name + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(path, temporary)
    except OSError:
        with open(path, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
    os.replace(temporary, name)
    _sync_folder(name)


def read_checkpoint(path: str, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of tensors, numbers and text; nothing in it is run.

    Raises:
        UserError: missing, truncated, or holding anything else.
    """
    return _read(path, dict, map_location)


def read_tensor(path: str) -> torch.Tensor:
    """Read a file that holds one tensor, see ``read_checkpoint``."""
    return _read(path, torch.Tensor, "cpu")


def load_model(model: nn.Module, state_dict: dict[str, torch.Tensor], path: str) -> None:
    """Load all of ``state_dict`` into ``model``.

    Raises:
        UserError: names or shapes of another model; the first is named.
    """
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, AttributeError, TypeError) as error:
        # below its head line, torch lists what is missing, unexpected and of another shape
        details = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        reason = details[0][:200]
        raise UserError(f"{path}: checkpoint of another model ({reason})") from error


def training_state(
    config: CfgNode, model: nn.Module, update: Update, **also: Any
) -> dict[str, Any]:
    """What ``restore_training`` needs, the configuration as text, and ``also``."""
    return {
        "model": model.state_dict(),
        **update.state_dict(),
        "config": config.dump(),
        "rng_state": torch.get_rng_state(),
        **also,
    }


def restore_training(
    state: dict[str, Any], path: str, model: nn.Module, update: Update, also: tuple[str, ...] = ()
) -> None:
    """Restore model, optimizers, loss scaling and random numbers from a checkpoint.

    Args:
        state: the checkpoint, read from ``path``.
        path: what to call it in an error.
        model, update: what is restored.
        also: further names that the checkpoint must have.

    Raises:
        UserError: something is missing, or belongs to another model or optimizer.
    """
    absent = {"model", "optimizer", "scaler", *also} - set(state)
    if absent:
        raise UserError(f"{path}: cannot resume, the checkpoint has no {', '.join(sorted(absent))}")
    load_model(model, state["model"], path)
    try:
        update.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: state of another optimizer ({error})") from error
    if "rng_state" in state:
        torch.set_rng_state(state["rng_state"].cpu())


def _write(state: dict[str, Any] | torch.Tensor, file: Any) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # after a failed write, torch fails again at the end of the file and hides the cause
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_folder(path: str) -> None:
    """Make a new name last: a rename is on the disk only when its folder is."""
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # not every network file system can
        pass
    finally:
        os.close(descriptor)


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


def _read(path: str, kind: type, map_location: str | torch.device) -> Any:
    try:
        _check_sums(path)
        state = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged, or holds more than weights ({reason})") from error
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).splitlines() or ["empty"])[0]
        raise UserError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, kind):
        raise UserError(f"{path}: expected a {kind.__name__}, found a {type(state).__name__}")
    return state
