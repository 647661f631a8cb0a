"""The random views of pre-training: drawn first, then applied.

Each view's draws follow from the seed, the epoch, the image and the view alone.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as TF
from yacs.config import CfgNode

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
Box = tuple[float, float, float, float]  # left, top, width and height in pixels


@dataclass(frozen=True)
class Augmentation:
    """The distribution of one view.

    Attributes:
        crop: smallest and largest share of the image's area in a crop.
        brightness, contrast, saturation: factors are drawn from 1 -+ these, not below 0.
        hue: shift drawn from -+ this, in turns of the colour circle.
        jitter_prob, grey_prob, blur_prob, solarize_prob, flip_prob: probabilities.
        sigma: range of the blur's standard deviation in pixels.
        ratio: range of a crop's width over its height.
        solarize_from: values from this one up are inverted.
        interpolation: of the resize, a name of ``INTERPOLATION``.

    Raises:
        ValueError: a range whose ends are the wrong way round.
    """

    crop: tuple[float, float]
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: float = 1.0
    solarize_prob: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    flip_prob: float = 0.5
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    solarize_from: int = 128
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("crop", "sigma", "ratio"):
            span = getattr(self, name)
            if len(span) != 2 or span[0] > span[1]:
                raise ValueError(f"the augmentation's {name} must be two numbers, the smaller first")


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view.

    Attributes:
        box: left, top, width and height of the crop in pixels; whole ones, where an image has its
            own size.
        flip: mirror left and right.
        jitter: (operation, amount) in the order in which they are applied.
        grey: reduce to luminance.
        sigma: standard deviation of the blur in pixels, 0 for none.
        solarize: invert the values from ``solarize_from`` up.
        interpolation: of the resize of the crop.
    """

    box: Box
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    sigma: float
    solarize: bool
    solarize_from: int = 128
    interpolation: str = "bilinear"


def configured_views(aug: CfgNode) -> tuple[Augmentation, Augmentation]:
    """The two views that the section AUG of a configuration says.

    Raises:
        ValueError: see ``view_augmentations`` and ``Augmentation``.
    """
    if aug.SSL_AUG_TYPE != "custom":
        return view_augmentations(aug.SSL_AUG_TYPE, aug.SSL_AUG_CROP)
    return _custom_view(aug.VIEW1), _custom_view(aug.VIEW2)


def _custom_view(keys: CfgNode) -> Augmentation:
    return Augmentation(
        crop=tuple(keys.CROP),
        brightness=keys.BRIGHTNESS,
        contrast=keys.CONTRAST,
        saturation=keys.SATURATION,
        hue=keys.HUE,
        jitter_prob=keys.JITTER,
        grey_prob=keys.GREY,
        blur_prob=keys.BLUR,
        solarize_prob=keys.SOLARIZE,
        sigma=tuple(keys.BLUR_SIGMA),
        flip_prob=keys.FLIP,
        ratio=tuple(keys.RATIO),
        solarize_from=keys.SOLARIZE_FROM,
        interpolation=keys.INTERPOLATION,
    )


def view_augmentations(kind: str, crop: float) -> tuple[Augmentation, Augmentation]:
    """The two views of ``AUG.SSL_AUG_TYPE``: ``byol`` (arXiv 2006.07733, B) or ``simclr``.

    Args:
        kind: name.
        crop: smallest share of the area in a crop; simclr, as published, has 0.2.

    Raises:
        ValueError: another name, or a share outside (0, 1].
    """
    if not 0 < crop <= 1:
        raise ValueError(f"the smallest crop must lie in (0, 1], got {crop}")
    if kind == "byol":
        area = (crop, 1.0)
        return Augmentation(area), Augmentation(area, blur_prob=0.1, solarize_prob=0.2)
    if kind == "simclr":
        view = Augmentation((0.2, 1.0), saturation=0.4, blur_prob=0.5)
        return view, view
    raise ValueError(f"the augmentation must be byol, simclr or custom, got {kind!r}")


def draw_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    area: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random resized crop's left, top, width, height, distributed as torchvision's.

    Args:
        rng: draws from it.
        width, height: of the image in pixels.
        area: smallest and largest share of its area.
        ratio: smallest and largest width over height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # one call for all tries: a call for each number would take as long as the resize
    for share, shape, x, y in rng.random((10, 4)).tolist():
        target = width * height * _between(*area, share)
        drawn = math.exp(_between(low, high, shape))
        w, h = round(math.sqrt(target * drawn)), round(math.sqrt(target / drawn))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    # too long or too tall for its share: the largest middle part of an allowed shape
    w, h = width, height
    if width < ratio[0] * height:
        h = round(width / ratio[0])
    elif width > ratio[1] * height:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def draw_view(
    rng: np.random.Generator, width: int, height: int, augmentation: Augmentation
) -> ViewParameters:
    """Draw the parameters of one view of an image of the given size in pixels."""
    a = augmentation
    box = draw_box(rng, width, height, a.crop, a.ratio)
    flip, jittered, grey, blurred, solarized, sigma, *more = rng.random(14).tolist()
    jitter: list[tuple[str, float]] = []
    if jittered < a.jitter_prob:
        ranges = {
            "brightness": (max(0.0, 1 - a.brightness), 1 + a.brightness),
            "contrast": (max(0.0, 1 - a.contrast), 1 + a.contrast),
            "saturation": (max(0.0, 1 - a.saturation), 1 + a.saturation),
            "hue": (-a.hue, a.hue),
        }
        amounts = zip(more[:4], ranges.items(), more[4:], strict=True)
        # sorted by the first numbers, so that every order is equally likely
        jitter = [(name, _between(*span, u)) for _, (name, span), u in sorted(amounts)]
    return ViewParameters(
        box,
        flip < a.flip_prob,
        tuple(jitter),
        grey < a.grey_prob,
        _between(*a.sigma, sigma) if blurred < a.blur_prob else 0.0,
        solarized < a.solarize_prob,
        a.solarize_from,
        a.interpolation,
    )


def geometry(view: ViewParameters) -> ViewParameters:
    """The crop and the flip of a view alone."""
    return replace(view, jitter=(), grey=False, sigma=0.0, solarize=False)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


_JITTER = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


def resized_crop(image: Image.Image, box: Box, size: int, mode: str = "bilinear") -> Image.Image:
    """Crop left, top, width, height, which may end within pixels, and resize to size x size."""
    left, top, width, height = box
    edges = (left, top, left + width, top + height)
    return image.resize((size, size), INTERPOLATION[mode], edges)


def apply_view(image: Image.Image, view: ViewParameters, size: int) -> np.ndarray:
    """Apply what was drawn to an RGB image with PIL; returns size x size x 3 of uint8."""
    image = resized_crop(image, view.box, size, view.interpolation)
    if view.flip:
        image = TF.hflip(image)
    for name, amount in view.jitter:
        image = _JITTER[name](image, amount)
    if view.grey:
        image = TF.rgb_to_grayscale(image, 3)
    if view.sigma:
        image = image.filter(ImageFilter.GaussianBlur(view.sigma))
    if view.solarize:
        image = TF.solarize(image, view.solarize_from)
    return np.array(image)
