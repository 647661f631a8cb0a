"""Checkpoints: written whole or not at all, read without running what they hold."""

import contextlib
import fcntl
import glob
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from yacs.config import CfgNode

from utils.distributed import on_first_process
from utils.errors import UserError

LATEST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"
TEMPORARY = ".tmp"
EPOCH = re.compile(r"ckpt_epoch_(\d+)\.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its content, and the path that says in errors which one."""

    path: str
    state: dict[str, Any]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Write a file that gets the name ``path`` once it is whole and on the disk.

    Until then it has a name of its own, so that two writers do not share it, and a lock that shows
    that its writer lives. After an error nothing has changed.

    Raises:
        OSError: it cannot be written.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # not every network file system has locks
                fcntl.lockf(file, fcntl.LOCK_EX)
            yield file
            _flush(file)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    _sync_folder(path)


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files of writers that have died; those of living ones stay."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"*{TEMPORARY}")):
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.remove(path)


def save_checkpoint(
    state: dict[str, Any] | torch.Tensor,
    path: str,
    previous: str | None = None,
    also: str | None = None,
) -> None:
    """Write ``state`` to ``path``: on return it is on the disk, on failure nothing has changed.

    At every instant a whole file has that name, see ``replacing``.

    Args:
        state: what ``torch.save`` takes.
        path: the file.
        previous: a new name for the old file at ``path``, if that is to be kept.
        also: a second name for the new file.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        _write(state, file)
        if also:  # first, so that whoever finds the new ``path`` finds this one too
            _flush(file)
            link_file(file.name, also)
        if previous and os.path.exists(path):
            link_file(path, previous)


def link_file(path: str, name: str) -> None:
    """Give the file at ``path`` a second ``name``, which stays when ``path`` is replaced.

    It is a copy where the file system has no links.
    """
    if os.path.exists(name) and os.path.samefile(path, name):
        return  # renaming one name of a file to another would do nothing
    temporary = _temporary(name)
    try:
        os.link(path, temporary)
    except OSError:
        with replacing(name) as target, open(path, "rb") as source:
            shutil.copyfileobj(source, target)
        return
    os.replace(temporary, name)
    _sync_folder(name)


def read_checkpoint(path: str, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint; nothing in it is run, see ``read_torch_file``.

    Raises:
        UserError: missing, damaged, or no checkpoint.
    """
    from utils.torch_file import read_torch_file  # only here: many starts read no checkpoint

    return read_torch_file(path, dict, map_location)


def read_tensor(path: str) -> torch.Tensor:
    """Read a file that holds one tensor, see ``read_checkpoint``."""
    from utils.torch_file import read_torch_file

    return read_torch_file(path, torch.Tensor, "cpu")


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


def checkpoint_to_resume(config: CfgNode, folder: str, logger: logging.Logger) -> str | None:
    """The newest readable checkpoint of ``folder``, else MODEL.RESUME, from which a run begins.

    Every process has to call it; all get what the first finds. Without TRAIN.AUTO_RESUME and with
    EVAL_MODE, MODEL.RESUME takes precedence.

    Returns:
        its path, None if there is none.

    Raises:
        UserError: the folder has checkpoints, but none can be read, or the newest is a link to a
            disk that is not there.
    """
    given = config.MODEL.RESUME
    # a launcher's restart continues what the command line began
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if given and (config.EVAL_MODE or not (config.TRAIN.AUTO_RESUME or restarted)):
        return given
    found = None
    if config.TRAIN.AUTO_RESUME or (given and restarted):
        found = on_first_process(lambda: _newest_readable(folder, logger))
    same = found and os.path.exists(given) and os.path.samefile(found, given)
    if found and given and not same:
        logger.warning(
            f"continuing from the run's own {found}, not from --resume {given}: to go back to it, "
            "set TRAIN.AUTO_RESUME False"
        )
    return found or given or None


def epoch_checkpoints(folder: str) -> dict[int, str]:
    """The paths of the files ``ckpt_epoch_N.pth`` of a run folder by N, the last epoch first."""
    found = {m: p for p in Path(folder).glob("*") if (m := EPOCH.fullmatch(p.name))}
    return {int(m[1]): str(p) for m, p in sorted(found.items(), key=lambda x: -int(x[0][1]))}


def _newest_readable(folder: str, logger: logging.Logger) -> str | None:
    names = [os.path.join(folder, name) for name in (LATEST, PREVIOUS)]
    paths = [p for p in [*names, *epoch_checkpoints(folder).values()] if os.path.lexists(p)]
    errors = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(
                f"{path}: a link to {os.path.realpath(path)}, which is not there: mount its disk, "
                "or remove the link"
            )
        try:
            read_checkpoint(path)
        except UserError as error:
            errors.append(error)
            continue
        for passed_over in errors:
            logger.warning("%s: continuing from %s instead", passed_over, path)
        return path
    if errors:
        raise errors[0]
    return None


def _temporary(path: str) -> str:
    return f"{path}.{uuid.uuid4().hex[:12]}{TEMPORARY}"


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


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
    with contextlib.suppress(OSError):  # not every network file system can
        os.fsync(descriptor)
    os.close(descriptor)
