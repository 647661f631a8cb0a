"""What lies inside an encoder: features of patches, and class tokens of several blocks."""

from typing import Any, NamedTuple, TypeGuard

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.encoder import Backbone
from utils.errors import UserError

STRIDE = 16  # pixels


def patch_features(encoder: Backbone, images: torch.Tensor) -> torch.Tensor:
    """The patch features that DINO's video protocol compares.

    For a ViT they are its patch tokens after the last LayerNorm. For a Swin or a network of
    convolutions they are the map of stride 16, because the last map has a patch for 32 pixels.

    Args:
        encoder: from ``models.encoder``.
        images: (B, 3, H, W).

    Returns:
        (B, h, w, C), a patch every ``STRIDE`` pixels, or a ViT's own.

    Raises:
        UserError: a backbone of timm that gives no such map, or none for images of this size.
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


def patch_stride(encoder: Backbone) -> int:
    """Pixels from one patch of ``patch_features`` to the next."""
    return encoder.feature_info[_depth(encoder)]["reduction"]


def _depth(encoder: nn.Module) -> int:
    """The deepest block or stage whose patches are at most ``STRIDE`` apart."""
    infos = getattr(encoder, "feature_info", None) or []
    fitting = [i for i, info in enumerate(infos) if info["reduction"] <= STRIDE]
    if not fitting or not hasattr(encoder, "forward_intermediates"):
        raise UserError(
            f"{type(encoder).__name__} has no features of patches of {STRIDE} pixels or less: "
            "take another backbone for pictures and video"
        )
    return max(fitting)


def has_class_token(encoder: nn.Module) -> TypeGuard[VisionTransformer]:
    """Whether it is a ViT, of this project or of timm, with a class token."""
    return isinstance(encoder, VisionTransformer) and encoder.cls_token is not None


class ClassTokens(NamedTuple):
    """A feature that joins the class tokens of a ViT's last blocks, each after the last LayerNorm.

    Source: DINO (arXiv 2104.14294), its linear evaluation.

    Attributes:
        blocks: how many of the last blocks.
        patches: whether the mean of the last block's patch tokens follows.
    """

    blocks: int
    patches: bool = False

    def width(self, encoder: Backbone) -> int:
        """F, for an encoder whose own feature is its class token."""
        return encoder.num_features * (self.blocks + self.patches)

    def check(self, encoder: VisionTransformer) -> None:
        """Refuse an encoder with fewer blocks.

        Raises:
            UserError: it has.
        """
        if self.blocks > len(encoder.blocks):
            raise UserError(
                f"--n-last-blocks {self.blocks}: the encoder has {len(encoder.blocks)} blocks"
            )

    def __call__(self, encoder: Any, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, F), for an encoder that ``has_class_token``."""
        taken = encoder.get_intermediate_layers(
            images, n=self.blocks, return_prefix_tokens=True, norm=True
        )
        parts = [prefix[:, 0] for _, prefix in taken]  # BxC
        if self.patches:
            parts.append(taken[-1][0].mean(1))
        return torch.cat(parts, 1)


def mean_of_patches(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    """The mean of a ViT's patch tokens before its last LayerNorm, (B, 3, H, W) -> (B, F)."""
    return encoder.get_intermediate_layers(images)[-1].mean(1)


def class_attention(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The attention of the class token to the patches in the last block.

    Args:
        encoder: a ViT of this project or of timm.
        images: (B, 3, H, W).

    Returns:
        (B, heads, h, w); each head sums to 1 less its attention to the class token itself.

    Raises:
        UserError: a backbone without a class token.
    """
    if not has_class_token(encoder):
        raise UserError(f"{type(encoder).__name__} has no class token to draw the attention of")
    attention: Any = encoder.blocks[-1].attn  # of one of several classes of timm
    inputs: list[torch.Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        encoder.forward_features(images)
    finally:
        hook.remove()
    tokens = inputs[0]  # BxNxC
    heads = attention.num_heads
    # fused kernels do not give the weights, so they are computed here
    qkv = attention.qkv(tokens).unflatten(2, (3, heads, -1))  # BxNx3xheadsxd
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # BxheadsxNxd
    q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
    weights = (q * attention.scale @ k.transpose(2, 3)).float().softmax(3)[:, :, 0]  # BxheadsxN
    grid = encoder.patch_embed.dynamic_feat_size(images.shape[2:])
    return weights[:, :, encoder.num_prefix_tokens :].unflatten(2, grid)
