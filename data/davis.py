"""The files of DAVIS 2017 (arXiv 1704.00675): videos, indexed masks, drawings of both."""

import os
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from data.image import open_image, read_rgb
from utils.errors import UserError

RESOLUTION = "480p"
MULTIPLE = 64  # pixels; the long side of an encoded frame is a multiple of it
VOID = 255  # in a mask: neither an object nor background


@dataclass(frozen=True)
class Video:
    """A video with the mask of each frame.

    Attributes:
        name: as in the list of videos.
        frames: paths of its JPEGs, in order.
        annotations: paths of their masks.
    """

    name: str
    frames: tuple[str, ...]
    annotations: tuple[str, ...]


def read_videos(root: str, split: str = "val") -> list[Video]:
    """The videos that ``<root>/ImageSets/2017/<split>.txt`` lists.

    Raises:
        UserError: a missing list, video, frame or annotation, or a name that is not plain.
    """
    listing = os.path.join(root, "ImageSets", "2017", f"{split}.txt")
    if not root:
        raise UserError("no data set given: set --data-path to the folder of DAVIS 2017")
    try:
        with open(listing, encoding="utf-8") as file:
            names = file.read().split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{listing}: cannot read the list of videos ({reason})") from error
    if not names or len(set(names)) < len(names):
        raise UserError(f"{listing}: {'names a video twice' if names else 'lists no video'}")
    return [_read_video(root, name, listing) for name in names]


def _read_video(root: str, name: str, listing: str) -> Video:
    if os.path.basename(name) != name or name in (".", ".."):
        raise UserError(f"{listing}: {name!r} is not the name of a video")
    folder, masks = (
        os.path.join(root, kind, RESOLUTION, name) for kind in ("JPEGImages", "Annotations")
    )
    try:
        stems = sorted(file[:-4] for file in os.listdir(folder) if file.endswith(".jpg"))
    except OSError as error:
        raise UserError(f"{folder}: cannot read the video ({error.strerror})") from error
    if not stems:
        raise UserError(f"{folder}: holds no frames (*.jpg)")
    annotations = tuple(os.path.join(masks, f"{stem}.png") for stem in stems)
    for path in annotations:
        if not os.path.exists(path):
            raise UserError(f"{path}: the annotation of a frame is missing")
    return Video(name, tuple(os.path.join(folder, f"{s}.jpg") for s in stems), annotations)


def read_frame(path: str) -> np.ndarray:
    """A frame, H x W x 3 of uint8 in RGB.

    Raises:
        UserError: a missing or damaged file.
    """
    return np.asarray(read_rgb(path))


def fit_frame(frame: np.ndarray, short_side: int) -> np.ndarray:
    """Resize a frame: short side to ``short_side`` pixels, long side down to a multiple of 64.

    In a square frame the height is rounded. The ratio of the sides changes a little.

    Args:
        frame: H x W x 3 of uint8.
        short_side: in pixels, at least 64.
    """
    height, width = frame.shape[:2]
    short, long = min(height, width), max(height, width)
    fitted = short_side * long // (short * MULTIPLE) * MULTIPLE
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
    try:
        with open(path, "rb") as file:
            image = open_image(file.read())
        mode, mask = image.mode, np.array(image)
    except Exception as error:  # a damaged file can raise anything
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read the annotation ({reason})") from error
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
