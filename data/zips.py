"""Images in a zip, in the layout of Swin's repository: ``<split>.zip`` with ``<split>_map.txt``."""

import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from functools import partial

from data.archives import ArchiveSource, read_part
from data.image import MAX_BYTES
from data.listing import HIDDEN, Listing, is_hidden, read_lines
from data.source import Form
from utils.errors import UserError

_ENTRY = re.compile(r"([^\t]+)\t *(\d{1,5}) *", re.ASCII)  # no class has a longer number
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member: magic, lengths of name and extra


class ZipSource(ArchiveSource):
    """The images that ``<split>_map.txt`` lists: a path in the zip, a tab, a class number.

    Classes are named by their numbers.

    Raises:
        UserError: a missing file, or a list that is malformed or names no member of the zip.
    """

    def __init__(self, root: str, split: str) -> None:
        self.cache: dict[int, bytes] = {}
        archive = os.path.join(root, f"{split}.zip")
        super().__init__(root, f"{split}.zip", [archive], partial(_fill, archive, split))

    def read(self, index: int) -> bytes:
        """The file of image ``index``, as of other archives."""
        return self.cache[index] if index in self.cache else super().read(index)

    def _read(self, archive: str, member: dict[str, int]) -> bytes:
        if member["length"] > MAX_BYTES:
            raise ValueError("the file is too large")
        header = read_part(archive, member["start"], _LOCAL_HEADER.size)
        magic, name, extra = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\3\4":
            raise ValueError("no member begins there")
        start = member["start"] + len(header) + name + extra
        content = read_part(archive, start, member["size"])
        if member["method"] == zipfile.ZIP_DEFLATED:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            content = unpacker.decompress(content, member["length"] + 1)
        if len(content) != member["length"] or zlib.crc32(content) != member["crc"]:
            raise ValueError("Bad CRC-32: it is damaged")
        return content

    def fill_cache(self, rank: int, world_size: int) -> None:
        """Read every ``world_size``-th image from ``rank`` on into memory."""
        for index in range(rank, len(self.names), world_size):
            try:
                self.cache[index] = self.read(index)
            except UserError:  # whoever reads a damaged one later decides
                continue


def _fill(archive: str, split: str, listing: Listing) -> None:
    path = archive.removesuffix(".zip") + "_map.txt"
    listing.watch(path)
    listing.watch(archive)
    entries: list[tuple[str, int]] = []
    for number, line in read_lines(path):
        if not (entry := _ENTRY.fullmatch(line)):
            raise UserError(f"{path}:{number}: expected a path, a tab and a class number")
        name, label = entry.groups()
        if any(map(is_hidden, name.split("/"))):
            listing.left_out[HIDDEN] += 1
        else:
            entries.append((name, int(label)))
    if not entries:
        raise UserError(f"{path}: lists no images")
    with zipfile.ZipFile(archive) as opened:
        every = opened.infolist()
    members = {member.filename: member for member in every}
    if len(members) < len(every):
        ((twice, _),) = Counter(member.filename for member in every).most_common(1)
        raise UserError(f"{archive}: it has {twice} twice: pack it again")
    prefix = "" if entries[0][0] in members else f"{split}/"
    for name, label in entries:
        if not (member := members.get(prefix + name)):
            raise UserError(f"{path}: {name} is not in {archive}")
        plain = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not plain or member.flag_bits & 1:
            raise UserError(f"{archive}: {name} is encrypted, or neither stored nor deflated")
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
    listing.classes = [str(label) for label in range(max(label for _, label in entries) + 1)]


def _find(root: str, split: str) -> list[str]:
    files = [os.path.join(root, name) for name in (f"{split}.zip", f"{split}_map.txt")]
    return files if all(map(os.path.exists, files)) else []


ZIP = Form("a zip", _find, lambda root, split, _: ZipSource(root, split))
