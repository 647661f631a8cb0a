"""What a training run reports: lines of the log, and the same figures in metrics.jsonl."""

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm import tqdm
from yacs.config import CfgNode

from utils.checkpoint import replacing
from utils.distributed import mean_over_processes, on_first_process, on_terminal, rank
from utils.progress import EpochSize, Progress
from utils.run import Run
from utils.update import Result

if TYPE_CHECKING:
    from utils.trackers import Tracker

METRICS = "metrics.jsonl"
ROW = "longest_row"  # what Averages calls it while it reads
# of 1 / sqrt(dim), the standard deviation of features that are spread evenly over the sphere
COLLAPSED = 0.1
THROUGHPUT_STEPS = 30  # updates that are read, and updates that are made
B = TypeVar("B")


class TrainingLog:
    """Writes the figures of a run, and warns of skipped updates and of a collapse.

    With several optimizers, a figure ends with its optimizer's name, such as ``loss@0.1``.

    Args:
        config: PRINT_FREQ, TRAIN.EPOCHS, and the trackers.
        run: its folder, device and log.
        progress: where the run is.
        optimizers: have the learning rates.
        names: of the optimizers, if there are several.
        dim: dimensions of the features.
        queues: of the method, (dim, K) each, if it has any.

    Attributes:
        longest_rows: of each optimizer, the most updates that it has skipped in a row up to the
            last line.
    """

    def __init__(
        self,
        config: CfgNode,
        run: Run,
        progress: Progress,
        optimizers: Sequence[torch.optim.Optimizer],
        names: Sequence[str] = ("",),
        dim: int = 1,
        queues: Sequence[torch.Tensor] = (),
    ) -> None:
        self.config, self.run, self.progress = config, run, progress
        self.optimizers, self.names, self.dim, self.queues = optimizers, names, dim, queues
        self.metrics = MetricsFile(run.folder, progress.step, run.logger)
        self._epochs_reported = on_first_process(self.metrics.epochs)
        self.trackers: Sequence[Tracker] = ()
        if config.TENSORBOARD or config.WANDB:
            from utils.trackers import open_trackers  # only here: few runs need it

            self.trackers = open_trackers(config, run, progress.step)
        if progress.step and progress.epoch < config.TRAIN.EPOCHS:  # the run goes on here
            self.metrics.write("start", self._place())
        self.averages = Averages(names)
        self.longest_rows = [0] * len(names)
        self._collapsed = False
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}  # beside the bar: figures of the last lines
        self._epoch_started = self._line_started = time.monotonic()
        self._epoch_seconds = 0.0

    def watch(self, updates: Iterable[B]) -> Iterator[B]:
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
        yield from self._bar

    def record(self, result: Result, also: dict[str, float], stopping: bool = False) -> bool:
        """Take an update's figures; every PRINT_FREQ updates, those since the last line become one.

        The end of an epoch and of the run also give a line. Every process has to call it.

        Args:
            result: of the update that ``progress`` counted last.
            also: what else to report, as it is now.
            stopping: whether the run ends here.

        Returns:
            whether there was a line.
        """
        self.averages.add(result.figures, result.finite)
        every, place = self.config.PRINT_FREQ, self.progress
        if not (stopping or place.epoch_ended or place.steps_of_epoch % every == 0):
            return False
        now = time.monotonic()
        # some virtual machines' clocks stand still
        seconds = max(1e-6, now - self._line_started) / self.averages.updates
        now_on_device = {ROW: result.longest_row}
        if self.queues:
            now_on_device["queue_spread"] = queue_spread(self.queues)
        read = self.averages.read(now_on_device)  # the only wait for the device between two lines
        self.longest_rows = [round(read.pop(_named(ROW, name))) for name in self.names]
        self._line(self._rates() | read | also, seconds)
        self._line_started, self._epoch_seconds = now, now - self._epoch_started
        return True

    def reported(self, epoch: int) -> bool:
        """Whether an earlier start of the run has written the line at the end of ``epoch``."""
        return epoch in self._epochs_reported

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

    def _rates(self) -> dict[str, float]:
        # with layer decay, the last group has the highest rate
        rates = [optimizer.param_groups[-1]["lr"] for optimizer in self.optimizers]
        return {_named("lr", n): rate for n, rate in zip(self.names, rates, strict=True)}

    def _line(self, means: dict[str, float], seconds: float) -> None:
        place, epochs = self.progress, self.config.TRAIN.EPOCHS
        speed = {
            "seconds": seconds,
            "images_per_s": place.size.images_per_update / seconds,
            "memory_mb": memory(self.run.device),
            "eta_s": seconds * (epochs * place.size.updates - place.step),
        }
        self._write("train", {**means, **speed})
        self.run.logger.info(
            f"Train: [{place.epoch}/{epochs}][{place.steps_of_epoch}/{place.size.updates}] "
            f"eta {duration(speed['eta_s'])} ends {moment_in(speed['eta_s'])} time {seconds:.4f} "
            f"images/s {speed['images_per_s']:.1f} mem {speed['memory_mb']:.0f}MB "
            + " ".join(f"{name} {value:.6g}" for name, value in means.items())
        )
        self._warn(means)
        self._show(means, speed)

    def _show(self, means: dict[str, float], speed: dict[str, float]) -> None:
        losses = [means[_named("loss", name)] for name in self.names]
        self._shown["images/s"] = f"{speed['images_per_s']:.1f}"
        self._shown["loss"] = f"{min(losses):.4g}"  # of the best head
        self._shown["left"] = duration(speed["eta_s"])
        if self._bar is not None:
            self._bar.set_postfix(**self._shown)

    def _place(self) -> dict[str, float]:
        place = self.progress
        # the time axis is the number of epochs made, with a fraction within one
        epochs = place.step / place.size.updates
        return {"epoch": place.epoch, "step": place.step, "epochs": epochs}

    def _write(self, kind: str, figures: Mapping[str, float | None]) -> None:
        place = self.progress
        self.metrics.write(kind, {**self._place(), **figures})
        for tracker in self.trackers:
            known = {name: value for name, value in figures.items() if value is not None}
            tracker.write(kind, place.step, known)

    def _warn(self, means: dict[str, float]) -> None:
        logger, before = self.run.logger, self._collapsed
        for name in self.names:
            if skipped := means[_named("skipped", name)]:
                who = f"updates skipped{f' of rate {name}' if name else ''}"
                logger.warning("%s, as loss or gradient was not finite: %d", who, skipped)
        self._collapsed = collapsed(means.get("feature_std", 1.0), self.dim)
        if self._collapsed and not before:
            logger.warning(
                "collapsed: the features of all images are nearly the same (standard deviation "
                f"{means['feature_std']:.2g}, spread evenly it would be {self.dim**-0.5:.2g}): "
                "lower TRAIN.BASE_LR"
            )


class Averages:
    """Means of figures over updates and processes, without a synchronisation before ``read``.

    Skipped updates do not count in the means.

    Args:
        names: of the optimizers, each with figures of its own; a single one has an empty name.
    """

    def __init__(self, names: Sequence[str] = ("",)) -> None:
        self.names = names
        self._sums = torch.zeros(0)  # meaningless before the first update
        self._figures: tuple[str, ...] = ()
        self.updates = 0  # since the last reading, skipped ones included

    def add(self, figures: dict[str, torch.Tensor], finite: torch.Tensor) -> None:
        """Take the figures of one update, on the device; ``finite``: whether it was made."""
        self._figures = tuple(figures)
        values = torch.stack([finite.float(), *(v.float() for v in figures.values())])
        values = torch.where(finite, values, 0)
        self._sums = self._sums + values if self.updates else values
        self.updates += 1

    def read(self, also: Mapping[str, torch.Tensor] | None = None) -> dict[str, float]:
        """The means, and ``skipped``, the number of skipped updates; then counting starts anew.

        Every process has to call it. The means are NaN if all updates were skipped.

        Args:
            also: values to read with them as they are, a scalar each or one for each optimizer.
        """
        also = also or {}
        sums = mean_over_processes(self._sums.clone()).view(-1, len(self.names))
        rows = [value.expand(len(self.names)).to(sums) for value in also.values()]
        columns = torch.cat([sums, torch.stack(rows)]) if rows else sums
        read: dict[str, float] = {}
        for name, (made, *totals) in zip(self.names, columns.T.tolist(), strict=True):
            as_they_are = totals[len(self._figures) :]
            means = [total / made if made else math.nan for total in totals[: len(self._figures)]]
            read |= {_named(f, name): mean for f, mean in zip(self._figures, means, strict=True)}
            read[_named("skipped", name)] = self.updates - round(made)
            read |= {_named(f, name): v for f, v in zip(also, as_they_are, strict=True)}
        self.updates = 0
        return read


class MetricsFile:
    """``metrics.jsonl`` of a run folder: one JSON object a line, written by the first process.

    Training goes on when the file cannot be written. The lines are kept and written later.

    Args:
        folder: the run folder.
        step: updates made so far; lines of later updates, from an earlier start of the run, are
            dropped.
        logger: gets an error when the file cannot be written.
    """

    def __init__(self, folder: str, step: int, logger: logging.Logger) -> None:
        self.path, self.logger = os.path.join(folder, METRICS), logger
        self._waiting: list[bytes] = []
        self._failed = False
        if rank() == 0:
            try:
                self._drop_after(step)
            except OSError as error:
                self._fail(error)

    def write(self, kind: str, figures: Mapping[str, float | None]) -> None:
        """Append one line: its ``kind`` (``train``, ``epoch``, ``start``) and figures.

        NaN becomes null.
        """
        known = {n: v if v is not None and math.isfinite(v) else None for n, v in figures.items()}
        if rank() > 0:
            return
        self._waiting.append(json.dumps({"kind": kind} | known).encode() + b"\n")
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            return self._fail(error)
        self._waiting, self._failed = [], False

    def epochs(self) -> list[int]:
        """The epochs whose end the file tells of, none if it cannot be read."""
        with contextlib.suppress(OSError):
            lines = map(_figures, self._lines())
            return [line["epoch"] for line in lines if line.get("kind") == "epoch"]
        return []

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self.logger.error("%s: cannot write (%s), kept for later", self.path, error.strerror)
        self._failed = True

    def _append(self, lines: bytes) -> None:
        with open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                written = file.write(lines)
                if written < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)  # no half line may stay
                raise

    def _lines(self) -> list[str]:
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return file.readlines()

    def _drop_after(self, step: int) -> None:
        lines = self._lines()
        kept = [line for line in lines if _figures(line).get("step", math.inf) <= step]
        if kept != lines:
            with replacing(self.path) as file:
                file.write("".join(kept).encode())


def _figures(line: str) -> dict[str, Any]:
    """What a line holds, nothing for one that is damaged or was cut off."""
    try:
        found = json.loads(line) if line.endswith("\n") else None
        return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}
    except (ValueError, RecursionError):
        return {}


def _named(figure: str, name: str) -> str:
    return f"{figure}@{name}" if name else figure


@torch.no_grad()
def queue_spread(queues: Sequence[torch.Tensor]) -> torch.Tensor:
    """The standard deviation over the keys of a queue, (dim, K) each, averaged over dimensions."""
    return torch.stack([queue.std(1).mean() for queue in queues]).mean()


def collapsed(feature_std: float, dim: int) -> bool:
    """Whether features of ``dim`` dimensions are nearly the same for all images."""
    return feature_std < COLLAPSED / dim**0.5


def measure_throughput(
    updates: Iterable[B], size: EpochSize, ahead: int, update: Callable[[B], object], run: Run
) -> None:
    """Log images per second of the loader alone and of the update alone.

    Args:
        updates: the micro-batches of each update.
        size: images of an update.
        ahead: updates that were read before they are asked for: they say nothing of the speed.
        update: one update from its micro-batches.
        run: device and log.
    """
    batches = iter(updates)
    micro_batches = next(batches)
    for _ in itertools.islice(batches, ahead):
        pass
    started = time.monotonic()
    loaded = size.images_per_update * sum(1 for _ in itertools.islice(batches, THROUGHPUT_STEPS))
    if loaded:
        run.logger.info("loader: %.1f images/s", loaded / max(1e-6, time.monotonic() - started))
    else:
        run.logger.info(
            "loader: not measured, since the %d updates of an epoch are all read ahead: lower "
            "DATA.NUM_WORKERS, or take more images",
            size.updates,
        )
    for step in range(-3, THROUGHPUT_STEPS):
        if step == 0:  # warmed up
            synchronize(run.device)
            started = time.monotonic()
        update(micro_batches)
    synchronize(run.device)
    seconds = max(1e-6, time.monotonic() - started) / THROUGHPUT_STEPS
    run.logger.info(
        "update: %.1f images/s, %.4f s an update", size.images_per_update / seconds, seconds
    )


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> float:
    """The most memory used so far in MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def moment_in(seconds: float) -> str:
    """The date and hour so many seconds from now, in the time of this place."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
