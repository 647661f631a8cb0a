"""What ``--dry-run`` does: a few updates, from which it tells how long a run would take."""

import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from yacs.config import CfgNode

from utils.config import configuration_facts
from utils.distributed import all_gather_objects
from utils.errors import UserError
from utils.progress import EpochSize, Progress
from utils.run import Run
from utils.training_log import duration, memory, moment_in, synchronize

UPDATES = 3  # that are timed, after one that is not


class Images(Protocol):
    """Names and classes of images, as ``data.source.ImageSource`` has them."""

    names: Sequence[str]
    classes: list[str]


class Loader(Protocol):
    """The micro-batches of each update of an epoch, as of ``data.loader.TrainingLoader``."""

    size: EpochSize
    dataset: Any

    def start_at(self, epoch: int, images_seen: int = 0) -> None:
        """Let the next iteration continue ``epoch`` after ``images_seen`` images."""

    def __iter__(self) -> Iterator[list[Any]]:
        """One item an update."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder in place of the run folder, also for what is compiled; it is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="synco-") as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "compiled"))
        yield folder


def rehearse(
    effective: CfgNode,
    loader: Loader,
    open_val: Callable[[], Images],
    progress: Progress,
    update: Callable[[list[Any]], Any],
    run: Run,
) -> None:
    """Log what would be trained; make a few updates, and log when the run would end.

    Every process has to call it.

    Args:
        effective: the configuration in effect.
        loader: of the training images.
        open_val: opens the val images, or raises UserError.
        progress: where the run would begin.
        update: one update from its micro-batches.
        run: device and log; its start has logged the configuration as it was read.
    """
    say, size, epochs = run.logger.info, loader.size, effective.TRAIN.EPOCHS
    read = configuration_facts(run.config)
    derived = [f"{k} {v}" for k, v in configuration_facts(effective).items() if v != read[k]]
    say(f"in effect, beside the configuration above: {', '.join(derived)}")
    train = loader.dataset.source
    try:
        val = f"{len(open_val().names)} val images"
    except UserError as error:
        val = f"no val images, which training does not need ({error})"
    say(f"data: {len(train.names)} training images, {len(train.classes)} classes, {val}")
    to_go = max(0, epochs * size.updates - progress.step)
    say(
        f"updates: {size.updates} an epoch, {epochs * size.updates} in {epochs} epochs, {to_go} "
        f"to go; {size.images_per_update} images each"
    )

    seconds = _time_updates(loader, progress, update, run.device)
    each, peak = statistics.median(seconds), max(all_gather_objects(memory(run.device)))
    times = ", ".join(f"{second:.3g}" for second in seconds)
    say(f"{UPDATES} updates took {times} s: {size.images_per_update / each:.4g} images/s")
    say(
        f"estimated end: {moment_in(to_go * each)}, after {duration(to_go * each)} of such "
        "updates. Checkpoints and k-NN come on top; --throughput says whether images come as fast"
    )
    of = "a GPU" if run.device.type == "cuda" else "a process"
    say(f"peak memory of {of}: {peak:.0f} MB")
    say(f"dry run: nothing was written into {run.config.OUTPUT}")


def _time_updates(
    loader: Loader, progress: Progress, update: Callable[[list[Any]], Any], device: torch.device
) -> list[float]:
    """The seconds of each update, with the wait for its images."""
    ends = [time.monotonic()]
    for micro_batches in itertools.islice(_batches(loader, progress), 1 + UPDATES):
        update(micro_batches)
        synchronize(device)
        if len(ends) == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ends.append(time.monotonic())
    # the first one started the data workers and filled the memory
    return [end - start for start, end in itertools.pairwise(ends[1:])]


def _batches(loader: Loader, progress: Progress) -> Iterator[list[Any]]:
    """The updates from the place of the run on, over the ends of epochs."""
    seen = progress.images_seen
    for epoch in itertools.count(progress.epoch):
        loader.start_at(epoch, seen)
        yield from loader
        seen = 0
