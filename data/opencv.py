"""The views of pre-training by OpenCV: the same draws as with PIL, applied several times faster.

Brightness, contrast and solarisation are tables of 256 values, saturation is a 3 x 3 matrix. Each
operation stays within 2/255 of torchvision's on photographs, in the mean over the pixels.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from data.augmentation import ViewParameters
from data.image import decode_rgb, open_image

# its threads would compete with the other workers and processes
cv2.setNumThreads(0)

LEVELS = np.arange(256, dtype=np.float32)
# Rec. 601, as PIL and torchvision turn colours to grey
GREY = np.array([[0.299, 0.587, 0.114]], dtype=np.float32)


def decode_array(content: bytes, name: str) -> np.ndarray:
    """Decode an image file to H x W x 3 of uint8; see ``decode_rgb``.

    OpenCV decodes the JPEGs that it and PIL read alike, PIL everything else.
    """
    if content[:2] == b"\xff\xd8" and _plain_jpeg(content):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if image is not None and content.rstrip(b"\0")[-2:] == b"\xff\xd9":
            return image
    # also a truncated JPEG, which OpenCV would fill with grey: PIL says what is wrong
    return np.array(decode_rgb(content, name))  # a copy, which may be written to


def _plain_jpeg(content: bytes) -> bool:
    try:
        with open_image(content) as image:
            return image.format == "JPEG" and image.mode in ("RGB", "L")
    except Exception:  # decode_rgb will name it
        return False


def apply_view(image: np.ndarray, view: ViewParameters, size: int) -> np.ndarray:
    """Apply what was drawn to H x W x 3 of uint8; returns size x size x 3."""
    image = resized_crop(image, view.box, size)
    if view.flip:
        image = cv2.flip(image, 1)
    for name, amount in view.jitter:
        image = JITTER[name](image, amount)
    if view.grey:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if view.sigma:
        image = blur(image, view.sigma)
    if view.solarize:
        image = cv2.LUT(image, SOLARIZE)
    return image


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Crop left, top, width, height, and resize to size x size, antialiased as PIL does it.

    By torch: OpenCV has no such filter, and its mean over an area takes twice the time.
    """
    left, top, width, height = box
    crop = torch.from_numpy(image[top : top + height, left : left + width])
    planes = crop.permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    # torch keeps the planes apart, OpenCV the colours of a pixel together
    return cv2.merge(list(resized[0].contiguous().numpy()))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply."""
    return cv2.LUT(image, _table(LEVELS * factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Move away from the mean grey of the image, or towards it."""
    mean = np.dot(GREY[0], cv2.mean(image)[:3])
    return cv2.LUT(image, _table(LEVELS * factor + round(float(mean)) * (1 - factor)))


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


def _table(levels: np.ndarray) -> np.ndarray:
    return np.clip(levels, 0, 255).astype(np.uint8)


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
SOLARIZE = _table(np.where(LEVELS < 128, LEVELS, 255 - LEVELS))
