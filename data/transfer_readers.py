"""Readers of the transfer data sets.

torchvision fetches the archives. Its readers are not used: they know one folder only, stumble over
lists from Windows, and compare checksums of gigabytes at every start.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from scipy.io import loadmat
from torchvision.datasets import VisionDataset
from torchvision.datasets.utils import download_and_extract_archive

from data.image import decode_rgb, read_file
from data.listing import is_hidden, list_classes, read_lines
from data.source import FolderSource
from utils.errors import UserError
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

    names: Sequence[str]
    labels: Any = ()  # becomes an array of int64
    classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.labels = np.asarray(self.labels, np.int64)

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""
        return read_file(self.names[index])

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return decode_rgb(self.read(index), self.names[index])


@dataclass
class ImageArrays:
    """Images in one array, ``pixels``, N x H x W x 3 of uint8; the rest is as in ImageFiles."""

    names: Sequence[str]
    labels: Any
    classes: list[str]
    pixels: np.ndarray

    def __post_init__(self) -> None:
        self.labels = np.asarray(self.labels, np.int64)

    def read(self, index: int) -> bytes:
        """Image ``index`` as a file, for pre-training, which decodes files."""
        file = io.BytesIO()
        self.read_image(index).save(file, "PNG", compress_level=0)
        return file.getvalue()

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return Image.fromarray(self.pixels[index])


class ListedFiles:
    """A data set whose lists name its image files. Its archives are fetched by torchvision.

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

    def open(self, folder: str, split: str) -> ImageFiles | ImageArrays | FolderSource:
        """The images of a split in the data set's folder; ``a+b`` joins two of torchvision's.

        Raises:
            FileNotFoundError, NotADirectoryError: files are missing.
            UserError: a list has a line that cannot be.
            Exception: files are damaged; the type is the one that their parser raises.
        """
        parts = [self.read_lists(folder, part) for part in split.split("+")]
        for part in parts:
            if part.classes != parts[0].classes:
                raise ValueError(f"the classes of the parts of {split} differ")
        labels = np.concatenate([part.labels for part in parts])
        return ImageFiles([n for part in parts for n in part.names], labels, parts[0].classes)

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """The images of one of torchvision's splits, see ``open``."""
        raise NotImplementedError

    def download(self, root: str, split: str) -> None:
        """Fetch and unpack what ``open`` reads to torchvision's folder under the data path."""
        for part in split.split("+"):
            self.dataset(root, download=True, **self.arguments(part))


class FlowerFiles(ListedFiles):
    """Oxford 102 Flower: MATLAB lists of image numbers, and of labels from 1."""

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``."""
        name = {"train": "trnid", "val": "valid", "test": "tstid"}[part]
        numbers = _matlab(folder, "setid.mat")[name].ravel().tolist()
        labels = _matlab(folder, "imagelabels.mat")["labels"].ravel() - 1
        if numbers and not 1 <= min(numbers) <= max(numbers) <= len(labels):
            raise ValueError(f"{name} of setid.mat names an image without a label")
        names = [os.path.join(folder, "jpg", f"image_{number:05}.jpg") for number in numbers]
        classes = list(self.dataset.classes)
        return ImageFiles(names, [labels[number - 1] for number in numbers], classes)


class PetFiles(ListedFiles):
    """Oxford-IIIT Pet: lines of image, breed from 1, species, and number within the species."""

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``."""
        lines = _words(folder, f"annotations/{part}.txt", 4)
        names = [os.path.join(folder, "images", f"{line[0]}.jpg") for line in lines]
        labels = [int(line[1]) - 1 for line in lines]
        breeds = {label: line[0].rsplit("_", 1)[0] for line, label in zip(lines, labels, strict=True)}
        classes = [breeds[label].replace("_", " ").title() for label in sorted(breeds)]
        return ImageFiles(names, labels, classes)


class FoodFiles(ListedFiles):
    """Food-101: a JSON list of images for each class."""

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``."""
        path = os.path.join(folder, "meta", f"{part}.json")
        with open(path, encoding="utf-8-sig") as file:
            try:
                lists = json.load(file)
            except ValueError as error:
                raise UserError(f"{path}: not a JSON file ({error})") from error
        classes = sorted(lists)
        numbers = {name: number for number, name in enumerate(classes)}
        names = [
            os.path.join(folder, "images", f"{image}.jpg") for images in lists.values() for image in images
        ]
        labels = [numbers[name] for name, images in lists.items() for _ in images]
        return ImageFiles(names, labels, classes)


class CarFiles(ListedFiles):
    """Stanford Cars: MATLAB records of box, class from 1 and file."""

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``."""
        lists = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
        records = _matlab(folder, lists[part])["annotations"].ravel()
        names = [os.path.join(folder, f"cars_{part}", record["fname"]) for record in records]
        labels = [int(record["class"]) - 1 for record in records]
        classes = _matlab(folder, "devkit/cars_meta.mat")["class_names"].tolist()
        return ImageFiles(names, labels, classes)


class DtdFiles(ListedFiles):
    """Describable Textures: lines of class and image, by division."""

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``."""
        images = _words(folder, f"labels/{part}{self.options['partition']}.txt", 2, "/")
        classes = sorted({name for name, _ in images})
        names = [os.path.join(folder, "images", *image) for image in images]
        return ImageFiles(names, [classes.index(name) for name, _ in images], classes)


class AircraftFiles(ListedFiles):
    """FGVC-Aircraft: lines of image and variant."""

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``."""
        classes = _lines(folder, "variants.txt")
        images = _words(folder, f"images_variant_{part}.txt", 2)
        names = [os.path.join(folder, "images", f"{image}.jpg") for image, _ in images]
        return ImageFiles(names, [classes.index(name) for _, name in images], classes)


class PlacesFiles(ListedFiles):
    """Places365-Standard at 256 x 256."""

    FOLDERS: ClassVar = {
        # as torchvision names it, and as the archive does
        "train-standard": ("data_256_standard", "data_256"),
        "val": ("val_256",),
    }

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``."""
        numbers = {name: int(label) for name, label in _words(folder, "categories_places365.txt", 2)}
        images = _words(folder, f"places365_{part.replace('-', '_')}.txt", 2)
        place = find_folder(folder, self.FOLDERS[part], "")
        names = [os.path.join(place, image.lstrip("/")) for image, _ in images]
        classes = sorted(numbers, key=numbers.__getitem__)
        return ImageFiles(names, [int(label) for _, label in images], classes)


class CifarArrays(ListedFiles):
    """CIFAR, whose pickles are read here, because torchvision would run them."""

    def arguments(self, split: str) -> dict[str, Any]:
        """As ``ListedFiles.arguments``."""
        return {"train": split == "train"}

    def open(self, folder: str, split: str) -> ImageArrays:
        """As ``ListedFiles.open``."""
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
    """STL-10: planes of columns, and labels from 1."""

    def open(self, folder: str, split: str) -> ImageArrays:
        """As ``ListedFiles.open``."""
        path = os.path.join(folder, f"{split}_X.bin")
        pixels = np.fromfile(path, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        labels = np.fromfile(os.path.join(folder, f"{split}_y.bin"), np.uint8).astype(int) - 1
        names = [f"{path}: image {index}" for index in range(len(pixels))]
        return ImageArrays(names, labels.tolist(), _lines(folder, "class_names.txt"), pixels)


class VocFiles(ListedFiles):
    """PASCAL VOC 2007, with the class lists of its classification task.

    In these lists 0 marks an image whose objects of the class are all "difficult".
    """

    def arguments(self, split: str) -> dict[str, Any]:
        """As ``ListedFiles.arguments``."""
        return {"year": "2007", "image_set": split}

    def open(self, folder: str, split: str) -> ImageFiles:
        """As ``ListedFiles.open``; labels are N x 20 of 1, 0 and ``DIFFICULT``."""
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


class SunFiles(ListedFiles):
    """SUN397 in its official partitions, whose lists torchvision neither reads nor fetches."""

    def arguments(self, split: str) -> dict[str, Any]:
        """As ``ListedFiles.arguments``."""
        return {}

    def read_lists(self, folder: str, part: str) -> ImageFiles:
        """As ``ListedFiles.read_lists``; ``part`` names a list, such as ``Training_01``."""
        classes = _lines(folder, "ClassName.txt")
        numbers = {name: number for number, name in enumerate(classes)}
        images = _lines(folder, f"{part}.txt")
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

    def open(self, folder: str, split: str) -> ImageFiles:
        """As ``ListedFiles.open``; ``split`` is one of ``CALTECH101_SPLITS``."""
        classes, found, numbers = list_classes(os.path.join(folder, "101_ObjectCategories"))
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

    def open(self, folder: str, split: str) -> FolderSource:
        """As ``ListedFiles.open``."""
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
    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: not a readable MATLAB file ({error})") from error


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
