"""Draw what an encoder has learned: attention, components, neighbours or a map of features.

Run as ``python -m tools.visualize attention --cfg ...`` from the root of the repository.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from yacs.config import CfgNode

from data.dataset import to_tensor
from data.loader import normalize
from data.source import ImageSource, PartOfSource, add_dataset_arguments, build_source
from data.transfer_readers import ImageFiles
from evaluation.features import encode_images
from models.patch_features import class_attention, patch_features
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from tools.feature_map import METHODS, draw_map, draw_pictures
from tools.sheet import NEUTRAL, RIGHT, WRONG, Tile, draw_sheet, fit, overlay, resize_map
from utils.arguments import number_in, parse_arguments
from utils.config import run_folder
from utils.distributed import rank
from utils.errors import UserError
from utils.run import Run, run_script, start

WIDEST = 4  # times the short side, beyond which an image is made smaller
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this tool."""
    parser.add_argument("picture", choices=list(COUNTS))
    add_pretrained_arguments(parser)
    add_dataset_arguments(parser)
    parser.add_argument(
        "--images", type=number_in(1, 10**9), metavar="N", help="so many validation images"
    )
    parser.add_argument(
        "--files", nargs="+", metavar="PATH", help="these images, or folders of them, instead"
    )
    parser.add_argument(
        "--size",
        type=number_in(1, 8192),
        metavar="PIXELS",
        help="short side for attention and components (default: twice DATA.IMG_SIZE)",
    )
    parser.add_argument(
        "--foreground", action="store_true", help="components: colour the foreground alone"
    )
    parser.add_argument(
        "--neighbours", type=number_in(1, 50), default=8, metavar="K", help="a query's neighbours"
    )
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="of the map")


@dataclass(frozen=True)
class Subject:
    """What a picture is of.

    Attributes:
        config: sizes of images, the data set, the seed.
        images: those that are drawn.
        encoder: in eval mode, on the device of ``run``.
        run: device and precision.
    """

    config: CfgNode
    images: ImageSource
    encoder: nn.Module
    run: Run


def main() -> None:
    """Images, encoder, picture."""
    args, config = parse_arguments(__doc__.splitlines()[0], add_arguments)
    run = start(config, os.path.join(run_folder(config), "pictures"))
    if args.files:
        images: ImageSource = find_images(args.files)
    else:
        images = choose(
            build_source(config, "val", args.download), args.images or COUNTS[args.picture], config
        )
    encoder, _ = load_pretrained_encoder(args, config, run)
    subject = Subject(config, images, encoder, run)
    if args.picture == "attention":
        picture = draw_attention(subject, args.size)
    elif args.picture == "components":
        picture = draw_components(subject, args.size, args.foreground)
    elif args.picture == "neighbours":
        train = build_source(config, "train", args.download)
        picture = draw_neighbours(subject, train, args.neighbours)
    else:
        picture = draw_features(subject, args.method)
    path = os.path.join(run.folder, f"{args.picture}.png")
    if rank() == 0:
        picture.save(path)
        run.logger.info("%s written, %d x %d pixels", path, *picture.size)


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


def caption(images: ImageSource, index: int) -> str:
    """The class of an image, or the name of its file."""
    if has_classes(images):
        return images.classes[images.labels[index]]
    return os.path.basename(images.names[index])


def has_classes(images: ImageSource) -> bool:
    """Whether images are told apart by their classes; a single class tells nothing."""
    return len(images.classes) > 1 and bool((images.labels >= 0).all())


def resized(image: Image.Image, size: int, encoder: nn.Module) -> Image.Image:
    """The image with a short side of about ``size`` and whole patches on both sides."""
    infos = getattr(encoder, "feature_info", None) or [{"reduction": 32}]
    patch = infos[-1]["reduction"]
    scale = min(size / min(image.size), WIDEST * size / max(image.size))
    sides = [max(patch, round(side * scale / patch) * patch) for side in image.size]
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)


@torch.inference_mode()
def of_patches(
    function: Callable[..., torch.Tensor], subject: Subject, size: int | None
) -> list[torch.Tensor]:
    """``function(encoder, image)`` of each image by itself, since their sizes differ."""
    size = size or 2 * subject.config.DATA.IMG_SIZE
    images, encoder, run = subject.images, subject.encoder, subject.run
    found = []
    for index in range(len(images.names)):
        pixels = np.asarray(resized(images.read_image(index), size, encoder))
        with run.precision.autocast():
            values = function(encoder, normalize(to_tensor(pixels)[None].to(run.device)))
        found.append(values[0].float().cpu())
    return found


def draw_attention(subject: Subject, size: int | None = None) -> Image.Image:
    """For each image the attention of the class token: the mean of the heads, then each head.

    Args:
        subject: of an encoder with a class token.
        size: short side in pixels at which images are encoded; default: twice DATA.IMG_SIZE.
    """
    rows = []
    for index, heads in enumerate(of_patches(class_attention, subject, size)):
        picture = fit(subject.images.read_image(index))
        tiles = [Tile(picture, caption(subject.images, index))]
        named = {"mean": heads.mean(0), **{f"head {i}": head for i, head in enumerate(heads, 1)}}
        tiles += [Tile(overlay(picture, scaled(values)), name) for name, values in named.items()]
        lines = -(-len(tiles) // 8)  # no more than 8 side by side
        width = -(-len(tiles) // lines)
        rows += [tiles[i : i + width] for i in range(0, len(tiles), width)]
    note = "Attention of the class token in the last block, dark to bright, each on its own scale."
    return draw_sheet(rows, (note,))


def draw_similarity(subject: Subject, size: int | None = None) -> Image.Image:
    """Each image beside the cosine similarity of its patches to their mean.

    It is for encoders that average their patches, and have no class token.

    Args:
        subject: of an encoder with patch features.
        size: short side in pixels at which images are encoded; default: twice DATA.IMG_SIZE.
    """
    tiles = []
    for index, patches in enumerate(of_patches(patch_features, subject, size)):  # hxwxC each
        values = F.cosine_similarity(patches, patches.mean((0, 1)), dim=2)
        picture = fit(subject.images.read_image(index))
        tiles.append(Tile(picture, caption(subject.images, index)))
        tiles.append(Tile(overlay(picture, scaled(values))))
    rows = [tiles[i : i + 6] for i in range(0, len(tiles), 6)]
    note = "Similarity of each patch to the mean of all, dark to bright, each on its own scale."
    return draw_sheet(rows, (note,))


def scaled(values: torch.Tensor) -> np.ndarray:
    """Values from their least, 0, to their greatest, 1."""
    low, high = values.min(), values.max()
    return ((values - low) / (high - low).clamp(min=1e-12)).numpy()


def draw_components(
    subject: Subject, size: int | None = None, foreground: bool = False
) -> Image.Image:
    """Each image beside its patches coloured by the first three principal components.

    Args:
        subject: of an encoder with patch features.
        size: short side in pixels at which images are encoded; default: twice DATA.IMG_SIZE.
        foreground: colour the foreground alone, see ``principal_colours``.
    """
    images = subject.images
    coloured = principal_colours(of_patches(patch_features, subject, size), foreground)
    tiles = []
    for index, colours in enumerate(coloured):
        picture = fit(images.read_image(index))
        planes = [resize_map(plane, picture.size) for plane in np.moveaxis(colours, 2, 0)]
        pixels = (255 * np.stack(planes, 2)).clip(0, 255).round().astype(np.uint8)
        tiles.append((Tile(picture, caption(images, index)), Tile(Image.fromarray(pixels))))
    across = min(4, max(1, round(len(tiles) ** 0.5)))  # pairs side by side
    groups = [tiles[i : i + across] for i in range(0, len(tiles), across)]
    rows = [[tile for pair in group for tile in pair] for group in groups]
    note = "First three principal components of the patch features of all images: red, green, blue."
    return draw_sheet(rows, (note,))


def principal_colours(features: list[torch.Tensor], foreground: bool = False) -> list[np.ndarray]:
    """The first three principal components of all patches together, scaled to colours.

    Args:
        features: (h, w, C) for each image.
        foreground: split the patches by the first component, leave the side with more of the
            images' borders white, and colour the rest by its own components.

    Returns:
        (h, w, 3) for each image, from 0 to 1.
    """
    rows = torch.cat([f.flatten(0, 1) for f in features]).double()  # PxC
    keep = torch.ones(len(rows), dtype=torch.bool)
    if foreground:
        first = principal_components(rows, 1)[:, 0]
        border = torch.cat([_border(f.shape[:2]).flatten() for f in features])
        side = first > 0
        keep = side if side[border].float().mean() < 0.5 else ~side
    scores = principal_components(rows[keep], 3)
    # the farthest patches would leave little contrast to the others
    low, high = (torch.quantile(scores, q, dim=0) for q in (0.02, 0.98))
    colours = torch.ones(len(rows), 3, dtype=torch.float64)
    colours[keep] = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    parts = colours.split([f.shape[0] * f.shape[1] for f in features])
    return [p.view(*f.shape[:2], 3).numpy() for p, f in zip(parts, features, strict=True)]


def principal_components(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(P, C) -> coordinates on the ``count`` directions of most variance, (P, count)."""
    centered = rows - rows.mean(0)
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -count:].flip(1)
    # a direction's sign is arbitrary: its largest entry is made positive
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return centered @ (directions * largest.sign())


def _border(grid: tuple[int, ...]) -> torch.Tensor:
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def draw_neighbours(subject: Subject, train: ImageSource, count: int = 8) -> Image.Image:
    """A row for each image: it, then its nearest training images with their similarities.

    Args:
        subject: the queries, and what encodes them.
        train: among which neighbours are sought.
        count: neighbours of a query.

    Raises:
        UserError: training images of several classes each.
    """
    config, images, encoder, run = subject.config, subject.images, subject.encoder, subject.run
    if np.ndim(train.labels) > 1:
        raise UserError(f"{config.DATA.DATASET} has several classes an image, neighbours need one")
    keys, _ = encode_images(config, encoder, train, run, normalize=True)
    queries, _ = encode_images(config, encoder, images, run, normalize=True)
    best, nearest = (queries @ keys.T).topk(min(count, len(keys)), dim=1)
    known = has_classes(images) and has_classes(train)
    rows = []
    for index in range(len(images.names)):
        own = caption(images, index)
        found = zip(best[index].tolist(), nearest[index].tolist(), strict=True)
        row = [Tile(fit(images.read_image(index)), own, NEUTRAL)]
        rows.append(row + neighbour_tiles(train, found, own if known else None))
    note = "Left the query, then the nearest training images with their cosine similarity."
    return draw_sheet(rows, (note,))


def neighbour_tiles(
    train: ImageSource, found: Iterable[tuple[float, int]], own: str | None
) -> list[Tile]:
    """The neighbours of a query, each with its similarity and class.

    Args:
        train: the training images.
        found: cosine similarity and number of each.
        own: the query's class, which is right; None if nothing is right or wrong.
    """
    tiles = []
    for similarity, key in found:
        name = caption(train, key)
        mark, colour = ("✓", RIGHT) if name == own else ("✗", WRONG)
        if own is None:
            mark, colour = "", NEUTRAL
        tiles.append(Tile(fit(train.read_image(key)), f"{mark} {similarity:.2f} {name}", colour))
    return tiles


def draw_features(subject: Subject, method: str = METHODS[0]) -> Image.Image:
    """The features of the images in the plane, whose layout ``method`` makes.

    They are points coloured by class, or the images themselves where there are no classes.
    """
    config, images = subject.config, subject.images
    features, labels = encode_images(config, subject.encoder, images, subject.run, normalize=True)
    if has_classes(images):
        return draw_map(features.numpy(), labels.numpy(), images.classes, method, config.SEED)
    pictures = [images.read_image(index) for index in range(len(images.names))]
    return draw_pictures(features.numpy(), pictures, method, config.SEED)


# pictures, and of how many images each is unless --images says
COUNTS = {"attention": 6, "components": 6, "neighbours": 8, "map": 2000}

if __name__ == "__main__":
    run_script(main)
