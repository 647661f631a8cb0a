"""Sheets of images with captions."""

import os
from dataclasses import dataclass
from functools import lru_cache

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = 200  # pixels, of the longer side of an image
GAP, FRAME, TEXT, LINE = 8, 5, 15, 22  # pixels: between tiles, frames, letters, lines
# told apart by colour-blind readers too (Okabe and Ito)
RIGHT, WRONG, NEUTRAL = (0, 114, 178), (213, 94, 0), (60, 60, 60)

Colour = tuple[int, int, int]


@dataclass
class Tile:
    """An image of the sheet, the text below it, and the colour of its frame, if it has one."""

    image: Image.Image
    caption: str = ""
    frame: Colour | None = None


def fit(image: Image.Image) -> Image.Image:
    """The image with a longer side of ``TILE``."""
    scale = TILE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def draw_sheet(rows: list[list[Tile]], notes: tuple[str, ...] = ()) -> Image.Image:
    """Tiles in rows and columns, each just above its caption, and lines of text at the end."""
    tiles = [tile for row in rows for tile in row]
    border = FRAME if any(tile.frame for tile in tiles) else 0
    width = max(tile.image.width for tile in tiles) + 2 * border
    height = max(tile.image.height for tile in tiles) + 2 * border
    below = LINE if any(tile.caption for tile in tiles) else 0
    columns = max(len(row) for row in rows)
    sheet_width = columns * (width + GAP) + GAP
    lines = [line for note in notes for line in wrap(note, sheet_width - 2 * GAP)]
    sheet_height = len(rows) * (height + below + GAP) + GAP + len(lines) * LINE
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    pen = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            left, top = GAP + c * (width + GAP), GAP + r * (height + below + GAP)
            framed = ImageOps.expand(tile.image, border, tile.frame or "white")
            x, y = left + (width - framed.width) // 2, top + height - framed.height
            sheet.paste(framed, (x, y))
            text = shorten(tile.caption, width)
            middle = (left + width / 2, top + height + LINE / 2)
            pen.text(middle, text, tile.frame or NEUTRAL, font(), anchor="mm")
    for number, line in enumerate(lines):
        y = sheet_height - (len(lines) - number) * LINE
        pen.text((GAP, y), line, NEUTRAL, font())
    return sheet


@lru_cache(maxsize=1)
def font() -> ImageFont.FreeTypeFont:
    """matplotlib's own font, which has the letters of most languages."""
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, TEXT)


def shorten(text: str, width: float) -> str:
    """The text on one line, cut at the end if it is wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, width: float) -> list[str]:
    """The text in lines no wider than ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shorten(line, width) for line in lines]


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values of patches, (h, w) -> pixels of ``size``, smoothly interpolated."""
    patches = Image.fromarray(values.astype(np.float32))
    return np.asarray(patches.resize(size, Image.Resampling.BICUBIC))


def overlay(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """Values of patches, (h, w), from 0 to 1, as colours over the picture in grey."""
    values = resize_map(values, picture.size).clip(0, 1)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    colours = matplotlib.colormaps["inferno"](values)[..., :3]
    # where the value is low, the picture stays visible
    share = 0.45 + 0.4 * values[..., None]
    blended = (1 - share) * grey + share * colours
    return Image.fromarray((255 * blended).round().astype(np.uint8))
