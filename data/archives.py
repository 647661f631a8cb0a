"""Files that lie in an archive, read in place by the offsets that its list has."""

import os
from collections.abc import Callable

from data.image import MAX_BYTES
from data.listing import Listing, open_listing
from data.source import ImageFiles
from utils.errors import reading


class ArchiveSource(ImageFiles):
    """Images in archives, whose list has the columns ``archive``, ``start`` and ``size``.

    Nothing is unpacked to the disk. A read shares no position in the file with another one, so
    workers and threads may read at once.

    Args:
        root: the data path.
        name: of the split and the archives, names the kept list.
        archives: paths of the files.
        fill: lists the images in them.
        also: files that the list depends on.

    Raises:
        UserError: an archive that cannot be read, or no images.
    """

    def __init__(
        self,
        root: str,
        name: str,
        archives: list[str],
        fill: Callable[[Listing], None],
        also: list[str] | None = None,
    ) -> None:
        found = open_listing(root, name, "", fill, [*archives, *(also or [])])
        super().__init__(found.names, found.labels, found.classes)
        self.archives, self.columns = archives, found.columns

    def read(self, index: int) -> bytes:
        """The file of image ``index``.

        Raises:
            UserError: a damaged member, or one larger than ``MAX_BYTES``.
        """
        archive = self.archives[self.columns["archive"][index]]
        with reading(archive, f"cannot read {self.names[index]}"):
            return self._read(archive, {name: int(c[index]) for name, c in self.columns.items()})

    def _read(self, archive: str, member: dict[str, int]) -> bytes:
        return read_part(archive, member["start"], member["size"])


def read_part(path: str, start: int, size: int) -> bytes:
    """``size`` bytes of a file from ``start`` on.

    Raises:
        ValueError: more than ``MAX_BYTES``, or the file ends before them.
    """
    if size > MAX_BYTES:
        raise ValueError("the file is too large")
    with open(path, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, start)
    if len(content) < size:
        raise ValueError("the archive ends before it")
    return content
