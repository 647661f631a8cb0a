"""The data sets that the loaders read."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms
from yacs.config import CfgNode

from data import opencv
from data.augmentation import (
    MEAN,
    STD,
    Augmentation,
    ViewParameters,
    apply_view,
    draw_view,
    geometry,
)
from data.image import decode_rgb
from data.source import ImageSource
from utils.errors import UserError
from utils.seed import seed_libraries


class Views(NamedTuple):
    """Two views of an image of ``TwoViews``, or of each image of a batch.

    Attributes:
        first, second: uint8 of S x S x 3; each tensor of a batch has a dimension before these.
        replaced: -1, or the index of the bad image in whose place another came; an integer, or
            those of a batch as a tensor.
        label: class of the image, likewise.
        draws: of both views, (2, any number), with the back end ``device``, else empty; see
            ``data.device_views``.
    """

    first: torch.Tensor
    second: torch.Tensor
    replaced: Any
    label: Any
    draws: torch.Tensor


Decoded = tuple[Image.Image | np.ndarray, list[ViewParameters]]  # with the views drawn for it


class TwoViews(Dataset):
    """Two random views of each image, from one decode.

    Items are addressed by (epoch, index): the draws follow from both, and workers outlive an
    epoch. Another image replaces a bad one; these two and the seed alone decide which.

    Args:
        source: the images.
        augmentations: distribution of the first and of the second view.
        size: side of a view in pixels.
        seed: the run's seed.
        backend: ``opencv``; or the slower ``pil``, whose operations are the published code's, but
            which crops and resizes in one step; or ``device``, which leaves all but crop and flip
            to ``data.device_views``.
        replacements: how many images are tried in place of a bad one; with 0 it is an error.
    """

    def __init__(
        self,
        source: ImageSource,
        augmentations: tuple[Augmentation, Augmentation],
        size: int,
        seed: int,
        backend: str = "opencv",
        replacements: int = 8,
    ) -> None:
        self.source = source
        self.augmentations = augmentations
        self.size = size
        self.seed = seed
        self.backend = backend
        self.replacements = replacements

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, key: tuple[int, int]) -> Views:
        """(epoch, index) -> the views of the image.

        Raises:
            UserError: neither the image nor its replacements can be read.
        """
        epoch, index = key
        (image, drawn), used = self._decode_or_replace(epoch, index)
        views, draws = [], torch.empty(0)
        if self.backend == "device":
            from data.device_views import pack  # which most runs do not need

            most = max(a.sigma[1] if a.blur_prob else 0 for a in self.augmentations)
            draws = torch.stack([pack(view, most) for view in drawn])
            drawn = [geometry(view) for view in drawn]
        for view in drawn:
            if isinstance(image, Image.Image):
                made = apply_view(image, view, self.size)
            else:
                made = opencv.apply_view(image, view, self.size)
            views.append(torch.from_numpy(np.ascontiguousarray(made)))
        replaced = -1 if used == index else index
        return Views(views[0], views[1], replaced, self.source.labels[used], draws)

    def _decode_or_replace(self, epoch: int, index: int) -> tuple[Decoded, int]:
        def draw(width: int, height: int) -> list[ViewParameters]:
            return [
                draw_view(np.random.default_rng((self.seed, epoch, index, n)), width, height, a)
                for n, a in enumerate(self.augmentations)
            ]

        errors: list[UserError] = []
        for candidate in self._candidates(epoch, index):
            try:
                return self._decode(candidate, draw), candidate
            except UserError as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        raise UserError(
            f"{errors[0]}; nor can the {len(errors) - 1} images be read that were drawn in its "
            "place: see whether the data set is still there"
        )

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        rng = np.random.default_rng((self.seed, epoch, index, len(self.augmentations)))
        yield from rng.integers(len(self), size=self.replacements).tolist()

    def _decode(self, index: int, draw: Callable[[int, int], list[ViewParameters]]) -> Decoded:
        content, name = self.source.read(index), self.source.names[index]
        if self.backend == "pil":
            image = decode_rgb(content, name)
            return image, draw(*image.size)
        return opencv.decode_for_views(content, name, draw, self.size)


class TrainImages(Dataset):
    """One random view of each image with its label, addressed by (epoch, index) as in TwoViews.

    Args:
        source: the images.
        augment: draws a view of an RGB image and returns it as a tensor; its draws follow from
            the seed that comes with the image.
        seed: the run's seed.
    """

    def __init__(
        self,
        source: ImageSource,
        augment: Callable[[Image.Image, tuple[int, ...]], torch.Tensor],
        seed: int,
    ) -> None:
        self.source = source
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """(epoch, index) -> an image of 3 x size x size, and its label."""
        epoch, index = key
        image = self.augment(self.source.read_image(index), (self.seed, epoch, index))
        return image, self.source.labels[index]


class CropAndFlip:
    """Random resized crop and flip: the augmentation of a linear probe (MoBY, section 4).

    Args:
        size: side of the result in pixels.
    """

    DRAWS = Augmentation((0.08, 1.0), jitter_prob=0.0, grey_prob=0.0, blur_prob=0.0)

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image, seed: tuple[int, ...]) -> torch.Tensor:
        """An RGB image -> uint8 of 3 x size x size."""
        drawn = draw_view(np.random.default_rng(seed), *image.size, self.DRAWS)
        return to_tensor(apply_view(image, drawn, self.size))


class RandAugmented:
    """timm's random resized crop, flip, RandAugment and random erasing, for fine-tuning.

    Args:
        size: side of the result in pixels.
        interpolation: bicubic, bilinear or nearest.
        aug: the section AUG of the configuration. COLOR_JITTER, AUTO_AUGMENT, REPROB, REMODE and
            RECOUNT are used.
    """

    def __init__(self, size: int, interpolation: str, aug: CfgNode) -> None:
        jitter: Any = aug.COLOR_JITTER or None  # timm takes None, but its type does not say so
        self.transform = create_transform(
            size,
            is_training=True,
            interpolation=interpolation,
            color_jitter=jitter,
            auto_augment=aug.AUTO_AUGMENT if aug.AUTO_AUGMENT != "none" else None,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            mean=MEAN,
            std=STD,
        )

    def __call__(self, image: Image.Image, seed: tuple[int, ...]) -> torch.Tensor:
        """An RGB image -> float32 of 3 x size x size, normalised."""
        seed_libraries(*seed)
        return self.transform(image)


def resize_and_crop(size: int, interpolation: str, crop: bool) -> list[nn.Module]:
    """The steps from a PIL image to one of ``size`` x ``size``, see ``TestImages``."""
    mode = transforms.InterpolationMode(interpolation)
    if crop:
        return [transforms.Resize(size + 32, mode), transforms.CenterCrop(size)]
    return [transforms.Resize((size, size), mode)]


class TestImages(Dataset):
    """Each image once, resized and cropped in the middle, with its label.

    Args:
        source: the images.
        size: side of the result in pixels.
        interpolation: of the resize: bicubic, bilinear or nearest.
        crop: resize the short side to ``size`` + 32 and crop the middle; else resize to
            ``size`` x ``size``.
    """

    __test__ = False  # not a test case

    def __init__(
        self,
        source: ImageSource,
        size: int,
        interpolation: str = "bicubic",
        crop: bool = True,
    ) -> None:
        self.source = source
        self.transform = transforms.Compose(resize_and_crop(size, interpolation, crop))

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """A uint8 image of 3 x size x size, and its label."""
        image = self.source.read_image(index)
        return to_tensor(np.asarray(self.transform(image))), self.source.labels[index]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """H x W x 3 of uint8 -> 3 x H x W."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
