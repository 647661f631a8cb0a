"""Checkpoints: written whole or not at all, read without running what they hold."""

import os
import pickle
import zipfile
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from utils.errors import UserError

LATEST = "checkpoint.pth"


def save_checkpoint(state: dict[str, Any], path: str) -> None:
    """Write ``state`` to ``path``: to a temporary file first, which then takes its place."""
    temporary = path + ".tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    **also: Any,
) -> dict[str, Any]:
    """What ``restore_training`` needs, the configuration as text, and ``also``."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "config": config.dump(),
        **also,
    }


def restore_training(
    state: dict[str, Any],
    path: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    also: tuple[str, ...] = (),
) -> None:
    """Put model, optimizer and loss scaling back to where a checkpoint was written.

    Args:
        state: the checkpoint, read from ``path``.
        path: what to call it in an error.
        model, optimizer, scaler: what is restored.
        also: further names that the checkpoint must have.

    Raises:
        UserError: something is missing, or belongs to another model or optimizer.
    """
    absent = {"model", "optimizer", "scaler", *also} - set(state)
    if absent:
        raise UserError(f"{path}: cannot resume, the checkpoint has no {', '.join(sorted(absent))}")
    load_model(model, state["model"], path)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: state of another optimizer ({error})") from error
    scaler.load_state_dict(state["scaler"])


def latest_checkpoint(folder: str) -> str | None:
    """Path of the newest checkpoint of a run folder, None if it has none."""
    path = os.path.join(folder, LATEST)
    return path if os.path.exists(path) else None


def checkpoint_to_resume(config: CfgNode, folder: str) -> str | None:
    """MODEL.RESUME, or with TRAIN.AUTO_RESUME the newest of ``folder``; None if there is none."""
    found = latest_checkpoint(folder) if config.TRAIN.AUTO_RESUME else None
    return config.MODEL.RESUME or found


def _read(path: str, kind: type, map_location: str | torch.device) -> Any:
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged, or holds more than weights ({reason})") from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise UserError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, kind):
        raise UserError(f"{path}: expected a {kind.__name__}, found a {type(state).__name__}")
    return state
