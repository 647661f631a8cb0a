"""Semi-supervised subsets of the training images: a share drawn by classes, or a published list."""

import argparse
import os

import numpy as np

from data.listing import read_lines
from data.source import ImageSource, PartOfSource
from utils.errors import UserError, reading


def add_subset_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--subset``."""
    parser.add_argument(
        "--subset",
        type=_share_or_list,
        metavar="SHARE|LIST",
        help="train on a share of the images, such as 0.01, equally many of each class; or on those "
        "that a file names, such as SimCLR's 1percent.txt",
    )


def subset_suffix(subset: float | str | None) -> str:
    """What a subset adds to the name of a folder of results."""
    if subset is None:
        return ""
    name = f"{subset:g}" if isinstance(subset, float) else os.path.basename(subset)
    return f"_subset_{name.removesuffix('.txt')}"


def take_subset(train: ImageSource, subset: float | str | None, seed: int) -> ImageSource:
    """The chosen images of ``train``, in its order; all without a subset.

    Args:
        train: the training images.
        subset: the share, or the path of a list with the name of an image in each line.
        seed: of the draw. The images of a share are among those of a larger one.

    Raises:
        UserError: a list that cannot be read, or names an image that is not there.
    """
    if subset is None:
        return train
    chosen = _drawn(train, subset, seed) if isinstance(subset, float) else _listed(train, subset)
    return PartOfSource(train, np.sort(chosen))


def _drawn(train: ImageSource, share: float, seed: int) -> np.ndarray:
    labels = np.asarray(train.labels)
    order = np.random.default_rng((seed, 1)).permutation(len(labels))
    if labels.ndim > 1:  # no classes to balance
        return order[: max(1, round(share * len(labels)))]
    order = order[np.argsort(labels[order], kind="stable")]  # class by class
    classes, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    each = max(1, round(share * len(labels) / len(classes)))
    taken = np.minimum(counts, each)
    return np.concatenate([order[s : s + n] for s, n in zip(starts, taken, strict=True)])


def _listed(train: ImageSource, path: str) -> np.ndarray:
    with reading(f"--subset {path}"):
        wanted = {line.strip() for _, line in read_lines(path)}
    places = [i for i, name in enumerate(train.names) if os.path.basename(name) in wanted]
    found = {os.path.basename(train.names[i]) for i in places}
    if len(places) != len(wanted):
        missing = sorted(wanted - found)
        reason = f"{missing[0]} is none of the training images" if missing else (
            f"{len(wanted)} names fit {len(places)} training images"
        )  # fmt: skip
        raise UserError(f"--subset {path}: {reason}")
    if not places:
        raise UserError(f"--subset {path}: names no images")
    return np.array(places)


def _share_or_list(text: str) -> float | str:
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"a share lies between 0 and 1, got {text}")
    return share
