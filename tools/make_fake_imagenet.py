"""Draw a small data set in ImageNet's layout: textured shapes whose colours mean nothing.

A class has a shape and a texture. Colours, place, size, tilt, scale of the texture, background and
lighting are drawn anew for each image, alike for all classes.

    python -m tools.make_fake_imagenet FOLDER [--train 250] [--val 100]
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from tools.tiny import drawing_parser, write_image
from utils.run import run_script

CLASSES = (
    ("disc", "stripes"),
    ("square", "checks"),
    ("triangle", "eye"),
    ("cross", "rings"),
    ("star", "zigzag"),
    ("ellipse", "grid"),
    ("disc", "spokes"),
    ("square", "quarters"),
    ("triangle", "bricks"),
    ("cross", "dartboard"),
    ("star", "spiral"),
    ("ellipse", "halves"),
)


def main() -> None:
    """Draw train/ and val/."""
    args = drawing_parser(
        __doc__,
        ("train", 250, "training images a class"),
        ("val", 100, "validation images a class"),
        ("size", 64, "mean side of an image in pixels"),
        ("classes", 12, "number of classes, up to 12"),
    ).parse_args()
    for split, count in (("train", args.train), ("val", args.val)):
        write_split(Path(args.folder, split), split, count, args)


def write_split(folder: Path, split: str, count: int, args: argparse.Namespace) -> None:
    """Write ``count`` JPEGs per class; image i of a class depends on the seed and on i alone."""
    for number, (shape, texture) in enumerate(CLASSES[: args.classes]):
        for i in range(count):
            rng = np.random.default_rng((args.seed, number, i, split == "val"))
            width, height = rng.integers(int(0.85 * args.size), int(1.3 * args.size), 2)
            image = draw(rng, shape, texture, int(width), int(height))
            path = folder / f"{shape}_{texture}" / f"{i:05}.jpg"
            write_image(path, image[..., ::-1], int(rng.integers(70, 96)))


def draw(rng: np.random.Generator, shape: str, texture: str, width: int, height: int) -> np.ndarray:
    """One image, height x width x 3 of uint8."""
    short = min(width, height)
    # a background of smooth patches around one tint
    coarse = tint(rng, rng.uniform(40, 215)) + rng.normal(0, 8, (3, 3, 3))
    image = cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    # coordinates around the object's centre, tilted, in units of its radius
    radius = short * rng.uniform(0.4, 0.5)
    cx, cy = (rng.uniform(0.65 * radius, side - 0.65 * radius) for side in (width, height))
    angle = rng.uniform(-0.5, 0.5)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x - cx) / radius, (y - cy) / radius
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    mask = cv2.GaussianBlur(inside(shape, u, v).astype(np.float32), (0, 0), 0.5)[..., None]
    light = pattern(rng, texture, u, v)[..., None]
    # the texture is darker and lighter, either way round, in two tints
    levels = rng.permutation([rng.uniform(10, 100), rng.uniform(150, 245)])
    first, second = tint(rng, levels[0]), tint(rng, levels[1])
    image = image * (1 - mask) + (first * light + second * (1 - light)) * mask
    # lighting falls off across the image, and the sensor adds noise
    slope = rng.uniform(-0.4, 0.4, 2)
    yy, xx = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image = image * (rng.uniform(0.7, 1.1) + slope[0] * xx + slope[1] * yy)[..., None]
    image += rng.normal(0, rng.uniform(2, 5), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def tint(rng: np.random.Generator, level: float) -> np.ndarray:
    """A colour of about the given brightness, 0 to 255."""
    return level + rng.normal(0, 45, 3)


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points (u, v) lie in the shape; all shapes have about the same area."""
    a, b = np.abs(u), np.abs(v)
    shapes = {
        "disc": lambda: u**2 + v**2 < 0.85**2,
        "square": lambda: np.maximum(a, b) < 0.75,
        "triangle": lambda: (v > -0.6) & (a * 1.732 < 1.25 - v),
        "cross": lambda: (np.minimum(a, b) < 0.34) & (np.maximum(a, b) < 1.0),
        "star": lambda: np.hypot(u, v) < 0.72 + 0.24 * np.cos(5 * np.arctan2(v, u)),
        "ellipse": lambda: (u / 1.1) ** 2 + (v / 0.65) ** 2 < 1,
    }
    return shapes[shape]()


def pattern(rng: np.random.Generator, texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The share of the first colour at each point (u, v), 0 or 1."""
    step = rng.uniform(0.42, 0.55)
    a, b = u / step + rng.uniform(0, 1), v / step + rng.uniform(0, 1)
    radius, turn = np.hypot(u, v) / step, np.arctan2(v, u) / (2 * np.pi)
    patterns = {
        "stripes": lambda: a / 1.6 % 1 < 0.5,
        "checks": lambda: (np.floor(1.3 * a) + np.floor(1.3 * b)) % 2,
        "eye": lambda: np.hypot(u, v) < 0.7 * step,
        "rings": lambda: radius % 1 < 0.5,
        "zigzag": lambda: (0.7 * a + 1.2 * np.abs(0.7 * b % 1 - 0.5)) % 1 < 0.5,
        "grid": lambda: np.minimum(a % 1, b % 1) < 0.25,
        "spokes": lambda: 4 * turn % 1 < 0.5,
        "quarters": lambda: u * v > 0,
        "bricks": lambda: np.minimum(2 * b % 1, (a + 0.5 * np.floor(2 * b)) % 1 / 0.8) < 0.25,
        "dartboard": lambda: (np.floor(2 * radius) + np.floor(8 * turn)) % 2,
        "spiral": lambda: (0.6 * radius + turn) % 1 < 0.5,
        "halves": lambda: u > 0,
    }
    return patterns[texture]().astype(np.float32)


if __name__ == "__main__":
    run_script(main)
