"""What a training run reports: lines of the log, and the same figures in metrics.jsonl."""

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from utils.checkpoint import replacing
from utils.distributed import on_first_process, on_terminal, rank
from utils.progress import EpochSize, Progress
from utils.provenance import memory
from utils.run import Run
from utils.update import Averages, Result, Update, named

if TYPE_CHECKING:
    from utils.trackers import Tracker

METRICS = "metrics.jsonl"
ROW = "longest_row"  # what Averages calls it while it reads
HALF_AN_IMAGE = 1e-9  # of the largest data sets: earlier versions rounded places otherwise
# of 1 / sqrt(dim), the standard deviation of features that are spread evenly over the sphere
COLLAPSED = 0.1
THROUGHPUT_STEPS = 30  # updates that are read, and updates that are made
B = TypeVar("B")


class Loader(Protocol):
    """The micro-batches of each update of an epoch, as of ``data.loader.TrainingLoader``."""

    size: EpochSize
    dataset: Any

    @property
    def ahead(self) -> int:
        """Updates that are read before they are asked for: they say nothing of the speed."""

    def start_at(self, epoch: int, images_seen: int = 0) -> None:
        """Let the next iteration continue ``epoch`` after ``images_seen`` images."""

    def __iter__(self) -> Iterator[list[Any]]:
        """One item an update."""


class TrainingLog:
    """Writes the figures of a run, and warns of skipped updates and of a collapse.

    With several optimizers, a figure ends with its optimizer's name, such as ``loss@0.1``.

    Args:
        run: its folder, device and log; PRINT_FREQ, TRAIN.EPOCHS, and the trackers.
        progress: where the run is.
        update: its optimizers have the learning rates, and its model may have queues.
        names: of the optimizers, if there are several.

    Attributes:
        epochs_logged: the epochs whose end an earlier start of the run has logged.
    """

    def __init__(
        self, run: Run, progress: Progress, update: Update, names: Sequence[str] = ("",)
    ) -> None:
        self.run, self.progress, self.names = run, progress, names
        self.optimizers, model = update.optimizers, update.ddp.module
        # only the methods of pre-training have queues, and features that can collapse
        self.queues = model.queues() if hasattr(model, "queues") else ()
        self.dim = getattr(model, "dim", 1)
        self.epochs_logged: list[int] = []
        self.trackers: Sequence[Tracker] = ()
        self._collapsed = False
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}  # beside the bar: figures of the last lines
        self._epoch_started = self._line_started = time.monotonic()
        self._epoch_seconds = 0.0

    def open(self, resumed_at: float | None = None) -> None:
        """Open metrics.jsonl and the trackers; every process has to call it.

        Args:
            resumed_at: the place of the checkpoint, see ``progress.clock``: what was told of later
                ones is dropped. Without a checkpoint, all is.
        """
        config, run = self.run.config, self.run
        self.metrics = MetricsFile(run.folder, resumed_at, run.logger)
        self.epochs_logged = on_first_process(self.metrics.epochs)
        if config.TENSORBOARD or config.WANDB:
            from utils.trackers import open_trackers  # only here: few runs need it

            self.trackers = open_trackers(run, resumed_at)
        if resumed_at is not None and self.progress.epoch < config.TRAIN.EPOCHS:
            self.metrics.write("start", self._place())

    def bar(self, updates: Iterable[B]) -> Iterable[B]:
        """The same updates of the epoch, with a progress bar on a terminal.

        Beside the bar are figures that have been read for a line: it waits for no device.
        """
        self._epoch_started = self._line_started = time.monotonic()
        self._bar = tqdm(
            updates,
            desc=f"epoch {self.progress.epoch}",
            total=self.progress.size.updates,
            initial=self.progress.steps_of_epoch,
            disable=not on_terminal(),
            leave=False,
            postfix=self._shown,
        )
        return self._bar

    def line(self, averages: Averages, result: Result, also: dict[str, float]) -> list[int]:
        """Write the means since the last line; every process has to call it.

        Args:
            averages: are read, and begin anew.
            result: of the last update.
            also: what else to write, as it is now.

        Returns:
            of each optimizer, the most updates that it has skipped in a row so far.
        """
        now = time.monotonic()
        # some virtual machines' clocks stand still
        seconds = max(1e-6, now - self._line_started) / averages.updates
        now_on_device = {ROW: result.longest_row}
        if self.queues:
            now_on_device["queue_spread"] = queue_spread(self.queues)
        read = averages.read(now_on_device)  # the only wait for the device between two lines
        rows = [round(read.pop(named(ROW, name))) for name in self.names]
        # with layer decay, the last group has the highest rate
        rates = [optimizer.param_groups[-1]["lr"] for optimizer in self.optimizers]
        rates_by_name = {named("lr", n): rate for n, rate in zip(self.names, rates, strict=True)}
        self._write_line(rates_by_name | read | also, seconds)
        self._line_started, self._epoch_seconds = now, now - self._epoch_started
        return rows

    def end_epoch(self, figures: Mapping[str, float | None]) -> None:
        """Write a line at the end of an epoch, about the part that this start of the program did.

        Args:
            figures: of the encoder after the epoch.
        """
        self._write("epoch", {"seconds": self._epoch_seconds, **figures})
        if (knn := figures.get("knn")) is not None:
            self._shown["knn"] = f"{knn:.4f}"
        listed = "".join(f" {name} {v:.4f}" for name, v in figures.items() if v is not None)
        place, took = self.progress, duration(self._epoch_seconds)
        self.run.logger.info(f"EPOCH {place.epoch} training takes {took}{listed}")

    def _write_line(self, means: dict[str, float], seconds: float) -> None:
        place, epochs = self.progress, self.run.config.TRAIN.EPOCHS
        speed = {
            "seconds": seconds,
            "images_per_s": place.size.images_per_update / seconds,
            "memory_mb": memory(self.run.device),
            "eta_s": seconds * (epochs * place.size.updates - place.step),
        }
        self._write("train", {**means, **speed})
        self.run.logger.info(
            f"Train: [{place.epoch}/{epochs}][{place.steps_of_epoch}/{place.size.updates}] "
            f"eta {duration(speed['eta_s'])} ends {date_in(speed['eta_s'])} time {seconds:.4f} "
            f"images/s {speed['images_per_s']:.1f} mem {speed['memory_mb']:.0f}MB "
            + " ".join(f"{name} {value:.6g}" for name, value in means.items())
        )
        self._warn(means)
        losses = [means[named("loss", name)] for name in self.names]
        self._shown["images/s"] = f"{speed['images_per_s']:.1f}"
        self._shown["loss"] = f"{min(losses):.4g}"  # of the best head
        self._shown["left"] = duration(speed["eta_s"])
        if self._bar is not None:
            self._bar.set_postfix(**self._shown)

    def _place(self) -> dict[str, float]:
        place = self.progress
        return {"epoch": place.epoch, "step": place.step, "epochs": place.epochs}

    def _write(self, kind: str, figures: Mapping[str, float | None]) -> None:
        self.metrics.write(kind, {**self._place(), **figures})
        for tracker in self.trackers:
            known = {name: value for name, value in figures.items() if value is not None}
            tracker.write(kind, self.progress.epochs, known)

    def _warn(self, means: dict[str, float]) -> None:
        logger, before = self.run.logger, self._collapsed
        for name in self.names:
            if skipped := means[named("skipped", name)]:
                who = f"updates skipped{f' of rate {name}' if name else ''}"
                logger.warning("%s, as loss or gradient was not finite: %d", who, skipped)
        self._collapsed = collapsed(means.get("feature_std", 1.0), self.dim)
        if self._collapsed and not before:
            logger.warning(
                "collapsed: the features of all images are nearly the same (standard deviation "
                f"{means['feature_std']:.2g}, spread evenly it would be {self.dim**-0.5:.2g}): "
                "lower TRAIN.BASE_LR"
            )


class MetricsFile:
    """``metrics.jsonl`` of a run folder: one JSON object a line, written by the first process.

    Training goes on when the file cannot be written. The lines are kept and written later.

    Args:
        folder: the run folder.
        resumed_at: the place that the run goes on from, see ``progress.clock``. Lines of later
            places, from an earlier start of the run, are dropped; all are where it begins anew.
        logger: gets an error when the file cannot be written.
    """

    def __init__(self, folder: str, resumed_at: float | None, logger: logging.Logger) -> None:
        self.path, self.logger = Path(folder, METRICS), logger
        self._waiting, self._failed = b"", False
        limit = -1.0 if resumed_at is None else resumed_at + HALF_AN_IMAGE
        if rank() == 0:
            with self._going_on():
                lines = self._lines()
                kept = [line for line in lines if _figures(line).get("epochs", math.inf) <= limit]
                if kept != lines:
                    with replacing(str(self.path)) as file:
                        file.write("".join(kept).encode())

    def write(self, kind: str, figures: Mapping[str, float | None]) -> None:
        """Append one line: its ``kind`` (``train``, ``epoch``, ``start``) and figures.

        NaN becomes null.
        """
        if rank() > 0:
            return
        known = {n: v if v is not None and math.isfinite(v) else None for n, v in figures.items()}
        self._waiting += json.dumps({"kind": kind} | known).encode() + b"\n"
        with self._going_on(), open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if file.write(self._waiting) < len(self._waiting):
                file.truncate(size)  # no half line may stay
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting, self._failed = b"", False

    def epochs(self) -> list[int]:
        """The epochs whose end the file tells of, none if it cannot be read."""
        with self._going_on():
            lines = map(_figures, self._lines())
            return [line["epoch"] for line in lines if line.get("kind") == "epoch"]
        return []

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Say once that the file cannot be read or written, and go on."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                self.logger.error("%s: cannot write (%s), kept for later", self.path, error)
            self._failed = True

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines(True)


def _figures(line: str) -> dict[str, Any]:
    """What a line holds, nothing for one that is damaged or was cut off."""
    with contextlib.suppress(ValueError, KeyError, RecursionError):
        found = json.loads(line) if line.endswith("\n") else None
        if isinstance(found, dict) and isinstance(found["epochs"], float):
            return found
    return {}


@torch.no_grad()
def queue_spread(queues: Sequence[torch.Tensor]) -> torch.Tensor:
    """The standard deviation over the keys of a queue, (dim, K) each, averaged over dimensions."""
    return torch.stack([queue.std(1).mean() for queue in queues]).mean()


def collapsed(feature_std: float, dim: int) -> bool:
    """Whether features of ``dim`` dimensions are nearly the same for all images."""
    return feature_std < COLLAPSED / dim**0.5


def measure_throughput(loader: Loader, update: Callable[[list[Any]], object], run: Run) -> None:
    """Log images per second of the loader alone and of the update alone.

    Args:
        loader: the micro-batches of each update.
        update: one update from its micro-batches.
        run: device and log.
    """
    batches, images = iter(loader), loader.size.images_per_update
    micro_batches = next(batches)
    for _ in itertools.islice(batches, loader.ahead):
        pass
    started = time.monotonic()
    loaded = images * sum(1 for _ in itertools.islice(batches, THROUGHPUT_STEPS))
    if loaded:
        run.logger.info("loader: %.1f images/s", loaded / max(1e-6, time.monotonic() - started))
    else:
        run.logger.info(
            "loader: not measured, since the %d updates of an epoch are all read ahead: lower "
            "DATA.NUM_WORKERS, or take more images",
            loader.size.updates,
        )
    for step in range(-3, THROUGHPUT_STEPS):
        if step == 0:  # warmed up
            synchronize(run.device)
            started = time.monotonic()
        update(micro_batches)
    synchronize(run.device)
    seconds = max(1e-6, time.monotonic() - started) / THROUGHPUT_STEPS
    run.logger.info("update: %.1f images/s, %.4f s an update", images / seconds, seconds)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def date_in(seconds: float) -> str:
    """The date and hour so many seconds from now, in the time of this place."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
