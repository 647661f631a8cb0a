"""Turn folders of images into train/ and val/: each folder becomes a class.

With --one-class all images, however they lie, become one class, for pre-training alone.

    python -m tools.split_images PHOTOS DATA [--val-share 0.1]
"""

import os
import shutil
from collections import Counter

import numpy as np

from data.image import read_rgb
from data.listing import is_hidden, list_images, log_left_out
from utils.arguments import command_parser
from utils.errors import UserError, reading
from utils.run import run_script


def main() -> None:
    """Check every image, shuffle each class, and copy."""
    parser = command_parser(__doc__)
    parser.add_argument("source", help="a folder of folders of images, of any depth")
    parser.add_argument("folder", help="where train/ and val/ are written")
    parser.add_argument("--val-share", type=float, default=0.1, help="share of a class in val/")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--one-class", action="store_true", help="all images are of one class, however they lie"
    )
    args = parser.parse_args()
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share must lie between 0 and 1, got {args.val_share}")
    for split in ("train", "val"):
        if os.path.isdir(there := os.path.join(args.folder, split)) and os.listdir(there):
            raise UserError(f"{there}: it has images already: choose another folder, or remove it")
    with reading(args.source):
        tops = {name: os.path.join(args.source, name) for name in sorted(os.listdir(args.source))}
    folders = {n: top for n, top in tops.items() if os.path.isdir(top) and not is_hidden(n)}
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for name, top in ({"images": args.source} if args.one_class else folders).items():
        images = [path for path in sorted(list_images(top, left_out)) if readable(path)]
        if len(images) < 2:
            print(f"left out: {top}: {len(images)} readable images, a class needs two")
            continue
        # by name, not by position: a class keeps its split when others come or go
        seed = (args.seed, *os.fsencode(name))
        order = np.random.default_rng(seed).permutation(len(images))
        val = min(max(1, round(args.val_share * len(images))), len(images) - 1)
        taken: set[str] = set()
        for position, index in enumerate(order):
            split = "val" if position < val else "train"
            flat = os.path.relpath(images[index], top).replace(os.sep, "__")
            if flat in taken:
                raise UserError(f"{images[index]}: another image became {flat} too: rename one")
            taken.add(flat)
            target = os.path.join(args.folder, split, name)
            with reading(target, "cannot write the images"):
                os.makedirs(target, exist_ok=True)
                shutil.copyfile(images[index], os.path.join(target, flat))
            counts[split] += 1
    log_left_out(args.source, left_out)
    if not counts["train"]:
        raise UserError(f"{args.source}: no class with at least two readable images")
    print(f"{counts['train']} training and {counts['val']} validation images in {args.folder}")


def readable(path: str) -> bool:
    """Whether the image can be decoded; says so if not."""
    try:
        read_rgb(path)
    except UserError as error:
        print(f"left out: {error}")
        return False
    return True


if __name__ == "__main__":
    run_script(main)
