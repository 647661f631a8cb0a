"""What ``--dry-run`` does: a few updates, from which it tells how long a run would take."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from utils.config import configuration_facts
from utils.distributed import all_gather_objects
from utils.errors import UserError
from utils.provenance import memory
from utils.session import Session
from utils.training_log import date_in, duration, synchronize

UPDATES = 3  # that are timed, after one that is not


class Images(Protocol):
    """Names and classes of images, as ``data.source.ImageSource`` has them."""

    names: Sequence[str]
    classes: list[str]


def rehearse(
    session: Session,
    train: Images,
    open_val: Callable[[], Images],
    update: Callable[[list[Any]], Any],
) -> None:
    """Log what would be trained; make a few updates, and log when the run would end.

    Every process has to call it.

    Args:
        session: where the run would begin; its start has logged the configuration as it was read.
        train: the training images.
        open_val: opens the val images, or raises UserError.
        update: one update from its micro-batches.
    """
    run, size, epochs = session.run, session.loader.size, session.config.TRAIN.EPOCHS
    say, read = run.logger.info, configuration_facts(run.config)
    shown = configuration_facts(run.effective).items()
    say(f"in effect: {', '.join(f'{key} {value}' for key, value in shown if value != read[key])}")
    try:
        val = f"{len(open_val().names)} val images"
    except UserError as error:
        val = f"no val images, which training does not need ({error})"
    say(f"data: {len(train.names)} training images, {len(train.classes)} classes, {val}")
    to_go = max(0, session.steps - session.step)
    say(
        f"updates: {size.updates} an epoch, {session.steps} in {epochs} epochs, {to_go} "
        f"to go; {size.images_per_update} images each"
    )

    seconds = _time_updates(session, update)
    each, peak = statistics.median(seconds), max(all_gather_objects(memory(run.device)))
    times = ", ".join(f"{second:.3g}" for second in seconds)
    say(f"{UPDATES} updates took {times} s: {size.images_per_update / each:.4g} images/s")
    say(
        f"estimated end: {date_in(to_go * each)}, after {duration(to_go * each)} of such "
        "updates. Checkpoints and k-NN come on top; --throughput says whether images come as fast"
    )
    of = "a GPU" if run.device.type == "cuda" else "a process"
    say(f"peak memory of {of}: {peak:.0f} MB")
    say(f"dry run: nothing was written into {run.effective.OUTPUT}")


def _time_updates(session: Session, update: Callable[[list[Any]], Any]) -> list[float]:
    """The seconds of each update, with the wait for its images."""
    device, ends = session.run.device, [time.monotonic()]
    for micro_batches in itertools.islice(_batches(session), 1 + UPDATES):
        update(micro_batches)
        synchronize(device)
        if len(ends) == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ends.append(time.monotonic())
    # the first one started the data workers and filled the memory
    return [end - start for start, end in itertools.pairwise(ends[1:])]


def _batches(session: Session) -> Iterator[list[Any]]:
    """The updates from the place of the run on, over the ends of epochs."""
    seen = session.progress.images_seen
    for epoch in itertools.count(session.progress.epoch):
        session.loader.start_at(epoch, seen)
        yield from session.loader
        seen = 0
