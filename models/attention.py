"""What the class token of a ViT attends to."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from utils.errors import UserError


def class_attention(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The attention of the class token to the patches in the last block.

    Args:
        encoder: a ViT of this project or of timm.
        images: (B, 3, H, W).

    Returns:
        (B, heads, h, w); what a head leaves to the class token itself is missing from its sum of 1.

    Raises:
        UserError: a backbone without a class token.
    """
    if not isinstance(encoder, VisionTransformer) or encoder.cls_token is None:
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
