"""The data sets that a representation is transferred to: a table with one row per data set.

Splits and metrics are those of Kornblith et al. 2019 (arXiv 1805.08974), as SimCLR and BYOL use
them. They lack imagenet, stl10 and places365, which have their own standard splits and top-1.
``python -m data.transfer`` prints the table in Markdown.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from data import transfer_readers as readers
from data.folders import FolderSource
from data.source import ImageFiles
from data.transfer_readers import CALTECH101_SPLITS, DIFFICULT, ImageArrays, find_folder
from utils.errors import UserError, reading

# words that evaluation.classification_metrics looks up
TOP1, MEAN_PER_CLASS, MAP = "top1", "mean_per_class", "mAP"
SUN397_PARTITIONS = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"


@dataclass(frozen=True)
class TransferSet:
    """A row of the table.

    Attributes:
        name: what ``--dataset`` calls it.
        read: its reader, of the data set's folder and a split's name.
        train, test: the reader's names of the splits; ``a+b`` joins two.
        classes: number of classes.
        metric: TOP1, MEAN_PER_CLASS or MAP; with ``MAP`` an image can have several labels.
        places: where the data set's folder can lie under the data path: as torchvision has it, as
            the archive unpacks, or (an empty name) the data path itself.
        mark: a file or folder that tells the data set's folder.
        layout: the files expected under the data path.
        origin: the data set's home.
        fetch: how ``--download`` unpacks a split below a data path, if it can.
    """

    name: str
    read: Callable[[str, str], ImageFiles]
    train: str
    test: str
    classes: int
    metric: str
    places: tuple[str, ...]
    mark: str
    layout: str
    origin: str
    fetch: Callable[[str, str], object] | None = None


def _by_split(dataset: Callable[..., object], **options: object) -> Callable[[str, str], object]:
    """Fetch by a class of torchvision that takes ``split``."""
    return lambda root, split: dataset(root, split=split, download=True, **options)


def _fetch_sun(root: str, split: str) -> None:
    datasets.SUN397(root, download=True)
    download_and_extract_archive(SUN397_PARTITIONS, os.path.join(root, "SUN397"))


# fmt: off
_ROWS = (
    TransferSet(
        "imagenet", readers.read_folders, "train", "val", 1000, TOP1,
        ("",), "train",
        "{train,val}/<class>/<image>",
        "https://image-net.org",
    ),
    TransferSet(
        "cifar10", partial(readers.read_cifar, dataset=datasets.CIFAR10), "train", "test", 10, TOP1,
        ("cifar-10-batches-py", ""), "batches.meta",
        "cifar-10-batches-py/{data_batch_1,...,data_batch_5,test_batch,batches.meta}",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        lambda root, split: datasets.CIFAR10(root, download=True),
    ),
    TransferSet(
        "cifar100", partial(readers.read_cifar, dataset=datasets.CIFAR100), "train", "test", 100, TOP1,
        ("cifar-100-python", ""), "meta",
        "cifar-100-python/{train,test,meta}",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        lambda root, split: datasets.CIFAR100(root, download=True),
    ),
    TransferSet(
        "stl10", readers.read_stl, "train", "test", 10, TOP1,
        ("stl10_binary", ""), "class_names.txt",
        "stl10_binary/{train_X.bin,train_y.bin,test_X.bin,test_y.bin,class_names.txt}",
        "https://cs.stanford.edu/~acoates/stl10/",
        _by_split(datasets.STL10),
    ),
    TransferSet(
        "flowers102", readers.read_flowers, "train+val", "test", 102, MEAN_PER_CLASS,
        ("flowers-102", ""), "setid.mat",
        "flowers-102/{jpg/,imagelabels.mat,setid.mat}",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        _by_split(datasets.Flowers102),
    ),
    TransferSet(
        "pets", readers.read_pets, "trainval", "test", 37, MEAN_PER_CLASS,
        ("oxford-iiit-pet", ""), "annotations",
        "oxford-iiit-pet/{images/,annotations/{trainval,test}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        _by_split(datasets.OxfordIIITPet),
    ),
    TransferSet(
        "food101", readers.read_food, "train", "test", 101, TOP1,
        ("food-101", ""), "meta",
        "food-101/{images/,meta/{train,test}.json}",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        _by_split(datasets.Food101),
    ),
    TransferSet(
        "cars", readers.read_cars, "train", "test", 196, TOP1,
        ("stanford_cars", ""), "devkit",
        "stanford_cars/{cars_train/,cars_test/,cars_test_annos_withlabels.mat,"
        "devkit/{cars_meta,cars_train_annos}.mat}",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    ),
    TransferSet(
        "caltech101", readers.read_caltech, *CALTECH101_SPLITS, 102, MEAN_PER_CLASS,
        ("caltech101", "caltech-101", ""), "101_ObjectCategories",
        "caltech101/101_ObjectCategories/<class>/image_0001.jpg",
        "https://data.caltech.edu/records/mzrjq-6wc02",
        lambda root, split: datasets.Caltech101(root, download=True),
    ),
    TransferSet(
        "dtd", readers.read_dtd, "train+val", "test", 47, TOP1,
        ("dtd/dtd", "dtd", ""), "labels",
        "dtd/dtd/{images/,labels/{train1,val1,test1}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        _by_split(datasets.DTD),
    ),
    TransferSet(
        "aircraft", readers.read_aircraft, "trainval", "test", 100, MEAN_PER_CLASS,
        ("fgvc-aircraft-2013b/data", "data", ""), "variants.txt",
        "fgvc-aircraft-2013b/data/{images/,variants.txt,images_variant_{trainval,test}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        _by_split(datasets.FGVCAircraft),
    ),
    TransferSet(
        "sun397", readers.read_sun, "Training_01", "Testing_01", 397, TOP1,
        ("SUN397", ""), "ClassName.txt",
        "SUN397/{ClassName.txt,Training_01.txt,Testing_01.txt,a/abbey/sun_*.jpg,...}",
        "https://vision.princeton.edu/projects/2010/SUN/",
        _fetch_sun,
    ),
    TransferSet(
        "voc2007", readers.read_voc, "trainval", "test", 20, MAP,
        ("VOCdevkit/VOC2007", "VOC2007", ""), "ImageSets",
        "VOCdevkit/VOC2007/{JPEGImages/,ImageSets/Main/{trainval,test,*_trainval,*_test}.txt}",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
        lambda root, split: datasets.VOCDetection(root, "2007", split, download=True),
    ),
    # at 256 x 256, enough for a crop of 224, and a quarter of the space
    TransferSet(
        "places365", readers.read_places, "train-standard", "val", 365, TOP1,
        ("",), "categories_places365.txt",
        "{data_256_standard/,val_256/,categories_places365.txt,"
        "places365_{train_standard,val}.txt}",
        "http://places2.csail.mit.edu/download.html",
        _by_split(datasets.Places365, small=True),
    ),
)
# fmt: on
TRANSFER_SETS = {row.name: row for row in _ROWS}


def open_transfer_set(name: str, root: str, split: str, download: bool = False) -> ImageFiles:
    """The images of a data set of the table.

    Args:
        name: its name.
        root: the data path, which holds the data set's folder or is it, see ``TransferSet.places``.
        split: ``train`` or ``test``.
        download: fetch what is missing; for one process only, before the others open it.

    Raises:
        UserError: unknown name, files missing or damaged, or a download that failed.
        ValueError: another split.
    """
    if name not in TRANSFER_SETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(TRANSFER_SETS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    row = TRANSFER_SETS[name]
    parts = getattr(row, split).split("+")
    if not root:
        raise UserError(f"no data set given: set --data-path to a folder with {row.layout}")
    try:
        return _read(row, root, parts)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not (download and row.fetch):
            how = "--download fetches it" if row.fetch else "it has to be fetched by hand"
            missing = f" (no {error.filename})" if error.filename else ""
            raise UserError(
                f"{root}: {name} is not there{missing}; expected {row.layout} "
                f"from {row.origin}; {how}"
            ) from error
    by_hand = f"fetch {row.layout} from {row.origin} by hand"
    with reading(root, f"the download of {name} failed, {by_hand}"):
        for part in parts:
            row.fetch(root, part)
    return open_transfer_set(name, root, split)


def _read(row: TransferSet, root: str, parts: list[str]) -> ImageFiles:
    folder = find_folder(root, row.places, row.mark)
    try:
        images, *others = [row.read(folder, part) for part in parts]
        for other in others:
            if other.classes != images.classes:
                raise ValueError(f"the classes of the parts of {'+'.join(parts)} differ")
            labels = np.concatenate([images.labels, other.labels])
            images = ImageFiles([*images.names, *other.names], labels, images.classes)
        if not isinstance(images, ImageArrays) and len(images.names):
            os.stat(images.names[0])  # the lists may be there without what a download would bring
    except (UserError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # the parser of a damaged file can raise anything
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{root}: the files of {row.name} are damaged ({said})") from error
    if isinstance(images, FolderSource):  # a user's own data set has this layout too
        return images
    found, labels = len(images.classes), images.labels
    least = DIFFICULT if row.metric == MAP else 0
    whole = found == row.classes and 0 < len(images.names) == len(labels)
    if not whole or labels.min() < least or labels.max() >= found:
        raise UserError(
            f"{root}: {row.name} has {row.classes} classes and a label of them for each image; here "
            f"are {found} classes, {len(images.names)} images and {len(labels)} labels, from "
            f"{labels.min(initial=0)} to {labels.max(initial=0)}"
        )
    return images


def markdown_table() -> str:
    """The table in Markdown."""
    header = ("data set", "train", "test", "classes", "metric", "files under `--data-path`")
    lines = [header, ("---",) * len(header)]
    for row in TRANSFER_SETS.values():
        files = f"`{row.layout}`" + ("" if row.fetch else " (by hand)")
        name = f"[{row.name}]({row.origin})"
        lines.append((name, row.train, row.test, str(row.classes), row.metric, files))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(markdown_table())
