"""Images that a list names, by lines of a path and a label: ``<split>.csv`` or ``<split>.txt``."""

import csv
import os
from collections import defaultdict

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.listing import MOST_CLASSES, Listing, files_in, open_listing, read_lines
from data.source import Form, ImageFiles
from utils.errors import UserError


class ListSource(ImageFiles):
    """The images that a list names, ordered by class and path.

    Paths are below the data path; a slash before them, as Places has it, does not count. Labels
    are numbers or names. A first line that names the columns is left out.

    Raises:
        UserError: a line that is no path and label, or a path that leaves the data path.
    """

    def __init__(self, root: str, split: str, paths: list[str]) -> None:
        path = paths[0]
        found = open_listing(root, f"{split}-list", root, lambda each: _fill(path, each), [path])
        super().__init__(found.names, found.labels, found.classes)


def _fill(path: str, listing: Listing) -> None:
    listing.watch(path)
    entries = read_entries(path)
    head, *others = [name for name, _ in entries]
    if (
        not head.lower().endswith(IMG_EXTENSIONS)
        and any(name.lower().endswith(IMG_EXTENSIONS) for name in others)
        and not os.path.exists(os.path.join(listing.root, head))
    ):
        entries = entries[1:]  # the first line names the columns
    numbered = all(label.isdecimal() for _, label in entries)
    by_class: defaultdict[str, list[str]] = defaultdict(list)
    label_of: dict[str, str] = {}
    for name, label in entries:
        label = str(int(label)) if numbered else label
        if label_of.setdefault(name, label) != label:
            raise UserError(f"{path}: {name} has the labels {label_of[name]} and {label}")
        by_class[label].append(name)
    listing.classes = sorted(by_class)
    if numbered:
        most = max(map(int, by_class))
        if most >= MOST_CLASSES:
            raise UserError(f"{path}: {most} is too large for a class number")
        listing.classes = [str(number) for number in range(most + 1)]
    for number, label in enumerate(listing.classes):
        # as folders are listed: the files of a folder before the folders in it
        listing.add(sorted(by_class[label], key=os.path.split), number)


def read_entries(path: str) -> list[tuple[str, str]]:
    """The path and the label of each line: after the last tab or space, or in CSV's cells.

    Raises:
        OSError: the list cannot be read.
        UserError: a line that is no path and label, or a path that leaves its folder; no lines.
    """
    entries = []
    for number, line in read_lines(path):
        if path.endswith(".csv"):
            cells = next(csv.reader([line], skipinitialspace=True))
        elif "\t" in line:
            cells = line.strip().rsplit("\t", 1)
        else:
            cells = line.strip().rsplit(None, 1)
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            raise UserError(f"{path}:{number}: expected a path and a label")
        name, label = os.path.normpath(cells[0].strip()).lstrip("/"), cells[1].strip()
        if ".." in name.split("/"):
            raise UserError(f"{path}:{number}: {cells[0]} lies outside of the data path")
        entries.append((name, label))
    if not entries:
        raise UserError(f"{path}: lists no images")
    return entries


LIST = Form(
    "a list",
    # beside ImageNet's archive, a list gives the classes of its images
    lambda root, split: (
        []
        if files_in(root, rf"ILSVRC2012_img_{split}\.tar")
        else files_in(root, rf"{split}\.(csv|txt)")
    ),
    ListSource,
)
