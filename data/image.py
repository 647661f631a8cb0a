"""Decoding an image file to RGB."""

import io
import warnings

import numpy as np
from PIL import Image

from utils.errors import UserError


def decode_rgb(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file of any mode that PIL reads.

    Grey, palette and CMYK images are converted; 16-bit and float ones are scaled to 8 bits;
    transparency is laid over white.

    Args:
        content: the file.
        name: what to call it in an error.

    Raises:
        UserError: not a readable image.
    """
    try:
        with warnings.catch_warnings():
            # PIL warns of what is handled here (palettes with transparent bytes)
            warnings.simplefilter("ignore", UserWarning)
            image = Image.open(io.BytesIO(content))
            image.load()
            return _to_rgb(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: not a readable image ({reason})") from error


def read_rgb(path: str) -> Image.Image:
    """Read an image file, see ``read_file`` and ``decode_rgb``."""
    return decode_rgb(read_file(path), path)


def read_file(path: str) -> bytes:
    """The bytes of an image file.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read the image ({error.strerror})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
        if top > 1 and values.max(initial=0) <= 255:
            top = 255.0
        grey = np.clip(values * (255 / top), 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")
