"""Draw a small data set in ImageNet's layout: textured shapes whose colours mean nothing.

A class has a shape and a texture. Colours, place, size, tilt, scale of the texture, background and
lighting are drawn anew for each image, alike for all classes.
"""

import argparse
import os

import cv2
import numpy as np

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where train/ and val/ are written")
    parser.add_argument("--train", type=int, default=250, help="training images a class")
    parser.add_argument("--val", type=int, default=100, help="validation images a class")
    parser.add_argument("--size", type=int, default=64, help="mean side of an image in pixels")
    parser.add_argument("--classes", type=int, default=12, help="number of classes, up to 12")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, count in (("train", args.train), ("val", args.val)):
        write_split(os.path.join(args.folder, split), split, count, args)


def write_split(folder: str, split: str, count: int, args: argparse.Namespace) -> None:
    """Write ``count`` JPEGs per class; image i of a class depends on the seed and on i alone."""
    for number, (shape, texture) in enumerate(CLASSES[: args.classes]):
        path = os.path.join(folder, f"{shape}_{texture}")
        os.makedirs(path, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng((args.seed, number, i, split == "val"))
            width, height = rng.integers(int(0.85 * args.size), int(1.3 * args.size), 2)
            image = draw(rng, shape, texture, int(width), int(height))
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
            cv2.imwrite(os.path.join(path, f"{i:05}.jpg"), image, quality)


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
    if shape == "disc":
        return u**2 + v**2 < 0.85**2
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) < 0.75
    if shape == "triangle":
        return (v > -0.6) & (np.abs(u) * 1.732 < 1.25 - v)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return (np.minimum(a, b) < 0.34) & (np.maximum(a, b) < 1.0)
    if shape == "star":
        return np.hypot(u, v) < 0.72 + 0.24 * np.cos(5 * np.arctan2(v, u))
    if shape == "ellipse":
        return (u / 1.1) ** 2 + (v / 0.65) ** 2 < 1
    raise ValueError(f"unknown shape {shape!r}")


def pattern(rng: np.random.Generator, texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The share of the first colour at each point (u, v), 0 or 1."""
    step = rng.uniform(0.42, 0.55)
    a, b = u / step + rng.uniform(0, 1), v / step + rng.uniform(0, 1)
    radius, turn = np.hypot(u, v) / step, np.arctan2(v, u) / (2 * np.pi)
    if texture == "stripes":
        light = a / 1.6 % 1 < 0.5
    elif texture == "checks":
        light = (np.floor(1.3 * a) + np.floor(1.3 * b)) % 2
    elif texture == "eye":
        light = np.hypot(u, v) < 0.7 * step
    elif texture == "rings":
        light = radius % 1 < 0.5
    elif texture == "zigzag":
        light = (0.7 * a + 1.2 * np.abs(0.7 * b % 1 - 0.5)) % 1 < 0.5
    elif texture == "grid":
        light = np.minimum(a % 1, b % 1) < 0.25
    elif texture == "spokes":
        light = 4 * turn % 1 < 0.5
    elif texture == "quarters":
        light = u * v > 0
    elif texture == "bricks":
        light = np.minimum(2 * b % 1, (a + 0.5 * np.floor(2 * b)) % 1 / 0.8) < 0.25
    elif texture == "dartboard":
        light = (np.floor(2 * radius) + np.floor(8 * turn)) % 2
    elif texture == "spiral":
        light = (0.6 * radius + turn) % 1 < 0.5
    elif texture == "halves":
        light = u > 0
    else:
        raise ValueError(f"unknown texture {texture!r}")
    return light.astype(np.float32)


if __name__ == "__main__":
    main()
