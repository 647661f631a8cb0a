"""Which files below a folder are images, and the list of a split's images that is kept.

What a system or a program puts beside images is left out and counted. To list a million files
takes seconds, and their names as Python's strings take 460 MB in each process and each data
worker. So one process of a node lists, keeps the list beside the data, and all map that file.
"""

import difflib
import errno
import hashlib
import json
import logging
import os
import re
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.checkpoint import replacing
from utils.errors import UserError, reading

# ---- what is no image

# of Windows, macOS, NAS and file systems, in lower case; names with a dot in front are hidden too
LITTER = frozenset(
    {
        *("thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "__macosx"),
        *("@eadir", "@tmp", "#recycle", "#snapshot", "lost+found"),
    }
)

# reasons to leave something out, as the log line counts them
HIDDEN = "hidden"
BESIDE = "beside the class folders"
OTHER = "without an image's extension"
IRREGULAR = "pipes, devices or links to no file"
CIRCLE = "links to a folder above them"
EMPTY = "class folders without images"
RUN = "folders of a run"

MOST_CLASSES = 100_000  # a class with a larger number is taken for a mistake


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set."""
    return name.startswith(".") or name.lower() in LITTER


def is_image(name: str, left_out: Counter[str]) -> bool:
    """Whether a path in an archive is that of an image; counts why not."""
    if any(map(is_hidden, name.split("/"))):
        left_out[HIDDEN] += 1
    elif not name.lower().endswith(IMG_EXTENSIONS):
        left_out[OTHER] += 1
    else:
        return True
    return False


def log_left_out(where: str, left_out: Counter[str]) -> None:
    """Write one line on what is left out, if anything is."""
    if left_out:
        logging.getLogger("synco").warning("%s: %s", where, counts(left_out))


def counts(left_out: Counter[str]) -> str:
    """What is left out, by reason, in words."""
    return "left out: " + ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))


# ---- folders


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
    if os.path.isdir(root):
        return
    above, missing = root.rstrip("/"), ""
    while above and not os.path.isdir(above):
        above, missing = os.path.split(above)
    close = difflib.get_close_matches(missing, folders_in(above or "."), n=1)
    wrong = f"{root}: the data path does not exist or is no folder"
    if close or os.path.isfile(root):
        meant = os.path.join(above, *close) or "."
        raise UserError(f"{wrong}, did you mean {meant}?")
    raise UserError(wrong)


def folders_in(top: str) -> list[str]:
    """Names of the folders in a folder that are not hidden, sorted; none if it cannot be read."""
    try:
        with os.scandir(top) as entries:
            return sorted(e.name for e in entries if not is_hidden(e.name) and _follows(e.is_dir))
    except OSError:
        return []


def files_in(folder: str, pattern: str) -> list[str]:
    """Paths of what a folder holds whose whole name matches, by name; none without a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if re.fullmatch(pattern, name)]


def list_classes(folder: str, listing: "Listing") -> None:
    """List the images of ``<folder>/<class>/``, in the order of torchvision's ``ImageFolder``.

    Raises:
        OSError: a folder or the aim of a link that cannot be read.
        UserError: no images at all.
    """
    above = frozenset({_identity(folder)})
    listing.watch(folder)
    for entry in sorted(_entries(folder, listing.left_out), key=lambda entry: entry.name):
        if not _follows(entry.is_dir):
            listing.left_out[BESIDE] += 1
        elif images := list_images(entry.path, listing.left_out, entry.name, above, listing.watch):
            listing.add(images, len(listing.classes))
            listing.classes.append(entry.name)
        else:
            listing.left_out[EMPTY] += 1
    if not listing.classes:
        but = f", but {counts(listing.left_out)}" if listing.left_out else ""
        raise UserError(f"{folder}: no folder with images in it{but}")


def list_images(
    folder: str,
    left_out: Counter[str],
    name: str | None = None,
    above: frozenset[tuple[int, int]] = frozenset(),
    watch: Callable[[str], None] | None = None,
) -> list[str]:
    """Names of the images at any depth below ``folder``, by folder and by name.

    A link counts as what it leads to. The folder of a run is not looked into.

    Args:
        folder: where to look.
        left_out: counts, by reason, what is no image.
        name: what the names have in place of ``folder``.
        above: folders, by device and inode, that a link must not lead back to.
        watch: is told each folder before it is read.

    Raises:
        OSError: a folder or the aim of a link that cannot be read.
    """
    found: list[tuple[str, list[str]]] = []
    pending = [(folder, folder if name is None else name, above)]
    while pending:
        top, name, above = pending.pop()
        identity = _identity(top)
        if identity in above:
            left_out[CIRCLE] += 1
            continue
        if watch:
            watch(top)
        files, folders, others = [], [], Counter[str]()
        # the system has told most kinds already, without a call for each
        for entry in (entries := _entries(top, others)):
            if _follows(entry.is_dir):
                below = os.path.join(name, entry.name)
                folders.append((entry.path, below, above | {identity}))
            elif not entry.name.lower().endswith(IMG_EXTENSIONS):
                others[OTHER] += 1
            elif _follows(entry.is_file):
                files.append(entry.name)
            else:
                others[IRREGULAR] += 1
        if others[OTHER] > 1 and _is_run({entry.name for entry in entries}):
            left_out[RUN] += 1
            continue
        left_out.update(+others)
        pending += folders
        found.append((name, sorted(files)))
    return [os.path.join(name, file) for name, files in sorted(found) for file in files]


def _entries(folder: str, left_out: Counter[str]) -> list[os.DirEntry]:
    """What is in a folder and not hidden; this program's own folder is not counted either."""
    with os.scandir(folder) as entries:
        every = [entry for entry in entries if entry.name != FOLDER]
    seen = [entry for entry in every if not is_hidden(entry.name)]
    if hidden := len(every) - len(seen):
        left_out[HIDDEN] += hidden
    return seen


def _is_run(names: set[str]) -> bool:
    """Whether these are the files of a run of this program, whose pictures are no data set."""
    return "config.json" in names and any(n.endswith((".pth", ".jsonl")) for n in names)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _follows(question: Callable[[], bool]) -> bool:
    """The answer of ``is_dir`` or ``is_file``; a link to itself is neither."""
    try:
        return question()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """The number and the text of each line of a list that is not blank.

    A byte order mark of UTF-8 and the ends of lines, Unix's or Windows', are taken off.

    Raises:
        OSError: a file that cannot be read.
        UserError: not UTF-8, or a NUL byte.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise UserError(f"{path}:{number}: holds a NUL byte")
                if line.strip():
                    yield number, line.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a UTF-8 text file") from error


# ---- the list that is kept

VERSION = "synco index 2"
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
class Listed:
    """The images of a split, as they were listed.

    Attributes:
        classes: names of the classes.
        names: of the images.
        labels: class number of each image, int64.
        columns: further whole numbers for each image, int64, by name.
        files: the archives that were listed, by path from the data path.
        left_out: how many files were left out, by reason.
    """

    classes: list[str]
    names: Names
    labels: np.ndarray
    columns: dict[str, np.ndarray]
    files: list[str]
    left_out: Counter[str]


class Listing:
    """The images of a split while they are listed.

    Args:
        root: the data path.
        files: the archives to be listed, by path from the data path.

    Attributes:
        classes, left_out: of what will be ``Listed``.
    """

    def __init__(self, root: str, files: Sequence[str] = ()) -> None:
        self.root, self.files = root, files
        self.classes: list[str] = []
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

    def keep(self, path: str) -> None:
        """Write the list to a file, whose folder is made.

        Raises:
            OSError: it cannot be written.
        """
        if not os.path.isdir(folder := os.path.dirname(path)):
            unchanged = self._stamps.get(".") == _stamp(self.root)
            os.makedirs(folder)
            if unchanged:  # but by what was just made in it
                self.watch(self.root)
        arrays, facts = self._contents()
        with replacing(path) as file:
            file.write(save(arrays, {VERSION: json.dumps(facts)}))

    def listed(self, folder: str) -> Listed:
        """The list in this process's memory; ``folder`` is what stands before the names."""
        return _listed(*self._contents(), folder)

    def _contents(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by name, and facts as JSON has them."""
        names = b"".join(self._blocks)
        numbers = {"labels": self._labels, **self._columns}
        arrays = {name: np.frombuffer(column, np.int64) for name, column in numbers.items()}
        arrays["starts"] = np.cumsum([0, *self._lengths])
        arrays["names"] = np.frombuffer(names, np.uint8)
        facts = {
            "classes": self.classes,
            "files": self.files,
            "left_out": self.left_out,
            "digest": hashlib.sha256(names).hexdigest(),
            "stamps": self._stamps,
        }
        return arrays, facts


def open_listing(
    root: str,
    name: str,
    folder: str,
    fill: Callable[[Listing], None],
    files: Sequence[str] = (),
) -> Listed:
    """The list of a split, from the file that keeps it, or made and kept.

    It is kept in ``<root>/.synco``, or in a cache folder of the user where that cannot be written.
    The log says what is left out.

    Args:
        root: the data path.
        name: of the split and of the form of its data.
        folder: what stands before the names of the images.
        fill: adds the images, and watches what they are read from.
        files: the archives that there are, by path: a list of others does not hold.

    Raises:
        UserError: whatever went wrong in ``fill``.
    """
    where = files[0] if files else folder
    with reading(where):
        listed = _kept_or_made(root, name, folder, fill, files)
    log_left_out(where, listed.left_out)
    return listed


def _kept_or_made(
    root: str, name: str, folder: str, fill: Callable[[Listing], None], files: Sequence[str]
) -> Listed:
    given = [os.path.relpath(path, root) for path in files]
    places = [os.path.join(place, f"{name}.index") for place in _places(root)]
    for place in places:
        if (listed := _load(place, root, folder)) and listed.files == given:
            return listed
    listing = Listing(root, given)
    fill(listing)
    if len(listing) >= WORTH_KEEPING and listing.settled():
        reason: Any = "the images are changing"
        for place in places:
            try:
                listing.keep(place)
            except OSError as error:
                reason = error
            if kept := _load(place, root, folder):
                return kept
        logging.getLogger("synco").warning(
            "%s: each process lists the %d images for itself, as no list can be kept (%s)",
            root,
            len(listing),
            reason,
        )
    return listing.listed(folder)


def _places(root: str) -> list[str]:
    root = os.path.realpath(root)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    mine = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return [os.path.join(root, FOLDER), os.path.join(caches, "synco", mine)]


def _load(path: str, root: str, folder: str) -> Listed | None:
    """The list in a file, mapped; None if it is missing, damaged or no longer holds."""
    try:
        with safe_open(path, "pt") as file:  # which, unlike "np", maps the arrays
            facts = json.loads(file.metadata()[VERSION])
            for watched, stamp in facts["stamps"].items():
                if _stamp(os.path.join(root, watched)) != stamp:
                    return None
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return _listed(arrays, facts, folder)


def _listed(arrays: dict[str, np.ndarray], facts: dict[str, Any], folder: str) -> Listed:
    columns = dict(arrays)
    names = Names(columns.pop("names"), columns.pop("starts"), folder, facts["digest"])
    labels, left_out = columns.pop("labels"), Counter(facts["left_out"])
    return Listed(facts["classes"], names, labels, columns, facts["files"], left_out)


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_mtime_ns, status.st_size]
