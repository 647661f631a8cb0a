"""Images in zips and tars, read in place by the offsets that a list of their members has."""

import itertools
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.image import MAX_BYTES
from data.index import Listing, open_index
from data.listing import HIDDEN, IRREGULAR, OTHER, is_hidden, log_left_out, read_lines
from data.source import IndexedSource
from utils.errors import UserError

CLASSES = ".classes"  # member of a packed tar: the names of its classes, in the order of numbers
MOST_CLASSES = 100_000
_ENTRY = re.compile(r"([^\t]+)\t *(\d{1,5}) *", re.ASCII)  # no class has a longer number
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip: magic, lengths of name and extra


class ArchiveSource(IndexedSource):
    """Images in archives, whose index has columns ``archive``, ``start`` and ``size``.

    Nothing is unpacked to the disk. A read shares no position in the file with another one, so
    workers and threads may read at once.

    Args:
        root: the data path.
        form: of the split and the archives, names the kept list.
        archives: paths of the files.
        fill: lists the images in them.

    Raises:
        UserError: an archive that cannot be read, or no images.
    """

    def __init__(
        self, root: str, form: str, archives: list[str], fill: Callable[[Listing], None]
    ) -> None:
        self.archives = archives
        try:
            index = open_index(root, form, "", fill, archives)
        except UserError:
            raise
        except Exception as error:  # a damaged archive can raise anything
            raise UserError(f"{archives[0]}: not a readable archive ({error})") from error
        log_left_out(archives[0], index.left_out)
        super().__init__(index)
        self.columns = index.columns

    def read(self, index: int) -> bytes:
        """The file of image ``index``.

        Raises:
            UserError: a damaged member, or one larger than ``MAX_BYTES``.
        """
        archive = self.archives[self.columns["archive"][index]]
        try:
            return self._read(archive, index)
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise UserError(f"{archive}: cannot read {self.names[index]} ({error})") from error

    def _read(self, archive: str, index: int) -> bytes:
        return _read_part(
            archive, int(self.columns["start"][index]), int(self.columns["size"][index])
        )


def _read_part(path: str, start: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise ValueError("the file is too large")
    with open(path, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, start)
    if len(content) < size:
        raise ValueError("the archive ends before it")
    return content


class ZipSource(ArchiveSource):
    """``<root>/<split>.zip`` with ``<split>_map.txt``: a path in the zip, a tab, a class number.

    The layout of Swin's repository. Classes are named by their numbers.

    Raises:
        UserError: a missing file, or a list that is malformed or names no member of the zip.
    """

    def __init__(self, root: str, split: str) -> None:
        self.cache: dict[int, bytes] = {}
        archive = os.path.join(root, f"{split}.zip")
        super().__init__(root, f"{split}.zip", [archive], partial(_fill_zip, archive, split))

    def read(self, index: int) -> bytes:
        """The file of image ``index``, as of other archives."""
        return self.cache[index] if index in self.cache else super().read(index)

    def _read(self, archive: str, index: int) -> bytes:
        of = {name: int(column[index]) for name, column in self.columns.items()}
        if of["length"] > MAX_BYTES:
            raise ValueError("the file is too large")
        header = _read_part(archive, of["start"], _LOCAL_HEADER.size)
        magic, name, extra = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\3\4":
            raise ValueError("no member begins there")
        content = _read_part(archive, of["start"] + len(header) + name + extra, of["size"])
        if of["method"] == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, of["length"] + 1)
        if len(content) != of["length"] or zlib.crc32(content) != of["crc"]:
            raise ValueError("Bad CRC-32: it is damaged")
        return content

    def fill_cache(self, rank: int, world_size: int) -> None:
        """Read every ``world_size``-th image from ``rank`` on into memory."""
        for index in range(rank, len(self.names), world_size):
            try:
                self.cache[index] = self.read(index)
            except UserError:  # whoever reads a damaged one later decides
                continue


def _fill_zip(archive: str, split: str, listing: Listing) -> None:
    path = archive.removesuffix(".zip") + "_map.txt"
    names: list[str] = []
    labels: list[int] = []
    try:
        listing.watch(path)
        for number, line in read_lines(path):
            if not (entry := _ENTRY.fullmatch(line)):
                raise UserError(f"{path}:{number}: expected a path, a tab and a class number")
            name, label = entry.groups()
            if name.startswith("/") or ".." in name.split("/"):
                raise UserError(f"{path}:{number}: {name} lies outside of the archive")
            if any(map(is_hidden, name.split("/"))):
                listing.left_out[HIDDEN] += 1
            else:
                names.append(name)
                labels.append(int(label))
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    if not names:
        raise UserError(f"{path}: lists no images")
    try:
        listing.watch(archive)
        with zipfile.ZipFile(archive) as opened:
            listed = opened.infolist()
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(f"{archive}: not a readable zip ({error})") from error
    members = {member.filename: member for member in listed}
    if len(members) < len(listed):
        twice = next(n for n, count in Counter(m.filename for m in listed).items() if count > 1)
        raise UserError(f"{archive}: it has {twice} twice: pack it again")
    prefix = "" if names[0] in members else f"{split}/"
    for name, label in zip(names, labels, strict=True):
        if not (member := members.get(prefix + name)):
            raise UserError(f"{path}: {name} is not in {archive}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{archive}: {name} is neither stored nor deflated: pack it again")
        if member.flag_bits & 1:
            raise UserError(f"{archive}: {name} is encrypted")
        listing.add(
            [name],
            label,
            archive=[0],
            start=[member.header_offset],
            size=[member.compress_size],
            length=[member.file_size],
            method=[member.compress_type],
            crc=[member.CRC],
        )
    listing.classes = [str(label) for label in range(max(labels) + 1)]


# ---- tars


class TarSource(ArchiveSource):
    """The images of one tar: of class folders, or of a tar for each class, as ImageNet's own.

    They are ordered by class and name, but in a tar of ``tools.pack_images`` as they lie there.

    Args:
        root: the data path.
        archive: the tar's name in it.
        class_of: the class of each file, for a tar without folders.
        said_by: the file or folder that says so.
    """

    def __init__(
        self,
        root: str,
        archive: str,
        class_of: dict[str, str] | None = None,
        said_by: str | None = None,
    ) -> None:
        path = os.path.join(root, archive)

        def fill(listing: Listing) -> None:
            if said_by:
                listing.watch(said_by)
            _fill_tar(path, class_of, listing)

        super().__init__(root, archive, [path, *([said_by] if said_by else [])], fill)


class ShardSource(ArchiveSource):
    """The images of WebDataset's shards: ``KEY.jpg`` beside ``KEY.cls`` or ``KEY.json``.

    They are ordered by class and key. Classes are named by their numbers.

    Args:
        root: the data path.
        split: its name.
        shards: their paths, in order.
    """

    def __init__(self, root: str, split: str, shards: list[str]) -> None:
        super().__init__(root, f"{split}-shards", shards, partial(_fill_shards, shards))


def tar_members(file: IO[bytes], start: int = 0, folder: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, place and size of each file in a tar, and in the tars in it, by the archive's order.

    Args:
        file: the tar.
        start: where it begins in the outermost file.
        folder: what it is called there.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep each
            name = os.path.join(folder, os.path.normpath(member.name).lstrip("/"))
            place = start + member.offset_data
            inner = None
            if not folder and member.isfile() and name.endswith(".tar"):
                inner = archive.extractfile(member)
            if inner:
                yield from tar_members(inner, place, name.removesuffix(".tar"))
            elif member.isfile() and not member.issparse():
                yield name, place, member.size
            elif not member.isdir():
                yield "", 0, 0


def _fill_tar(path: str, class_of: dict[str, str] | None, listing: Listing) -> None:
    listing.watch(path)
    found: defaultdict[str, list[tuple[str, str, int, int]]] = defaultdict(list)
    with open(path, "rb") as file:
        members = tar_members(file)
        for name, start, size in members:
            if name == CLASSES:
                listing.classes = json.loads(_read_part(path, start, size))
                return _fill_packed(members, listing)
            folder, base = os.path.split(name)
            if _is_image(name, listing):
                if class_of and base not in class_of:
                    raise UserError(f"{path}: no class is known of {name}")
                top, _, below = folder.partition("/")
                found[class_of[base] if class_of else top].append((below, base, start, size))
    if len(found) == 1 and not class_of:
        ((top, images),) = found.items()
        if all(below for below, *_ in images):  # a folder around all classes, such as train/
            found.clear()
            for below, base, start, size in images:
                inner, _, below = below.partition("/")
                found[inner].append((below, base, start, size))
    if not found or "" in found:
        raise UserError(f"{path}: expected folders of classes with images in them")
    for name in sorted(found):
        images = sorted(found[name])
        listing.add(
            ("/".join(filter(None, (name, below, base))) for below, base, _, _ in images),
            len(listing.classes),
            archive=[0] * len(images),
            start=[start for *_, start, _ in images],
            size=[size for *_, size in images],
        )
        listing.classes.append(name)


def class_folders(classes: list[str]) -> list[str]:
    """What the folders of classes are called in a packed tar: as they are, or by number."""
    plain = all(name and "/" not in name and not is_hidden(name) for name in classes)
    return classes if plain else [str(number) for number in range(len(classes))]


def _fill_packed(members: Iterator[tuple[str, int, int]], listing: Listing) -> None:
    numbers = {name: number for number, name in enumerate(class_folders(listing.classes))}
    for name, start, size in members:
        listing.add(
            [name], numbers[name.partition("/")[0]], archive=[0], start=[start], size=[size]
        )
    if not len(listing):
        raise UserError("no images in it")


def _fill_shards(shards: list[str], listing: Listing) -> None:
    images: list[tuple[int, str, int, int, int]] = []  # label, name, shard, start, size
    for number, shard in enumerate(shards):
        listing.watch(shard)
        parts: dict[str, dict[str, tuple[str, int, int]]] = defaultdict(dict)
        with open(shard, "rb") as file:
            for name, start, size in tar_members(file):
                folder, base = os.path.split(name)
                if any(map(is_hidden, name.split("/"))):
                    listing.left_out[HIDDEN] += 1
                    continue
                key, _, extension = base.partition(".")
                parts[os.path.join(folder, key)][f".{extension.lower()}"] = (name, start, size)
        for key, files in parts.items():
            found = [files[extension] for extension in files if extension in IMG_EXTENSIONS]
            if not found:
                listing.left_out[OTHER] += 1
            else:
                label = _label(shard, key, files)
                images += [(label, name, number, start, size) for name, start, size in found[:1]]
    if not images:
        raise UserError(f"{shards[0]}: no images in the shards")
    images.sort()
    for label, same in itertools.groupby(images, key=lambda image: image[0]):
        members = list(same)
        listing.add(
            (name for _, name, _, _, _ in members),
            label,
            archive=[shard for _, _, shard, _, _ in members],
            start=[start for *_, start, _ in members],
            size=[size for *_, size in members],
        )
    listing.classes = [str(label) for label in range(images[-1][0] + 1)]


def _label(shard: str, key: str, files: dict[str, tuple[str, int, int]]) -> int:
    try:
        if ".cls" in files:
            label = int(_read_part(shard, *files[".cls"][1:]))
        else:
            label = json.loads(_read_part(shard, *files[".json"][1:]))["label"]
        if not isinstance(label, int) or not 0 <= label < MOST_CLASSES:
            raise ValueError(f"{label!r} is no class number")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{shard}: {key} needs a class number in {key}.cls, or as label in {key}.json "
            f"({error})"
        ) from error
    return label


def _is_image(name: str, listing: Listing) -> bool:
    if not name:
        listing.left_out[IRREGULAR] += 1
    elif any(map(is_hidden, name.split("/"))):
        listing.left_out[HIDDEN] += 1
    elif not name.lower().endswith(IMG_EXTENSIONS):
        listing.left_out[OTHER] += 1
    else:
        return True
    return False
