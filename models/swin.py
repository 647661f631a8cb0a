"""Swin transformers (arXiv 2103.14030) on timm's layers."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from torch import nn

WINDOW = 7
PATCH = 4
DOWNSAMPLE = re.compile(r"layers\.(\d+)\.(?=downsample\.)")


class SwinTransformer(TimmSwinTransformer):
    """Swin with windows of 7 x 7, or another side, at any image size.

    The feature is the mean of the last stage. timm shrinks the windows for images below 224
    pixels, which changes the shape of the weights. Here such images are padded instead, so that
    one checkpoint serves every size.

    Args:
        img_size: side of the training images in pixels.
        embed_dim: width of the first stage, doubled at each of the next three.
        depths: blocks in each stage.
        num_heads: attention heads in each stage.
        drop_rate: dropout rate.
        drop_path_rate: stochastic depth rate of the last block, rising linearly from 0.
        patch_size: side of a patch in pixels.
        window_size: side of a window in patches, the same in every stage.
    """

    def __init__(
        self,
        img_size: int = 224,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_size: int = PATCH,
        window_size: int = WINDOW,
    ) -> None:
        # 2 ** (stages - 1): the smallest size at which no stage is narrower than a window
        smallest = window_size * patch_size * 2 ** (len(depths) - 1)
        super().__init__(
            img_size=max(img_size, smallest),
            patch_size=patch_size,
            window_size=window_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            num_classes=0,
            proj_drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            strict_img_size=False,
        )
        patches: Any = self.patch_embed  # torch's types allow no attributes of other types
        patches.dynamic_img_pad = True
        self.register_load_state_dict_pre_hook(rename_microsoft)
        # the maps of the others are larger than a window at every size that is built here
        shift_by_maps(self.layers[-1])


def shift_by_maps(model: nn.Module) -> None:
    """Let each block of any Swin of timm, also of version 2, shift by the map that it gets.

    timm decides at construction, by ``img_size``, whether a map is larger than a window. The same
    weights would give an image other features then, by a size that is not the image's.
    """
    for block in model.modules():
        if any(getattr(block, "target_shift_size", ())):
            block.register_forward_pre_hook(_shift_by_map)


def _shift_by_map(block: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    fit_shift(block, inputs[0].shape[1:3])  # BxHxWxC


def fit_shift(block: Any, size: Sequence[int]) -> None:
    """Shift by half a window along the sides on which a map of (h, w) is larger than a window."""
    halves = zip(size, block.window_size, strict=True)
    block.shift_size = tuple(window // 2 if side > window else 0 for side, window in halves)


def rename_microsoft(model: TimmSwinTransformer, state_dict: dict, prefix: str, *_: object) -> None:
    """Turn Microsoft's names into timm's, in place: their ``downsample`` ends the stage before.

    A hook before ``load_state_dict``, for any Swin of timm. Buffers that timm derives are dropped.
    Nothing is resampled: a table of another window is that of another network.
    """
    published = f"{prefix}layers.0.downsample.reduction.weight" in state_dict
    own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    for name, value in own.items():
        if name.endswith(("relative_position_index", "attn_mask")):
            continue
        stage = DOWNSAMPLE.match(name[len(prefix) :])
        if stage and published:
            name = f"{prefix}layers.{int(stage[1]) + 1}.{name[len(prefix) + stage.end() :]}"
        state_dict[name] = value


def microsoft_weights(encoder: TimmSwinTransformer) -> dict[str, torch.Tensor]:
    """The weights under Microsoft's names, with the buffers that its model keeps.

    These are where each pair of patches stands in the table of positions, and the masks of the
    shifted windows, (windows, patches, patches), for images of the encoder's size.
    """
    weights = {}
    for name, value in encoder.state_dict().items():
        stage = DOWNSAMPLE.match(name)
        if stage:
            name = f"layers.{int(stage[1]) - 1}.{name[stage.end() :]}"
        weights[name] = value
    stages: Any = encoder.layers  # torch's types allow no attributes of other types
    for i, stage in enumerate(stages):
        for j, block in enumerate(stage.blocks):
            name = f"layers.{i}.blocks.{j}"
            weights[f"{name}.attn.relative_position_index"] = block.attn.relative_position_index
            if any(block.target_shift_size):
                fit_shift(block, block.input_resolution)
            mask = block.get_attn_mask()
            if mask is not None:
                weights[f"{name}.attn_mask"] = mask
    return weights
