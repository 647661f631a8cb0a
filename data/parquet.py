"""ImageNet as Hugging Face has it: Parquet files with the columns ``image`` and ``label``."""

import json
import logging
import os
import time
from functools import partial

import numpy as np

from data.listing import Listing, files_in, open_listing
from data.shards import numbered
from data.source import Form, ImageFiles
from utils.errors import UserError, reading

try:
    from pyarrow.parquet import ParquetFile
except ImportError:
    ParquetFile = None


class ParquetSource(ImageFiles):
    """The rows of Parquet files, in the order in which they are stored.

    A file is read by groups of rows, so one image costs a group unless its neighbours are read
    next. That is why the order is the stored one, and why a training is slow.

    Args:
        root: the data path.
        split: its name.
        files: their paths, in order.

    Raises:
        UserError: pyarrow is missing, a file cannot be read, or has other columns.
    """

    def __init__(self, root: str, split: str, files: list[str]) -> None:
        if not ParquetFile:
            raise UserError(
                f"{files[0]}: reading Parquet needs pyarrow: pip install pyarrow (extra [parquet])"
            )
        self.files = files
        found = open_listing(root, f"{split}-parquet", "", partial(_fill, files), files)
        super().__init__(found.names, found.labels, found.classes)
        self._columns = found.columns
        self._group: tuple[tuple[int, int], list[bytes | None]] = ((-1, -1), [])

    def read(self, index: int) -> bytes:
        """The file of image ``index``.

        Raises:
            UserError: a row without an image, or a file that is damaged.
        """
        number, group, row = (int(self._columns[name][index]) for name in ("file", "group", "row"))
        if self._group[0] != (number, group):
            with reading(self.files[number], f"cannot read {self.names[index]}"):
                with ParquetFile(self.files[number]) as file:
                    table = file.read_row_group(group, columns=["image.bytes"])
            images = table["image"].combine_chunks().field("bytes").to_pylist()
            self._group = ((number, group), images)
        content = self._group[1][row]
        if content is None:
            raise UserError(f"{self.files[number]}: no image in {self.names[index]}")
        return content

    def log_cost(self) -> None:
        """Say what an image costs that is read by itself, as a training does."""
        started = time.perf_counter()
        self.read(len(self.names) // 2)
        logging.getLogger("synco").warning(
            "%s: an image read from Parquet costs %.1f ms here; python -m tools.pack_images makes "
            "a tar of them, which avoids it",
            os.path.dirname(self.files[0]),
            1000 * (time.perf_counter() - started),
        )


def _fill(files: list[str], listing: Listing) -> None:
    most = -1
    for number, path in enumerate(files):
        listing.watch(path)
        with ParquetFile(path) as file:
            named = _class_names(file.schema_arrow.metadata)
            columns = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
            if "image.bytes" not in columns or "label" not in columns:
                raise UserError(
                    f"{path}: expected the columns image.bytes and label, found {', '.join(columns)}"
                )
            wanted = ["label"] + ["image.path"] * ("image.path" in columns)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=wanted)
                labels = table["label"].to_numpy()
                if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
                    raise UserError(f"{path}: a label is no class number")
                most = max(most, int(labels.max(initial=-1)))
                names = [f"{os.path.basename(path)}/{group}/{row}" for row in range(len(labels))]
                if "image" in table.column_names:
                    paths = table["image"].combine_chunks().field("path").to_pylist()
                    names = [given or name for given, name in zip(paths, names, strict=True)]
                for row, (name, label) in enumerate(zip(names, labels.tolist(), strict=True)):
                    listing.add([name], label, file=[number], group=[group], row=[row])
    if most < 0:
        raise UserError(f"{files[0]}: no rows in the files")
    if len(named) <= most:
        named = [str(label) for label in range(most + 1)]
    listing.classes = named


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    """The names of the classes that Hugging Face's ``datasets`` writes into a schema."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])["info"]
        names = info["features"]["label"]["names"]
        return list(map(str, names))
    except (KeyError, TypeError, ValueError):
        return []


def _find(root: str, split: str) -> list[str]:
    rows = rf"{numbered(split)}(?:-[0-9a-f]+)?\.parquet"  # Hugging Face ends the names with a digest
    return files_in(root, rows) or files_in(os.path.join(root, "data"), rows)


PARQUET = Form("Parquet", _find, ParquetSource)
