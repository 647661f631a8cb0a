"""Pack train and val, in whichever form they lie, into train.tar and val.tar.

A file system serves one large file better than a million small ones. The images are stored as they
are, in their order, so a training sees the same batches. Started again, an interrupted pack goes
on. At the end every image is compared with what it was packed from.

    python -m tools.pack_images DATA PACKED [--zip]
"""

import fcntl
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from typing import BinaryIO

from tqdm import tqdm

from data.listing import Names
from data.opening import DataPath, open_present
from data.source import ImageSource
from data.tars import CLASSES, class_folders, tar_members
from utils.arguments import command_parser
from utils.checkpoint import replacing
from utils.distributed import on_terminal
from utils.errors import UserError, reading
from utils.run import run_script

PART = ".part"  # ends the name of a tar that is not whole


def main() -> None:
    """Pack each split that is there."""
    parser = command_parser(__doc__)
    parser.add_argument("data", help="what --data-path of the scripts would be")
    parser.add_argument("folder", help="where the archives are written")
    parser.add_argument(
        "--zip",
        action="store_true",
        help="write <split>.zip and <split>_map.txt, the layout of Swin's repository for --zip",
    )
    args = parser.parse_args()
    for split, source in open_present(DataPath(args.data)).items():
        path = os.path.join(args.folder, f"{split}.{'zip' if args.zip else 'tar'}")
        with reading(path, f"cannot pack {split}"):
            os.makedirs(args.folder, exist_ok=True)
            pack_zip(source, path) if args.zip else pack_tar(source, path)
        print(f"{split}: {len(source.names)} images in {path}")


def member_names(source: ImageSource) -> list[str]:
    """What the images are called in an archive: a folder for each class, and a path in it."""
    folders = class_folders(source.classes)
    names = []
    for index, label in enumerate(source.labels.tolist()):
        known = source.names
        name = known.short(index) if isinstance(known, Names) else known[index]
        names.append(f"{folders[label]}/{name.removeprefix(f'{source.classes[label]}/')}")
    return names


def pack_tar(source: ImageSource, path: str) -> None:
    """Write ``path``, going on from a part of it that an earlier start has left.

    Raises:
        UserError: an image that cannot be read, a part of other images, or a pack under way.
        OSError: the disk is full, for example.
    """
    names = [CLASSES, *member_names(source)]
    with open(path + PART, "a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{file.name}: another process is packing it") from error
        done, end = _whole_members(file)
        if done != names[: len(done)]:
            raise UserError(f"{file.name}: holds other images: remove it to pack anew")
        file.truncate(end)
        file.seek(end)
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number in _bar(range(len(done), len(names)), f"pack {path}"):
                content = json.dumps(source.classes).encode()
                if number:
                    content = source.read(number - 1)
                member = tarfile.TarInfo(names[number])
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
        _compare(source, file, path)
        os.replace(file.name, path)


def _whole_members(file: BinaryIO) -> tuple[list[str], int]:
    """Names of the members that are whole, and where the last one ends."""
    file.seek(0, os.SEEK_END)
    length = file.tell()
    names: list[str] = []
    end = 0
    try:
        file.seek(0)
        for name, start, size, *_ in tar_members(file):
            after = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if after > length:
                break
            names.append(name)
            end = after
    except tarfile.TarError:  # an empty file, or one that ends within a member
        pass
    return names, end


def _compare(source: ImageSource, file: BinaryIO, path: str) -> None:
    file.seek(0)
    members = [(start, size) for _, start, size, *_ in tar_members(file)][1:]
    for index in _bar(range(len(source.names)), f"compare {path}"):
        start, size = members[index]
        if os.pread(file.fileno(), size, start) != source.read(index):
            raise UserError(
                f"{file.name}: {source.names[index]} is not what was packed: see whether the disk "
                "is sound, remove the file, and pack anew"
            )


def pack_zip(source: ImageSource, path: str) -> None:
    """Write ``path`` and, beside it, the list of its images.

    Raises:
        UserError: an image that cannot be read, or a name that the list cannot hold.
        OSError: the disk is full, for example.
    """
    names = member_names(source)
    for name in names:
        if not name.isprintable():  # a tab, a line break, or bytes that are not UTF-8
            raise UserError(f"{path}: {name!r} cannot be listed: rename it, or leave --zip out")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{path}: two images are called {twice}: leave --zip out, or rename one")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for index in _bar(range(len(names)), f"pack {path}"):
            archive.writestr(zipfile.ZipInfo(names[index]), source.read(index))
    with replacing(path.removesuffix(".zip") + "_map.txt") as file:
        for name, label in zip(names, source.labels, strict=True):
            file.write(f"{name}\t{label}\n".encode())


def _bar(numbers: range, what: str) -> tqdm:
    return tqdm(numbers, desc=what, disable=not on_terminal())


if __name__ == "__main__":
    run_script(main)
