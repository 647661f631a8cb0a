"""Vision transformers of MoCo v3 (arXiv 2104.02057) on timm's layers."""

import math
from collections.abc import Sequence

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
        positions = fixed_positions(self.patch_embed.grid_size, embed_dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        nn.init.normal_(self.cls_token, std=1e-6)
        projection = self.patch_embed.proj
        limit = math.sqrt(6 / (projection.in_channels * patch_size**2 + embed_dim))
        nn.init.uniform_(projection.weight, -limit, limit)
        nn.init.zeros_(projection.bias)
        self.fixed_positions = True  # until a checkpoint brings learned ones
        self.register_load_state_dict_pre_hook(fit_positions)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        # BxhxwxC -> Bx(1+hw)xC
        batch, *grid, width = x.shape
        positions: torch.Tensor
        if tuple(grid) == tuple(self.patch_embed.grid_size):
            positions = self.pos_embed
        elif self.fixed_positions:
            positions = fixed_positions(grid, width).to(self.pos_embed)
        else:
            positions = resample_abs_pos_embed(
                self.pos_embed, new_size=list(grid), old_size=list(self.patch_embed.grid_size)
            )
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), x.view(batch, -1, width)], 1)
        return self.pos_drop(tokens + positions)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay skips."""
        return {"pos_embed", "cls_token"}


def fixed_positions(grid: Sequence[int], width: int) -> torch.Tensor:
    """Positions of an (h, w) grid: 1 x (1 + h w) x width, zero for the class token."""
    positions = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True)
    return torch.cat([torch.zeros(1, width), positions])[None]


def are_fixed_positions(positions: torch.Tensor) -> bool:
    """Whether positions of any precision, 1 x (1 + side^2) x width, are ``fixed_positions``."""
    side = _side(positions.shape[1] - 1)
    if not side or positions.shape[2] % 4 or not positions.is_floating_point():
        return False
    # what rounding leaves of numbers from -1 to 1
    tolerance = max(1e-4, torch.finfo(positions.dtype).eps)
    fixed = fixed_positions((side, side), positions.shape[2])
    return torch.allclose(positions.detach().cpu().float(), fixed, atol=tolerance)


def fit_positions(model: TimmVisionTransformer, state_dict: dict, prefix: str, *_: object) -> None:
    """Fit the positions of a checkpoint, fixed or learned, to the model's grid, in place.

    A hook before ``load_state_dict``, for any ViT of timm. Grids are square.
    """
    loaded, own = state_dict.get(prefix + "pos_embed"), model.pos_embed
    if loaded is None or own is None or loaded.ndim != 3 or loaded.shape[2] != own.shape[2]:
        return
    others = 0 if model.no_embed_class else model.num_prefix_tokens
    side = _side(loaded.shape[1] - others)
    if not side:
        return
    fixed = others == 1 and are_fixed_positions(loaded)
    if isinstance(model, VisionTransformer):
        model.fixed_positions = fixed
    grid = list(model.patch_embed.grid_size)
    if loaded.shape == own.shape and [side, side] == grid:
        return
    if fixed:
        state_dict[prefix + "pos_embed"] = fixed_positions(grid, own.shape[2])
    else:
        state_dict[prefix + "pos_embed"] = resample_abs_pos_embed(
            loaded, new_size=grid, old_size=[side, side], num_prefix_tokens=others
        )


def take_grid(model: TimmVisionTransformer, positions: torch.Tensor) -> None:
    """Give a ViT the grid of learned positions, 1 x N x width, that will be loaded.

    So they are interpolated once, from their own grid to that of an image. A ViT that goes on
    learning keeps the grid of its images, to which ``fit_positions`` interpolates.
    """
    own = model.pos_embed
    if own is None or positions.ndim != 3 or positions.shape[2] != own.shape[2]:
        return
    side = _side(positions.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens))
    if side and not are_fixed_positions(positions):
        height, width = model.patch_embed.patch_size
        model.set_input_size((side * height, side * width))


def _side(patches: int) -> int:
    """The side of a square of so many patches, 0 if they make none."""
    side = math.isqrt(max(patches, 0))
    return side if side * side == patches else 0
