"""ImageNet's own archives, as they are downloaded."""

import io
import os
import tarfile

from scipy.io import loadmat

from data.listing import files_in
from data.lists import read_entries
from data.source import Form
from data.tars import TarSource
from utils.errors import UserError, reading

DEVKIT = "ILSVRC2012_devkit_t12"


def read_classes(devkit: str) -> list[str]:
    """The class, such as n01440764, of each validation image, in the order of their numbers.

    Args:
        devkit: the folder of ImageNet's development kit, or its archive.

    Raises:
        UserError: a file of the kit that is missing, damaged or does not fit the other.
    """
    truth, meta = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
    numbers, table = _kit_file(devkit, truth), _kit_file(devkit, meta)
    with reading(f"{devkit}/{meta}", "not the classes of ImageNet"):
        synsets = loadmat(io.BytesIO(table), squeeze_me=True)["synsets"]
        # superclasses have children and no images
        classes = {
            int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0
        }
    with reading(f"{devkit}/{truth}", "names a class that meta.mat has not"):
        return [classes[int(number)] for number in numbers.split()]


def _kit_file(devkit: str, name: str) -> bytes:
    with reading(f"{devkit}/{name}", f"cannot read what is in {DEVKIT}.tar.gz"):
        if os.path.isfile(devkit):
            with tarfile.open(devkit) as archive:
                member = archive.extractfile(f"{DEVKIT}/{name}")
                return member.read() if member else b""
        with open(os.path.join(devkit, name), "rb") as file:
            return file.read()


def _open(root: str, split: str, paths: list[str]) -> TarSource:
    """Training images know their classes; those of validation need a list or the kit."""
    if split == "train":
        return TarSource(root, paths[0])
    if os.path.isfile(listed := os.path.join(root, "val.txt")):
        known = {os.path.basename(path): label for path, label in read_entries(listed)}
        return TarSource(root, paths[0], known, listed)
    kits = files_in(root, rf"{DEVKIT}(\.tar\.gz)?")
    if not kits:
        raise UserError(
            f"{root}: ILSVRC2012_img_val.tar has no classes: put {DEVKIT}.tar.gz of "
            "https://image-net.org beside it, or val.txt with lines of a name and a class number"
        )
    classes = read_classes(kits[0])
    known = {f"ILSVRC2012_val_{i:08d}.JPEG": name for i, name in enumerate(classes, 1)}
    return TarSource(root, paths[0], known, kits[0])


IMAGENET = Form(
    "ImageNet's archive",
    lambda root, split: files_in(root, rf"ILSVRC2012_img_{split}\.tar"),
    _open,
)
