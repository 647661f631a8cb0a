"""Timing what runs in turn."""

import statistics
import time
from collections.abc import Callable

import torch


def compare(rounds: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each function, run in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            if round_:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
