"""Random numbers that follow from what they are for, so that workers and resumes change nothing."""

import ctypes
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import cv2
import numpy as np
import torch

PART = 2**17  # values that a thread draws at a time
ZERO, ONE = np.zeros(1), np.ones(1)
# of OpenMP, whose threads keep cores busy for milliseconds after an operation
END_WAITING_THREADS = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)


def derive_seed(*keys: int) -> int:
    """A 64-bit seed from non-negative whole numbers such as (seed, rank, step)."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed every random draw of one update: drop path, dropout and synthetic negatives."""
    # manual_seed takes signed 64-bit numbers
    torch.manual_seed(derive_seed(seed, rank, step) >> 1)


def seed_libraries(*keys: int) -> None:
    """Seed the generators of Python, numpy and torch, from which timm's augmentations draw."""
    seed = derive_seed(*keys) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def normal(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Draws of N(0, 1) in float32; on the CPU by OpenCV, which takes half the time of torch.

    As many threads draw as torch uses. OpenCV's generators are seeded by torch's default one anew
    for each part of the values, so that the number of threads changes nothing.
    """
    if device.type != "cpu":
        return torch.randn(shape, device=device)
    values = torch.empty(shape)
    if not values.numel():  # OpenCV refuses to fill nothing
        return values
    flat = values.view(1, -1).numpy()
    parts = [flat[:, first : first + PART] for first in range(0, flat.size, PART)]
    seeds = torch.randint(2**31 - 1, (len(parts),)).tolist()
    tasks = iter(list(zip(parts, seeds, strict=True)))
    helpers = min(torch.get_num_threads(), len(parts)) - 1
    if helpers and END_WAITING_THREADS:
        END_WAITING_THREADS(1)  # omp_pause_soft: they come back with the next operation
    drawn = [_helpers(helpers).submit(_draw, tasks) for _ in range(helpers)]
    _draw(tasks)
    for future in drawn:
        future.result()
    return values


def _draw(tasks: Iterator[tuple[np.ndarray, int]]) -> None:
    """Fill parts as long as other threads have left any; OpenCV lets them run meanwhile."""
    for part, seed in tasks:
        cv2.setRNGSeed(seed)
        cv2.randn(part, ZERO, ONE)


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)
