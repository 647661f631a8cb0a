"""Images in folders: ``<split>/<class>/<image>``, or without classes at any depth."""

import logging
import os

from data.listing import (
    Listing,
    check_root,
    folders_in,
    list_classes,
    list_images,
    open_listing,
)
from data.source import Form, ImageFiles
from utils.errors import UserError

UNSORTED = ["all"]  # the classes of images that have none


class FolderSource(ImageFiles):
    """``<root>/<split>/<class>/<image>``, classes numbered in the order of their names.

    Hidden files and the like are left out, see ``data.listing``.

    Raises:
        UserError: a folder that is missing or cannot be read, or no images.
    """

    def __init__(self, root: str, split: str) -> None:
        check_root(root)
        folder = os.path.join(root, split)
        if not os.path.isdir(folder):
            raise UserError(f"{root}: no folder {split}/ in the data path{_hint(root, split)}")
        found = open_listing(root, split, folder, lambda listing: list_classes(folder, listing))
        if {"train", "val"} & set(found.classes):
            logging.getLogger("synco").warning(
                "%s: train and val are taken as classes (%s): is the data path %s?",
                folder,
                ", ".join(found.classes[:4]),
                folder,
            )
        super().__init__(found.names, found.labels, found.classes)


class FlatSource(ImageFiles):
    """Images without classes, at any depth below a folder; they are one class.

    Raises:
        UserError: no images, or a folder that cannot be read.
    """

    def __init__(self, root: str, split: str, folders: list[str]) -> None:
        (folder,) = folders

        def fill(listing: Listing) -> None:
            listing.classes = UNSORTED
            listing.add(list_images(folder, listing.left_out, "", watch=listing.watch), 0)

        found = open_listing(root, f"{split}-flat", folder, fill)
        if not len(found.names):
            raise UserError(
                f"{root}: no folder {split}/ in the data path, nor any images{_hint(root, split)}"
            )
        if meant := _meant(root, split):
            logging.getLogger("synco").warning(
                "%s: all %d images below it are taken as one class, whatever their folders (%s); "
                "did you mean %s?",
                folder,
                len(found.names),
                ", ".join(folders_in(folder)[:4]) or "none",
                meant,
            )
        super().__init__(found.names, found.labels, found.classes)


def _find_classes(root: str, split: str) -> list[str]:
    folder = os.path.join(root, split)
    return [folder] if folders_in(folder) else []


def _find_flat(root: str, split: str) -> list[str]:
    """The folder of the split, or the data path where it has no folders of splits."""
    folder = os.path.join(root, split)
    if os.path.isdir(folder):
        return [] if folders_in(folder) else [folder]
    return [root] if split == "train" and not os.path.isdir(os.path.join(root, "val")) else []


def _hint(root: str, split: str) -> str:
    """What is in a data path in place of the folder of a split, as the end of a sentence."""
    if meant := _meant(root, split):
        return f", did you mean {meant}?"
    other = {"train": "val", "val": "train"}[split]
    if other in folders_in(root):
        return f", only {other}/; `python -m tools.split_images` makes both from folders of images"
    return ""


def _meant(root: str, split: str) -> str | None:
    """The folder just above or below that has the folder of a split, with folders of classes."""
    above = os.path.dirname(os.path.abspath(root))
    near = [above, *(os.path.join(root, n) for n in folders_in(root))]
    return next((folder for folder in near if _find_classes(folder, split)), None)


FOLDERS = Form("class folders", _find_classes, lambda root, split, _: FolderSource(root, split))
FLAT = Form("images without classes", _find_flat, FlatSource)
