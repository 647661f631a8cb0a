"""Draw what an encoder has learned: attention, components, neighbours or a map of features.

python -m tools.visualize attention --cfg FILE --data-path DATA --output OUT --tag TAG
"""

import argparse
import os
from collections import Counter

import numpy as np
from yacs.config import CfgNode

from data.opening import DataPath, add_dataset_arguments, open_splits, open_train
from data.source import ImageFiles, ImageSource, PartOfSource
from evaluation import pictures
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from utils.arguments import TRAINING, number_in, parse_arguments
from utils.config import run_folder
from utils.distributed import rank
from utils.errors import UserError
from utils.run import run_script, start

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
# pictures, and of how many images each is unless --images says
COUNTS = {"attention": 6, "components": 6, "neighbours": 8, "map": 2000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this tool."""
    parser.add_argument("picture", choices=list(COUNTS), help="what to draw")
    add_pretrained_arguments(parser)
    add_dataset_arguments(parser)
    parser.add_argument(
        "--images", type=number_in(1, 10**9), metavar="N", help="so many validation images"
    )
    parser.add_argument(
        "--files", nargs="+", metavar="PATH", help="these images, or folders of them, instead"
    )
    short = "short side for attention and components (default: twice DATA.IMG_SIZE)"
    parser.add_argument("--size", type=number_in(1, 8192), metavar="PIXELS", help=short)
    parser.add_argument(
        "--foreground", action="store_true", help="components: colour the foreground alone"
    )
    parser.add_argument(
        "--neighbours", type=number_in(1, 50), default=8, metavar="K", help="a query's neighbours"
    )
    parser.add_argument(
        "--method", choices=pictures.LAYOUTS, default=pictures.LAYOUTS[0], help="of the map"
    )


def main() -> None:
    """Images, encoder, picture."""
    args, config = parse_arguments(__doc__, add_arguments, unused=TRAINING)
    run = start(config, os.path.join(run_folder(config), "pictures"))
    place = DataPath.of(config)
    if args.files:
        images: ImageSource = find_images(args.files)
    else:
        _, val = open_splits(place, args.download, labelled=False)
        images = choose(val, args.images or COUNTS[args.picture], config)
    encoder, _ = load_pretrained_encoder(args, config, run)
    subject = pictures.Subject(config, images, encoder, run)
    if args.picture == "attention":
        figure = pictures.draw_attention(subject, args.size)
    elif args.picture == "components":
        figure = pictures.draw_components(subject, args.size, args.foreground)
    elif args.picture == "neighbours":
        train = open_train(place, args.download)
        figure = pictures.draw_neighbours(subject, train, args.neighbours)
    else:
        figure = pictures.draw_features(subject, args.method)
    path = os.path.join(run.folder, f"{args.picture}.png")
    if rank() == 0:
        pictures.save(figure, path)
        run.logger.info("%s written", path)


def find_images(paths: list[str]) -> ImageFiles:
    """The image files ``paths``, and those in the folders among them; labels are -1."""
    names: list[str] = []
    for path in paths:
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
        found = [os.path.join(path, n) for n in inside if n.lower().endswith(ENDINGS)]
        names += found if os.path.isdir(path) else [path]
    if not names:
        raise UserError(f"--files {' '.join(paths)}: no images there")
    return ImageFiles(names, [-1] * len(names))


def choose(source: ImageSource, count: int, config: CfgNode) -> PartOfSource:
    """``count`` of the images, drawn by SEED, equally many of each class."""
    if np.ndim(source.labels) > 1:
        raise UserError(f"{config.DATA.DATASET} has several classes an image: use --files")
    order = np.random.default_rng(config.SEED).permutation(len(source.names))
    seen: Counter[int] = Counter()
    rounds = []
    for index in order:
        rounds.append(seen[source.labels[index]])
        seen[source.labels[index]] += 1
    chosen = order[np.argsort(rounds, kind="stable")][:count]
    return PartOfSource(source, chosen.tolist())


if __name__ == "__main__":
    run_script(main)
