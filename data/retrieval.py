"""The files of the revisited Oxford and Paris benchmarks (arXiv 1803.11285)."""

import functools
import math
import operator
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data.dataset import to_tensor
from data.image import read_rgb
from data.listing import check_root, list_images, log_left_out
from utils.errors import UserError, reading
from utils.unpickle import load_plain_pickle

DATASETS = ("roxford5k", "rparis6k")
TRUTH = "http://cmp.felk.cvut.cz/revisitop/data/datasets/{0}/gnd_{0}.pkl"
_BUILDINGS = "https://www.robots.ox.ac.uk/~vgg/data"
IMAGES = {
    "roxford5k": (f"{_BUILDINGS}/oxbuildings/oxbuild_images-v1.tgz",),
    "rparis6k": (
        f"{_BUILDINGS}/parisbuildings/paris_1-v1.tgz",
        f"{_BUILDINGS}/parisbuildings/paris_2-v1.tgz",
    ),
}
LABELS = ("easy", "hard", "junk")


@dataclass(frozen=True)
class GroundTruth:
    """What ``gnd_<dataset>.pkl`` says.

    Attributes:
        folder: of the data set.
        database: names of the images that are ranked.
        queries: names of the queries.
        labels: for each query the numbers of its ``easy``, ``hard`` and ``junk`` images.
        boxes: for each query left, top, right and bottom of its object in pixels, or None.
    """

    folder: str
    database: list[str]
    queries: list[str]
    labels: list[dict[str, np.ndarray]]
    boxes: list[tuple[float, float, float, float] | None]

    def path(self, name: str) -> str:
        """Where an image lies: in ``jpg/`` itself, or below it, as the archives of Paris have it.

        Raises:
            UserError: it is missing, or lies in several folders below.
        """
        flat = os.path.join(self.folder, "jpg", f"{name}.jpg")
        if os.path.exists(flat):
            return flat
        found = self._below.get(f"{name}.jpg", [])
        if len(found) > 1:
            raise UserError(f"{found[0]}: the image lies in {os.path.dirname(found[1])} too")
        if not found:
            archives = " and ".join(IMAGES[os.path.basename(self.folder)])
            raise UserError(
                f"{flat}: the ground truth names this image, but it is missing, there and in the "
                f"folders below; unpack {archives} into jpg/"
            )
        return found[0]

    @functools.cached_property
    def _below(self) -> dict[str, list[str]]:
        """Paths by name of the images in and below ``jpg/``."""
        left_out: Counter[str] = Counter()
        folder = os.path.join(self.folder, "jpg")
        with reading(folder, "cannot read the images"):
            paths = list_images(folder, left_out)
        log_left_out(folder, left_out)
        found: dict[str, list[str]] = {}
        for path in paths:
            found.setdefault(os.path.basename(path), []).append(path)
        return found


def read_ground_truth(root: str, dataset: str) -> GroundTruth:
    """Read ``<root>/<dataset>/gnd_<dataset>.pkl``; the pickle may hold plain data only.

    Raises:
        UserError: a file that is missing, damaged or hostile, or has impossible contents.
    """
    check_root(root, f"the folder that holds {dataset}/")
    folder = os.path.join(root, dataset)
    path = os.path.join(folder, f"gnd_{dataset}.pkl")
    if not os.path.exists(path):
        raise UserError(
            f"{path}: the ground truth is missing, which no archive of images holds; fetch it from "
            f"{TRUTH.format(dataset)}"
        )
    content = load_plain_pickle(path)
    with reading(path, "not a ground truth of revisitop"):
        database, queries = _names(content["imlist"]), _names(content["qimlist"])
        entries = list(zip(queries, content["gnd"], strict=True))
    labels, boxes = [], []
    for query, entry in entries:
        with reading(f"{path}: query {query}", "not an entry of revisitop"):
            labels.append({name: _indices(entry[name], len(database)) for name in LABELS})
            boxes.append(_box(entry["bbx"]) if entry.get("bbx") is not None else None)
    return GroundTruth(folder, database, queries, labels, boxes)


def _names(values: Any) -> list[str]:
    named = [isinstance(name, str) and os.path.basename(name) == name for name in values]
    if not named or not all(named):
        raise ValueError("imlist and qimlist must hold names of images")
    return list(map(str, values))  # plain ones, also of an array


# by ``fromiter``, since lists that hold one list often could become any number of values


def _indices(values: Any, count: int) -> np.ndarray:
    indices = np.fromiter(map(operator.index, values), np.int64)
    if len(indices) and not 0 <= indices.min() <= indices.max() < count:
        raise ValueError(f"it names an image that is not among the {count} of imlist")
    return indices


def _box(values: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = np.fromiter(map(float, values), np.float64).tolist()
    if not (-math.inf < left < right < math.inf and -math.inf < top < bottom < math.inf):
        raise ValueError("bbx must be left, top, right and bottom with an area")
    return left, top, right, bottom


class RetrievalImages(Dataset):
    """The database or the queries, shrunk and not cropped, each with its number.

    Args:
        truth: names and boxes.
        queries: whether to read the queries or the database.
        size: longest side in pixels; a smaller image stays as it is.
        crop: crop each query to its box, the benchmark's official protocol.

    Raises:
        UserError: a missing image, or a query without a box that should be cropped.
    """

    def __init__(self, truth: GroundTruth, queries: bool, size: int, crop: bool = False) -> None:
        self.names = truth.queries if queries else truth.database
        self.paths = [truth.path(name) for name in self.names]
        self.boxes = truth.boxes if queries and crop else [None] * len(self.names)
        self.size = size
        if queries and crop and None in self.boxes:
            raise UserError(f"query {self.names[self.boxes.index(None)]} has no bbx to crop to")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """A uint8 image of 3 x H x W, and its number."""
        image = read_rgb(self.paths[index])
        if box := self.boxes[index]:
            image = crop_to_box(image, box, self.paths[index])
        # DINO's resize, which never enlarges
        image.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        return to_tensor(np.asarray(image)), index


def crop_to_box(
    image: Image.Image, box: tuple[float, float, float, float], name: str
) -> Image.Image:
    """The part of an image in a box of left, top, right, bottom, in pixels.

    Raises:
        UserError: the box lies outside the image; the message names ``name``.
    """
    left, top, right, bottom = map(round, box)
    inside = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UserError(
            f"{name}: the box of the query, {box}, does not fit its {image.width} x "
            f"{image.height} pixels"
        )
    return image.crop(inside)
