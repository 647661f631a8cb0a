"""Images in one tar: of class folders, or of a tar for each class."""

import itertools
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import IO, NamedTuple

from data.archives import ArchiveSource, read_part
from data.listing import IRREGULAR, Listing, files_in, is_hidden, is_image
from data.source import Form
from utils.errors import UserError

CLASSES = ".classes"  # member of a packed tar: the names of its classes, in the order of numbers


class Member(NamedTuple):
    """A file in a tar, or a link to one.

    Attributes:
        name: its path.
        start, size: of its bytes.
        hard, soft: the path that it is another name of, or that it leads to; empty for a file.
    """

    name: str
    start: int
    size: int
    hard: str = ""
    soft: str = ""


def tar_members(file: IO[bytes], start: int = 0, folder: str = "") -> Iterator[Member]:
    """The members of a tar but its folders, and of the tars in it, in the archive's order.

    What is neither a file nor a link, or has holes, has no name.

    Args:
        file: the tar.
        start: where it begins in the outermost file.
        folder: what it is called there.
    """

    def path(name: str) -> str:
        return os.path.join(folder, os.path.normpath(name).lstrip("/"))

    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep each
            name, place = path(member.name), start + member.offset_data
            inner = None
            if not folder and member.isreg() and name.endswith(".tar"):
                inner = archive.extractfile(member)
            if inner:
                yield from tar_members(inner, place, name.removesuffix(".tar"))
            elif member.isreg() and not member.issparse():
                yield Member(name, place, member.size)
            elif member.islnk():
                yield Member(name, 0, 0, hard=path(member.linkname))
            elif member.issym():
                aim = os.path.join(os.path.dirname(member.name), member.linkname)
                yield Member(name, 0, 0, soft=path(aim))
            elif not member.isdir():
                yield Member("", 0, 0)


def _unpacked(members: Iterator[Member], left_out: Counter[str]) -> Iterator[Member]:
    """The images that unpacking would give: the last of a name, and what a link leads to."""
    found: dict[str, Member] = {}
    for member in members:
        if member.name:
            found[member.name] = found.get(member.hard, member) if member.hard else member
        else:
            left_out[IRREGULAR] += 1
    for name, member in found.items():
        for _ in range(8):  # links to links
            member = found.get(member.soft, member)
        if member.hard or member.soft:
            left_out[IRREGULAR] += 1
        elif is_image(name, left_out):
            yield member._replace(name=name)


class TarSource(ArchiveSource):
    """The images of one tar: of class folders, or of a tar for each class, as ImageNet's own.

    They are ordered by class and name, but in a tar of ``tools.pack_images`` as they lie there.

    Args:
        root: the data path.
        path: of the tar.
        class_of: the class of each file, for a tar without folders.
        said_by: the file or folder that says so.
    """

    def __init__(
        self,
        root: str,
        path: str,
        class_of: dict[str, str] | None = None,
        said_by: str | None = None,
    ) -> None:
        also = [said_by] if said_by else []

        def fill(listing: Listing) -> None:
            for watched in (path, *also):
                listing.watch(watched)
            _fill(path, class_of, listing)

        super().__init__(root, os.path.basename(path), [path], fill, also)


def _fill(path: str, class_of: dict[str, str] | None, listing: Listing) -> None:
    with open(path, "rb") as file:
        members = tar_members(file)
        first = next(members, None)
        if first and first.name == CLASSES:
            listing.classes = json.loads(read_part(path, first.start, first.size))
            return _fill_packed(members, listing)
        every = itertools.chain([first] if first else [], members)
        images = list(_unpacked(every, listing.left_out))
    found: defaultdict[str, list[tuple[str, str, Member]]] = defaultdict(list)
    for member in images:
        folder, base = os.path.split(member.name)
        if class_of and base not in class_of:
            raise UserError(f"{path}: no class is known of {member.name}")
        top, _, below = folder.partition("/")
        found[class_of[base] if class_of else top].append((below, base, member))
    if len(found) == 1 and not class_of:
        ((top, entries),) = found.items()
        if all(below for below, *_ in entries):  # a folder around all classes, such as train/
            found.clear()
            for below, base, member in entries:
                inner, _, below = below.partition("/")
                found[inner].append((below, base, member))
    if not found or "" in found:
        raise UserError(f"{path}: expected folders of classes with images in them")
    for label, name in enumerate(sorted(found)):
        entries = sorted(found[name])
        listing.add(
            ("/".join(filter(None, (name, below, base))) for below, base, _ in entries),
            label,
            archive=[0] * len(entries),
            start=[member.start for *_, member in entries],
            size=[member.size for *_, member in entries],
        )
        listing.classes.append(name)


def class_folders(classes: list[str]) -> list[str]:
    """What the folders of classes are called in a packed tar: as they are, or by number."""
    plain = all(name and "/" not in name and not is_hidden(name) for name in classes)
    return classes if plain else [str(number) for number in range(len(classes))]


def _fill_packed(members: Iterator[Member], listing: Listing) -> None:
    numbers = {name: number for number, name in enumerate(class_folders(listing.classes))}
    for name, start, size, *_ in members:
        listing.add(
            [name], numbers[name.partition("/")[0]], archive=[0], start=[start], size=[size]
        )
    if not len(listing):
        raise UserError("no images in it")


TAR = Form(
    "a tar",
    lambda root, split: files_in(root, rf"{split}\.tar"),
    lambda root, split, paths: TarSource(root, paths[0]),
)
