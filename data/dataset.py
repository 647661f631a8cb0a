"""The data sets that the loaders read."""

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import transforms

from data.augmentation import Augmentation, apply_view, draw_view
from data.source import FolderSource, ZipSource


class TwoViews(Dataset):
    """Two random views of each image, from one decode.

    Items are addressed by (epoch, index), because what is drawn depends on both and workers
    outlive an epoch.

    Args:
        source: the images.
        augmentations: distribution of the first and of the second view.
        size: side of a view in pixels.
        seed: the run's seed.
    """

    def __init__(
        self,
        source: FolderSource | ZipSource,
        augmentations: tuple[Augmentation, Augmentation],
        size: int,
        seed: int,
    ) -> None:
        self.source = source
        self.augmentations = augmentations
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(epoch, index) -> two uint8 images of 3 x size x size."""
        epoch, index = key
        image = self.source.read_image(index)
        views = []
        for number, augmentation in enumerate(self.augmentations):
            rng = np.random.default_rng((self.seed, epoch, index, number))
            drawn = draw_view(rng, *image.size, augmentation)
            views.append(to_tensor(apply_view(image, drawn, self.size)))
        return views[0], views[1]


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
        source: FolderSource | ZipSource,
        size: int,
        interpolation: str = "bicubic",
        crop: bool = True,
    ) -> None:
        self.source = source
        mode = transforms.InterpolationMode(interpolation)
        if crop:
            steps = [transforms.Resize(size + 32, mode), transforms.CenterCrop(size)]
        else:
            steps = [transforms.Resize((size, size), mode)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """A uint8 image of 3 x size x size, and its label."""
        image = self.source.read_image(index)
        return to_tensor(np.asarray(self.transform(image))), self.source.labels[index]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """H x W x 3 of uint8 -> 3 x H x W."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
