"""Features of patches instead of whole images."""

import torch
from torch import nn

from models.timm_backbone import Backbone
from utils.errors import UserError

STRIDE = 16  # pixels


def patch_stride(encoder: Backbone) -> int:
    """Pixels between the patches of ``patch_features``."""
    return encoder.feature_info[_depth(encoder)]["reduction"]


def patch_features(encoder: Backbone, images: torch.Tensor) -> torch.Tensor:
    """The patch features that DINO's video protocol compares.

    A ViT's are its patch tokens after the last LayerNorm; those of a Swin or of a network of
    convolutions are the map of stride 16, because its last has a patch for 32 pixels.

    Args:
        encoder: from ``models.encoder``.
        images: (B, 3, H, W).

    Returns:
        (B, h, w, C), a patch every ``patch_stride`` pixels.

    Raises:
        UserError: a backbone of timm that gives no such map, or none of images of this size.
    """
    depth = _depth(encoder)
    try:
        (features,) = encoder.forward_intermediates(
            images, indices=[depth], norm=True, stop_early=True, intermediates_only=True
        )
    except AssertionError as error:  # how timm's backbones refuse
        raise UserError(
            f"{type(encoder).__name__} gives no patch features of images of "
            f"{images.shape[2]} x {images.shape[3]} pixels ({error})"
        ) from error
    return features.permute(0, 2, 3, 1)


def _depth(encoder: nn.Module) -> int:
    """The deepest block or stage whose patches lie no further apart than ``STRIDE``."""
    infos = getattr(encoder, "feature_info", None) or []
    fitting = [i for i, info in enumerate(infos) if info["reduction"] <= STRIDE]
    if not fitting or not hasattr(encoder, "forward_intermediates"):
        raise UserError(
            f"{type(encoder).__name__} has no features of patches of {STRIDE} pixels or less: "
            "take another backbone for pictures and video"
        )
    return max(fitting)
