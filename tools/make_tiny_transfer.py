"""Write a miniature of a transfer data set, in the names and formats of the original's files.

There are as many classes as in the original (but 10 for imagenet), with few and small images. An
image's colour tells its class, so that a classifier has something to find.

    python -m tools.make_tiny_transfer cifar10 FOLDER
"""

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.io import savemat

from tools import tiny
from tools.tiny import write_lines
from utils.arguments import command_parser
from utils.run import run_script

TRAIN, TEST = 2, 1  # images per class; caltech101 trains on as many as its protocol draws
CALTECH_TRAIN = 30
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)


def main() -> None:
    """Write one data set."""
    parser = command_parser(__doc__)
    parser.add_argument("name", choices=sorted(WRITERS), help="of the data set")
    parser.add_argument("folder", help="what is later given as --data-path")
    args = parser.parse_args()
    write_tiny(args.name, args.folder)


def write_tiny(name: str, folder: str) -> None:
    """Write the miniature of data set ``name`` under ``folder``."""
    WRITERS[name](Path(folder))


def colour(label: int) -> np.ndarray:
    """The RGB colour of a class, of 512 that even JPEG keeps apart."""
    return np.array([label // 64, label // 8 % 8, label % 8]) * 32 + 16


def pixels(label: int, width: int = 24, height: int = 16) -> np.ndarray:
    """An image of a class, height x width x 3 of uint8: its colour and a little noise."""
    noise = np.random.default_rng(label).integers(-4, 5, (height, width, 1))
    return (colour(label) + noise).astype(np.uint8)


def write_image(path: Path, label: int) -> None:
    """Write an image of a class."""
    tiny.write_image(path, pixels(label))


def class_names(count: int, form: str = "class_{:03}") -> list[str]:
    """Names whose alphabetical order is that of the class numbers."""
    return [form.format(number) for number in range(count)]


def imagenet(folder: Path) -> None:
    """Folders train/ and val/, each with a folder for each class."""
    for split, count in (("train", TRAIN), ("val", TEST)):
        for label, name in enumerate(class_names(10, "n{:08}")):
            for number in range(count):
                write_image(folder / split / name / f"{name}_{number}.JPEG", label)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, which wrote CIFAR."""

    def save_string(self, value: str | bytes) -> None:
        """Write a string."""
        content = value.encode("latin1") if isinstance(value, str) else value
        pickler: Any = self  # the types of pickle leave out what follows
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        pickler.memoize(value)

    dispatch: ClassVar[Any] = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def write_python2_pickle(path: Path, value: dict) -> None:
    """Write a pickle as Python 2 with numpy 1 did."""
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue().replace(b"numpy._core.", b"numpy.core."))


def cifar_batch(labels: list[int], key: str) -> dict:
    """A batch of CIFAR: a row for each image, with its red, then green, then blue plane."""
    images = [pixels(label, 32, 32).transpose(2, 0, 1).ravel() for label in labels]
    names = [f"image_s_{number:06}.png" for number in range(len(labels))]
    return {"batch_label": "batch", key: labels, "data": np.stack(images), "filenames": names}


def cifar10(folder: Path) -> None:
    """Pickled batches, five of them for training."""
    folder = folder / "cifar-10-batches-py"
    labels = [label for label in range(10) for _ in range(TRAIN)]
    for number in range(5):
        batch = cifar_batch(labels[number::5], "labels")
        write_python2_pickle(folder / f"data_batch_{number + 1}", batch)
    write_python2_pickle(folder / "test_batch", cifar_batch(list(range(10)) * TEST, "labels"))
    meta = {"label_names": class_names(10), "num_cases_per_batch": 4, "num_vis": 3072}
    write_python2_pickle(folder / "batches.meta", meta)


def cifar100(folder: Path) -> None:
    """Pickled batches with fine and coarse labels."""
    folder = folder / "cifar-100-python"
    for split, count in (("train", TRAIN), ("test", TEST)):
        batch = cifar_batch(list(range(100)) * count, "fine_labels")
        batch["coarse_labels"] = [label // 5 for label in batch["fine_labels"]]
        write_python2_pickle(folder / split, batch)
    meta = {"fine_label_names": class_names(100), "coarse_label_names": class_names(20)}
    write_python2_pickle(folder / "meta", meta)


def stl10(folder: Path) -> None:
    """Binary arrays: planes of columns, and labels from 1."""
    folder = folder / "stl10_binary"
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = list(range(10)) * count
        images = np.stack([pixels(label, 96, 96).transpose(2, 1, 0) for label in labels])
        folder.mkdir(parents=True, exist_ok=True)
        images.tofile(folder / f"{split}_X.bin")
        np.array([label + 1 for label in labels], np.uint8).tofile(folder / f"{split}_y.bin")
    write_lines(folder / "class_names.txt", class_names(10))


def flowers102(folder: Path) -> None:
    """MATLAB lists of the image numbers of each split, and of labels from 1."""
    folder = folder / "flowers-102"
    parts = ["trnid", "valid"] + ["tstid"] * TEST
    labels = np.repeat(np.arange(102), len(parts))
    for number, label in enumerate(labels.tolist(), 1):
        write_image(folder / "jpg" / f"image_{number:05}.jpg", label)
    numbers = np.arange(1, len(labels) + 1).reshape(102, len(parts))
    ids = {part: numbers[:, np.array(parts) == part].reshape(1, -1) for part in parts}
    savemat(folder / "setid.mat", ids)
    savemat(folder / "imagelabels.mat", {"labels": labels[None] + 1})


def pets(folder: Path) -> None:
    """Lists of image, breed from 1, species and number within the species."""
    folder = folder / "oxford-iiit-pet"
    for split, numbers in (("trainval", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        lines = []
        for label, name in enumerate(class_names(37, "Long_Breed_{:02}")):
            for number in numbers:
                write_image(folder / "images" / f"{name}_{number}.jpg", label)
                lines.append(f"{name}_{number} {label + 1} {1 + label % 2} 1")
        write_lines(folder / "annotations" / f"{split}.txt", lines)


def food101(folder: Path) -> None:
    """JSON lists of a class's images."""
    folder = folder / "food-101"
    names = class_names(101)
    for split, numbers in (("train", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        lists = {name: [f"{name}/{1000 + number}" for number in numbers] for name in names}
        for label, name in enumerate(names):
            for image in lists[name]:
                write_image(folder / "images" / f"{image}.jpg", label)
        write_lines(folder / "meta" / f"{split}.json", [json.dumps(lists)])


def cars(folder: Path) -> None:
    """MATLAB records of box, class from 1 and file name."""
    folder = folder / "stanford_cars"
    (folder / "devkit").mkdir(parents=True, exist_ok=True)
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    for split, count, annotations in (
        ("train", TRAIN, "devkit/cars_train_annos.mat"),
        ("test", TEST, "cars_test_annos_withlabels.mat"),
    ):
        labels = list(range(196)) * count
        records = np.zeros((1, len(labels)), [(field, object) for field in fields])
        for index, label in enumerate(labels):
            name = f"{index + 1:05}.jpg"
            write_image(folder / f"cars_{split}" / name, label)
            records[0, index] = (1, 1, 24, 16, label + 1, name)
        savemat(folder / annotations, {"annotations": records})
    names = np.array([class_names(196)], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


def caltech101(folder: Path) -> None:
    """A folder for each class; the background's also holds a file that is not an image."""
    folder = folder / "caltech101" / "101_ObjectCategories"
    for label, name in enumerate(["BACKGROUND_Google", *class_names(101)]):
        for number in range(CALTECH_TRAIN + TEST):
            write_image(folder / name / f"image_{number + 1:04}.jpg", label)
    write_lines(folder / "BACKGROUND_Google" / "tmp", [])


def dtd(folder: Path) -> None:
    """A folder for each class, and lists of the first of ten divisions."""
    folder = folder / "dtd" / "dtd"
    names = class_names(47)
    for number, split in enumerate(["train", "val"] + ["test"] * TEST):
        images = [f"{name}/{name}_{number:04}.jpg" for name in names]
        for label, image in enumerate(images):
            write_image(folder / "images" / image, label)
        write_lines(folder / "labels" / f"{split}1.txt", images)


def aircraft(folder: Path) -> None:
    """Lists of an image's number and the name of its variant, which can hold spaces."""
    folder = folder / "fgvc-aircraft-2013b" / "data"
    names = class_names(100, "Maker F/A-{:03} Mk II")
    write_lines(folder / "variants.txt", names)
    for split, numbers in (("trainval", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        lines = []
        for label, name in enumerate(names):
            for number in numbers:
                image = f"{number * 100 + label:07}"
                write_image(folder / "images" / f"{image}.jpg", label)
                lines.append(f"{image} {name}")
        write_lines(folder / f"images_variant_{split}.txt", lines)


def sun397(folder: Path) -> None:
    """Folders by first letter, class and, for some, indoor or outdoor; lists of a division."""
    folder = folder / "SUN397"
    names = class_names(397, "/a/class_{:03}")
    names[1::2] = [f"{name}/outdoor" for name in names[1::2]]
    write_lines(folder / "ClassName.txt", names)
    for split, numbers in (("Training", range(TRAIN)), ("Testing", range(TRAIN, TRAIN + TEST))):
        images = [(f"{c}/sun_{n:016}.jpg", i) for i, c in enumerate(names) for n in numbers]
        for image, label in images:
            write_image(folder / image[1:], label)
        write_lines(folder / f"{split}_01.txt", [image for image, _ in images])


def voc2007(folder: Path) -> None:
    """A list for each class and split: 1, -1, or 0 where all objects of the class are difficult.

    The class after an image's own is difficult in it.
    """
    folder = folder / "VOCdevkit" / "VOC2007"
    lists = folder / "ImageSets" / "Main"
    names = VOC_CLASSES.split()
    for split, first, count in (("trainval", 1, TRAIN), ("test", 1000, TEST)):
        labels = list(range(20)) * count
        images = [f"{first + index:06}" for index in range(len(labels))]
        for image, label in zip(images, labels, strict=True):
            write_image(folder / "JPEGImages" / f"{image}.jpg", label)
        write_lines(lists / f"{split}.txt", images)
        for number, name in enumerate(names):
            marks = [{0: 1, 1: 0}.get((number - label) % 20, -1) for label in labels]
            lines = [f"{i} {mark:2}" for i, mark in zip(images, marks, strict=True)]
            write_lines(lists / f"{name}_{split}.txt", lines)


def places365(folder: Path) -> None:
    """Lists of image and class; the training images by class, those of val in one folder."""
    names = class_names(365, "/c/class_{:03}")
    categories = [f"{name} {label}" for label, name in enumerate(names)]
    write_lines(folder / "categories_places365.txt", categories)
    train = [
        (f"{name}/{number:08}.jpg", label)
        for label, name in enumerate(names)
        for number in range(1, TRAIN + 1)
    ]
    val = [(f"Places365_val_{i:08}.jpg", i % 365) for i in range(365 * TEST)]
    for listing, images, place in (
        ("places365_train_standard.txt", train, "data_256_standard"),
        ("places365_val.txt", val, "val_256"),
    ):
        for image, label in images:
            write_image(folder / place / image.lstrip("/"), label)
        write_lines(folder / listing, [f"{image} {label}" for image, label in images])


# fmt: off
_WRITERS = (
    imagenet, cifar10, cifar100, stl10, flowers102, pets, food101, cars, caltech101, dtd, aircraft,
    sun397, voc2007, places365,
)
# fmt: on
WRITERS: dict[str, Callable[[Path], None]] = {writer.__name__: writer for writer in _WRITERS}


if __name__ == "__main__":
    run_script(main)
