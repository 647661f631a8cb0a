"""What every source of images has: names, labels, classes, and the reading of one image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from data.image import decode_rgb, read_file


class ImageSource(Protocol):
    """Images with labels, in whichever form they lie.

    Attributes:
        names: what to call each image.
        labels: class number of each image, or a row of several labels for each; int64.
        classes: names of the classes.
    """

    names: Sequence[str]
    labels: np.ndarray
    classes: list[str]

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""

    def read_image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB."""


@runtime_checkable
class CostlySource(Protocol):
    """Images that are slow to read in any order but their own."""

    def log_cost(self) -> None:
        """Say what an image costs, and what to do."""


@dataclass(eq=False)
class ImageFiles:
    """Images that are files; who reads them from elsewhere replaces ``read``.

    Attributes:
        names: path of each image.
        labels: class number of each image, or N x C of 1 (positive), 0 (negative) and -1 (not
            counted).
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

    def read(self, index: int) -> bytes:
        """The file of image ``index``."""
        return self._source.read(self._indices[index])

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


class Form(NamedTuple):
    """A way in which the images of a split can lie in a data path.

    Attributes:
        name: what messages call it.
        find: the files or folders that hold a split in this form, from the data path and the
            split's name; none where it does not lie there in this form.
        open: the images, from the data path, the split's name and what ``find`` gave.
    """

    name: str
    find: Callable[[str, str], list[str]]
    open: Callable[[str, str, list[str]], ImageSource]
