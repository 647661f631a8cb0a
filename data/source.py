"""Where images lie: the folders of classes here, the other forms in ``data.forms``."""

import argparse
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from data.image import decode_rgb, read_file
from data.index import Index, open_index
from data.listing import fill_classes, is_hidden, log_left_out
from utils.distributed import (
    first_on_each_node,
    on_first_process,
    rank,
    wait_for_all,
    world_size,
)
from utils.errors import UserError

SPLITS = ("train", "val")


class ImageSource(Protocol):
    """Images with labels, wherever they lie.

    Attributes:
        names: what to call each image.
        labels: class number of each image, or a row of several labels for each; int64.
        classes: names of the classes.
    """

    names: Sequence[str]
    labels: np.ndarray
    classes: list[str]

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""


class PartOfSource:
    """Some of the images of another source, with its classes.

    Args:
        source: the images.
        indices: which of them.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self._source, self._indices = source, np.asarray(indices, np.int64)
        self.names: Sequence[str] = _SomeNames(source.names, self._indices)
        self.labels = source.labels[self._indices]
        self.classes = source.classes

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return self._source.read_image(self._indices[index])


class _SomeNames(Sequence[str]):
    def __init__(self, names: Sequence[str], indices: np.ndarray) -> None:
        self._names, self._indices = names, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._names[i] for i in self._indices[index]]
        return self._names[self._indices[index]]


@runtime_checkable
class FileSource(ImageSource, Protocol):
    """Images that are files."""

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""


@runtime_checkable
class CostlySource(Protocol):
    """Images that are slow to read in any order but their own."""

    def log_cost(self) -> None:
        """Say what an image costs, and what to do."""


class IndexedSource:
    """Images that are files, listed by ``data.index``.

    Attributes:
        names: what to call each image.
        labels: class number of each image.
        classes: names of the classes.
    """

    def __init__(self, index: Index) -> None:
        self.names: Sequence[str] = index.names
        self.labels: np.ndarray = index.labels
        self.classes = index.classes

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""
        return read_file(self.names[index])

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return decode_rgb(self.read(index), self.names[index])


class FolderSource(IndexedSource):
    """``<root>/<split>/<class>/<image>``, classes numbered in the order of their names.

    Hidden files and the like are left out, see ``data.listing``.

    Raises:
        UserError: a folder that is missing or cannot be read, or no images.
    """

    def __init__(self, root: str, split: str) -> None:
        check_root(root)
        folder = os.path.join(root, split)
        if not os.path.isdir(folder):
            from data.hints import nearest_split

            hint = nearest_split(root, split)
            raise UserError(f"{root}: no folder {split}/ in the data path{hint}")
        try:
            index = open_index(root, split, folder, lambda listing: fill_classes(listing, folder))
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}") from error
        log_left_out(folder, index.left_out)
        super().__init__(index)


def check_root(root: str, holds: str = "a folder with train/ and val/") -> None:
    """Refuse a data path that is not there.

    Args:
        root: the data path.
        holds: what it should be.

    Raises:
        UserError: it is not given, or no folder; with the nearest one that there is.
    """
    if not root:
        raise UserError(f"no data set given: set --data-path to {holds}")
    if not os.path.isdir(root):
        from data.hints import nearest_path

        hint = nearest_path(root)
        raise UserError(f"{root}: the data path does not exist or is no folder{hint}")


def open_source(root: str, split: str, zipped: bool = False, labelled: bool = True) -> FileSource:
    """The images of a split, in whichever form of docs/data.md they lie.

    Args:
        root: folder of the data set.
        split: a name of ``SPLITS``.
        zipped: read ``<split>.zip``.
        labelled: refuse images without classes.

    Raises:
        UserError: no images in any form, or a form that cannot be read.
    """
    check_root(root)
    try:
        beside = {name for name in os.listdir(root) if not name.startswith(".")} - set(SPLITS)
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}") from error
    if not zipped and not beside and has_classes(os.path.join(root, split)):
        return FolderSource(root, split)
    from data.forms import open_form  # the other forms, which most data paths do not have

    return open_form(root, split, zipped, labelled)


def has_classes(folder: str) -> bool:
    """Whether there is a folder that is not hidden in ``folder``."""
    try:
        with os.scandir(folder) as entries:
            return any(not is_hidden(entry.name) and entry.is_dir() for entry in entries)
    except OSError:
        return False


def build_source(
    config: CfgNode,
    split: str,
    download: bool = False,
    cache_mode: str | None = None,
    labelled: bool = True,
) -> ImageSource:
    """The images of ``train`` or of ``val`` (the test split of a transfer set).

    Args:
        config: DATA.DATASET names the set and DATA.DATA_PATH its folder.
        split: ``train`` or ``val``.
        download: fetch the set if it is missing and torchvision can.
        cache_mode: replaces DATA.CACHE_MODE.
        labelled: refuse images without classes.
    """
    data = config.DATA
    if data.DATASET == "imagenet":
        source: ImageSource = first_on_each_node(
            lambda: open_source(data.DATA_PATH, split, data.ZIP_MODE, labelled)
        )
        mode = cache_mode or data.CACHE_MODE
        if data.ZIP_MODE and mode != "no":
            share = (rank(), world_size()) if mode == "part" else (0, 1)
            source.fill_cache(*share)  # type: ignore[attr-defined]
            wait_for_all()  # it may take minutes more on one machine
        return source
    from data.transfer import open_transfer_set  # pre-training needs none of it

    name, split = data.DATASET, "test" if split == "val" else split

    def fetch() -> None:
        open_transfer_set(name, data.DATA_PATH, split, download=True)

    if download:
        on_first_process(fetch)
    return first_on_each_node(lambda: open_transfer_set(name, data.DATA_PATH, split))


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset`` and ``--download``."""
    from data.transfer import TRANSFER_SETS

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


def build_labelled_sources(
    config: CfgNode,
    download: bool = False,
    train: ImageSource | None = None,
    val_cache_mode: str | None = None,
) -> tuple[ImageSource, ImageSource]:
    """The images of ``train`` and of ``val``, see ``build_source``, with classes numbered alike.

    Args:
        config, download: as for ``build_source``.
        train: the training images, if they are open already.
        val_cache_mode: replaces DATA.CACHE_MODE for the validation images.

    Raises:
        UserError: a class of the validation images has no training image.
    """
    train = train or build_source(config, "train", download)
    val = build_source(config, "val", download, val_cache_mode)
    if np.ndim(val.labels) == 1:
        _name_numbered(train, val)
        if len(np.unique(train.labels)) < 2:
            raise UserError(
                f"{config.DATA.DATA_PATH}: the training images are of one class alone, "
                f"{train.classes[train.labels[0]]}: lay them out as train/<class>/<image>"
            )
        known = {train.classes[label] for label in np.unique(train.labels)}
        for name in (val.classes[label] for label in np.unique(val.labels)):
            if name not in known:
                raise UserError(
                    f"{config.DATA.DATA_PATH}: class {name} is among the validation images, but "
                    "has no training image"
                )
    if val.classes != train.classes:  # folders are numbered by what is there
        numbers = {name: number for number, name in enumerate(train.classes)}
        val.labels = np.array([numbers.get(name, -1) for name in val.classes])[val.labels]
        val.classes = train.classes
    return train, val


def _name_numbered(train: ImageSource, val: ImageSource) -> None:
    """Where one has names of classes and the other numbers, the numbers are of the names' order."""
    numbered = [s for s in (train, val) if all(map(str.isdecimal, s.classes))]
    if len(numbered) == 1:
        named = val if numbered[0] is train else train
        numbers = list(map(int, numbered[0].classes))
        used = np.unique(numbered[0].labels)
        if numbers[used[0]] > 0:
            raise UserError(
                f"no image of {'train' if named is val else 'val'} has the class number 0, which is "
                f"{named.classes[0]}: classes are numbered from 0 by their names; write the names"
            )
        if max(numbers) < len(named.classes):
            numbered[0].classes = [named.classes[number] for number in numbers]
