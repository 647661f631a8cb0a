"""The backbones by name."""

import argparse
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from models.batch_norm import SyncBatchNorm
from models.swin import SwinTransformer, rename_microsoft, shift_by_maps
from models.vit import VisionTransformer, fit_positions
from utils.errors import UserError, did_you_mean
from utils.update import Precision

PREFIX = "timm/"
# for images of other sizes than in training, where a backbone can take them
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}


class Backbone(nn.Module):
    """What a type checker must know of the encoders, which are of many classes of timm."""

    num_features: int
    feature_info: list[dict[str, Any]]
    no_weight_decay: Callable[[], set[str]]
    forward_intermediates: Callable[..., Any]
    set_grad_checkpointing: Callable[[bool], None]
    transform: Callable[[Any], torch.Tensor]  # of ``evaluation.encoder``


def create_timm_backbone(name: str, **options: Any) -> tuple[Backbone, dict[str, Any]]:
    """A backbone of timm with random weights; nothing is downloaded.

    Args:
        name: a name of ``timm.list_models()``, also with ``timm/`` before it.
        options: of its constructor, such as ``img_size`` and ``drop_path_rate``.

    Returns:
        the backbone, images (B, 3, H, W) -> features (B, ``num_features``), and those of
        ``options`` that this backbone has; the others are left out.

    Raises:
        UserError: timm does not know the name, or refuses the size.
    """
    name = name.removeprefix(PREFIX)
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models()) or ", see timm.list_models()"
        raise UserError(f"MODEL.ENCODER {PREFIX}{name}: timm has no such model{hint}")
    options = ANY_SIZE | options
    while True:
        try:
            encoder = cast(
                Backbone, timm.create_model(name, pretrained=False, num_classes=0, **options)
            )
            break
        except Exception as error:  # constructors of 1300 kinds can raise anything
            # one names the first argument that it does not know, another all of them
            _, _, named = str(error).partition("unexpected keyword argument")
            unknown = options.keys() & set(re.findall(r"'(\w+)'", named))
            if not unknown:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"MODEL.ENCODER {PREFIX}{name}: timm refuses it ({reason})"
                ) from error
            options = {option: value for option, value in options.items() if option not in unknown}
    # some have layers between the last map and the classifier
    encoder.num_features = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    if isinstance(encoder, TimmVisionTransformer):
        encoder.register_load_state_dict_pre_hook(fit_positions)
    if isinstance(encoder, TimmSwinTransformer):
        encoder.register_load_state_dict_pre_hook(rename_microsoft)
    shift_by_maps(encoder)
    if not hasattr(encoder, "no_weight_decay"):
        encoder.no_weight_decay = set  # none besides the one-dimensional ones
    return encoder, options


ENCODERS: dict[str, partial[VisionTransformer] | partial[SwinTransformer]] = {
    "vit_nano": partial(VisionTransformer, patch_size=8, embed_dim=128, depth=5, num_heads=4),
    "vit_tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),
    "vit_small": partial(VisionTransformer, embed_dim=384, depth=12, num_heads=12),
    "vit_base": partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
    "vit_large": partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge": partial(VisionTransformer, patch_size=14, embed_dim=1280, depth=32, num_heads=16),
    "swin_tiny": partial(
        SwinTransformer, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)
    ),
    "swin_small": partial(
        SwinTransformer, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)
    ),
    "swin_base": partial(
        SwinTransformer, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)
    ),
    "swin_large": partial(
        SwinTransformer, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)
    ),
}
# the published names of backbones that are timm's
RESNETS = ("resnet50", "resnet101", "resnet152", "resnet200")


def full_name(name: str) -> str:
    """``timm/`` before the published name of a ResNet, other names as they are."""
    return f"{PREFIX}{name}" if name in RESNETS else name


class _ListEncoders(argparse.Action):
    """Prints the names that MODEL.ENCODER takes, and ends."""

    def __call__(self, parser, namespace, values, option_string=None):
        pattern = str(values or "")
        own = fnmatch.filter([*ENCODERS, *RESNETS], pattern or "*")
        of_timm = [f"{PREFIX}{name}" for name in timm.list_models(pattern.removeprefix(PREFIX))]
        print("\n".join(own + of_timm if pattern else own))
        if not pattern:
            print(f"{PREFIX}<name>: {len(of_timm)} of timm, such as --list-encoders 'convnext*'")
        parser.exit()


def add_encoder_list(parser: argparse.ArgumentParser) -> None:
    """Add ``--list-encoders``."""
    parser.add_argument(
        "--list-encoders",
        action=_ListEncoders,
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="PATTERN",
        help="print the names of MODEL.ENCODER, or those that fit, and end",
    )


def create_encoder(
    name: str,
    img_size: int = 224,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    stop_grad_conv1: bool = False,
    replace_ln_with_bn: bool = False,
    use_checkpoint: bool = False,
    num_heads: int = 0,
    patch_size: int = 0,
    window_size: int = 0,
) -> Backbone:
    """A backbone without a classifier: images (B, 3, H, W) -> features (B, ``num_features``).

    Args:
        name: a key of ``ENCODERS``, one of ``RESNETS``, or ``timm/`` and the name of a model of
            timm.
        img_size: side of the training images in pixels.
        drop_rate: dropout rate.
        drop_path_rate: stochastic depth rate; not every model of timm has it.
        stop_grad_conv1: keep the patch projection of a ViT or a Swin as initialised (MoCo v3,
            section 4).
        replace_ln_with_bn: BatchNorm in place of the LayerNorm before each MLP.
        use_checkpoint: recompute activations in the backward pass.
        num_heads, patch_size, window_size: of a ViT, of a ViT or a Swin, of a Swin; 0 leaves what
            the name says.

    Raises:
        UserError: unknown name, or an option that the backbone does not have.
    """
    name = full_name(name)
    options = {"img_size": img_size, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    network = {"num_heads": num_heads, "patch_size": patch_size, "window_size": window_size}
    network = {option: value for option, value in network.items() if value}
    encoder: nn.Module
    if name.startswith(PREFIX):
        encoder, taken = create_timm_backbone(name, **options, **network)
        _refuse_options(name, network.keys() - taken.keys())
    elif name in ENCODERS:
        known = inspect.signature(ENCODERS[name]).parameters
        _refuse_options(name, network.keys() - known.keys())
        try:
            encoder = ENCODERS[name](**options, **network)
        except (AssertionError, ValueError) as error:
            raise UserError(f"MODEL.ENCODER {name}: no such network ({error})") from error
    else:
        raise UserError(
            f"MODEL.ENCODER {name!r} is unknown, choose from "
            f"{', '.join([*ENCODERS, *RESNETS])} or {PREFIX}<name of a model of timm>"
            f"{did_you_mean(name, [*ENCODERS, *RESNETS])}"
        )
    if stop_grad_conv1:
        if not isinstance(encoder, (TimmVisionTransformer, TimmSwinTransformer)):
            raise UserError(f"MODEL.STOP_GRAD_CONV1: {name} has no patch projection, leave it out")
        patches: Any = encoder.patch_embed
        patches.proj.requires_grad_(False)
    if replace_ln_with_bn:
        _replace_norms(encoder, name)
    backbone = cast(Backbone, encoder)
    try:
        backbone.set_grad_checkpointing(use_checkpoint)
    except (AssertionError, AttributeError) as error:
        if use_checkpoint:
            raise UserError(
                f"TRAIN.USE_CHECKPOINT: {name} has no activation checkpointing, leave it out"
            ) from error
    return backbone


def _refuse_options(name: str, options: Iterable[str]) -> None:
    for option in sorted(options):
        raise UserError(f"MODEL.{option.upper()}: {name} has no such thing, leave it out")


def _replace_norms(encoder: nn.Module, name: str) -> None:
    norms = [
        (block, norm)
        for block in encoder.modules()
        if isinstance(norm := getattr(block, "norm2", None), nn.LayerNorm) and hasattr(block, "mlp")
    ]
    if not norms:
        raise UserError(
            f"MODEL.REPLACE_LN_WITH_BN: {name} has no blocks with a LayerNorm before their MLP"
        )
    for block, norm in norms:
        block.norm2 = SyncBatchNorm(norm.normalized_shape[0])


def choose_attention(model: nn.Module, precision: Precision) -> None:
    """Switch fused attention off where the plain form is faster.

    On the CPU there are two such cases, both where weights learn: the backward pass in bfloat16,
    and a position bias (Swin), because the fused kernel gives no gradient for it.
    """
    cpu = precision.device_type == "cpu"
    layers: list[Any] = list(model.modules())  # torch's types allow no attributes of other types
    for layer in layers:
        if hasattr(layer, "fused_attn"):
            learns = any(p.requires_grad for p in layer.parameters())
            biased = hasattr(layer, "relative_position_bias_table")
            layer.fused_attn = not (cpu and learns and (precision.enabled or biased))
