"""Measure the video protocol: the neighbourhood mask against loops, and frames per second.

Run as ``python -m tools.benchmark.video`` from the root of the repository.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from evaluation.label_propagation import LabelPropagation, outside_neighborhood
from models.encoder import ENCODERS, create_encoder
from models.patch_features import patch_features
from utils.run import run_script
from utils.training_log import synchronize

GRID, RADIUS = (30, 52), 12  # patches of a frame of 480 x 832 pixels


def main() -> None:
    """Time both and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=list(ENCODERS), nargs="+", default=["vit_small"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=5, help="frames that are timed")
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    slow, expected = timed(lambda: outside_by_loops(*GRID, RADIUS), torch.device("cpu"))
    fast, found = min(
        (
            timed(lambda: outside_neighborhood.__wrapped__(*GRID, RADIUS, device), device)
            for _ in range(5)
        ),
        key=lambda result: result[0],
    )
    assert torch.equal(found.cpu(), expected)
    print(
        f"mask of {GRID[0]} x {GRID[1]} patches: {1e3 * fast:.1f} ms, by loops {slow:.1f} s "
        f"({slow / fast:.0f} times)"
    )
    for name in args.encoder:
        encoding, propagating = time_video(name, args.frames, args.objects, device)
        total = encoding + propagating
        print(
            f"{name}, 480 x 832: {1 / total:.2f} frames/s, {1e3 * encoding:.0f} ms in the "
            f"encoder ({encoding / total:.0%}), {1e3 * propagating:.0f} ms in the propagation "
            f"({1 / propagating:.2f} frames/s alone)"
        )


@torch.inference_mode()
def time_video(name: str, frames: int, objects: int, device: torch.device) -> tuple[float, float]:
    """Median seconds per frame in the encoder and in the propagation, with a full context."""
    encoder = create_encoder(name).eval().to(device)
    image = torch.randn(1, 3, 480, 832, device=device)
    first = patch_features(encoder, image)[0]
    labels = torch.randint(objects + 1, first.shape[:2], device=device)
    propagation = LabelPropagation(first, F.one_hot(labels, objects + 1).float())
    for _ in range(7):  # until the context is full
        propagation.step(first + 0.1 * torch.randn_like(first))
    encoding, propagating = [], []
    for _ in range(frames):
        seconds, features = timed(lambda: patch_features(encoder, image)[0], device)
        encoding.append(seconds)
        propagating.append(timed(partial(propagation.step, features), device)[0])
    return statistics.median(encoding), statistics.median(propagating)


def outside_by_loops(height: int, width: int, radius: int) -> torch.Tensor:
    """What ``outside_neighborhood`` gives, by one assignment for each pair of patches."""
    outside = torch.ones(height, width, height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            for p in range(max(0, i - radius), min(height, i + radius + 1)):
                for q in range(max(0, j - radius), min(width, j + radius + 1)):
                    outside[i, j, p, q] = False
    return outside


def timed(function: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, torch.Tensor]:
    """Seconds that a call takes, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


if __name__ == "__main__":
    run_script(main)
