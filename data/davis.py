"""The files of DAVIS 2017 (arXiv 1704.00675): videos, indexed masks, drawings of both."""

import os
import re
from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from data.image import open_image, read_file, read_rgb
from data.listing import HIDDEN, OTHER, check_root, is_hidden, log_left_out, read_lines
from utils.errors import UserError, reading

RESOLUTION = "480p"
MULTIPLE = 64  # pixels; the long side of an encoded frame is a multiple of it
FRAMES = (".jpg", ".jpeg", ".png")
ORIGIN = "https://davischallenge.org/davis2017/code.html"
_NUMBER = re.compile(r"(\d{1,18})", re.ASCII)
VOID = 255  # in a mask: neither an object nor background


@dataclass(frozen=True)
class Video:
    """A video with the mask of each frame.

    Attributes:
        name: as in the list of videos.
        frames: paths of its frames, in the order of their numbers.
        annotations: paths of their masks.
    """

    name: str
    frames: tuple[str, ...]
    annotations: tuple[str, ...]


def read_videos(root: str, split: str = "val") -> list[Video]:
    """The videos that ``ImageSets/2017/<split>.txt`` lists, in ``root`` or in ``<root>/DAVIS``.

    DAVIS/ is what the archive unpacks to.

    Raises:
        UserError: a missing list, video, frame or annotation, or a name that is not plain.
    """
    check_root(root, "the folder of DAVIS 2017")
    place = os.path.join("ImageSets", "2017", f"{split}.txt")
    for top in (root, os.path.join(root, "DAVIS")):
        if os.path.exists(listing := os.path.join(top, place)):
            break
    else:
        raise UserError(
            f"{os.path.join(root, place)}: cannot read the list of videos (no such file, nor one "
            f"in DAVIS/); unpack DAVIS-2017-trainval-{RESOLUTION}.zip of {ORIGIN} there"
        )
    with reading(listing, "cannot read the list of videos"):
        names = [line.strip() for _, line in read_lines(listing)]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{listing}: {'names a video twice' if names else 'lists no video'}")
    left_out: Counter[str] = Counter()
    videos = [_read_video(top, name, listing, left_out) for name in names]
    log_left_out(top, left_out)
    return videos


def _read_video(root: str, name: str, listing: str, left_out: Counter[str]) -> Video:
    if os.path.basename(name) != name or name in (".", ".."):
        raise UserError(f"{listing}: {name!r} is not the name of a video")
    folder, masks = (
        os.path.join(root, kind, RESOLUTION, name) for kind in ("JPEGImages", "Annotations")
    )
    with reading(folder, "cannot read the video"):
        frames = _by_number(folder, FRAMES, left_out)
    if not frames:
        raise UserError(f"{folder}: holds no frames ({', '.join(FRAMES)})")
    with reading(masks, "cannot read the annotations"):
        annotations = _by_number(masks, (".png",), left_out)
    for number, path in frames.items():
        if number not in annotations:
            stem = os.path.splitext(os.path.basename(path))[0]
            missing = os.path.join(masks, f"{stem}.png")
            raise UserError(f"{missing}: the annotation of a frame is missing")
    return Video(name, tuple(frames.values()), tuple(annotations[number] for number in frames))


def _by_number(
    folder: str, extensions: tuple[str, ...], left_out: Counter[str]
) -> dict[tuple[str | int, ...], str]:
    """The files of a folder in the order of the numbers in their names: 9, 10, not 10, 9.

    A key holds the words and numbers of a name: ``frame_09`` and ``frame_9`` have the same.
    """
    numbered: dict[tuple[str | int, ...], str] = {}
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        if is_hidden(name) or extension.lower() not in extensions:
            left_out[HIDDEN if is_hidden(name) else OTHER] += 1
            continue
        parts = _NUMBER.split(stem)  # words in even places, numbers in odd ones
        key = tuple(int(part) if i % 2 else part for i, part in enumerate(parts))
        path = os.path.join(folder, name)
        if key in numbered:
            raise UserError(f"{path}: has the number of {os.path.basename(numbered[key])}")
        numbered[key] = path
    return dict(sorted(numbered.items()))


def read_frame(path: str) -> np.ndarray:
    """A frame, H x W x 3 of uint8 in RGB.

    Raises:
        UserError: a missing or damaged file.
    """
    return np.asarray(read_rgb(path))


def fit_frame(frame: np.ndarray, short_side: int, patch: int = 1) -> np.ndarray:
    """Resize a frame: short side to ``short_side`` pixels, long side down to a multiple of 64.

    In a square frame the height is rounded. The ratio of the sides changes a little. Where the
    patch of the encoder does not divide 64, both sides become multiples of it, so that the grid of
    patches covers the frame, as that of its mask does.

    Args:
        frame: H x W x 3 of uint8.
        short_side: in pixels, at least 64.
        patch: of the encoder in pixels.
    """
    height, width = frame.shape[:2]
    short, long = min(height, width), max(height, width)
    multiple = MULTIPLE
    if MULTIPLE % patch:
        multiple, short_side = patch, short_side // patch * patch
    fitted = short_side * long // (short * multiple) * multiple
    size = (fitted, short_side) if width > height else (short_side, fitted)
    return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)


def read_mask(path: str, shape: tuple[int, int]) -> np.ndarray:
    """The objects of a mask by pixel, H x W of uint8; 0 is background, and so is void.

    Args:
        path: an indexed or grey image.
        shape: height and width that it must have.

    Raises:
        UserError: missing, damaged, of another size or not indexed.
    """
    with reading(path, "cannot read the annotation"):
        image = open_image(read_file(path))
        mode, mask = image.mode, np.array(image)
    if mode not in ("P", "L"):
        raise UserError(f"{path}: an annotation must be indexed or grey, this is {mode}")
    if mask.shape != shape:
        raise UserError(
            f"{path}: the annotation has {mask.shape[1]} x {mask.shape[0]} pixels, its frame "
            f"{shape[1]} x {shape[0]}"
        )
    mask[mask == VOID] = 0
    return mask


def write_mask(path: str, mask: np.ndarray) -> None:
    """Write objects by pixel, H x W of uint8, as a PNG with the palette of DAVIS."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    image.save(path)


def palette() -> np.ndarray:
    """The colours of the objects: PASCAL VOC's colour map, 256 x 3 of uint8.

    Bits 0, 1 and 2 of a number are the highest bits of red, green and blue. Bits 3, 4 and 5 are
    the second highest, and so on.
    """
    bits = (np.arange(256)[:, None] >> np.arange(9)) & 1  # 256x9
    return (bits.reshape(256, 3, 3) * np.array([128, 64, 32])[:, None]).sum(1).astype(np.uint8)


def draw_mask(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Lay the objects of a mask over a frame, half transparent and outlined.

    Args:
        frame: H x W x 3 of uint8.
        mask: H x W of uint8.

    Returns:
        H x W x 3 of uint8.
    """
    colours = palette()[mask]
    drawn = cv2.addWeighted(frame, 0.5, colours, 0.5, 0)
    objects = mask > 0
    edge = objects & (cv2.erode(mask, np.ones((3, 3))) != cv2.dilate(mask, np.ones((3, 3))))
    drawn[edge] = colours[edge]
    return np.where(objects[..., None], drawn, frame)
