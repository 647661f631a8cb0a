"""Time, memory and speed."""

import itertools
import resource
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from utils.distributed import world_size
from utils.launch import Run


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
