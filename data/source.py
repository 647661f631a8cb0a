"""Where images lie: class folders, or a zip with a list of its members."""

import contextlib
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from data.image import MAX_BYTES, decode_rgb, read_file
from data.listing import HIDDEN, is_hidden, list_classes, log_left_out, read_lines
from utils.errors import UserError

SPLITS = ("train", "val")
_ENTRY = re.compile(r"([^\t]+)\t *(\d{1,5}) *", re.ASCII)  # no class has a longer number


class ImageSource(Protocol):
    """Images with labels, wherever they lie.

    Attributes:
        names: what to call each image.
        labels: class number of each image, or an array with a row of several labels for each.
        classes: names of the classes.
    """

    names: list[str]
    labels: list[int] | np.ndarray
    classes: list[str]

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""


class PartOfSource:
    """Some of the images of another source, with its classes.

    Args:
        source: the images.
        indices: which of them.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices
        self.names = [source.names[index] for index in indices]
        self.labels: list[int] | np.ndarray = np.asarray(source.labels)[indices]
        if self.labels.ndim == 1:
            self.labels = self.labels.tolist()
        self.classes = source.classes

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return self._source.read_image(self._indices[index])


@runtime_checkable
class FileSource(ImageSource, Protocol):
    """Images that are files."""

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""


class FolderSource:
    """``<root>/<split>/<class>/<image>``, classes numbered in the order of their names.

    Hidden files and the like are left out, see ``data.listing``.

    Attributes:
        names: path of each image.
        labels: class number of each image.
        classes: names of the classes.

    Raises:
        UserError: a folder that is missing or cannot be read, or no images.
    """

    def __init__(self, root: str, split: str) -> None:
        folder = os.path.join(root, split)
        if not root:
            raise UserError("no data set given: set --data-path to a folder with train/ and val/")
        if not os.path.isdir(root):
            raise UserError(f"{root}: the data path does not exist or is no folder")
        if not os.path.isdir(folder):
            raise UserError(f"{root}: no folder {split}/ in the data path")
        try:
            self.classes, self.names, labels = list_classes(folder)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}") from error
        self.labels: list[int] | np.ndarray = labels

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""
        return read_file(self.names[index])

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return decode_rgb(self.read(index), self.names[index])


class ZipSource:
    """``<root>/<split>.zip`` with ``<split>_map.txt``: a path in the zip, a tab, a class number.

    The layout of Swin's repository. Each process opens the archive for itself, once, and nothing
    is unpacked to the disk.

    Attributes:
        names, labels, classes: as in FolderSource; classes are named by their numbers.

    Raises:
        UserError: a missing file, or a list that is malformed or names no member of the zip.
    """

    def __init__(self, root: str, split: str) -> None:
        self.archive = os.path.join(root, f"{split}.zip")
        listing = os.path.join(root, f"{split}_map.txt")
        self.names: list[str] = []
        labels: list[int] = []
        left_out: Counter[str] = Counter()
        try:
            for number, line in read_lines(listing):
                if not (entry := _ENTRY.fullmatch(line)):
                    raise UserError(
                        f"{listing}:{number}: expected a path, a tab and a class number"
                    )
                name, label = entry.groups()
                if name.startswith("/") or ".." in name.split("/"):
                    raise UserError(f"{listing}:{number}: {name} lies outside of the archive")
                if any(map(is_hidden, name.split("/"))):
                    left_out[HIDDEN] += 1
                else:
                    self.names.append(name)
                    labels.append(int(label))
        except OSError as error:
            raise UserError(f"{listing}: cannot read ({error.strerror})") from error
        log_left_out(listing, left_out)
        if not self.names:
            raise UserError(f"{listing}: lists no images")
        self.labels: list[int] | np.ndarray = labels
        self.classes = [str(label) for label in range(max(labels) + 1)]
        self.cache: dict[int, bytes] = {}
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()
        members = set(self._zip().namelist())
        prefix = "" if self.names[0] in members else f"{split}/"
        self._members = [prefix + name for name in self.names]
        for name in self._members:
            if name not in members:
                raise UserError(f"{listing}: {name} is not in {self.archive}")

    def _zip(self) -> zipfile.ZipFile:
        # a forked worker must not share its parent's file position
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.archive))
            except Exception as error:  # a damaged archive can raise anything
                raise UserError(f"{self.archive}: not a readable zip ({error})") from error
        return self._opened[1]

    def __getstate__(self):
        state = self.__dict__.copy()
        del state["_lock"]
        return state | {"_opened": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""
        return decode_rgb(self.read(index), self.names[index])

    def read(self, index: int) -> bytes:
        """The file of image ``index``.

        Raises:
            UserError: a damaged member, or one larger than ``MAX_BYTES``.
        """
        if index in self.cache:
            return self.cache[index]
        member = self._members[index]
        try:
            with self._lock:
                archive = self._zip()
                if archive.getinfo(member).file_size > MAX_BYTES:
                    raise ValueError("the file is too large")
                return archive.read(member)
        except Exception as error:  # a damaged archive can raise anything
            raise UserError(f"{self.archive}: cannot read {self.names[index]} ({error})") from error

    def fill_cache(self, rank: int, world_size: int) -> None:
        """Read every ``world_size``-th image from ``rank`` on into memory."""
        for index in range(rank, len(self.names), world_size):
            with contextlib.suppress(UserError):  # whoever reads a damaged one later decides
                self.cache[index] = self.read(index)


def open_source(
    root: str, split: str, zipped: bool = False, cache: str = "no", rank: int = 0, world: int = 1
) -> FolderSource | ZipSource:
    """The images of a split, ``train`` or ``val``.

    Args:
        root: folder of the data set.
        split: a name of ``SPLITS``.
        zipped: read ``<split>.zip``.
        cache: what to keep in memory of a zip: nothing (``no``), all (``full``) or this process's
            share (``part``).
        rank, world: this process and the number of processes.
    """
    if not zipped:
        return FolderSource(root, split)
    if not os.path.isdir(root):
        raise UserError(f"{root or '(empty)'}: the data path does not exist or is no folder")
    source = ZipSource(root, split)
    if cache != "no":
        rank, world = (rank, world) if cache == "part" else (0, 1)
        source.fill_cache(rank, world)
    return source
