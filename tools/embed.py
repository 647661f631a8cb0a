"""Write the feature of every image of a folder, a list or another form of data.

RUN is a run folder, a file of weights or the name of an encoder. IMAGES is a folder with images at
any depth, a data path as of the other commands (its training images), or a text file with the path
of an image a line. Several processes share the work; started again, the same command goes on.

    python -m tools.embed RUN IMAGES --out features.npz
"""

import argparse
import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.loader import quiet_worker
from data.opening import DataPath, open_train
from data.source import ImageFiles, ImageSource
from evaluation.encoder import load_encoder
from utils.arguments import add_out, command_parser, number_in
from utils.checkpoint import replacing
from utils.distributed import (
    init_process_group,
    local_rank,
    on_first_process,
    on_terminal,
    processors,
    rank,
    wait_for_all,
    world_size,
)
from utils.errors import UserError, reading
from utils.provenance import describe_images, weights_digest
from utils.run import run_script, write_text

ENDINGS = (".npz", ".csv", ".parquet")
PART = 1024  # images whose features are written at once


def main() -> None:
    """Open, encode what is not encoded yet, join."""
    parser = command_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder, file of weights, or encoder")
    parser.add_argument("images", metavar="IMAGES", help="a folder, a data path, or a list")
    add_out(parser, f"the features; its ending says the format: {', '.join(ENDINGS)}")
    parser.add_argument(
        "--key", choices=["encoder", "encoder_k"], default="encoder", help="online or momentum"
    )
    parser.add_argument("--batch-size", type=number_in(1, PART), default=64, help="images at once")
    parser.add_argument(
        "--workers", type=number_in(0, 1024), help="of a process (default: as many as processors)"
    )
    args = parser.parse_args()
    if Path(args.out).suffix not in ENDINGS:
        raise UserError(f"--out {args.out}: the ending must be one of {', '.join(ENDINGS)}")
    device = init_process_group(local_rank(0))
    encoder = load_encoder(args.run, key=args.key).to(device)
    source = open_images(args.images)
    parts = Path(f"{args.out}.parts")
    facts = describe_images(args.images, images=(source.names, source.labels))
    about = {"weights": weights_digest(encoder), "images": facts["digest"]}
    on_first_process(lambda: claim(parts, about | {"transform": repr(encoder.transform)}))
    encode(source, encoder, parts, device, args)
    wait_for_all()
    if rank() == 0:
        unreadable = join(parts, args.out)
        for line in unreadable:
            print(f"left out: {line}")
        print(f"{args.out} written: {len(source.names) - len(unreadable)} images")


def open_images(path: str) -> ImageSource:
    """The images that a path stands for."""
    if os.path.isdir(path):
        return open_train(DataPath(path), labelled=False)
    with reading(path):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    folder = os.path.dirname(path)
    return ImageFiles([os.path.join(folder, line.strip()) for line in lines if line.strip()])


def claim(parts: Path, about: dict[str, Any]) -> None:
    """Begin the folder of parts, or refuse one of other images or of another encoder."""
    path = parts / "about.json"
    with reading(parts, "cannot write the features"):
        parts.mkdir(parents=True, exist_ok=True)
        if path.exists() and json.loads(path.read_text()) != about:
            raise UserError(f"{parts}: of other images or another encoder: remove it to begin anew")
        write_text(str(path), json.dumps(about))


class Views(Dataset):
    """Each image as the encoder takes it, or a line that says why it cannot be read."""

    def __init__(self, source: ImageSource, transform: Any) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str]:
        """Image ``index`` with its number."""
        try:
            return index, self.transform(self.source.read_image(index))
        except UserError as error:
            return index, str(error)


@torch.inference_mode()
def encode(
    source: ImageSource, encoder: Any, parts: Path, device: torch.device, args: argparse.Namespace
) -> None:
    """Write the parts that are not there yet, those of this process."""
    views, count = Views(source, encoder.transform), len(source.names)
    workers = processors() // world_size() if args.workers is None else int(args.workers)
    with tqdm(total=count, desc="images", disable=not on_terminal()) as bar:
        for start in range(rank() * PART, count, world_size() * PART):
            numbers = range(start, min(start + PART, count))
            if not (path := parts / f"{start:012}.npz").exists():
                loader = DataLoader(
                    Subset(views, numbers),
                    batch_size=int(args.batch_size),
                    num_workers=workers,
                    collate_fn=list,
                    worker_init_fn=quiet_worker,
                )
                names, rows, bad = [], [np.zeros((0, encoder.num_features), np.float32)], []
                for batch in loader:
                    read = [(n, view) for n, view in batch if isinstance(view, torch.Tensor)]
                    bad += [said for _, said in batch if isinstance(said, str)]
                    names += [source.names[number] for number, _ in read]
                    if read:
                        images = torch.stack([view for _, view in read]).to(device)
                        rows.append(encoder(images).float().cpu().numpy())
                paths, lines = np.array(names, str), np.array(bad, str)
                with reading(path, "cannot write the features"), replacing(str(path)) as file:
                    np.savez(file, features=np.concatenate(rows), paths=paths, bad=lines)
            bar.update(len(numbers) * world_size())


def join(parts: Path, path: str) -> list[str]:
    """Write all parts into one file, remove them; returns a line for each unreadable image."""
    with reading(path, "cannot write the features"):
        read = [dict(np.load(part)) for part in sorted(parts.glob("*.npz"))]
        paths, features, bad = (
            np.concatenate([part[name] for part in read]) for name in ("paths", "features", "bad")
        )
        with replacing(path) as file:
            if path.endswith(".npz"):
                np.savez(file, paths=paths, features=features)
            elif path.endswith(".csv"):
                text = io.TextIOWrapper(file, encoding="utf-8", newline="")
                rows = csv.writer(text)
                rows.writerow(["path", *(f"f{number}" for number in range(features.shape[1]))])
                rows.writerows([p, *f] for p, f in zip(paths, features.tolist(), strict=True))
                text.detach()
            else:
                import pyarrow as pa  # optional
                from pyarrow import parquet

                table = {"path": pa.array(paths.tolist()), "feature": pa.array(list(features))}
                parquet.write_table(pa.table(table), file)
        shutil.rmtree(parts)
    return bad.tolist()


if __name__ == "__main__":
    run_script(main)
