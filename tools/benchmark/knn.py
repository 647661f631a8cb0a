"""Measure time and memory of k-NN on random features, at shares of ImageNet's size.

Each size runs in a process of its own, so that its peak of memory is its own.
"""

import argparse
import multiprocessing
import time

import torch
import torch.nn.functional as F

from evaluation.knn import knn_classify
from utils.training_log import memory, synchronize

TRAIN, TEST, CLASSES = 1_281_167, 50_000, 1000


def main() -> None:
    """Print a table with a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1 / 40, 1 / 20, 1 / 10],
        help="shares of ImageNet",
    )
    parser.add_argument("--width", type=int, default=384, help="values a feature")
    parser.add_argument("--nb-knn", type=int, nargs="+", default=[10, 20, 100, 200])
    args = parser.parse_args()
    print("train x test | features MB | peak above them MB | seconds | ns a pair")
    for scale in args.scale:
        # spawned, because a fork begins with its parent's memory
        process = multiprocessing.get_context("spawn").Process(
            target=measure,
            args=(round(scale * TRAIN), round(scale * TEST), args.width, args.nb_knn),
        )
        process.start()
        process.join()


def measure(train: int, test: int, width: int, ks: list[int]) -> None:
    """Time one size and print its row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = memory(device)
    torch.manual_seed(0)
    features = [torch.empty(n, width, device=device) for n in (train, test)]
    for part in features:
        for rows in part.split(4096):  # no second copy of all
            rows.copy_(F.normalize(torch.randn(len(rows), width, device=device)))
    labels = torch.randint(0, CLASSES, (train,), device=device)
    held = sum(part.nbytes for part in features) / 2**20
    synchronize(device)
    started = time.time()
    knn_classify(features[0], labels, features[1], ks, 0.07, CLASSES)
    synchronize(device)
    seconds = time.time() - started
    above = memory(device) - before - held
    pair = 1e9 * seconds / (train * test)
    print(f"{train} x {test} | {held:.0f} | {above:.0f} | {seconds:.2f} | {pair:.2f}", flush=True)


if __name__ == "__main__":
    main()
