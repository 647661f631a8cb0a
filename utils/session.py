"""The updates of a training, and all that happens between two of them."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from utils.checkpoint import (
    LATEST,
    PREVIOUS,
    Checkpoint,
    epoch_checkpoints,
    load_model,
    remove_leftovers,
    save_checkpoint,
)
from utils.config import NETWORK, TRAINING, Use, settings
from utils.distributed import lost_peer, on_first_process, rank
from utils.errors import Diverged, UserError, reading
from utils.progress import Progress, clock, place_of
from utils.provenance import cost
from utils.run import Run, fault, written_config
from utils.signals import NOT_SAVED, StopSignals, end_stopped
from utils.training_log import Loader, TrainingLog, duration
from utils.update import Averages, Result, Update

PAUSE = 5.0  # seconds between tries to write the last checkpoint


class StateDicts(dict[str, Any]):
    """Objects by the names under which a checkpoint has their ``state_dict``."""

    def state_dict(self) -> dict[str, Any]:
        """The state of each."""
        return {name: part.state_dict() for name, part in self.items()}


@dataclass(frozen=True)
class Kind:
    """In what pre-training, a probe and fine-tuning differ.

    Attributes:
        uses: what the keys of its settings matter to.
        names: of the optimizers, if there are several: their figures are called ``loss@<name>``.
        keep_epochs: whether epochs get checkpoints of their own.
        check_weights: whether weights that are not finite are refused by a checkpoint.
        rate: what to lower when training diverges.
    """

    uses: Use = NETWORK | TRAINING
    names: Sequence[str] = ("",)
    keep_epochs: bool = True
    check_weights: bool = True
    rate: str = "TRAIN.BASE_LR"


PRETRAINING = Kind()


class Session:
    """Yields the updates of a run, from where it is to its end.

        with Session(...) as session:
            for epoch in session.epochs():
                for micro_batches in session.updates():
                    session.made(update(micro_batches, forward))

    A signal, a checkpoint and a line of the log come between two updates: what lies between a
    yield and ``made`` is not interrupted. A fault between two updates first saves what it would
    lose; within one, weights, key encoder and queue do not belong together, so nothing is saved.

    Args:
        run: folder, device, log and configuration.
        loader: the batches.
        update: its model and optimizers are saved and restored.
        signals: that may stop the run.
        parts: its ``state_dict`` gives what else a checkpoint has.
        kind: of training.

    Attributes:
        progress: where the run is; without a checkpoint it begins at TRAIN.START_EPOCH.
        diverged: of each optimizer, whether it skipped TRAIN.MAX_SKIPPED_UPDATES in a row.
    """

    def __init__(
        self,
        run: Run,
        loader: Loader,
        update: Update,
        signals: StopSignals,
        parts: Any,
        kind: Kind = PRETRAINING,
    ) -> None:
        self.run, self.loader, self.update, self.signals = run, loader, update, signals
        self.parts, self.kind, self.config = parts, kind, run.config
        epoch = self.config.TRAIN.START_EPOCH
        self.progress = Progress(loader.size, epoch, epoch * loader.size.updates)
        self.files = Checkpoints(run, kind)
        self.averages = Averages(kind.names)
        self.diverged = [False] * len(kind.names)
        self._resumed_at: float | None = None  # by the clock of the checkpoint
        self._saved_step = self.progress.step
        self._saved_epochs: float | None = None
        self._saved_at = time.monotonic()
        self._within_update = self._line_written = self._stop = self._save_now = False

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.progress.step

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.config.TRAIN.EPOCHS * self.loader.size.updates

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: weights, optimizers, loss scaling, random numbers and place.

        Raises:
            UserError: something is missing, or belongs to another model or optimizer.
        """
        path, state = checkpoint.path, checkpoint.state
        with reading(path, "cannot resume, it is no checkpoint of a training"):
            self.progress = place_of(state, self.loader.size, path)
            load_model(self.update.ddp.module, state["model"], path)
        with reading(path, "state of another optimizer"):
            self.update.load_state_dict(state)
        with reading(path, "its rng_state is no state"):
            torch.set_rng_state(state.get("rng_state", torch.get_rng_state()).cpu())
        self.files.resumed_from(path)
        self._resumed_at, self._saved_step = clock(state), self.step
        if os.path.dirname(path) == self.run.folder:
            self._saved_epochs = self._resumed_at
        if not self.config.EVAL_MODE:  # whose images are others anyway
            warn_of_changes(checkpoint, self.progress, self.run, self.kind.uses)
        self.run.logger.info("resumed from %s at update %d", path, self.step)

    def __enter__(self) -> "Session":
        self.files.open()
        self.log = TrainingLog(self.run, self.progress, self.update, self.kind.names)
        self.log.open(self._resumed_at)
        self.signals.training()
        self._started = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Save first what a fault would lose.

        Raises:
            UserError: the fault, if it is none of the program, and what was saved or lost.
        """
        if error is None:
            took = duration(time.monotonic() - self._started)
            self.run.logger.info("training took %s", took)
        elif isinstance(error, Exception) and not isinstance(error, Diverged):
            outcome = self._rescue(error)
            if reason := fault(error):
                raise UserError(f"{reason}: {outcome}") from error
            self.run.logger.error("%s: %s", type(error).__name__, outcome)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the one under way first."""
        while self.progress.epoch < self.config.TRAIN.EPOCHS:
            yield self.progress.epoch
            self.progress.next_epoch()

    def updates(self, bad_images: Any = None) -> Iterator[list[Any]]:
        """The micro-batches of each update that is left of the epoch; call ``made`` for each.

        Args:
            bad_images: notes those of each update, see ``data.loader.BadImages``, and tells of them
                at each line of the log.

        Raises:
            SystemExit: after a signal and a checkpoint.
        """
        self.update.ddp.train()
        self.loader.start_at(self.progress.epoch, self.progress.images_seen)
        every = self.config.TRAIN.SAVE_STEPS
        for micro_batches in self.log.bar(self.loader):
            if bad_images:
                bad_images.note(micro_batches)
            self._within_update = True
            yield micro_batches
            if bad_images and self._line_written:
                bad_images.check()
            due = self._save_now or (every > 0 and self.step % every == 0)
            # at its end, an epoch is saved by the script
            if self._stop or (due and not self.progress.epoch_ended):
                self.save()
            if self._stop:
                end_stopped(self.run.logger, self.step, self._saved_step)

    def made(self, result: Result, **figures: float) -> None:
        """Count the update, and take its figures for the next line of the log.

        Args:
            result: of the update.
            figures: what else the line has, as it is now.

        Raises:
            Diverged: every optimizer has skipped TRAIN.MAX_SKIPPED_UPDATES in a row.
        """
        self.progress.advance()
        self._within_update = False
        self.averages.add(result.figures, result.finite)
        # a signal on any process, and SAVE_MINUTES by the clock of the first
        self._stop, self._save_now = self.signals.agree(self._time_is_up())
        place, every = self.progress, self.config.PRINT_FREQ
        self._line_written = self._stop or place.epoch_ended or place.steps_of_epoch % every == 0
        if self._line_written:
            rows = self.log.line(self.averages, result, figures)
            most = self.config.TRAIN.MAX_SKIPPED_UPDATES
            self.diverged = self.update.check_skipped(most, self.files.advice(), rows)

    @property
    def saved(self) -> bool:
        """Whether the run folder has a checkpoint of this place."""
        return self._saved_epochs == self.progress.epochs

    @property
    def epoch_logged(self) -> bool:
        """Whether an earlier start of the run has logged the end of the epoch."""
        return self.progress.epoch in self.log.epochs_logged

    def end_epoch(self, figures: Mapping[str, float | None]) -> None:
        """Log the end of the epoch, with ``figures`` of the encoder after it."""
        self.log.end_epoch(figures)

    def save(self) -> None:
        """Write ``checkpoint.pth``; every process has to call it, and the first writes.

        The run may go on without a checkpoint, except the last: it is tried again for
        SAVE_PATIENCE minutes, or until a signal.

        Raises:
            Diverged: weights that are not finite.
            UserError: on every process: a file that cannot be written if ON_SAVE_ERROR is stop.
            SystemExit: NOT_SAVED, on every process: the last one could not be written.
        """
        write, tries = partial(self.files.write, self._state(), self._is_last()), 0
        while not on_first_process(write):
            if not self._is_last():
                return
            tries += 1
            # by the number of tries, as a clock may stand still
            over = tries * PAUSE >= 60 * self.config.TRAIN.SAVE_PATIENCE
            if any(self.signals.agree(over)):
                self.run.logger.error("ends without its last checkpoint: make room, start again")
                raise SystemExit(NOT_SAVED)
            time.sleep(PAUSE)
        self.files.last_good = self.files.latest
        self._saved_step, self._saved_epochs = self.step, self.progress.epochs
        self._saved_at = time.monotonic()

    def _is_last(self) -> bool:
        return self.progress.epoch_ended and self.progress.epoch + 1 == self.config.TRAIN.EPOCHS

    def _time_is_up(self) -> bool:
        """Whether SAVE_MINUTES have passed since a checkpoint or the last yes.

        Only the first process can say yes, so they have to share the answer.
        """
        seconds = 60 * self.config.TRAIN.SAVE_MINUTES
        up = bool(seconds) and rank() == 0 and time.monotonic() - self._saved_at >= seconds
        if up:
            self._saved_at = time.monotonic()
        return up

    def provenance(self) -> dict[str, Any]:
        """What a file that is written now says of where it comes from."""
        place = {"epoch": self.progress.epoch, "step": self.step}
        return place | self.run.provenance | cost(self.run.device, self.run.started)

    def _state(self) -> dict[str, Any]:
        model, run = self.update.ddp.module, self.run
        state = {
            "model": model.state_dict(),
            **self.update.state_dict(),
            "config": run.effective.dump(),
            "rng_state": torch.get_rng_state(),
            **self.progress.state_dict(),
            **self.parts.state_dict(),
            "provenance": self.provenance(),
        }
        if self.kind.check_weights and not all_finite(state["model"]):
            raise Diverged(
                f"the weights are not finite any more: nothing was saved, {self.files.kept()}"
            )
        return state

    def _rescue(self, error: Exception) -> str:
        step, saved = self.step, self._saved_step
        # all processes hold the same, but a lost one is noticed by all the others at once
        if not self._within_update and step > saved and (rank() == 0 or not lost_peer(error)):
            with contextlib.suppress(UserError):
                if self.files.write(self._state(), self._is_last()):
                    return f"saved after update {step}, start again"
        return f"{step - saved} updates since the last checkpoint are lost, {self.files.kept()}"


class Checkpoints:
    """The files ``checkpoint.pth``, ``checkpoint_previous.pth`` and ``ckpt_epoch_N.pth``.

    Args:
        run: folder, log, and the keys that say which files stay.
        kind: of training.

    Attributes:
        latest: the path of ``checkpoint.pth``.
        last_good: the newest that is known to be whole, if there is one.
    """

    def __init__(self, run: Run, kind: Kind = PRETRAINING) -> None:
        self.run, self.kind = run, kind
        self.latest = os.path.join(run.folder, LATEST)
        self.last_good: str | None = None
        self._previous: str | None = os.path.join(run.folder, PREVIOUS)

    def resumed_from(self, path: str) -> None:
        """Note that the run goes on from ``path``."""
        self.last_good = path
        if path in (self._previous, *epoch_checkpoints(self.run.folder).values()):
            self._previous = None  # a damaged file that was passed over must not replace it

    def open(self) -> None:
        """Remove what an interrupted write has left."""
        if rank() == 0:
            remove_leftovers(self.run.folder)

    def write(self, state: dict[str, Any], last: bool) -> bool:
        """Write ``checkpoint.pth`` and, if that is due at the end of an epoch, its own file.

        Args:
            state: with ``Progress.state_dict``.
            last: whether it is the last of the run.

        Returns:
            whether it could be written.

        Raises:
            UserError: it could not, and ON_SAVE_ERROR is stop.
        """
        config, epoch, kept = self.run.config, state["epoch"], None
        ended = state["images"] == state["training_images"]
        if self.kind.keep_epochs and ended and (last or (epoch + 1) % config.SAVE_FREQ == 0):
            kept = os.path.join(self.run.folder, f"ckpt_epoch_{epoch}.pth")
        try:
            save_checkpoint(state, self.latest, self._previous, kept)
        except OSError as error:
            message = (
                f"{self.latest}: cannot write the checkpoint ({error.strerror or error}): "
                f"{self._room(state)}: {self.kept()}"
            )
            if config.TRAIN.ON_SAVE_ERROR == "stop":
                raise UserError(message) from error
            self.run.logger.error(message)
            return False
        self._previous = os.path.join(self.run.folder, PREVIOUS)
        self.run.logger.info("%s saved", " and ".join(filter(None, (self.latest, kept))))
        if kept:
            self._prune(epoch)
        return True

    def advice(self) -> str:
        """What to do when training has diverged."""
        if not self.kind.keep_epochs:
            return f"lower {self.kind.rate}"
        good = self.last_good or "none so far"
        return f"lower {self.kind.rate} and continue from the last good checkpoint, {good}"

    def kept(self) -> str:
        """Which file is still whole."""
        return f"the last good checkpoint is {self.last_good or 'none so far'}"

    def _room(self, state: dict[str, Any]) -> str:
        tensors = filter(torch.is_tensor, tree_leaves(state))
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.run.folder).free
            room = f"it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
            return f"{room}, make room there"
        return "its folder is not there, bring it back"

    def _prune(self, epoch: int) -> None:
        keep = self.run.config.TRAIN.KEEP_CHECKPOINTS
        # later epochs are another run's
        own = [p for n, p in epoch_checkpoints(self.run.folder).items() if n <= epoch]
        for path in own[keep:] if keep else ():
            with contextlib.suppress(OSError):
                os.remove(path)


def warn_of_changes(checkpoint: Checkpoint, progress: Progress, run: Run, uses: Use) -> None:
    """Warn where a checkpoint was written with other settings, images or sizes than hold now.

    Args:
        checkpoint: that the run goes on from.
        progress: its place now.
        run: its effective settings, and in its provenance the digest of the images.
        uses: what the settings matter to.
    """
    path, state, size = checkpoint.path, checkpoint.state, progress.size
    warn = run.logger.warning
    before = state.get("images_per_update", size.images_per_update)
    if before != size.images_per_update:
        warn(
            f"{path} was written with {before} images an update, now there are "
            f"{size.images_per_update}: update {state['step']} becomes update {progress.step}, and "
            f"the base rate is {run.effective.TRAIN.BASE_LR:.3g}"
        )
    before = state.get("training_images", size.images)
    if before != size.images:
        warn(
            f"{path} was written with {before} images in the data set, now there are "
            f"{size.images}: the order of epoch {progress.epoch} is another, images may come twice"
        )
    now, written = settings(run.effective, uses), written_config(state)
    # ``keep_precision`` has said what becomes of the precision
    settings_before = settings(written, uses) | {"AMP_OPT_LEVEL": now.get("AMP_OPT_LEVEL")}
    changed = [
        f"{k} {settings_before.get(k)}, now {now.get(k)}"
        for k in dict.fromkeys([*now, *settings_before])
        if settings_before.get(k) != now.get(k)
    ]
    if written and changed:
        warn(f"{path} was written with other settings: {'; '.join(changed)}")
    digest = run.provenance.get("data", {}).get("digest")
    provenance = state.get("provenance")
    data = provenance.get("data") if isinstance(provenance, dict) else None
    if isinstance(data, dict) and data.get("digest", digest) != digest:
        warn(f"{path} was written with other images: their names or labels differ")


def all_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether no tensor has a value that is infinite or not a number."""
    finite = [t.isfinite().all() for t in tensors.values() if t.is_floating_point()]
    return bool(torch.stack(finite).all())
