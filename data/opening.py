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
        try:
            _number_as(train, val)
        except ValueError as error:
            raise UserError(f"{place.root}: {error}") from error
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
        on_first_process(lambda: open_transfer_set(place.dataset, place.root, split, True))
    return first_on_each_node(lambda: open_transfer_set(place.dataset, place.root, split))


def _number_as(train: ImageSource, val: ImageSource) -> None:
    """Number the classes of ``val`` as those of ``train``, by their names.

    Raises:
        ValueError: a class of ``val`` has no training image, or numbers fit no names.
    """
    if train.labels.ndim + val.labels.ndim > 2:  # an image has several labels
        if train.classes != val.classes:
            raise ValueError("train and val have different classes")
        return
    number_of = list(range(len(val.classes)))
    if train.classes != val.classes:
        _name_numbers(train, val)
        known = {name: number for number, name in enumerate(train.classes)}
        if len(known) < len(train.classes):
            raise ValueError("two classes of train have one name, so those of val fit no class")
        number_of = [known.get(name, -1) for name in val.classes]
    trained = set(np.unique(train.labels).tolist())
    untrained = [n for n in np.unique(val.labels).tolist() if number_of[n] not in trained]
    if untrained:
        others = f", nor have {len(untrained) - 1} others" if len(untrained) > 1 else ""
        raise ValueError(
            f"class {val.classes[untrained[0]]} is among the validation images, but has no "
            f"training image{others}"
        )
    if train.classes != val.classes:
        val.labels, val.classes = np.array(number_of)[val.labels], train.classes


def _name_numbers(train: ImageSource, val: ImageSource) -> None:
    """Where one split has names of classes and the other numbers alone, name the numbers.

    Number n stands for the n-th name, from 0; or for the name that is this number.

    Raises:
        ValueError: the numbers fit the names in neither way, or in both ways differently.
    """
    both = (train, val)
    numbers = [s for s in both if all(map(str.isdecimal, s.classes))]
    if len(numbers) > 1:  # folders may be named by numbers, but as words: 10 comes before 9
        numbers = [s for s in both if s.classes == [str(n) for n in range(len(s.classes))]]
    if len(numbers) != 1:
        return
    (numbered,) = numbers
    split, names = ("val", train.classes) if numbered is val else ("train", val.classes)
    values = [int(name) for name in numbered.classes]
    used = sorted(values[label] for label in np.unique(numbered.labels).tolist())
    by_place = dict(enumerate(names))
    by_value = {int(n): n for n in names} if all(map(str.isdecimal, names)) else {}
    fit = [by for by in (by_value, by_place) if by.keys() >= set(used)]
    if used[0] > 0 and fit == [by_place]:
        raise ValueError(
            f"no image of {split} has the class number 0, which is {names[0]}: classes are "
            "numbered from 0 by their names; write the names"
        )
    if len({tuple(by[n] for n in used) for by in fit if 0 in used or by is by_value}) != 1:
        raise ValueError(
            f"the class numbers {used[0]} to {used[-1]} of {split} do not say which of "
            f"{len(names)} classes ({names[0]}, ...) they are: write the names"
        )
    numbered.classes = [fit[0].get(value, str(value)) for value in values]
