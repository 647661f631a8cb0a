"""Decoding an image file to RGB, and refusing files that are not images."""

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from utils.errors import UserError, reading

# judged by content, not by file name; for some of the other formats PIL runs programs
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
if "avif" in features.modules and features.check("avif"):  # Pillow has it from 11.3 on
    FORMATS = (*FORMATS, "AVIF")
MAX_ASPECT = 100  # long side over short side
MAX_BYTES = 2**30  # of a file


def open_image(content: bytes) -> Image.Image:
    """Read the head of an image file, not yet its pixels.

    Args:
        content: the file.

    Raises:
        ValueError: a side is over ``MAX_ASPECT`` times the other: a view would show one colour, and
            a resize of the short side would fill the memory.
        Image.DecompressionBombWarning: more pixels than ``Image.MAX_IMAGE_PIXELS``, 89 million.
        Exception: whatever PIL raises for a file that is not an image of ``FORMATS``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if not usual_size(*image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
    return image


def usual_size(width: int, height: int) -> bool:
    """Whether an image of this size is neither empty, nor far too thin, nor far too large."""
    sides = 0 < max(width, height) <= MAX_ASPECT * min(width, height)
    return sides and width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)


def decode_rgb(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file of any mode and any of ``FORMATS``.

    Grey, palette, CMYK and YCCK images are converted; transparency is laid over white; of an
    animation the first frame counts. Integers of 16 and 32 bits are scaled by 65535, floats by 1
    if none is larger, else by 255; an image with a value beyond these is refused. The orientation
    of EXIF is left alone, as by torchvision's ``ImageFolder``.

    Args:
        content: the file.
        name: what to call it in an error.

    Raises:
        UserError: not a readable image, or one that ``open_image`` refuses.
    """
    with _unreadable(name):
        image = open_image(content)
        image.load()
        return _to_rgb(image)


def check_head(content: bytes, name: str) -> None:
    """Decode only the head of an image file, see ``open_image``.

    Raises:
        UserError: as ``decode_rgb``, but damaged pixels go unnoticed.
    """
    with _unreadable(name):
        open_image(content)


@contextlib.contextmanager
def _unreadable(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # PIL warns of what is handled here (palettes with transparent bytes)
            warnings.simplefilter("ignore", UserWarning)
            yield
    except Exception as error:  # a damaged file can raise anything
        # PIL names a buffer by its address
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if unknown else str(error) or type(error).__name__
        raise UserError(f"{name}: not a readable image ({reason})") from error


def read_rgb(path: str) -> Image.Image:
    """Read an image file, see ``read_file`` and ``decode_rgb``."""
    return decode_rgb(read_file(path), path)


def read_file(path: str) -> bytes:
    """The bytes of an image file.

    Raises:
        UserError: a file that cannot be read, is no regular one, or is larger than ``MAX_BYTES``.
    """
    with reading(path, "cannot read the image"), open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a readable image (no regular file)")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{path}: not a readable image (the file is too large)")
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe would be waited for


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        top = 65535 if image.mode != "F" else 1 if high <= 1 else 255
        if not 0 <= low <= high <= top:  # one such value would make the others black; or NaN
            raise ValueError(f"its values, from {low:g} to {high:g}, are not in 0 to {top}")
        grey = (values.astype(np.float32) * (255 / top)).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")
