"""The one place that opens images: it tries each form, and numbers val's classes as train's."""

import argparse
import logging
import os
from dataclasses import dataclass

import numpy as np
from yacs.config import CfgNode

from data.folders import FLAT, FOLDERS, UNSORTED, FolderSource
from data.listing import check_root, folders_in, is_hidden
from data.source import Form, ImageSource
from utils.distributed import (
    first_on_each_node,
    on_first_process,
    rank,
    wait_for_all,
    world_size,
)
from utils.errors import UserError, reading

SPLITS = ("train", "val")


@dataclass(frozen=True)
class DataPath:
    """Which images: what --data-path, --dataset, --zip and --cache-mode say.

    Attributes:
        root: the data path.
        dataset: a name of ``data.transfer.TRANSFER_SETS``.
        zipped: read ``<split>.zip``, whatever else is there.
        cache_mode: which zipped images a process keeps in memory: ``no``, ``full`` or ``part``.
    """

    root: str
    dataset: str = "imagenet"
    zipped: bool = False
    cache_mode: str = "no"

    @classmethod
    def of(cls, config: CfgNode, cache_mode: str | None = None) -> "DataPath":
        """What a configuration says; ``cache_mode`` replaces its DATA.CACHE_MODE."""
        data = config.DATA
        mode = cache_mode or data.CACHE_MODE
        return cls(data.DATA_PATH, data.DATASET, data.ZIP_MODE, mode)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset`` and ``--download``."""
    from data.transfer import TRANSFER_SETS  # pre-training needs none of it

    parser.add_argument(
        "--dataset",
        dest="DATA.DATASET",
        metavar="NAME",
        choices=list(TRANSFER_SETS),
        help=f"data set of --data-path: {', '.join(TRANSFER_SETS)}",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the data set if it is missing"
    )


def open_train(place: DataPath, download: bool = False, labelled: bool = True) -> ImageSource:
    """The training images.

    Args:
        place: where they are.
        download: fetch the set if it is missing and torchvision can.
        labelled: refuse images without classes.

    Raises:
        UserError: no images in any form, or a form that cannot be read.
    """
    return _open(place, "train", download, labelled)


def open_splits(
    place: DataPath,
    download: bool = False,
    labelled: bool = True,
    train: ImageSource | None = None,
) -> tuple[ImageSource, ImageSource]:
    """The images of ``train`` and of ``val`` (the test split of a transfer set), numbered alike.

    Args:
        place, download, labelled: as for ``open_train``.
        train: the training images, if they are open already.

    Raises:
        UserError: as ``open_train``; or, with ``labelled``, training images of one class alone, or
            a class of the validation images that has no training image.
    """
    train = train or _open(place, "train", download, labelled)
    val = _open(place, "val", download, labelled)
    if labelled and train.labels.ndim == 1 and len(np.unique(train.labels)) < 2:
        raise UserError(
            f"{place.root}: the training images are of one class alone, "
            f"{train.classes[train.labels[0]]}: lay them out as train/<class>/<image>"
        )
    if labelled or UNSORTED not in (train.classes, val.classes):
        with reading(place.root, "train and val do not fit"):
            _number_as(train, val)
    return train, val


def open_present(place: DataPath) -> dict[str, ImageSource]:
    """The splits that lie in a data path, with or without classes, numbered alike.

    Raises:
        UserError: neither is there, or one that is there cannot be read.
    """
    check_root(place.root)
    *sorted_, _ = forms()
    there = {
        split
        for split in SPLITS
        if any(form.find(place.root, split) for form in sorted_)
        or os.path.isdir(os.path.join(place.root, split))
    }
    if there == {"val"}:
        return {"val": _open(place, "val", False, False)}
    train = open_train(place, labelled=False)
    if "val" not in there:
        return {"train": train}
    return dict(zip(SPLITS, open_splits(place, labelled=False, train=train), strict=True))


def forms() -> tuple[Form, ...]:
    """The forms in the order in which they are tried; the last has no classes."""
    # here, since most data paths need none of these, and some import pyarrow and scipy
    from data.imagenet import IMAGENET
    from data.lists import LIST
    from data.parquet import PARQUET
    from data.shards import SHARDS
    from data.tars import TAR
    from data.zips import ZIP

    return (FOLDERS, TAR, IMAGENET, SHARDS, PARQUET, LIST, ZIP, FLAT)


def open_source(root: str, split: str, zipped: bool = False, labelled: bool = True) -> ImageSource:
    """The images of one split in the first form that is there; the log names the others.

    Only for the training images, and for ``open_splits``: no other reader knows train's classes.

    Args:
        root: the data path.
        split: a name of ``SPLITS``.
        zipped: read ``<split>.zip``.
        labelled: refuse images without classes.

    Raises:
        UserError: no images in any form, or a form that cannot be read.
    """
    check_root(root)
    if zipped:
        from data.zips import ZipSource  # as in ``forms``

        return ZipSource(root, split)
    if folders_in(os.path.join(root, split)) and not _beside(root):
        return FolderSource(root, split)
    *sorted_, flat = forms()
    found = {form: paths for form in sorted_ if (paths := form.find(root, split))}
    if not found and not labelled and (paths := flat.find(root, split)):
        return flat.open(root, split, paths)
    if not found:
        return FolderSource(root, split)  # which says what is missing
    first, *others = found
    if others:
        names = ", ".join(form.name for form in others)
        log = logging.getLogger("synco")
        log.info(f"{root}: {split} is read from {first.name}, not from {names}")
    return first.open(root, split, found[first])


def _beside(root: str) -> bool:
    """Whether anything lies in the data path but the folders of the splits."""
    with reading(root):
        return any(not is_hidden(name) and name not in SPLITS for name in os.listdir(root))


def _open(place: DataPath, split: str, download: bool, labelled: bool) -> ImageSource:
    if place.dataset == "imagenet":
        source = first_on_each_node(
            lambda: open_source(place.root, split, place.zipped, labelled)
        )
        if place.zipped and place.cache_mode != "no":
            share = (rank(), world_size()) if place.cache_mode == "part" else (0, 1)
            source.fill_cache(*share)  # type: ignore[attr-defined]
            wait_for_all()  # it may take minutes more on one machine
        return source
    from data.transfer import open_transfer_set  # pre-training needs none of it

    split = "test" if split == "val" else split
    if download:
        on_first_process(
            lambda: open_transfer_set(place.dataset, place.root, split, download=True)
        )
    return first_on_each_node(lambda: open_transfer_set(place.dataset, place.root, split))


def _number_as(train: ImageSource, val: ImageSource) -> None:
    """Number the classes of ``val`` as those of ``train``.

    Raises:
        ValueError: a class of ``val`` has no training image, or it is not known which it is.
    """
    if train.labels.ndim + val.labels.ndim > 2:  # an image has several labels
        if train.classes != val.classes:
            raise ValueError("train and val have different classes")
        return
    used = np.unique(val.labels).tolist()
    number_of = {number: number for number in used}
    if train.classes != val.classes:
        number_of = _by_name_or_number(train, val, used)
    trained = set(np.unique(train.labels).tolist())
    if untrained := [n for n in used if number_of.get(n) not in trained]:
        others = f", nor have {len(untrained) - 1} others" if len(untrained) > 1 else ""
        raise ValueError(
            f"class {val.classes[untrained[0]]} is among the validation images, but has no "
            f"training image{others}"
        )
    numbers = [number_of.get(n, -1) for n in range(len(val.classes))]
    val.labels, val.classes = np.array(numbers)[val.labels], train.classes


def _by_name_or_number(train: ImageSource, val: ImageSource, used: list[int]) -> dict[int, int]:
    """The number in ``train`` of each class of ``val``, of which ``used`` have images.

    They have the same name. Or one split has names and the other numbers alone, which count the
    names from 0; the numbers get the names.

    Raises:
        ValueError: both are so, but say different things; or numbers that do not count all names.
    """
    both = (train, val)
    numbers = [s for s in both if all(map(str.isdecimal, s.classes))]
    name = int if len(numbers) > 1 else str  # 01 is 1
    known = {name(c): n for n, c in enumerate(train.classes)}
    if len(known) < len(train.classes):
        raise ValueError("two classes of train have one name, so those of val fit no class")
    by_name = {n: known[name(c)] for n, c in enumerate(val.classes) if name(c) in known}
    if len(numbers) > 1:  # folders may be named by numbers, and counted by numbers elsewhere
        numbers = [s for s in both if s.classes == [str(n) for n in range(len(s.classes))]]
    named = by_name.keys() >= set(used)
    if len(numbers) != 1 or (by_name and not named):
        return by_name
    (numbered,) = numbers
    split, names = ("val", train.classes) if numbered is val else ("train", val.classes)
    values = {n: int(c) for n, c in enumerate(numbered.classes) if int(c) < len(names)}
    counted = [int(numbered.classes[n]) for n in np.unique(numbered.labels).tolist()]
    counts = min(counted) == 0 and max(counted) < len(names)
    by_number = values if numbered is val else {v: n for n, v in values.items()}
    if named and not (counts and any(by_name[n] != by_number.get(n) for n in used)):
        return by_name
    if named or min(counted) == 0 and not counts:
        raise ValueError(
            f"the class numbers {min(counted)} to {max(counted)} of {split} do not say which of "
            f"{len(names)} classes ({names[0]}, ...) they are: write the names"
        )
    if not counts:
        raise ValueError(
            f"no image of {split} has the class number 0, which is {names[0]}: classes are "
            "numbered from 0 by their names; write the names"
        )
    numbered.classes = [names[values[n]] if n in values else c for n, c in enumerate(numbered.classes)]
    return by_number
