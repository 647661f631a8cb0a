"""Pack train/ and val/ into train.zip and val.zip, which --zip reads.

A file system serves one large file better than a million small ones. The images are stored as
they are, beside the list that Swin's repository expects: a path, a tab and a class number.
"""

import argparse
import os
import sys
import zipfile
from collections.abc import Callable
from typing import IO

from tqdm import tqdm

from data.source import SPLITS, FolderSource
from utils.errors import UserError
from utils.run import run_script


def main() -> None:
    """Pack each split that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="the folder that holds train/ and val/")
    parser.add_argument("folder", help="where <split>.zip and <split>_map.txt are written")
    args = parser.parse_args()
    splits = [split for split in SPLITS if os.path.isdir(os.path.join(args.data, split))]
    if not splits:
        raise UserError(f"{args.data}: holds neither of the folders {' and '.join(SPLITS)}")
    for split in splits:
        images = pack(args.data, split, args.folder)
        print(f"{split}: {images} images in {os.path.join(args.folder, split)}.zip")


def pack(data: str, split: str, folder: str) -> int:
    """Write ``<split>.zip`` and ``<split>_map.txt`` into ``folder``; returns how many images.

    Classes are numbered, and images ordered, as ``FolderSource`` does.

    Raises:
        UserError: an image that cannot be read, a name that the list cannot hold, or no space.
    """
    source = FolderSource(data, split)
    names = [os.path.relpath(path, os.path.join(data, split)) for path in source.names]
    names = [name.replace(os.sep, "/") for name in names]
    for name in names:
        if not name.isprintable():  # a tab, a line break, or bytes that are not UTF-8
            raise UserError(f"{os.path.join(data, split)}: {name!r} cannot be listed: rename it")

    def write_zip(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:
            bar = tqdm(source.names, desc=split, disable=not sys.stderr.isatty())
            for path, name in zip(bar, names, strict=True):
                archive.write(path, name)

    def write_map(file: IO[bytes]) -> None:
        for name, label in zip(names, source.labels, strict=True):
            file.write(f"{name}\t{label}\n".encode())

    try:
        os.makedirs(folder, exist_ok=True)
        write_whole(os.path.join(folder, f"{split}.zip"), write_zip)
        write_whole(os.path.join(folder, f"{split}_map.txt"), write_map)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot pack {split} ({error.strerror})"
        ) from error
    return len(names)


def write_whole(path: str, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a temporary file, which takes the place of ``path`` once on the disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


if __name__ == "__main__":
    run_script(main)
