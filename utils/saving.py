"""When the checkpoints of a training run are written, and which of them stay."""

import contextlib
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from yacs.config import CfgNode

from utils.checkpoint import LATEST, PREVIOUS, epoch_checkpoints, save_checkpoint
from utils.distributed import on_first_process, rank
from utils.errors import UserError
from utils.launch import Run


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
