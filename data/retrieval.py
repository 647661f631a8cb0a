"""The files of the revisited Oxford and Paris benchmarks (arXiv 1803.11285)."""

import functools
import os
import reprlib
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
from utils.errors import UserError
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
        try:
            paths = list_images(folder, left_out)
        except OSError as error:
            raise UserError(f"{folder}: cannot read the images ({error.strerror})") from error
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
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dict, found a {type(content).__name__}")
    database, queries = (_names(content, key, path) for key in ("imlist", "qimlist"))
    truth = content.get("gnd")
    if not isinstance(truth, list | tuple) or len(truth) != len(queries):
        raise UserError(f"{path}: gnd must have an entry for each of {len(queries)} queries")
    labels, boxes = [], []
    for query, entry in zip(queries, truth, strict=True):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: the entry of query {query} is no dict")
        where = f"{path}: query {query}"
        labels.append({name: _indices(entry, name, len(database), where) for name in LABELS})
        boxes.append(_box(entry.get("bbx"), where))
    return GroundTruth(folder, database, queries, labels, boxes)


def _names(content: dict, key: str, path: str) -> list[str]:
    names = content.get(key)
    if isinstance(names, np.ndarray):
        names = names.tolist()
    if not isinstance(names, list | tuple) or not names:
        raise UserError(f"{path}: {key} must be a list of the names of images")
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise UserError(
                f"{path}: {key} holds {reprlib.repr(name)}, which is not the name of an image"
            )
    return list(names)


def _indices(entry: dict, name: str, count: int, where: str) -> np.ndarray:
    try:
        _refuse_nesting(entry[name])
        indices = np.array(entry[name])
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: {name} must be a list of numbers of images") from error
    # an empty list becomes an array of floats
    if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
        raise UserError(f"{where}: {name} must be a list of numbers of images")
    if len(indices) and not 0 <= indices.min() <= indices.max() < count:
        raise UserError(f"{where}: {name} names an image that is not among the {count} of imlist")
    return indices.astype(np.int64)


def _box(value: Any, where: str) -> tuple[float, float, float, float] | None:
    if value is None:
        return None
    try:
        _refuse_nesting(value)
        box = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        box = np.empty(0)
    if box.shape != (4,) or not np.isfinite(box).all() or not (box[:2] < box[2:]).all():
        raise UserError(f"{where}: bbx must be left, top, right and bottom with an area")
    return tuple(box.tolist())


def _refuse_nesting(values: Any) -> None:
    """Refuse lists of lists: by references, a few bytes could become any number of values."""
    if isinstance(values, list | tuple) and any(isinstance(v, list | tuple) for v in values):
        raise ValueError("nested")


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
