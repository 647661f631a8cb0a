"""The list of a split's images, mapped from a file that all processes of a node share.

To list a million files takes seconds, and their names as Python's strings take 460 MB in each
process and each data worker. So one process lists, and keeps the list beside the data.
"""

import hashlib
import json
import logging
import mmap
import os
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.checkpoint import replacing

MAGIC = b"synco index 1\n"
FOLDER = ".synco"
WORTH_KEEPING = 10_000  # images: fewer are listed in a moment
SETTLED = 2.0  # s: what changed later may change again under the same time stamp


class Names(Sequence[str]):
    """Names of files below a folder, kept as one block of bytes, with a NUL after each.

    Args:
        block: the names, uint8.
        starts: where each begins, and the end of the block, (images + 1,).
        folder: what stands before each name; empty for nothing.
        digest: as of ``utils.provenance.names_digest``.
    """

    def __init__(self, block: np.ndarray, starts: np.ndarray, folder: str, digest: str) -> None:
        self._block, self._starts, self._folder, self.digest = block, starts, folder, digest

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index):
        """The name of an image, or a list of names for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return os.path.join(self._folder, self.short(index))

    def short(self, index: int) -> str:
        """The name of image ``index`` without the folder."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"no image {index} among {len(self)}")
        start, end = self._starts[index % len(self) :][:2]
        return os.fsdecode(self._block[start : end - 1].tobytes())


@dataclass(frozen=True)
class Index:
    """The images of a split.

    Attributes:
        classes: names of the classes.
        names: of the images.
        labels: class number of each image, int64.
        columns: further whole numbers for each image, int64, by name.
        notes: facts that a reader keeps, as JSON has them.
        left_out: how many files were left out, by reason.
    """

    classes: list[str]
    names: Names
    labels: np.ndarray
    columns: dict[str, np.ndarray]
    notes: dict[str, Any]
    left_out: Counter[str]


class Listing:
    """The images of a split while they are listed.

    Args:
        root: the data path.

    Attributes:
        classes, notes, left_out: of the ``Index`` to be.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.classes: list[str] = []
        self.notes: dict[str, Any] = {}
        self.left_out: Counter[str] = Counter()
        self._stamps: dict[str, list[int]] = {}
        self._blocks: list[bytes] = []
        self._lengths = array("q")
        self._labels = array("q")
        self._columns: defaultdict[str, array] = defaultdict(lambda: array("q"))

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, names: Iterable[str], label: int, **columns: Iterable[int]) -> None:
        """Append images of one class.

        Args:
            names: without NUL bytes.
            label: the number of their class.
            columns: a whole number for each image, by name of the column.
        """
        encoded = [os.fsencode(name) for name in names]
        self._blocks.append(b"".join(name + b"\0" for name in encoded))
        self._lengths.extend(len(name) + 1 for name in encoded)
        self._labels.extend([label] * len(encoded))
        for name, numbers in columns.items():
            self._columns[name].extend(numbers)

    def watch(self, path: str) -> None:
        """The list holds as long as this file or folder keeps its size and time stamp.

        To be called before the content is read.
        """
        self._stamps[os.path.relpath(path, self.root)] = _stamp(path)

    def settled(self) -> bool:
        """Whether all that is watched last changed some seconds ago."""
        latest = max((changed for changed, _ in self._stamps.values()), default=0)
        return latest < (time.time() - SETTLED) * 1e9

    def parts(self) -> list[bytes | memoryview]:
        """The parts of a file that holds the list: a line, a line of JSON, arrays."""
        starts = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.frombuffer(self._lengths, np.int64), out=starts[1:])
        block = b"".join(self._blocks)
        header = {
            "images": len(self),
            "bytes": len(block),
            "columns": list(self._columns),
            "digest": hashlib.sha256(block).hexdigest(),
            "classes": self.classes,
            "notes": self.notes,
            "left_out": self.left_out,
            "stamps": self._stamps,
        }
        line = json.dumps(header).encode()
        line += b" " * (-(len(MAGIC) + len(line) + 1) % 8) + b"\n"  # numbers lie at eighths
        numbers = [memoryview(column) for column in (self._labels, *self._columns.values())]
        return [MAGIC, line, starts.data, *numbers, block]

    def index(self, folder: str) -> Index:
        """The list in this process's memory; ``folder`` is what stands before the names."""
        return _parse(b"".join(self.parts()), folder)


def open_index(
    root: str,
    name: str,
    folder: str,
    fill: Callable[[Listing], None],
    files: Sequence[str] = (),
) -> Index:
    """The list of a split, from the file that keeps it, or made and kept.

    It is kept in ``<root>/.synco``, or in a cache folder of the user where that cannot be written.

    Args:
        root: the data path.
        name: of the split and of the form of its data.
        folder: what stands before the names of the images.
        fill: adds the images, and watches what they are read from.
        files: the archives that there are, by path: a list of others does not hold.
    """
    given = [os.path.relpath(path, root) for path in files]
    places = [os.path.join(place, f"{name}.index") for place in _places(root)]
    for place in places:
        if (index := _load(place, root, folder)) and index.notes.get("files", []) == given:
            return index
    listing = Listing(root)
    listing.notes["files"] = given
    fill(listing)
    if len(listing) >= WORTH_KEEPING and listing.settled():
        parts, reason = listing.parts(), None
        for place in places:
            try:
                os.makedirs(os.path.dirname(place), exist_ok=True)
                with replacing(place) as file:
                    file.writelines(parts)
                if index := _load(place, root, folder):
                    return index
            except OSError as error:
                reason = error
        logging.getLogger("synco").warning(
            "%s: each process lists the %d images for itself, as no list can be kept (%s)",
            root,
            len(listing),
            reason or "the images are changing",
        )
    return listing.index(folder)


def _places(root: str) -> list[str]:
    root = os.path.realpath(root)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    mine = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return [os.path.join(root, FOLDER), os.path.join(caches, "synco", mine)]


def _load(path: str, root: str, folder: str) -> Index | None:
    """The list in a file, mapped; None if it is missing, damaged or no longer holds."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(content, folder, root)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse(content: bytes | mmap.mmap, folder: str, root: str | None = None) -> Index:
    """The list in ``content``; with ``root``, what it was read from must not have changed."""
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError("no list of images, or one of another version")
    place = content.find(b"\n", len(MAGIC)) + 1
    header = json.loads(content[len(MAGIC) : place])
    if root is not None:
        for path, stamp in header["stamps"].items():
            if _stamp(os.path.join(root, path)) != stamp:
                raise ValueError(f"{path} has changed")
    images = header["images"]
    arrays = []
    for count in (images + 1, *[images] * (1 + len(header["columns"]))):
        arrays.append(np.frombuffer(content, np.int64, count, place))
        place += arrays[-1].nbytes
    block = np.frombuffer(content, np.uint8, header["bytes"], place)
    if place + len(block) != len(content):
        raise ValueError("not whole")
    starts, labels, *columns = arrays
    return Index(
        header["classes"],
        Names(block, starts, folder, header["digest"]),
        labels,
        dict(zip(header["columns"], columns, strict=True)),
        header["notes"],
        Counter(header["left_out"]),
    )


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_mtime_ns, status.st_size]
