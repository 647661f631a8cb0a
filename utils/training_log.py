"""What a training run reports: lines of the log, and the same figures in metrics.jsonl."""

import itertools
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from utils.distributed import mean_over_processes, rank, world_size
from utils.progress import images_per_update
from utils.run import Run
from utils.trackers import open_trackers


class TrainingLog:
    """Writes the figures of a run, and warns of skipped updates and of a collapse.

    Args:
        config: its configuration.
        run: its folder, device and log.
        optimizer: has the learning rate.
        dim: dimensions of the features.
        steps_per_epoch: updates of an epoch.
        step: updates made so far.
    """

    def __init__(
        self,
        config: CfgNode,
        run: Run,
        optimizer: torch.optim.Optimizer,
        dim: int,
        steps_per_epoch: int,
        step: int,
    ) -> None:
        self.config, self.run, self.optimizer, self.dim = config, run, optimizer, dim
        self.steps_per_epoch = steps_per_epoch
        self.metrics = MetricsFile(run.folder, step, run.logger)
        self.trackers = open_trackers(config, run, step)
        self._collapsed = False

    def line(
        self,
        epoch: int,
        step: int,
        means: dict[str, float],
        seconds: float,
        queues: tuple[torch.Tensor, ...],
    ) -> None:
        """One line for the updates since the one before.

        Args:
            epoch, step: the epoch, and the updates made so far.
            means: from ``Averages``, and whatever else is to be reported.
            seconds: that an update took.
            queues: of the method, (dim, K) each, if it has any.
        """
        epochs, logger = self.config.TRAIN.EPOCHS, self.run.logger
        means = {"lr": self.optimizer.param_groups[0]["lr"]} | means
        if queues:
            means["queue_spread"] = queue_spread(queues)
        speed = {
            "seconds": seconds,
            "images_per_s": images_per_update(self.config) / seconds,
            "memory_mb": memory(self.run.device),
            "eta_s": seconds * (epochs * self.steps_per_epoch - step),
        }
        self._write("train", epoch, step, means | speed)
        logger.info(
            "Train: [%d/%d][%d/%d] eta %s time %.4f images/s %.1f mem %.0fMB %s",
            *(epoch, epochs, step - epoch * self.steps_per_epoch, self.steps_per_epoch),
            *(duration(speed["eta_s"]), seconds, speed["images_per_s"], speed["memory_mb"]),
            " ".join(f"{name} {value:.6g}" for name, value in means.items()),
        )
        self._warn(means)

    def epoch(self, epoch: int, step: int, seconds: float, figures: dict[str, float]) -> None:
        """One line at the end of an epoch, of what this start of the program did of it.

        Args:
            epoch, step: as for ``line``.
            seconds: that the training took.
            figures: of the encoder after the epoch.
        """
        self._write("epoch", epoch, step, {"seconds": seconds} | figures)
        self.run.logger.info(
            "EPOCH %d training takes %s%s",
            *(epoch, duration(seconds)),
            "".join(f" {name} {value:.4f}" for name, value in figures.items()),
        )

    def _write(self, kind: str, epoch: int, step: int, figures: dict[str, float]) -> None:
        # the number of epochs made, a fraction within one, serves as the time axis
        place = {"epoch": epoch, "step": step, "epochs": step / self.steps_per_epoch}
        self.metrics.write(kind, place | figures)
        for tracker in self.trackers:
            tracker.write(kind, step, figures)

    def _warn(self, means: dict[str, float]) -> None:
        logger, before = self.run.logger, self._collapsed
        if means["skipped"]:
            logger.warning(
                "updates skipped, as loss or gradient was not finite: %d", means["skipped"]
            )
        self._collapsed = collapsed(means.get("feature_std", 1.0), self.dim)
        if self._collapsed and not before:
            logger.warning(
                "collapsed: the features of all images are nearly the same (standard deviation "
                "%.2g, spread evenly it would be %.2g): lower TRAIN.BASE_LR",
                *(means["feature_std"], self.dim**-0.5),
            )


METRICS = "metrics.jsonl"


class Averages:
    """Means of figures over updates and processes, without a synchronisation before ``read``.

    Updates that were skipped count in none of the means.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(0)  # of no meaning before the first update
        self._names: tuple[str, ...] = ()
        self.updates = 0  # since the last reading, skipped ones included

    def add(self, figures: dict[str, torch.Tensor], finite: torch.Tensor) -> None:
        """Take the scalars of one update, on the device; ``finite``: whether it was made."""
        self._names = tuple(figures)
        values = torch.stack([finite.float(), *(v.float() for v in figures.values())])
        values = torch.where(finite, values, 0)
        self._sums = self._sums + values if self.updates else values
        self.updates += 1

    def read(self) -> dict[str, float]:
        """The means, and ``skipped``, the number of updates that were; then begins anew.

        Every process has to call it. NaN, if all updates were skipped.
        """
        made, *sums = mean_over_processes(self._sums.clone()).tolist()
        means = [total / made if made else math.nan for total in sums]
        skipped = self.updates - round(made)
        self.updates = 0
        return dict(zip(self._names, means, strict=True)) | {"skipped": skipped}


class MetricsFile:
    """``metrics.jsonl`` of a run folder: one JSON object a line, written by the first process.

    Args:
        folder: the run folder.
        step: updates made so far; lines of later ones, which a run left that is now continued
            from before them, are dropped.
        logger: gets a warning when the file cannot be written, which stops no training.
    """

    def __init__(self, folder: str, step: int, logger: logging.Logger) -> None:
        self.path, self.logger, self._failed = os.path.join(folder, METRICS), logger, rank() > 0
        self._guard(self._drop_after, step)

    def write(self, kind: str, figures: dict[str, float | int]) -> None:
        """Append one line: its ``kind`` (``train`` or ``epoch``) and figures; NaN becomes null."""
        line = {"kind": kind} | {n: v if math.isfinite(v) else None for n, v in figures.items()}
        self._guard(self._append, json.dumps(line))

    def _append(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _drop_after(self, step: int) -> None:
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
        kept = [line for line in lines if _step(line) <= step]
        if kept != lines:
            temporary = self.path + ".tmp"
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(kept)
            os.replace(temporary, self.path)

    def _guard(self, function: Callable[..., None], argument: str | int) -> None:
        if self._failed:
            return
        try:
            function(argument)
        except OSError as error:
            self._failed = True
            self.logger.error("%s: cannot write (%s), given up", self.path, error.strerror)


def _step(line: str) -> float:
    """The number of updates that a line tells of; infinite for one that was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


# of 1 / sqrt(dim), the standard deviation of features that are spread evenly over the sphere
COLLAPSED = 0.1


@torch.no_grad()
def similarity_figures(
    queries: tuple[torch.Tensor, ...],
    keys: tuple[torch.Tensor, ...],
    queues: tuple[torch.Tensor, ...],
) -> dict[str, torch.Tensor]:
    """How far the unit features of a batch lie apart.

    Args:
        queries: q1 and q2, (B, dim) each.
        keys: k1 and k2, (B, dim) each.
        queues: queue1 and queue2, (dim, K) each; none if the method has no queue.

    Returns:
        scalars on the device: ``negative``, the mean similarity of a query and the queue of its
        keys, or without one the keys of other images; and ``feature_std``, the standard deviation
        of the queries over the batch, averaged over the dimensions. Only what B allows: both but
        the former of a queue need two images.
    """
    figures = {}
    images = queries[0].shape[0]
    pairs = list(zip(queries, reversed(keys), strict=True))
    if queues:
        # a mean of products is the product of the means: no B x K matrix
        parts = [q.mean(0) @ n.mean(1) for q, n in zip(queries, reversed(queues), strict=True)]
        figures["negative"] = torch.stack(parts).mean()
    elif images > 1:
        parts = [(q.sum(0) @ k.sum(0) - (q * k).sum()) / (images**2 - images) for q, k in pairs]
        figures["negative"] = torch.stack(parts).mean()
    if images > 1:
        figures["feature_std"] = torch.stack([q.std(0).mean() for q in queries]).mean()
    return figures


@torch.no_grad()
def queue_spread(queues: tuple[torch.Tensor, ...]) -> float:
    """The standard deviation over the keys of a queue, (dim, K) each, averaged over dimensions."""
    return float(torch.stack([queue.std(1).mean() for queue in queues]).mean())


def collapsed(feature_std: float, dim: int) -> bool:
    """Whether features of ``dim`` dimensions are nearly the same for all images."""
    return feature_std < COLLAPSED / dim**0.5


def measure_throughput(
    loader: DataLoader,
    config: CfgNode,
    steps: int,
    update: Callable[[list], object],
    run: Run,
) -> None:
    """Log images a second of the loader alone and of the update alone.

    Args:
        loader: the batches of one process.
        config: DATA.BATCH_SIZE and TRAIN.ACCUMULATION_STEPS.
        steps: how many batches, and how many updates, are timed.
        update: one update from a list of micro-batches.
        run: device and log.
    """
    images = config.DATA.BATCH_SIZE * world_size()
    micro_batches = max(1, config.TRAIN.ACCUMULATION_STEPS)
    batches = iter(loader)
    batch = [next(batches) for _ in range(micro_batches)]
    started = time.time()
    loaded = sum(1 for _ in itertools.islice(batches, steps))
    if loaded:
        run.logger.info("loader: %.1f images/s", images * loaded / (time.time() - started))
    for step in range(-3, steps):
        if step == 0:  # warmed up
            synchronize(run.device)
            started = time.time()
        update(batch)
    synchronize(run.device)
    seconds = (time.time() - started) / steps
    run.logger.info(
        "update: %.1f images/s, %.4f s an update", images * micro_batches / seconds, seconds
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


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
