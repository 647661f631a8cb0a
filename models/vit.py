"""Vision transformers of MoCo v3 (arXiv 2104.02057) on timm's layers."""

import math

import torch
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn


class VisionTransformer(TimmVisionTransformer):
    """ViT with fixed 2-D sine-cosine positions and MoCo v3's initialisation.

    The feature is the class token after the last LayerNorm. Images may have any size: positions
    are computed for their grid, and a size that the patch does not divide is padded.

    Args:
        img_size: side of the training images in pixels.
        patch_size: side of a patch in pixels.
        embed_dim: width; a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads in each block.
        drop_rate: dropout rate.
        drop_path_rate: stochastic depth rate of the last block, rising linearly from 0.

    Source: MoCo v3, sections 4 and 5; parameter names and shapes as published.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=0,
            pos_drop_rate=drop_rate,
            proj_drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init="moco",
            dynamic_img_size=True,
            dynamic_img_pad=True,
        )
        self.pos_embed = nn.Parameter(self._sincos(self.patch_embed.grid_size), requires_grad=False)
        nn.init.normal_(self.cls_token, std=1e-6)
        projection = self.patch_embed.proj
        limit = math.sqrt(6 / (projection.in_channels * patch_size**2 + embed_dim))
        nn.init.uniform_(projection.weight, -limit, limit)
        nn.init.zeros_(projection.bias)
        self.fixed_positions = True  # until a checkpoint brings learned ones
        self.register_load_state_dict_pre_hook(_fit_positions)

    def _sincos(self, grid: tuple[int, ...]) -> torch.Tensor:
        """Positions of an (h, w) grid: 1 x (1 + h w) x width, zero for the class token."""
        positions = build_sincos2d_pos_embed(list(grid), self.embed_dim, interleave_sin_cos=True)
        return torch.cat([torch.zeros(1, self.embed_dim), positions])[None]

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        # BxhxwxC -> Bx(1+hw)xC
        batch, *grid, width = x.shape
        positions: torch.Tensor
        if tuple(grid) == tuple(self.patch_embed.grid_size):
            positions = self.pos_embed
        elif self.fixed_positions:
            positions = self._sincos(tuple(grid)).to(self.pos_embed)
        else:
            positions = resample_abs_pos_embed(
                self.pos_embed, new_size=list(grid), old_size=list(self.patch_embed.grid_size)
            )
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), x.view(batch, -1, width)], 1)
        return self.pos_drop(tokens + positions)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay skips."""
        return {"pos_embed", "cls_token"}


def _fit_positions(model: VisionTransformer, state_dict: dict, prefix: str, *_: object) -> None:
    """Fit the positions of a checkpoint, fixed or learned, to the model's grid, in place."""
    loaded = state_dict.get(prefix + "pos_embed")
    if loaded is None or loaded.ndim != 3 or loaded.shape[2] != model.embed_dim:
        return
    side = math.isqrt(loaded.shape[1] - 1)
    if side * side != loaded.shape[1] - 1:
        return
    model.fixed_positions = torch.allclose(loaded.cpu(), model._sincos((side, side)), atol=1e-4)
    if loaded.shape != model.pos_embed.shape:
        if model.fixed_positions:
            state_dict[prefix + "pos_embed"] = model._sincos(model.patch_embed.grid_size)
        else:
            grid = list(model.patch_embed.grid_size)
            state_dict[prefix + "pos_embed"] = resample_abs_pos_embed(loaded, new_size=grid)
