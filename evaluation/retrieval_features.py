"""The feature of an image of any size, as in DINO's evaluation of retrieval (arXiv 2104.14294)."""

import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

SCALES = (1, 1 / math.sqrt(2), 1 / 2)


class AsDino(nn.Module):
    """An encoder that takes images of any size as DINO's ``vision_transformer.py`` does.

    Of a side that the patch of a ViT does not divide, the rest is cut off; a side shorter than a
    patch is padded. Learned positions are interpolated without antialiasing, to a grid that is 0.1
    larger. Fixed positions are computed, and other networks than ViTs are as they are.

    Args:
        encoder: images (B, 3, H, W) -> features (B, F); a ViT keeps this behaviour.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.square = encoder, True
        if isinstance(encoder, VisionTransformer) and not getattr(encoder, "fixed_positions", 0):
            positions = 0 if encoder.pos_embed is None else encoder.pos_embed.shape[1]
            self.side = math.isqrt(max(0, positions - 1))
            plain = encoder.dynamic_img_size and encoder.num_prefix_tokens == 1
            if plain and positions == 1 + self.side**2:
                encoder._pos_embed = self._embed  # type: ignore[method-assign]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, F)."""
        if isinstance(self.encoder, VisionTransformer):
            height, width = images.shape[2:]
            self.square = height == width
            patch = self.encoder.patch_embed.patch_size
            height, width = (
                side - side % whole if side >= whole else side
                for side, whole in zip((height, width), patch, strict=True)
            )
            images = images[:, :, :height, :width]
        return self.encoder(images)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        # BxhxwxC -> Bx(1+hw)xC
        encoder: Any = self.encoder
        batch, height, width, _ = x.shape
        own = encoder.pos_embed[:, 1:]  # 1xNxC
        if not self.square or height * width != own.shape[1]:
            own = own.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
            scale = ((height + 0.1) / self.side, (width + 0.1) / self.side)
            own = F.interpolate(own, scale_factor=scale, mode="bicubic").flatten(2).mT
        positions = torch.cat([encoder.pos_embed[:, :1], own], 1)
        tokens = torch.cat([encoder.cls_token.expand(batch, -1, -1), x.flatten(1, 2)], 1)
        return encoder.pos_drop(tokens + positions)


class MultiScale(nn.Module):
    """The mean feature of an image at the sizes of ``SCALES``.

    Args:
        encoder: images (B, 3, H, W) of any size -> features (B, F).
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, F)."""
        scaled = [images if scale == 1 else shrink(images, scale) for scale in SCALES]
        return torch.stack([self.encoder(image).float() for image in scaled]).mean(0)


def shrink(images: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, H * scale, W * scale), rounded down, of at least one pixel."""
    if min(images.shape[2:]) * scale >= 1:
        return F.interpolate(images, scale_factor=scale, mode="bilinear")
    size = [max(1, int(side * scale)) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear")
