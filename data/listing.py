"""Which files of a folder are images of a data set, and the lines of a list.

What a system or a program puts beside images is left out and counted.
"""

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.index import Listing
from utils.errors import UserError

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


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set."""
    return name.startswith(".") or name.lower() in LITTER


def list_classes(folder: str) -> tuple[list[str], list[str], list[int]]:
    """Names of the classes of ``<folder>/<class>/``, path of each image, and its class number.

    As ``fill_classes``, with one log line that counts what is left out.
    """
    listing = Listing(folder)
    fill_classes(listing, folder)
    log_left_out(folder, listing.left_out)
    index = listing.index(folder)
    return index.classes, list(index.names), index.labels.tolist()


def fill_classes(listing: Listing, folder: str) -> None:
    """List the images of ``<folder>/<class>/``, in the order of torchvision's ``ImageFolder``.

    Raises:
        OSError: a folder or the aim of a link that cannot be read.
        UserError: no images at all.
    """
    above = frozenset({_identity(folder)})
    listing.watch(folder)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                listing.left_out[HIDDEN] += 1
            elif not _follows(entry.is_dir):
                listing.left_out[BESIDE] += 1
            elif images := list_images(
                entry.path, listing.left_out, entry.name, above, listing.watch
            ):
                listing.add(images, len(listing.classes))
                listing.classes.append(entry.name)
            else:
                listing.left_out[EMPTY] += 1
    if not listing.classes:
        raise UserError(
            f"{folder}: no folder with images in it{_counts(listing.left_out, ', but ')}"
        )


def list_images(
    folder: str,
    left_out: Counter[str],
    name: str | None = None,
    above: frozenset[tuple[int, int]] = frozenset(),
    watch: Callable[[str], None] | None = None,
) -> list[str]:
    """Names of the images at any depth below ``folder``, by folder and by name.

    A link counts as what it leads to.

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
        files = []
        with os.scandir(top) as entries:
            for entry in entries:  # the system has told most kinds already, without a call for each
                if is_hidden(entry.name):
                    left_out[HIDDEN] += 1
                elif _follows(entry.is_dir):
                    below = os.path.join(name, entry.name)
                    pending.append((entry.path, below, above | {identity}))
                elif not entry.name.lower().endswith(IMG_EXTENSIONS):
                    left_out[OTHER] += 1
                elif _follows(entry.is_file):
                    files.append(entry.name)
                else:
                    left_out[IRREGULAR] += 1
        found.append((name, sorted(files)))
    return [os.path.join(name, file) for name, files in sorted(found) for file in files]


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


def log_left_out(where: str, left_out: Counter[str]) -> None:
    """Write one line on what is left out, if anything is."""
    if left_out:
        logging.getLogger("synco").warning("%s: %s", where, _counts(left_out, ""))


def _counts(left_out: Counter[str], before: str) -> str:
    if not left_out:
        return ""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    return f"{before}left out: {counts}"


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
