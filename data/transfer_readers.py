"""Readers of the transfer data sets, in torchvision's folder layouts.

torchvision finds and lists the images; decoding, errors and array pickles are this project's.
torchvision's checksums are for its downloads only: comparing gigabytes at every start would tell
no more than reading them does.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import VisionDataset
from torchvision.datasets.utils import download_and_extract_archive

from data.image import decode_rgb, read_file
from data.listing import list_classes
from data.source import FolderSource
from utils.unpickle import load_plain_pickle

DIFFICULT = -1  # for an image with several labels: neither positive nor negative

CALTECH101_SPLITS = ("30 images a class", "the others")
SUN397_PARTITIONS = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"


@dataclass
class ImageFiles:
    """Images that are files.

    Attributes:
        names: path of each image.
        labels: class number of each image, or N x C of 1 (positive), 0 (negative) and
            ``DIFFICULT`` (not counted).
        classes: names of the classes.
    """

    names: list[str]
    labels: list[int] | np.ndarray = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""
        return read_file(self.names[index])

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return decode_rgb(self.read(index), self.names[index])


@dataclass
class ImageArrays:
    """Images in one array, ``pixels``, N x H x W x 3 of uint8; the rest is as in ImageFiles."""

    names: list[str]
    labels: list[int] | np.ndarray
    classes: list[str]
    pixels: np.ndarray

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return Image.fromarray(self.pixels[index])


class ListedFiles:
    """A data set whose torchvision class lists files and hands their paths to ``loader``.

    Args:
        dataset: the class of torchvision.
        options: further arguments of the class.
    """

    def __init__(self, dataset: type[VisionDataset], **options: Any) -> None:
        self.dataset = dataset
        self.options = options

    def arguments(self, split: str) -> dict[str, Any]:
        """The arguments with which torchvision's class reads a split."""
        return {"split": split, **self.options}

    def open(self, root: str, split: str) -> ImageFiles | ImageArrays | FolderSource:
        """The images of a split under ``root``; ``a+b`` joins two of torchvision's.

        Raises:
            FileNotFoundError, NotADirectoryError, RuntimeError: files are missing.
            Exception: files are damaged; the type is the one that their parser raises.
        """
        names, labels = [], []
        classes: list[str] | None = None
        for part in split.split("+"):
            dataset = _unchecked(self.dataset)(root, loader=str, **self.arguments(part))
            if classes not in (None, dataset.classes):
                raise ValueError(f"the classes of {part} differ from those of the other parts")
            classes = dataset.classes
            for index in range(len(dataset)):
                path, label = dataset[index]
                names.append(path)
                labels.append(int(label))
        return ImageFiles(names, labels, classes or [])

    def download(self, root: str, split: str) -> None:
        """Fetch and unpack what ``open`` reads, as far as torchvision can."""
        for part in split.split("+"):
            self.dataset(root, download=True, **self.arguments(part))


class PetFiles(ListedFiles):
    """Oxford-IIIT Pet, whose torchvision class takes no ``loader``."""

    def open(self, root: str, split: str) -> ImageFiles:
        """As ``ListedFiles.open``."""
        pets = self.dataset(root, **self.arguments(split))
        return ImageFiles([str(path) for path in pets._images], pets._labels, pets.classes)


class CifarArrays(ListedFiles):
    """CIFAR, whose pickles are read here, because torchvision would run them."""

    def arguments(self, split: str) -> dict[str, Any]:
        """As ``ListedFiles.arguments``."""
        return {"train": split == "train"}

    def open(self, root: str, split: str) -> ImageArrays:
        """As ``ListedFiles.open``."""
        folder = os.path.join(root, self.dataset.base_folder)
        names, labels, pixels = [], [], []
        for file, _ in getattr(self.dataset, f"{split}_list"):
            path = os.path.join(folder, file)
            batch = _unpickle(path)
            labels += batch["labels" if "labels" in batch else "fine_labels"]
            names += [f"{path}: {name}" for name in batch["filenames"]]
            if not isinstance(batch["data"], np.ndarray):
                raise ValueError("the pixels are no array")
            pixels.append(batch["data"].astype(np.uint8, copy=False).reshape(-1, 3, 32, 32))
        meta = _unpickle(os.path.join(folder, self.dataset.meta["filename"]))
        images = np.concatenate(pixels).transpose(0, 2, 3, 1)
        return ImageArrays(names, labels, meta[self.dataset.meta["key"]], images)


class StlArrays(ListedFiles):
    """STL-10."""

    def open(self, root: str, split: str) -> ImageArrays:
        """As ``ListedFiles.open``."""
        dataset = _unchecked(self.dataset)(root, **self.arguments(split))
        path = os.path.join(root, dataset.base_folder, f"{split}_X.bin")
        names = [f"{path}: image {index}" for index in range(len(dataset))]
        pixels = dataset.data.transpose(0, 2, 3, 1)
        return ImageArrays(names, dataset.labels.tolist(), dataset.classes, pixels)


class VocFiles(ListedFiles):
    """PASCAL VOC 2007, with the class lists of its classification task.

    In these lists 0 marks an image whose objects of the class are all "difficult".
    """

    def arguments(self, split: str) -> dict[str, Any]:
        """As ``ListedFiles.arguments``."""
        return {"year": "2007", "image_set": split}

    def open(self, root: str, split: str) -> ImageFiles:
        """As ``ListedFiles.open``; labels are N x 20 of 1, 0 and ``DIFFICULT``."""
        names = self.dataset(root, **self.arguments(split)).images
        lists = os.path.join(root, "VOCdevkit", "VOC2007", "ImageSets", "Main")
        suffix = f"_{split}.txt"
        classes = sorted(n.removesuffix(suffix) for n in os.listdir(lists) if n.endswith(suffix))
        stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
        columns = []
        for name in classes:
            marks = dict(line.split() for line in _lines(lists, name + suffix))
            columns.append([{"1": 1, "-1": 0, "0": DIFFICULT}[marks[stem]] for stem in stems])
        return ImageFiles(names, np.array(columns).T.copy(), classes)


class SunFiles(ListedFiles):
    """SUN397 in its official partitions, whose lists torchvision neither reads nor fetches."""

    def arguments(self, split: str) -> dict[str, Any]:
        """As ``ListedFiles.arguments``."""
        return {}

    def open(self, root: str, split: str) -> ImageFiles:
        """As ``ListedFiles.open``; ``split`` names a list, such as ``Training_01``."""
        folder = os.path.join(root, "SUN397")
        classes = _lines(folder, "ClassName.txt")
        numbers = {name: number for number, name in enumerate(classes)}
        images = _lines(folder, f"{split}.txt")
        labels = [numbers[os.path.dirname(image)] for image in images]
        # /a/abbey -> abbey
        return ImageFiles([folder + image for image in images], labels, [c[3:] for c in classes])

    def download(self, root: str, split: str) -> None:
        """As ``ListedFiles.download``, and the lists."""
        super().download(root, split)
        download_and_extract_archive(SUN397_PARTITIONS, os.path.join(root, "SUN397"))


class CaltechFiles(ListedFiles):
    """Caltech-101 with its background class, which torchvision's class leaves out."""

    def arguments(self, split: str) -> dict[str, Any]:
        """As ``ListedFiles.arguments``."""
        return {}

    def open(self, root: str, split: str) -> ImageFiles:
        """As ``ListedFiles.open``; ``split`` is one of ``CALTECH101_SPLITS``."""
        folder = os.path.join(root, "caltech101", "101_ObjectCategories")
        classes, found, numbers = list_classes(folder)
        images: list[list[str]] = [[] for _ in classes]
        for path, number in zip(found, numbers, strict=True):
            images[number].append(path)
        names, labels = [], []
        for label, paths in enumerate(images):
            # RandomState, because numpy promises that its draws never change
            order = np.random.RandomState(label).permutation(len(paths))
            drawn = order[:30] if split == CALTECH101_SPLITS[0] else order[30:]
            names += [paths[index] for index in sorted(drawn)]
            labels += [label] * len(drawn)
        return ImageFiles(names, labels, classes)


class ClassFolders:
    """A folder for each split, and in it a folder for each class, as in ImageNet."""

    def open(self, root: str, split: str) -> FolderSource:
        """As ``ListedFiles.open``."""
        os.stat(os.path.join(root, split))
        return FolderSource(root, split)


def _unchecked(dataset: type[VisionDataset]) -> type[VisionDataset]:
    """The class without its checksums: it finds missing files when it opens them."""
    return type(dataset.__name__, (dataset,), {"_check_integrity": lambda *_: True})


def _unpickle(path: str) -> dict[str, Any]:
    os.stat(path)  # missing differs from damaged
    return load_plain_pickle(path, "latin1")


def _lines(folder: str, name: str) -> list[str]:
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]
