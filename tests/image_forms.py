"""Writers of the forms in which images can lie, all from the same folder of classes."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.folders import FolderSource
from tools import pack_images

SPLITS = ("train", "val")


def copy_folder(imagenet: Path, root: Path) -> None:
    for split in SPLITS:
        shutil.copytree(imagenet / split, root / split)


def files(imagenet: Path, split: str) -> list[tuple[Path, str, int]]:
    """Path, class and its number of each image, in an order of no meaning."""
    paths = sorted((imagenet / split).rglob("*.jpg"), key=lambda path: (path.name, path.parent))
    return [(path, path.parent.name, int(path.parent.name[-1])) for path in paths]


def write_packed(imagenet: Path, root: Path) -> None:
    for split in SPLITS:
        pack_images.pack_tar(FolderSource(str(imagenet), split), str(root / f"{split}.tar"))


def write_tar(imagenet: Path, root: Path) -> None:
    """As a user makes it, with a folder around the classes and their folders as members."""
    for split in SPLITS:
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(imagenet / split, f"./{split}")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(imagenet: Path, root: Path, as_json: bool = False) -> None:
    for split in SPLITS:
        images = files(imagenet, split)
        for shard in range(3):
            with tarfile.open(root / f"{split}-{shard:06}.tar", "w") as archive:
                for path, name, label in images[shard::3]:
                    key = f"{name}_{path.stem}"
                    if as_json:
                        text = json.dumps({"label": label, "class_name": name})
                        add(archive, f"{key}.json", text.encode())
                    else:
                        add(archive, f"{key}.cls", str(label).encode())
                    add(archive, f"{key}.jpg", path.read_bytes())


def write_json_shards(imagenet: Path, root: Path) -> None:
    write_shards(imagenet, root, as_json=True)


def write_parquet(imagenet: Path, root: Path) -> None:
    """As Hugging Face's datasets writes it; stored in the folder's order, two rows a group."""
    (root / "data").mkdir()
    features = {"label": {"names": ["class0", "class1"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    for split, name in zip(SPLITS, ("train", "validation"), strict=True):
        source = FolderSource(str(imagenet), split)
        rows = [
            {"image": {"bytes": source.read(i), "path": f"{i:03}.JPEG"}, "label": int(label)}
            for i, label in enumerate(source.labels)
        ]
        for part in range(2):
            half = rows[part * len(rows) // 2 : (part + 1) * len(rows) // 2]
            table = pa.Table.from_pylist(half, schema)
            path = root / "data" / f"{name}-{part:05}-of-00002-0a1b2c3d4e5f6071.parquet"
            pq.write_table(table, path, row_group_size=2)


def write_text_list(imagenet: Path, root: Path) -> None:
    """As Places has it: a slash before each path, and numbers."""
    for split in SPLITS:
        lines = []
        for path, name, label in files(imagenet, split):
            target = root / "images" / split / f"{name} {path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            lines.append(f"/images/{split}/{name} {path.name} {label}\n")
        (root / f"{split}.txt").write_text("".join(lines))


def write_csv(imagenet: Path, root: Path) -> None:
    for split in SPLITS:
        lines = ["path,label\r\n"]
        for path, name, _ in files(imagenet, split):
            target = root / "all" / f"{split}, {name}, {path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            lines.append(f'"all/{target.name}",{name}\r\n')
        (root / f"{split}.csv").write_text("".join(lines))


def write_zip(imagenet: Path, root: Path) -> None:
    for split in SPLITS:
        pack_images.pack_zip(FolderSource(str(imagenet), split), str(root / f"{split}.zip"))


def write_flat(imagenet: Path, root: Path) -> None:
    """Images without classes, named so that their order is the folder's."""
    for split in SPLITS:
        (root / split).mkdir()
        for path, name, _ in files(imagenet, split):
            shutil.copy(path, root / split / f"{name}-{path.name}")


# what writes a form, and which of FORMS it is
WRITERS = {
    "folder": (copy_folder, "class folders"),
    "packed": (write_packed, "a tar"),
    "tar": (write_tar, "a tar"),
    "shards": (write_shards, "WebDataset shards"),
    "json shards": (write_json_shards, "WebDataset shards"),
    "parquet": (write_parquet, "Parquet"),
    "text list": (write_text_list, "a list"),
    "csv": (write_csv, "a list"),
    "zip": (write_zip, "a zip"),
    "flat": (write_flat, "images without classes"),
}
