"""The forms in which a data path can hold ImageNet, or one's own images, and how they are found."""

import csv
import io
import logging
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from scipy.io import loadmat

from data.archives import MOST_CLASSES, ShardSource, TarSource, ZipSource
from data.hints import nearest_split
from data.index import Listing, open_index
from data.listing import list_images, log_left_out, read_lines
from data.source import FolderSource, IndexedSource, has_classes
from utils.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12"
# the names of splits in files: Hugging Face says validation
ALSO = {"train": "train", "val": "(?:val|validation)"}
FORMS = (
    "class folders",
    "a tar",
    "ImageNet's archive",
    "WebDataset shards",
    "Parquet",
    "a list",
    "a zip",
    "images without classes",
)


def open_form(root: str, split: str, zipped: bool, labelled: bool) -> IndexedSource:
    """The images of a split in the first of ``FORMS`` that is there; the log names the others.

    Args: as of ``data.source.open_source``.

    Raises:
        UserError: no images in any form, or a form that cannot be read.
    """
    if zipped:
        return ZipSource(root, split)
    found = find_forms(root, split)
    if not found and not labelled and (folder := _flat_folder(root, split)):
        return FlatSource(root, split, folder)
    if not found:
        return FolderSource(root, split)  # which says what is missing
    form = next(form for form in FORMS if form in found)
    if len(found) > 1:
        others = ", ".join(form for form in FORMS[FORMS.index(form) + 1 :] if form in found)
        logging.getLogger("synco").info(f"{root}: {split} is read from {form}, not from {others}")
    return found[form]()


def find_forms(root: str, split: str) -> dict[str, Callable[[], IndexedSource]]:
    """How to open each labelled form of a split that lies in the data path."""
    found: dict[str, Callable[[], IndexedSource]] = {}
    inside = os.path.join(root, split)
    if has_classes(inside):
        found["class folders"] = partial(FolderSource, root, split)
    names = sorted(os.listdir(root))
    if f"{split}.tar" in names:
        found["a tar"] = partial(TarSource, root, f"{split}.tar")
    archive = f"ILSVRC2012_img_{split}.tar"
    if archive in names:
        found["ImageNet's archive"] = partial(_open_archive, root, split, archive)
    name = rf"(?:.+[-_])?{ALSO[split]}-\d+(?:-of-\d+)?"
    if shards := _matching(root, rf"{name}\.tar") or _matching(inside, r"(?:.+-)?\d+\.tar"):
        found["WebDataset shards"] = partial(ShardSource, root, split, shards)
    # Hugging Face ends the names with a digest
    rows = rf"{name}(?:-[0-9a-f]+)?\.parquet"
    if files := _matching(root, rows) or _matching(os.path.join(root, "data"), rows):
        found["Parquet"] = partial(_open_parquet, root, split, files)
    if lists := [name for name in (f"{split}.csv", f"{split}.txt") if name in names]:
        if "ImageNet's archive" not in found:  # whose classes the list gives
            found["a list"] = partial(ListSource, root, split, os.path.join(root, lists[0]))
    if {f"{split}.zip", f"{split}_map.txt"} <= set(names):
        found["a zip"] = partial(ZipSource, root, split)
    return found


class ListSource(IndexedSource):
    """Images that a list names, with lines of a path and a label: ``<split>.csv`` or ``.txt``.

    Paths are below the data path; a slash before them, as Places has it, does not count. Labels
    are numbers or names. The images are ordered by class and path.

    Raises:
        UserError: a line that is no path and label, or a path that leaves the data path.
    """

    def __init__(self, root: str, split: str, path: str) -> None:
        try:
            index = open_index(
                root, f"{split}-list", root, lambda listing: _fill_list(path, listing), [path]
            )
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror})") from error
        super().__init__(index)


class FlatSource(IndexedSource):
    """Images without classes, at any depth below a folder; they are one class.

    Raises:
        UserError: no images, or a folder that cannot be read.
    """

    def __init__(self, root: str, split: str, folder: str) -> None:
        def fill(listing: Listing) -> None:
            images = list_images(folder, listing.left_out, "", watch=listing.watch)
            listing.add(images, 0)
            listing.classes = ["all"]
            if not images:
                hint = nearest_split(root, split)
                raise UserError(
                    f"{root}: no folder {split}/ in the data path, nor any images{hint}"
                )

        try:
            index = open_index(root, f"{split}-flat", folder, fill)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}") from error
        log_left_out(folder, index.left_out)
        super().__init__(index)


def _flat_folder(root: str, split: str) -> str | None:
    """The folder that holds images beside no folder of a split, if one does."""
    inside = os.path.join(root, split)
    if has_classes(inside):
        return None
    if os.path.isdir(inside):
        return inside
    return None if split != "train" or os.path.isdir(os.path.join(root, "val")) else root


def _matching(folder: str, pattern: str) -> list[str]:
    """Paths of the files in a folder whose whole name matches, by name; none without a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if re.fullmatch(pattern, name)]


def _open_parquet(root: str, split: str, files: list[str]) -> IndexedSource:
    from data.parquet import ParquetSource  # pyarrow is not everywhere

    return ParquetSource(root, split, files)


def _open_archive(root: str, split: str, archive: str) -> TarSource:
    return TarSource(root, archive, *(() if split == "train" else _classes_of_val(root)))


def _classes_of_val(root: str) -> tuple[dict[str, str], str]:
    """The class of each image of ILSVRC2012_img_val.tar, and the list or kit that says so."""
    if os.path.isfile(listed := os.path.join(root, "val.txt")):
        entries = [_entry(listed, number, line) for number, line in read_lines(listed)]
        return {os.path.basename(path): label for path, label in entries}, listed
    kits = [os.path.join(root, DEVKIT), os.path.join(root, f"{DEVKIT}.tar.gz")]
    if not (found := list(filter(os.path.exists, kits))):
        raise UserError(
            f"{root}: ILSVRC2012_img_val.tar has no classes: put {DEVKIT}.tar.gz of "
            "https://image-net.org beside it, or val.txt with lines of a name and a class number"
        )
    classes = read_classes(found[0])
    return {f"ILSVRC2012_val_{i:08d}.JPEG": name for i, name in enumerate(classes, 1)}, found[0]


def read_classes(devkit: str) -> list[str]:
    """The class, such as n01440764, of each validation image, in the order of their numbers.

    Args:
        devkit: the folder of ImageNet's development kit, or its archive.

    Raises:
        UserError: a file of the kit that is missing, damaged or does not fit the other.
    """
    truth, meta = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
    numbers, table = _kit_file(devkit, truth), _kit_file(devkit, meta)
    try:
        synsets = loadmat(io.BytesIO(table), squeeze_me=True)["synsets"]
        # superclasses have children and no images
        classes = {
            int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0
        }
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{devkit}/{meta}: not the classes of ImageNet ({error})") from error
    try:
        return [classes[int(number)] for number in numbers.split()]
    except (KeyError, ValueError) as error:
        raise UserError(f"{devkit}/{truth}: {error} is no class of meta.mat") from error


def _kit_file(devkit: str, name: str) -> bytes:
    try:
        if os.path.isfile(devkit):
            with tarfile.open(devkit) as archive:
                member = archive.extractfile(f"{DEVKIT}/{name}")
                return member.read() if member else b""
        with open(os.path.join(devkit, name), "rb") as file:
            return file.read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise UserError(
            f"{devkit}/{name}: cannot read ({error}); it is in {DEVKIT}.tar.gz of "
            "https://image-net.org"
        ) from error


def _fill_list(path: str, listing: Listing) -> None:
    listing.watch(path)
    entries = [_entry(path, number, line) for number, line in read_lines(path)]
    if entries and not os.path.exists(os.path.join(listing.root, entries[0][0])):
        title, numbers = entries[0][1], [label.isdecimal() for _, label in entries]
        alone = len(entries) > 1 and not numbers[0] and all(numbers[1:])
        if alone or title.lower() in ("label", "class", "target"):
            entries = entries[1:]  # the first line names the columns
    if not entries:
        raise UserError(f"{path}: lists no images")
    by_class: defaultdict[str, list[str]] = defaultdict(list)
    for name, label in entries:
        by_class[label].append(name)
    if all(label.isdecimal() for label in by_class):
        numbered = {int(label): names for label, names in by_class.items()}
        if max(numbered) >= MOST_CLASSES:
            raise UserError(f"{path}: {max(numbered)} is too large for a class number")
        listing.classes = [str(number) for number in range(max(numbered) + 1)]
        for number in sorted(numbered):
            listing.add(sorted(numbered[number]), number)
    else:
        listing.classes = sorted(by_class)
        for number, label in enumerate(listing.classes):
            listing.add(sorted(by_class[label]), number)


def _entry(path: str, number: int, line: str) -> tuple[str, str]:
    """The path and the label of a line: after the last comma, tab or space, or in CSV's quotes."""
    if path.endswith(".csv"):
        try:
            cells = next(csv.reader([line]))
        except csv.Error as error:
            raise UserError(f"{path}:{number}: not a line of CSV ({error})") from error
    else:
        cells = line.strip().replace("\t", " ").rsplit(None, 1)
    if len(cells) != 2 or not all(cell.strip() for cell in cells):
        raise UserError(f"{path}:{number}: expected a path and a label")
    name, label = os.path.normpath(cells[0].strip()).lstrip("/"), cells[1].strip()
    if ".." in name.split("/"):
        raise UserError(f"{path}:{number}: {cells[0]} lies outside of the data path")
    return name, label
