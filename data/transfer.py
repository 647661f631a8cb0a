"""The data sets that a representation is transferred to: a table with one row per data set.

Splits and metrics are those of Kornblith et al. 2019 (arXiv 1805.08974), as SimCLR and BYOL use
them. They lack imagenet, stl10 and places365, which have their own standard splits and top-1.
``python -m data.transfer`` prints the table in Markdown.
"""

import os
from dataclasses import dataclass

import numpy as np
from torchvision import datasets

from data.hints import nearest_path
from data.source import FolderSource
from data.transfer_readers import (
    CALTECH101_SPLITS,
    DIFFICULT,
    AircraftFiles,
    CaltechFiles,
    CarFiles,
    CifarArrays,
    ClassFolders,
    DtdFiles,
    FlowerFiles,
    FoodFiles,
    ImageArrays,
    ImageFiles,
    ListedFiles,
    PetFiles,
    PlacesFiles,
    StlArrays,
    SunFiles,
    VocFiles,
    find_folder,
)
from utils.errors import UserError

# words that evaluation.classification_metrics looks up
TOP1, MEAN_PER_CLASS, MAP = "top1", "mean_per_class", "mAP"


@dataclass(frozen=True)
class TransferSet:
    """A row of the table.

    Attributes:
        name: what ``--dataset`` calls it.
        reader: reads it, and downloads it if ``download`` is set.
        train, test: the reader's names of the splits.
        classes: number of classes.
        metric: TOP1, MEAN_PER_CLASS or MAP; with ``MAP`` an image can have several labels.
        places: where the data set's folder can lie under the data path: as torchvision has it, as
            the archive unpacks, or (an empty name) the data path itself.
        mark: a file or folder that tells the data set's folder.
        layout: the files expected under the data path.
        origin: the data set's home.
        download: whether ``--download`` can fetch it.
    """

    name: str
    reader: ListedFiles | ClassFolders
    train: str
    test: str
    classes: int
    metric: str
    places: tuple[str, ...]
    mark: str
    layout: str
    origin: str
    download: bool = True


# fmt: off
_ROWS = (
    TransferSet(
        "imagenet", ClassFolders(), "train", "val", 1000, TOP1,
        ("",), "train",
        "{train,val}/<class>/<image>",
        "https://image-net.org", download=False,
    ),
    TransferSet(
        "cifar10", CifarArrays(datasets.CIFAR10), "train", "test", 10, TOP1,
        ("cifar-10-batches-py", ""), "batches.meta",
        "cifar-10-batches-py/{data_batch_1,...,data_batch_5,test_batch,batches.meta}",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    TransferSet(
        "cifar100", CifarArrays(datasets.CIFAR100), "train", "test", 100, TOP1,
        ("cifar-100-python", ""), "meta",
        "cifar-100-python/{train,test,meta}",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    TransferSet(
        "stl10", StlArrays(datasets.STL10), "train", "test", 10, TOP1,
        ("stl10_binary", ""), "class_names.txt",
        "stl10_binary/{train_X.bin,train_y.bin,test_X.bin,test_y.bin,class_names.txt}",
        "https://cs.stanford.edu/~acoates/stl10/",
    ),
    TransferSet(
        "flowers102", FlowerFiles(datasets.Flowers102), "train+val", "test", 102, MEAN_PER_CLASS,
        ("flowers-102", ""), "setid.mat",
        "flowers-102/{jpg/,imagelabels.mat,setid.mat}",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    TransferSet(
        "pets", PetFiles(datasets.OxfordIIITPet), "trainval", "test", 37, MEAN_PER_CLASS,
        ("oxford-iiit-pet", ""), "annotations",
        "oxford-iiit-pet/{images/,annotations/{trainval,test}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    TransferSet(
        "food101", FoodFiles(datasets.Food101), "train", "test", 101, TOP1,
        ("food-101", ""), "meta",
        "food-101/{images/,meta/{train,test}.json}",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    TransferSet(
        "cars", CarFiles(datasets.StanfordCars), "train", "test", 196, TOP1,
        ("stanford_cars", ""), "devkit",
        "stanford_cars/{cars_train/,cars_test/,cars_test_annos_withlabels.mat,"
        "devkit/{cars_meta,cars_train_annos}.mat}",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html", download=False,
    ),
    TransferSet(
        "caltech101", CaltechFiles(datasets.Caltech101), *CALTECH101_SPLITS, 102, MEAN_PER_CLASS,
        ("caltech101", "caltech-101", ""), "101_ObjectCategories",
        "caltech101/101_ObjectCategories/<class>/image_0001.jpg",
        "https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    TransferSet(
        "dtd", DtdFiles(datasets.DTD, partition=1), "train+val", "test", 47, TOP1,
        ("dtd/dtd", "dtd", ""), "labels",
        "dtd/dtd/{images/,labels/{train1,val1,test1}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
    TransferSet(
        "aircraft", AircraftFiles(datasets.FGVCAircraft, annotation_level="variant"),
        "trainval", "test", 100, MEAN_PER_CLASS,
        ("fgvc-aircraft-2013b/data", "data", ""), "variants.txt",
        "fgvc-aircraft-2013b/data/{images/,variants.txt,images_variant_{trainval,test}.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
    TransferSet(
        "sun397", SunFiles(datasets.SUN397), "Training_01", "Testing_01", 397, TOP1,
        ("SUN397", ""), "ClassName.txt",
        "SUN397/{ClassName.txt,Training_01.txt,Testing_01.txt,a/abbey/sun_*.jpg,...}",
        "https://vision.princeton.edu/projects/2010/SUN/",
    ),
    TransferSet(
        "voc2007", VocFiles(datasets.VOCDetection), "trainval", "test", 20, MAP,
        ("VOCdevkit/VOC2007", "VOC2007", ""), "ImageSets",
        "VOCdevkit/VOC2007/{JPEGImages/,ImageSets/Main/{trainval,test,*_trainval,*_test}.txt}",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    ),
    # at 256 x 256, enough for a crop of 224, and a quarter of the space
    TransferSet(
        "places365", PlacesFiles(datasets.Places365, small=True),
        "train-standard", "val", 365, TOP1,
        ("",), "categories_places365.txt",
        "{data_256_standard/,val_256/,categories_places365.txt,"
        "places365_{train_standard,val}.txt}",
        "http://places2.csail.mit.edu/download.html",
    ),
)
# fmt: on
TRANSFER_SETS = {row.name: row for row in _ROWS}

_MISSING = (FileNotFoundError, NotADirectoryError)


def open_transfer_set(
    name: str, root: str, split: str, download: bool = False
) -> ImageFiles | ImageArrays | FolderSource:
    """The images of a data set of the table.

    Args:
        name: its name.
        root: the data path, which holds the data set's folder or is it, see ``TransferSet.places``.
        split: ``train`` or ``test``.
        download: fetch what is missing; for one process only, before the others open it.

    Returns:
        names, labels, classes and ``read_image(index)``.

    Raises:
        UserError: unknown name, files missing or damaged, or a download that failed.
        ValueError: another split.
    """
    if name not in TRANSFER_SETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(TRANSFER_SETS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    row = TRANSFER_SETS[name]
    if not root:
        raise UserError(f"no data set given: set --data-path to a folder with {row.layout}")
    try:
        return _open(row, root, getattr(row, split))
    except _MISSING as error:
        if not (download and row.download):
            how = "--download fetches it" if row.download else "it has to be fetched by hand"
            path = getattr(error, "filename", None)
            missing = f" (no {path})" if path else ""
            missing += "" if os.path.isdir(root) else nearest_path(root)
            raise UserError(
                f"{root}: {name} is not there{missing}; expected {row.layout} "
                f"from {row.origin}; {how}"
            ) from error
    assert isinstance(row.reader, ListedFiles)  # no other has ``row.download``
    try:
        row.reader.download(root, getattr(row, split))
    except Exception as error:  # of the network, the archive or the disk
        raise UserError(
            f"{root}: the download of {name} failed ({_one_line(error)}); fetch {row.layout} "
            f"from {row.origin} by hand"
        ) from error
    return open_transfer_set(name, root, split)


def markdown_table() -> str:
    """The table in Markdown."""
    header = ("data set", "train", "test", "classes", "metric", "files under `--data-path`")
    lines = [header, ("---",) * len(header)]
    for row in TRANSFER_SETS.values():
        files = f"`{row.layout}`" + ("" if row.download else " (by hand)")
        name = f"[{row.name}]({row.origin})"
        lines.append((name, row.train, row.test, str(row.classes), row.metric, files))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _open(row: TransferSet, root: str, split: str) -> ImageFiles | ImageArrays | FolderSource:
    try:
        images = row.reader.open(find_folder(root, row.places, row.mark), split)
        if isinstance(images, ImageFiles) and images.names:
            os.stat(images.names[0])  # the lists may be there without what a download would bring
    except (UserError, *_MISSING):
        raise
    except Exception as error:  # the parser of a damaged file can raise anything
        raise UserError(
            f"{root}: the files of {row.name} are damaged "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error
    if isinstance(images, FolderSource):  # a user's own data set has this layout too
        return images
    found, labels = len(images.classes), np.asarray(images.labels)
    if found != row.classes:
        raise UserError(f"{root}: {row.name} has {row.classes} classes, {found} are there")
    if not len(images.names) or len(images.names) != len(labels):
        raise UserError(f"{root}: {row.name} has {len(images.names)} images, {len(labels)} labels")
    if labels.min() < (DIFFICULT if row.metric == MAP else 0) or labels.max() >= row.classes:
        raise UserError(f"{root}: a label of {row.name} names none of its {row.classes} classes")
    return images


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    print(markdown_table())
