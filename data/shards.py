"""WebDataset's shards: tars with ``KEY.jpg`` beside ``KEY.cls`` or ``KEY.json``."""

import itertools
import json
import os
from collections import defaultdict
from functools import partial

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.archives import ArchiveSource, read_part
from data.listing import HIDDEN, IRREGULAR, MOST_CLASSES, OTHER, Listing, files_in, is_hidden
from data.source import Form
from data.tars import Member, tar_members
from utils.errors import UserError, reading

# the names of splits in files: Hugging Face says validation
ALSO = {"train": "train", "val": "(?:val|validation)"}


def numbered(split: str) -> str:
    """A pattern of what the numbered files of a split are called, without their ending."""
    return rf"(?:.+[-_])?{ALSO[split]}-\d+(?:-of-\d+)?"


class ShardSource(ArchiveSource):
    """The images of WebDataset's shards, ordered by class and key.

    A key is the path up to the first dot of its last part, as WebDataset specifies. Classes are
    named by their numbers.

    Args:
        root: the data path.
        split: its name.
        shards: their paths, in order.

    Raises:
        UserError: a member that is there twice, keys with dots, or an image without a class.
    """

    def __init__(self, root: str, split: str, shards: list[str]) -> None:
        super().__init__(root, f"{split}-shards", shards, partial(_fill, shards))


def _fill(shards: list[str], listing: Listing) -> None:
    images: list[tuple[int, tuple[str, str], int, Member]] = []  # label, path, shard
    for number, shard in enumerate(shards):
        listing.watch(shard)
        for key, files in _samples(shard, listing).items():
            found = [files[extension] for extension in files if extension in IMG_EXTENSIONS]
            _refuse_dots(shard, files, bool(found))
            if found:
                label = _label(shard, key, files)
                images.append((label, os.path.split(found[0].name), number, found[0]))
            else:
                listing.left_out[OTHER] += 1
    if not images:
        raise UserError(f"{shards[0]}: no images in the shards")
    images.sort()
    for label, same in itertools.groupby(images, key=lambda image: image[0]):
        members = list(same)
        listing.add(
            (member.name for *_, member in members),
            label,
            archive=[shard for _, _, shard, _ in members],
            start=[member.start for *_, member in members],
            size=[member.size for *_, member in members],
        )
    listing.classes = [str(label) for label in range(images[-1][0] + 1)]


def _samples(shard: str, listing: Listing) -> dict[str, dict[str, Member]]:
    """The members of each sample of a shard by their extension, such as ``.jpg``."""
    samples: defaultdict[str, dict[str, Member]] = defaultdict(dict)
    with open(shard, "rb") as file:
        for member in tar_members(file):
            folder, base = os.path.split(member.name)
            if not member.name or member.hard or member.soft:
                listing.left_out[IRREGULAR] += 1
            elif any(map(is_hidden, member.name.split("/"))):
                listing.left_out[HIDDEN] += 1
            else:
                stem, _, extension = base.partition(".")
                files = samples[os.path.join(folder, stem)]
                if files.setdefault(f".{extension.lower()}", member) is not member:
                    raise UserError(f"{shard}: two members are called {member.name}")
    return samples


def _refuse_dots(shard: str, files: dict[str, Member], has_image: bool) -> None:
    """Refuse a sample that holds another one, whose key would have a dot."""
    for extension, member in files.items():
        rest, last = os.path.splitext(extension)
        if rest and last in IMG_EXTENSIONS:
            if not has_image or {f"{rest}.cls", f"{rest}.json"} & files.keys():
                raise UserError(
                    f"{shard}: {member.name} has a dot in its key, which ends at the first dot of "
                    "a name for WebDataset: name the members without it"
                )


def _label(shard: str, key: str, files: dict[str, Member]) -> int:
    with reading(shard, f"{key} needs a class number in {key}.cls, or as label in {key}.json"):
        if member := files.get(".cls"):
            label = int(read_part(shard, member.start, member.size))
        else:
            member = files[".json"]
            label = json.loads(read_part(shard, member.start, member.size))["label"]
        if not isinstance(label, int) or not 0 <= label < MOST_CLASSES:
            raise ValueError(f"{label!r} is no class number")
        return label


def _find(root: str, split: str) -> list[str]:
    inside = files_in(os.path.join(root, split), r"(?:.+-)?\d+\.tar")
    return files_in(root, rf"{numbered(split)}\.tar") or inside


SHARDS = Form("WebDataset shards", _find, ShardSource)
