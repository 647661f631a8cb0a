"""Features that nothing has learned, against which an encoder's are judged.

Each is a module that takes images, (B, 3, H, W) and normalised, and gives features (B, F).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from data.augmentation import MEAN, STD

SIDE = 32  # pixels: larger images would only add noise to the distance of pixels
BINS = 8  # of each channel


class RawPixels(nn.Module):
    """The pixels themselves, of the image shrunk to ``SIDE`` x ``SIDE``; F is 3 x SIDE x SIDE."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3 x SIDE x SIDE)."""
        small = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return small.flatten(1)


class ColourHistogram(nn.Module):
    """The square roots of the shares of the pixels in ``BINS`` x ``BINS`` x ``BINS`` colours.

    The dot product of two is the Bhattacharyya coefficient of the histograms, which is usual for
    comparing them.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, BINS ** 3); their squares sum to 1."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
        levels = ((images * std + mean) * BINS).long().clamp(0, BINS - 1)  # Bx3xHxW
        red, green, blue = levels.flatten(2).unbind(1)  # BxP each
        colours = (red * BINS + green) * BINS + blue
        counts = torch.zeros(len(images), BINS**3, device=images.device)
        counts.scatter_add_(1, colours, torch.ones_like(colours, dtype=counts.dtype))
        return (counts / colours.shape[1]).sqrt()


BASELINES: dict[str, Callable[[], nn.Module]] = {
    "raw_pixels": RawPixels,
    "colour_histogram": ColourHistogram,
}
