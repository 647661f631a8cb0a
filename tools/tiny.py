"""What the tools share that draw small data sets."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from utils.arguments import command_parser


def drawing_parser(description: str, *numbers: tuple[str, int, str]) -> argparse.ArgumentParser:
    """A parser with ``folder`` and flags for whole numbers.

    Args:
        description: the tool's docstring.
        numbers: name, default and help of each flag.
    """
    parser = command_parser(description)
    parser.add_argument("folder", help="where it is written: the --data-path of the scripts")
    for name, default, text in (*numbers, ("seed", 0, "of all that is drawn")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    return parser


def write_image(path: Path, image: np.ndarray, quality: int = 95) -> None:
    """Write an image, H x W x 3 of uint8 in RGB, as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
