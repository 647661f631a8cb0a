"""Where a run is, and when that is saved."""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from utils.checkpoint import LATEST, PREVIOUS, epoch_checkpoints, remove_leftovers, save_checkpoint
from utils.config import as_dict, leaves
from utils.distributed import lost_peer, on_first_process, rank, world_size
from utils.errors import Diverged, UserError
from utils.run import Run, fault
from utils.signals import NOT_SAVED, StopSignals

PAUSE = 5.0  # seconds between tries to write the last checkpoint


def images_per_update(config: CfgNode) -> int:
    """Images of one update, over all processes and micro-batches."""
    return config.DATA.BATCH_SIZE * world_size() * max(1, config.TRAIN.ACCUMULATION_STEPS)


@dataclass(frozen=True)
class EpochSize:
    """How an epoch divides into updates; images that fill no update are left out.

    Attributes:
        images: in the data set.
        images_per_update: of all processes and micro-batches.
    """

    images: int
    images_per_update: int

    @property
    def updates(self) -> int:
        """Updates of an epoch."""
        return self.images // self.images_per_update


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        size: of an epoch.
        epoch: the epoch, from 0.
        step: updates made so far.
        images_seen: images of the epoch's order that were seen.
    """

    size: EpochSize
    epoch: int = 0
    step: int = 0
    images_seen: int = 0

    def advance(self) -> None:
        """Count one update."""
        self.step += 1
        self.images_seen += self.size.images_per_update

    @property
    def steps_of_epoch(self) -> int:
        """Updates made of the epoch; one that was begun with other batches counts as made."""
        return self.step - self.epoch * self.size.updates

    @property
    def epoch_ended(self) -> bool:
        """Whether all updates of the epoch are made."""
        return self.steps_of_epoch == self.size.updates

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.images_seen = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The place for a checkpoint; an epoch that has ended counts all its images."""
        seen = self.size.images if self.epoch_ended else self.images_seen
        return {
            "epoch": self.epoch,
            "step": self.step,
            "images": seen,
            "images_per_update": self.size.images_per_update,
            "training_images": self.size.images,
        }


def locate(state: dict[str, Any], size: EpochSize) -> Progress:
    """The place of a checkpoint, even if an update had another number of images then.

    Args:
        state: ``Progress.state_dict``; older checkpoints are from the end of an epoch and have
            no ``images``.
        size: of an epoch now.

    Returns:
        the place; an epoch that has no update left may not have been reported yet.
    """
    seen, epoch = state.get("images", size.images), state["epoch"]
    begun = min(size.updates, -(-seen // size.images_per_update))
    return Progress(size, epoch, epoch * size.updates + begun, seen)


def warn_of_changes(
    state: dict[str, Any], path: str, progress: Progress, base_lr: float, logger: logging.Logger
) -> None:
    """Warn where a checkpoint's batches and data differ from those of the run that continues it.

    Args:
        state: the checkpoint, read from ``path``.
        path: what to call it.
        progress: its place now.
        base_lr: the base rate now.
        logger: gets the warnings.
    """
    size, epoch, step = progress.size, progress.epoch, progress.step
    before = state.get("images_per_update", size.images_per_update)
    if before != size.images_per_update:
        logger.warning(
            f"{path} was written with {before} images an update, now there are "
            f"{size.images_per_update}: update {state['step']} becomes update {step}, and the base "
            f"rate is {base_lr:.3g}"
        )
    before = state.get("training_images", size.images)
    if before != size.images:
        logger.warning(
            f"{path} was written with {before} images in the data set, now there are "
            f"{size.images}: the order of epoch {epoch} is another, images may come twice"
        )


LEARNED = re.compile(r"(MODEL|TRAIN|AUG|DATA)\.|SEED$")
# what is learned does not depend on these, or ``warn_of_changes`` says how
OTHER = re.compile(
    r"MODEL\.(NAME|RESUME|NUM_CLASSES|DROP_PATH_RATE)|TRAIN\.(START_EPOCH|(BASE|WARMUP|MIN)_LR"
    r"|AUTO_RESUME|WAIT_FOR_LOCK|KEEP_CHECKPOINTS|SAVE_\w+|ON_SAVE_ERROR|KNN_FREQ|PROBE|TF32"
    r"|MAX_SKIPPED_UPDATES|ACCUMULATION_STEPS|USE_CHECKPOINT)|DATA\.(?!IMG_SIZE).*"
)


def warn_of_settings(
    state: dict[str, Any], path: str, config: CfgNode, digest: str, logger: logging.Logger
) -> None:
    """Warn where what a checkpoint was trained with differs from what the run goes on with.

    Args:
        state: the checkpoint, read from ``path``.
        path: what to call it.
        config: in effect now.
        digest: of the images now, see ``data_facts``.
        logger: gets the warnings.
    """
    try:
        before = dict(leaves(yaml.safe_load(state["config"])))
    except (KeyError, AttributeError, yaml.YAMLError):
        before = {}  # of another program
    # as YAML has it, which knows no tuples
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in leaves(as_dict(config))}
    changed = [
        f"{key} {before[key]}, now {value}"
        for key, value in now.items()
        if LEARNED.match(key) and not OTHER.fullmatch(key) and before.get(key, value) != value
    ]
    if changed:
        logger.warning(f"{path} was written with other settings: {'; '.join(changed)}")
    provenance = state.get("provenance")
    data = provenance.get("data") if isinstance(provenance, dict) else None
    if isinstance(data, dict) and data.get("digest", digest) != digest:
        logger.warning(f"{path} was written with other images: their names or labels differ")


class Checkpoints:
    """The files ``checkpoint.pth``, ``checkpoint_previous.pth`` and ``ckpt_epoch_N.pth``.

    Args:
        config: SAVE_FREQ and, of TRAIN, EPOCHS, KEEP_CHECKPOINTS, SAVE_MINUTES, SAVE_STEPS and
            ON_SAVE_ERROR.
        run: folder and log.
        progress: where the run is.
        state: makes what is to be written, with the weights as ``model``.
        resumed_from: the checkpoint that the run continues from, if any.
        keep_epochs: whether epochs get files of their own.
        check_weights: refuse to save weights that are not finite.
    """

    def __init__(
        self,
        config: CfgNode,
        run: Run,
        progress: Progress,
        state: Callable[[], dict[str, Any]],
        resumed_from: str | None = None,
        keep_epochs: bool = True,
        check_weights: bool = True,
    ) -> None:
        self.config, self.run, self.progress, self.state = config, run, progress, state
        self.keep_epochs, self.check_weights = keep_epochs, check_weights
        self.latest = os.path.join(run.folder, LATEST)
        self.last_good, self._saved_step = resumed_from, progress.step
        # a damaged file that was passed over must not replace the one before it
        damaged = resumed_from in self._fallbacks()
        self._previous = None if damaged else os.path.join(run.folder, PREVIOUS)
        self._saved_at = time.monotonic()
        self._within_update = False
        if rank() == 0:  # what an interrupted write has left
            remove_leftovers(run.folder)

    def time_is_up(self) -> bool:
        """Whether SAVE_MINUTES have passed since a checkpoint or the last yes.

        Only the first process can say yes, so the processes have to share the answer.
        """
        seconds = 60 * self.config.TRAIN.SAVE_MINUTES
        up = bool(seconds) and rank() == 0 and time.monotonic() - self._saved_at >= seconds
        if up:
            self._saved_at = time.monotonic()
        return up

    def due(self) -> bool:
        """Whether the end of an epoch or SAVE_STEPS asks for a checkpoint after this update."""
        every = self.config.TRAIN.SAVE_STEPS
        return self.progress.epoch_ended or (every > 0 and self.progress.step % every == 0)

    def save(self, signals: StopSignals) -> None:
        """Write ``checkpoint.pth``; every process has to call it, and the first writes.

        At the end of an epoch it also writes ``ckpt_epoch_N.pth``, if that is due. The run may go
        on without a checkpoint, except the last: it is tried again for SAVE_PATIENCE minutes, or
        until a signal.

        Raises:
            Diverged: weights that are not finite.
            UserError: on every process: a file that cannot be written if ON_SAVE_ERROR is stop.
            SystemExit: NOT_SAVED, on every process: the last one could not be written.
        """
        state, tries = self._checked_state(), 0
        while not on_first_process(lambda: self._save(state)):
            if not self._is_last():
                return
            tries += 1
            # by the number of tries, as a clock may stand still
            over = tries * PAUSE >= 60 * self.config.TRAIN.SAVE_PATIENCE
            if any(signals.agree(over)):
                self.run.logger.error("ends without its last checkpoint: make room, start again")
                raise SystemExit(NOT_SAVED)
            time.sleep(PAUSE)
        self.last_good, self._saved_step = self.latest, self.progress.step
        self._saved_at = time.monotonic()

    @contextlib.contextmanager
    def update_under_way(self) -> Iterator[None]:
        """Within it, weights, key encoder and queue do not belong together."""
        self._within_update = True
        yield
        self._within_update = False

    @contextlib.contextmanager
    def saved_on_fault(self) -> Iterator[None]:
        """Save first what a fault between two updates would lose; nothing after one within one.

        Raises:
            UserError: the fault, if it is none of the program, and what was saved or lost.
        """
        try:
            yield
        except Diverged:
            raise
        except Exception as error:
            outcome = self._rescue(error)
            if reason := fault(error):
                raise UserError(f"{reason}: {outcome}") from error
            self.run.logger.error("%s: %s", type(error).__name__, outcome)
            raise

    def _rescue(self, error: Exception) -> str:
        step, saved = self.progress.step, self._saved_step
        # all processes hold the same, but a lost one is noticed by all the others at once
        if not self._within_update and step > saved and (rank() == 0 or not lost_peer(error)):
            with contextlib.suppress(UserError):
                if self._save(self._checked_state()):
                    return f"saved after update {step}, start again"
        return f"{step - saved} updates since the last checkpoint are lost, {self._kept()}"

    def advice(self) -> str:
        """What to do when training has diverged."""
        good = self.last_good or "none so far"
        return f"lower TRAIN.BASE_LR and continue from the last good checkpoint, {good}"

    def _checked_state(self) -> dict[str, Any]:
        state = self.state()
        if self.check_weights and not all_finite(state["model"]):
            raise Diverged(
                f"the weights are not finite any more: nothing was saved, {self._kept()}"
            )
        return state

    def _is_last(self) -> bool:
        return self.progress.epoch_ended and self.progress.epoch + 1 == self.config.TRAIN.EPOCHS

    def _save(self, state: dict[str, Any]) -> bool:
        epoch = self.progress.epoch
        due = self._is_last() or (epoch + 1) % self.config.SAVE_FREQ == 0
        kept = None
        if self.keep_epochs and self.progress.epoch_ended and due:
            kept = os.path.join(self.run.folder, f"ckpt_epoch_{epoch}.pth")
        try:
            save_checkpoint(state, self.latest, self._previous, kept)
        except OSError as error:
            message = (
                f"{self.latest}: cannot write the checkpoint ({error.strerror or error}): "
                f"{self._room(state)}: {self._kept()}"
            )
            if self.config.TRAIN.ON_SAVE_ERROR == "stop":
                raise UserError(message) from error
            self.run.logger.error(message)
            return False
        self._previous = os.path.join(self.run.folder, PREVIOUS)
        self.run.logger.info("%s saved", " and ".join(filter(None, (self.latest, kept))))
        if kept:
            self._prune(epoch)
        return True

    def _room(self, state: dict[str, Any]) -> str:
        try:
            free = shutil.disk_usage(self.run.folder).free
        except OSError:
            return "its folder is not there, bring it back"
        return (
            f"it takes {state_bytes(state) / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free, make "
            "room there"
        )

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
