"""Encoder weights from the checkpoints of this project and of others."""

import argparse
import os
import re

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from yacs.config import CfgNode

from models import build_encoder
from models.encoder import Backbone
from utils.checkpoint import LATEST, load_model, read_checkpoint
from utils.config import run_folder
from utils.errors import UserError
from utils.run import Run

# where checkpoints of this field keep their weights, the innermost last
CONTAINERS = ("model", "state_dict", "teacher", "student")
# the prefixes of a backbone's weights, and whose checkpoints have them
FAMILIES = (
    ("this project, SynCo-v2 or MoBY", "{key}."),
    ("MoCo v3", "module.{moco}."),
    ("DINO", "module.backbone."),
    ("DINO", "backbone."),
    ("linear evaluation or timm under DistributedDataParallel", "module."),
    ("timm, DeiT or Microsoft's Swin", ""),
)
# heads and the other parts of a wrapper
LEFT_OUT = re.compile(
    r"^(head|head_dist|fc|fc_norm|predictor|projector|projector_k|queue|contrast)\b|^head\.|_head\."
)
STEM = ("patch_embed.proj.weight", "conv1.weight", "stem.0.weight", "conv_stem.weight")


def add_pretrained_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--pretrained``, ``--random-weights`` and ``--key``."""
    parser.add_argument(
        "--pretrained", metavar="PATH", help="weights to judge (default: the run's checkpoint.pth)"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="judge the encoder as initialised"
    )
    parser.add_argument(
        "--key",
        choices=["encoder", "encoder_k"],
        default="encoder",
        help="which encoder of a pre-training checkpoint: online or momentum",
    )


def load_pretrained_encoder(
    args: argparse.Namespace, config: CfgNode, run: Run, drop_path_rate: float = 0.0
) -> Backbone:
    """The encoder of ``build_pretrained_encoder``, logged, on the device of ``run``."""
    encoder, said = build_pretrained_encoder(args, config, drop_path_rate)
    run.logger.info(said)
    return encoder.to(run.device)


def build_pretrained_encoder(
    args: argparse.Namespace, config: CfgNode, drop_path_rate: float = 0.0
) -> tuple[Backbone, str]:
    """The configured encoder with the weights that ``--pretrained`` names, frozen, in eval mode.

    Returns:
        the encoder, and a line that says where its weights are from.

    Raises:
        UserError: no such file, or a weight of the encoder is missing from it.
    """
    encoder = build_encoder(config, drop_path_rate)
    if args.random_weights:
        said = f"{config.MODEL.ENCODER} with random weights, as asked"
    else:
        said = load_encoder_weights(encoder, pretrained_path(args, config), args.key)
    return encoder.requires_grad_(False).eval(), said


def pretrained_path(args: argparse.Namespace, config: CfgNode) -> str:
    """The checkpoint that ``--pretrained`` names, or the run's latest."""
    path = args.pretrained or config.LINEAR_EVAL.PRETRAINED
    return path or os.path.join(run_folder(config), LATEST)


def load_encoder_weights(encoder: nn.Module, path: str, key: str = "encoder") -> str:
    """Load the weights of a backbone from a checkpoint of any known family.

    Args:
        encoder: the backbone; all its weights must be in the file.
        path: the checkpoint, or the .safetensors of its weights.
        key: ``encoder`` or ``encoder_k``, of a pre-training checkpoint.

    Returns:
        a line that says what was found and how many weights were loaded.

    Raises:
        UserError: not a checkpoint, or one of another encoder.
    """
    state = _read(path)
    inside = []
    for name in CONTAINERS:
        if isinstance(state.get(name), dict):
            state = state[name]
            inside.append(name)
    weights = {name: value for name, value in state.items() if torch.is_tensor(value)}
    expected = encoder.state_dict()
    # a backbone of timm may have another name for its first convolution
    stem = next((name for name, value in expected.items() if value.ndim == 4), STEM[0])
    family, prefix = _find_family(weights, (stem, *STEM), key, path)
    own = {name[len(prefix) :]: v for name, v in weights.items() if name.startswith(prefix)}
    # it may also have a head.norm of its own
    own = {n: value for n, value in own.items() if n in expected or not LEFT_OUT.search(n)}
    load_model(encoder, own, path)
    count = len(expected)
    where = "/".join(inside) or "the file itself"
    return (
        f"{path}: weights of {family} (in {where}, prefix {prefix or 'none'!r}), "
        f"{count} of {count} loaded, {len(weights) - len(own)} of other parts left out"
    )


def _read(path: str) -> dict:
    if not path.endswith(".safetensors"):
        return read_checkpoint(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the weights ({error})") from error


def _find_family(
    weights: dict[str, torch.Tensor], stems: tuple[str, ...], key: str, path: str
) -> tuple[str, str]:
    moco = "base_encoder" if key == "encoder" else "momentum_encoder"
    for family, pattern in FAMILIES:
        prefix = pattern.format(key=key, moco=moco)
        if any(prefix + stem in weights for stem in stems):
            return family, prefix
    example = next(iter(weights), None)
    raise UserError(
        f"{path}: no encoder weights found in it"
        + (f" (its names are like {example})" if example else " (it holds no tensors)")
    )
