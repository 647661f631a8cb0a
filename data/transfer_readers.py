"""Readers of the transfer data sets: a function each, from the set's folder and a split's name.

torchvision fetches the archives. Its readers are not used: they know one folder only, stumble over
lists from Windows, and compare checksums of gigabytes at every start. A reader raises OSError where
a file is missing, and anything where one is damaged.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import loadmat
from torchvision import datasets

from data.folders import FolderSource
from data.listing import Listing, is_hidden, list_classes, log_left_out, read_lines
from data.source import ImageFiles
from utils.errors import UserError, reading
from utils.unpickle import load_plain_pickle

DIFFICULT = -1  # for an image with several labels: neither positive nor negative

CALTECH101_SPLITS = ("30 images a class", "the others")


@dataclass(eq=False)
class ImageArrays(ImageFiles):
    """Images in one array, ``pixels``, N x H x W x 3 of uint8; the rest is as in ImageFiles."""

    pixels: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    def read(self, index: int) -> bytes:
        """Image ``index`` as a file, for pre-training, which decodes files."""
        file = io.BytesIO()
        self.read_image(index).save(file, "PNG", compress_level=0)
        return file.getvalue()

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return Image.fromarray(self.pixels[index])


def read_flowers(folder: str, split: str) -> ImageFiles:
    """Oxford 102 Flower: MATLAB lists of image numbers, and of labels from 1."""
    name = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    numbers = _matlab(folder, "setid.mat")[name].ravel().tolist()
    labels = _matlab(folder, "imagelabels.mat")["labels"].ravel() - 1
    if numbers and not 1 <= min(numbers) <= max(numbers) <= len(labels):
        raise ValueError(f"{name} of setid.mat names an image without a label")
    names = [os.path.join(folder, "jpg", f"image_{number:05}.jpg") for number in numbers]
    classes = list(datasets.Flowers102.classes)
    return ImageFiles(names, [labels[number - 1] for number in numbers], classes)


def read_pets(folder: str, split: str) -> ImageFiles:
    """Oxford-IIIT Pet: lines of image, breed from 1, species, and number within the species."""
    lines = _words(folder, f"annotations/{split}.txt", 4)
    names = [os.path.join(folder, "images", f"{line[0]}.jpg") for line in lines]
    labels = [int(line[1]) - 1 for line in lines]
    breeds = {label: line[0].rsplit("_", 1)[0] for line, label in zip(lines, labels, strict=True)}
    classes = [breeds[label].replace("_", " ").title() for label in sorted(breeds)]
    return ImageFiles(names, labels, classes)


def read_food(folder: str, split: str) -> ImageFiles:
    """Food-101: a JSON list of images for each class."""
    path = os.path.join(folder, "meta", f"{split}.json")
    os.stat(path)  # missing differs from damaged
    with reading(path, "not a JSON file"), open(path, encoding="utf-8-sig") as file:
        lists = json.load(file)
    classes = sorted(lists)
    images = [(image, classes.index(name)) for name, listed in lists.items() for image in listed]
    names = [os.path.join(folder, "images", f"{image}.jpg") for image, _ in images]
    return ImageFiles(names, [label for _, label in images], classes)


def read_cars(folder: str, split: str) -> ImageFiles:
    """Stanford Cars: MATLAB records of box, class from 1 and file."""
    lists = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    records = _matlab(folder, lists[split])["annotations"].ravel()
    names = [os.path.join(folder, f"cars_{split}", record["fname"]) for record in records]
    labels = [int(record["class"]) - 1 for record in records]
    classes = _matlab(folder, "devkit/cars_meta.mat")["class_names"].tolist()
    return ImageFiles(names, labels, classes)


def read_dtd(folder: str, split: str) -> ImageFiles:
    """Describable Textures: lines of class and image, by division; here the first."""
    images = _words(folder, f"labels/{split}1.txt", 2, "/")
    classes = sorted({name for name, _ in images})
    names = [os.path.join(folder, "images", *image) for image in images]
    return ImageFiles(names, [classes.index(name) for name, _ in images], classes)


def read_aircraft(folder: str, split: str) -> ImageFiles:
    """FGVC-Aircraft: lines of image and variant."""
    classes = _lines(folder, "variants.txt")
    images = _words(folder, f"images_variant_{split}.txt", 2)
    names = [os.path.join(folder, "images", f"{image}.jpg") for image, _ in images]
    return ImageFiles(names, [classes.index(name) for _, name in images], classes)


def read_places(folder: str, split: str) -> ImageFiles:
    """Places365-Standard at 256 x 256."""
    numbers = {name: int(label) for name, label in _words(folder, "categories_places365.txt", 2)}
    images = _words(folder, f"places365_{split.replace('-', '_')}.txt", 2)
    # as torchvision names it, and as the archive does
    folders = {"train-standard": ("data_256_standard", "data_256"), "val": ("val_256",)}
    place = find_folder(folder, folders[split], "")
    names = [os.path.join(place, image.lstrip("/")) for image, _ in images]
    classes = sorted(numbers, key=numbers.__getitem__)
    return ImageFiles(names, [int(label) for _, label in images], classes)


def read_cifar(folder: str, split: str, dataset: type[datasets.CIFAR10]) -> ImageArrays:
    """CIFAR, whose pickles are read here, because torchvision would run them."""
    names, labels, pixels = [], [], []
    for file, _ in getattr(dataset, f"{split}_list"):
        path = os.path.join(folder, file)
        batch = _unpickle(path)
        labels += batch["labels" if "labels" in batch else "fine_labels"]
        names += [f"{path}: {name}" for name in batch["filenames"]]
        if not isinstance(batch["data"], np.ndarray):
            raise ValueError("the pixels are no array")
        pixels.append(batch["data"].astype(np.uint8, copy=False).reshape(-1, 3, 32, 32))
    meta = _unpickle(os.path.join(folder, dataset.meta["filename"]))
    images = np.concatenate(pixels).transpose(0, 2, 3, 1)
    return ImageArrays(names, labels, meta[dataset.meta["key"]], images)


def read_stl(folder: str, split: str) -> ImageArrays:
    """STL-10: planes of columns, and labels from 1."""
    path = os.path.join(folder, f"{split}_X.bin")
    pixels = np.fromfile(path, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    labels = np.fromfile(os.path.join(folder, f"{split}_y.bin"), np.uint8).astype(int) - 1
    names = [f"{path}: image {index}" for index in range(len(pixels))]
    return ImageArrays(names, labels, _lines(folder, "class_names.txt"), pixels)


def read_voc(folder: str, split: str) -> ImageFiles:
    """PASCAL VOC 2007, with the class lists of its classification task.

    In these lists 0 marks an image whose objects of the class are all "difficult". Labels are
    N x 20 of 1, 0 and ``DIFFICULT``.
    """
    lists = os.path.join(folder, "ImageSets", "Main")
    stems = _lines(lists, f"{split}.txt")
    suffix = f"_{split}.txt"
    found = [n for n in os.listdir(lists) if n.endswith(suffix) and not is_hidden(n)]
    classes = sorted(name.removesuffix(suffix) for name in found)
    columns = []
    for name in classes:
        marks = dict(_words(lists, name + suffix, 2))
        columns.append([{"1": 1, "-1": 0, "0": DIFFICULT}[marks[stem]] for stem in stems])
    names = [os.path.join(folder, "JPEGImages", f"{stem}.jpg") for stem in stems]
    return ImageFiles(names, np.array(columns).T.copy(), classes)


def read_sun(folder: str, split: str) -> ImageFiles:
    """SUN397 in its official partitions, whose lists torchvision neither reads nor fetches."""
    classes = _lines(folder, "ClassName.txt")
    numbers = {name: number for number, name in enumerate(classes)}
    images = _lines(folder, f"{split}.txt")
    labels = [numbers[os.path.dirname(image)] for image in images]
    # /a/abbey -> abbey
    return ImageFiles([folder + image for image in images], labels, [c[3:] for c in classes])


def read_caltech(folder: str, split: str) -> ImageFiles:
    """Caltech-101 with its background class; ``split`` is one of ``CALTECH101_SPLITS``."""
    folder = os.path.join(folder, "101_ObjectCategories")
    listing = Listing(folder)
    list_classes(folder, listing)
    log_left_out(folder, listing.left_out)
    every = listing.listed(folder)
    names, labels = [], []
    for label in range(len(every.classes)):
        paths = [every.names[index] for index in np.flatnonzero(every.labels == label)]
        # RandomState, because numpy promises that its draws never change
        order = np.random.RandomState(label).permutation(len(paths))
        drawn = order[:30] if split == CALTECH101_SPLITS[0] else order[30:]
        names += [paths[index] for index in sorted(drawn)]
        labels += [label] * len(drawn)
    return ImageFiles(names, labels, every.classes)


def read_folders(folder: str, split: str) -> FolderSource:
    """A folder for each split, and in it a folder for each class, as in ImageNet."""
    os.stat(os.path.join(folder, split))
    return FolderSource(folder, split)


def find_folder(root: str, places: Sequence[str], mark: str) -> str:
    """The first of ``places`` in ``root`` that holds the file or folder ``mark``, else the first."""
    folders = [os.path.join(root, place) if place else root for place in places]
    return next((f for f in folders if os.path.exists(os.path.join(f, mark))), folders[0])


def _unpickle(path: str) -> dict[str, Any]:
    os.stat(path)  # missing differs from damaged
    return load_plain_pickle(path, "latin1")


def _matlab(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    os.stat(path)
    with reading(path, "not a readable MATLAB file"):
        return loadmat(path, squeeze_me=True)


def _lines(folder: str, name: str) -> list[str]:
    return [line.strip() for _, line in read_lines(os.path.join(folder, name))]


def _words(folder: str, name: str, count: int, separator: str | None = None) -> list[list[str]]:
    """The words of each line of a list; the last may hold separators."""
    path = os.path.join(folder, name)
    lines = []
    for number, line in read_lines(path):
        words = line.strip().split(separator, count - 1)
        if len(words) != count:
            raise UserError(f"{path}:{number}: expected {count} words, found {len(words)}")
        lines.append(words)
    return lines
