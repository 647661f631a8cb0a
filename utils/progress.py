"""Where a run is, when that is saved, and from where it continues."""

import contextlib
import glob
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from utils.checkpoint import LATEST, PREVIOUS, read_checkpoint, restore_training, save_checkpoint
from utils.distributed import on_first_process, rank, world_size
from utils.errors import UserError
from utils.run import Run

EPOCH = re.compile(r"ckpt_epoch_(\d+)\.pth")


class Checkpoints:
    """The files ``checkpoint.pth``, ``checkpoint_previous.pth`` and ``ckpt_epoch_N.pth``.

    Args:
        config: SAVE_FREQ and, of TRAIN, EPOCHS, KEEP_CHECKPOINTS, SAVE_MINUTES, SAVE_STEPS and
            ON_SAVE_ERROR.
        run: folder and log.
        resumed_from: the checkpoint that the run continues from, if any.
    """

    def __init__(self, config: CfgNode, run: Run, resumed_from: str | None) -> None:
        self.config, self.run = config, run
        self.latest = os.path.join(run.folder, LATEST)
        self.last_good = resumed_from
        # what was passed over as damaged must not take the place of the one before it
        damaged = resumed_from in self._fallbacks()
        self._previous = None if damaged else os.path.join(run.folder, PREVIOUS)
        self._saved_at = time.monotonic()
        if rank() == 0:  # what an interrupted write has left
            for path in glob.glob(os.path.join(glob.escape(run.folder), "*.pth.tmp")):
                with contextlib.suppress(OSError):
                    os.remove(path)

    def time_is_up(self) -> bool:
        """Whether SAVE_MINUTES have passed since a checkpoint or the last yes; the first decides.

        The processes have to agree on the answer.
        """
        seconds = 60 * self.config.TRAIN.SAVE_MINUTES
        up = bool(seconds) and rank() == 0 and time.monotonic() - self._saved_at >= seconds
        if up:
            self._saved_at = time.monotonic()
        return up

    def due(self, step: int) -> bool:
        """Whether SAVE_STEPS asks for a checkpoint after ``step`` updates."""
        every = self.config.TRAIN.SAVE_STEPS
        return every > 0 and step % every == 0

    def save(self, state: Callable[[], dict[str, Any]], ended: int | None = None) -> None:
        """Write ``checkpoint.pth``; every process has to call it, and the first writes.

        Args:
            state: makes what is to be written, with the weights as ``model``.
            ended: the epoch, if it has ended; then ``ckpt_epoch_N.pth`` where that is due.

        Raises:
            UserError: on every process: weights that are not finite, or a file that cannot be
                written if ON_SAVE_ERROR is stop.
        """
        on_first_process(lambda: self._save(state(), ended))
        self._saved_at = time.monotonic()

    def _save(self, state: dict[str, Any], ended: int | None) -> None:
        if not all_finite(state["model"]):
            raise UserError(
                f"the weights are not finite any more: nothing was saved, {self._kept()}"
            )
        kept = None
        if ended is not None:
            last = ended + 1 == self.config.TRAIN.EPOCHS
            if last or (ended + 1) % self.config.SAVE_FREQ == 0:
                kept = os.path.join(self.run.folder, f"ckpt_epoch_{ended}.pth")
        try:
            save_checkpoint(state, self.latest, self._previous, kept)
        except OSError as error:
            needed, free = state_bytes(state), shutil.disk_usage(self.run.folder).free
            message = (
                f"{self.latest}: cannot write the checkpoint ({error.strerror or error}): it takes "
                f"{needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free: {self._kept()}"
            )
            if self.config.TRAIN.ON_SAVE_ERROR == "stop":
                raise UserError(message) from error
            self.run.logger.error(message)
            return
        self.last_good = self.latest
        self._previous = os.path.join(self.run.folder, PREVIOUS)
        self.run.logger.info("%s saved", " and ".join(filter(None, (self.latest, kept))))
        if kept and ended is not None:
            self._prune(ended)

    def _prune(self, epoch: int) -> None:
        keep = self.config.TRAIN.KEEP_CHECKPOINTS
        # later epochs are another run's
        own = [p for n, p in epoch_checkpoints(self.run.folder).items() if n <= epoch]
        for path in own[keep:] if keep else ():
            with contextlib.suppress(OSError):
                os.remove(path)

    def _kept(self) -> str:
        return f"the last good checkpoint is {self.last_good or 'none so far'}"

    def _fallbacks(self) -> list[str]:
        previous = os.path.join(self.run.folder, PREVIOUS)
        return [previous, *epoch_checkpoints(self.run.folder).values()]


def all_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether no tensor has a value that is infinite or not a number."""
    finite = [t.isfinite().all() for t in tensors.values() if t.is_floating_point()]
    return bool(torch.stack(finite).all())


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    return sum(t.numel() * t.element_size() for t in _tensors(state))


def _tensors(node: Any) -> Iterator[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _tensors(child)


def images_per_update(config: CfgNode) -> int:
    """Of all processes and micro-batches."""
    return config.DATA.BATCH_SIZE * world_size() * max(1, config.TRAIN.ACCUMULATION_STEPS)


def locate(epoch: int, images: int, per_update: int, steps_per_epoch: int) -> tuple[int, int]:
    """The update with which to continue after ``images`` images of ``epoch``.

    Args:
        epoch: from 0.
        images: images of the epoch's order that were seen; those of a whole epoch or more mean
            that the epoch is complete.
        per_update: images an update takes now, of all processes.
        steps_per_epoch: updates of an epoch now.

    Returns:
        the number of the update, and by how many images it and those after it in the epoch start
        before their usual place, less than ``per_update``.
    """
    first = -(-images // per_update)
    if first >= steps_per_epoch:
        return (epoch + 1) * steps_per_epoch, 0
    return epoch * steps_per_epoch + first, first * per_update - images


def resume(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    run: Run,
) -> tuple[str | None, int, int]:
    """Load the checkpoint to continue from, if there is one.

    Returns:
        its path, the update to continue with, and the images by which that starts early.
    """
    path = checkpoint_to_resume(config, run.folder, run.logger)
    if not path:
        return None, config.TRAIN.START_EPOCH * steps_per_epoch, 0
    state = read_checkpoint(path, run.device)
    also = ("epoch", "step", "rng_state")
    restore_training(state, path, model, optimizer, run.precision.scaler, also)
    torch.set_rng_state(state["rng_state"].cpu())
    now, images = images_per_update(config), config.DATA.TRAINING_IMAGES
    seen = state.get("images", images)  # older checkpoints: the whole epoch
    step, shift = locate(state["epoch"], seen, now, steps_per_epoch)
    if state.get("images_per_update", now) != now:
        run.logger.warning(
            "%s was written with %d images an update, now there are %d: update %d becomes update "
            "%d, and the base rate is %.3g",
            *(path, state["images_per_update"], now, state["step"], step, config.TRAIN.BASE_LR),
        )
    if state.get("training_images", images) != images:
        run.logger.warning(
            "%s was written with %d images in the data set, now there are %d: the order of the "
            "epoch is another, images may come twice",
            *(path, state["training_images"], images),
        )
    run.logger.info("resumed from %s at update %d", path, step)
    return path, step, shift


def latest_checkpoint(folder: str) -> str | None:
    """Path of the newest checkpoint of a run folder, None if it has none."""
    path = os.path.join(folder, LATEST)
    return path if os.path.exists(path) else None


def checkpoint_to_resume(config: CfgNode, folder: str, logger: logging.Logger) -> str | None:
    """MODEL.RESUME, or with TRAIN.AUTO_RESUME the newest readable checkpoint of ``folder``.

    Every process has to call it; all get what the first finds. When the launcher has restarted
    the processes, what they have written goes before MODEL.RESUME.

    Returns:
        its path, None if there is none.

    Raises:
        UserError: the folder has checkpoints, but none can be read.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if config.MODEL.RESUME and not restarted:
        return config.MODEL.RESUME
    found = None
    if config.TRAIN.AUTO_RESUME:
        found = on_first_process(lambda: _newest_readable(folder, logger))
    return found or config.MODEL.RESUME or None


def epoch_checkpoints(folder: str) -> dict[int, str]:
    """The paths of the files ``ckpt_epoch_N.pth`` of a run folder by N, the last epoch first."""
    found = {m: p for p in Path(folder).glob("*") if (m := EPOCH.fullmatch(p.name))}
    return {int(m[1]): str(p) for m, p in sorted(found.items(), key=lambda x: -int(x[0][1]))}


def _newest_readable(folder: str, logger: logging.Logger) -> str | None:
    names = [os.path.join(folder, name) for name in (LATEST, PREVIOUS)]
    paths = [p for p in [*names, *epoch_checkpoints(folder).values()] if os.path.exists(p)]
    errors = []
    for path in paths:
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
