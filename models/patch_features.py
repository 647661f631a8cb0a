"""Features of patches instead of whole images."""

import torch
from torch import nn

STRIDE = 16  # pixels


def patch_stride(encoder: nn.Module) -> int:
    """Pixels between the patches of ``patch_features``."""
    return encoder.feature_info[_depth(encoder)]["reduction"]


def patch_features(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The patch features that DINO's video protocol compares, of any encoder of this project.

    A ViT's are its patch tokens after the last LayerNorm; a Swin's those of the stage of stride
    16, because its last has a patch for 32 pixels.

    Args:
        encoder: from ``models.encoder``.
        images: (B, 3, H, W).

    Returns:
        (B, h, w, C), a patch every ``patch_stride`` pixels.
    """
    (features,) = encoder.forward_intermediates(
        images, indices=[_depth(encoder)], norm=True, stop_early=True, intermediates_only=True
    )
    return features.permute(0, 2, 3, 1)


def _depth(encoder: nn.Module) -> int:
    """The deepest block or stage whose patches lie no further apart than ``STRIDE``."""
    strides = [info["reduction"] for info in encoder.feature_info]
    return max(i for i, stride in enumerate(strides) if stride <= STRIDE)
