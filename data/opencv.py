"""The views of pre-training by OpenCV: the same draws as with PIL, applied several times faster.

Brightness and contrast scale and shift, saturation is a 3 x 3 matrix, solarisation a table. On
photographs each operation stays within 2/255 of torchvision's, averaged over the pixels.
"""

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import augmentation
from data.augmentation import Box, ViewParameters
from data.image import decode_rgb, usual_size

# its threads would compete with the other workers and processes
cv2.setNumThreads(0)

# Rec. 601, with which PIL and torchvision turn colours to grey
GREY = np.array([[0.299, 0.587, 0.114]], dtype=np.float32)
TRUNCATE = -0.49  # OpenCV rounds where PIL truncates


# libjpeg decodes at these scales by leaving out the finest frequencies; it pays for an image of more
# pixels than this, while a smaller one loses as much by the slower resize of parts of pixels
SCALES = {
    1: cv2.IMREAD_COLOR_RGB,
    # the name of the flag for the scale alone says grey
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}
LARGE = 1_500_000
# the smallest crop, as a multiple of its view: from here on, the mean difference to the view of the
# whole image stays below 2/255 on photographs
FINER = 1.5


def decode_array(content: bytes, name: str, scale: int = 1) -> np.ndarray:
    """Decode an image file to H x W x 3 of uint8; see ``decode_rgb``.

    OpenCV decodes the JPEGs that both read alike. PIL decodes everything else.

    Args:
        content: of the file.
        name: for errors.
        scale: of SCALES; one over it is the size of the result. For what ``jpeg_size`` knows.
    """
    if jpeg_size(content):
        flags = SCALES[scale] | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if image is not None and content.rstrip(b"\0")[-2:] == b"\xff\xd9":
            return image
    # truncated JPEGs too: OpenCV would fill them with grey, PIL says what is wrong
    return np.array(decode_rgb(content, name))  # a copy, which is writable


def decode_for_views(
    content: bytes, name: str, draw: Callable[[int, int], list[ViewParameters]], size: int
) -> tuple[np.ndarray, list[ViewParameters]]:
    """Decode an image and draw its views; a large JPEG only as finely as they need.

    Args:
        content: of the file.
        name: for errors.
        draw: the views of an image, from its width and height in pixels.
        size: side of a view in pixels.

    Returns:
        H x W x 3 of uint8, and the views, whose boxes are in its pixels or parts of them.
    """
    width, height = jpeg_size(content) or (0, 0)
    if width * height <= LARGE:
        image = decode_array(content, name)
        return image, draw(image.shape[1], image.shape[0])
    views = draw(width, height)
    smallest = min(side for view in views for side in view.box[2:])
    scale = max((s for s in SCALES if FINER * s * size <= smallest), default=1)
    image = decode_array(content, name, scale)
    if image.shape[1] == width:  # by PIL, whatever the scale
        return image, views
    return image, [replace(view, box=_scaled(view.box, scale)) for view in views]


def _scaled(box: Box, scale: int) -> Box:
    left, top, width, height = box
    return left / scale, top / scale, width / scale, height / scale


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that OpenCV decodes as PIL does; None for any other file.

    Its header says 8 bits, grey or three colours, and a size that ``open_image`` takes. PIL takes
    far longer to tell.
    """
    if content[:2] != b"\xff\xd8":
        return None
    at = 2
    while content[at : at + 1] == b"\xff" and at + 9 < len(content):
        marker = content[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame's header
            height, width = (int.from_bytes(content[i : i + 2], "big") for i in (at + 5, at + 7))
            plain = content[at + 4] == 8 and content[at + 9] in (1, 3)
            return (width, height) if plain and usual_size(width, height) else None
        # a marker of the header is followed by the length of its segment; 0xFF is padding
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        at += 1 if marker == 0xFF else 2 + length
    return None


def apply_view(image: np.ndarray, view: ViewParameters, size: int) -> np.ndarray:
    """Apply what was drawn to H x W x 3 of uint8; returns size x size x 3."""
    image = resized_crop(image, view.box, size, view.interpolation)
    if view.flip:
        image = cv2.flip(image, 1)
    for name, amount in view.jitter:
        image = JITTER[name](image, amount)
    if view.grey:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if view.sigma:
        image = blur(image, view.sigma)
    if view.solarize:
        image = solarize(image, view.solarize_from)
    return image


def resized_crop(
    image: np.ndarray, box: Box, size: int, mode: str = "bilinear"
) -> np.ndarray:
    """Crop left, top, width, height, and resize to size x size, antialiased as PIL does it.

    torch does this: OpenCV has no such filter, and its mean over an area takes twice the time. PIL
    does it where the box ends within pixels.
    """
    if not all(float(side).is_integer() for side in box):
        return np.asarray(augmentation.resized_crop(Image.fromarray(image), box, size, mode))
    left, top, width, height = map(int, box)
    crop = torch.from_numpy(image[top : top + height, left : left + width])
    # with the batch's dimension added first, torch sees channels last, its fastest case
    planes = crop[None].permute(0, 3, 1, 2)
    mode = {"nearest": "nearest-exact"}.get(mode, mode)  # whose pixels are PIL's
    smooth = mode in ("bilinear", "bicubic")
    resized = F.interpolate(planes, size=(size, size), mode=mode, antialias=smooth)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=TRUNCATE)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Move away from the mean grey of the image, or towards it."""
    mean = np.dot(GREY[0], cv2.mean(image)[:3])
    shift = round(float(mean)) * (1 - factor)
    return cv2.addWeighted(image, factor, image, 0, shift + TRUNCATE)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Move away from each pixel's grey, or towards it."""
    matrix = np.eye(3, dtype=np.float32) * factor + GREY * (1 - factor)
    return cv2.transform(image, matrix)


def hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Turn the colour circle by a share of a whole turn."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turns * 255) % 256)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of ``sigma`` pixels."""
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(2.5 * sigma)) + 1, sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel)


def solarize(image: np.ndarray, start: int) -> np.ndarray:
    """Invert the values from ``start`` up."""
    return cv2.LUT(image, np.where(LEVELS < start, LEVELS, 255 - LEVELS))


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
LEVELS = np.arange(256, dtype=np.uint8)
