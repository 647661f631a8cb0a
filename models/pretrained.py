"""Encoder weights from the checkpoints of this project and of others."""

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from yacs.config import CfgNode

from models import build_encoder
from models.encoder import Backbone
from utils.checkpoint import LATEST, load_model, read_checkpoint
from utils.config import run_folder
from utils.errors import UserError
from utils.provenance import weights_digest
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
# a line of the configuration in a checkpoint
METHOD = re.compile(r"^MODEL:$(?:\n .*)*?\n  TYPE: (\w+)$", re.MULTILINE)
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
) -> tuple[Backbone, dict[str, Any]]:
    """The encoder of ``build_pretrained_encoder`` on the device of ``run``, and its origin."""
    encoder, origin = build_pretrained_encoder(args, config, run.logger.info, drop_path_rate)
    return encoder.to(run.device), origin


def build_pretrained_encoder(
    args: argparse.Namespace,
    config: CfgNode,
    say: Callable[[str], Any],
    drop_path_rate: float = 0.0,
) -> tuple[Backbone, dict[str, Any]]:
    """The configured encoder with the weights that ``--pretrained`` names, frozen, in eval mode.

    Args:
        args: of ``add_pretrained_arguments``.
        config: the configuration.
        say: gets lines that say where the weights are from, and which encoder it is.
        drop_path_rate: stochastic depth.

    Returns:
        the encoder, and the origin of its weights for ``gather_provenance``.

    Raises:
        UserError: no such file, or a weight of the encoder is missing from it.
    """
    encoder = build_encoder(config, drop_path_rate)
    origin: dict[str, Any] = {"encoder": config.MODEL.ENCODER}
    if args.random_weights:
        say(f"{config.MODEL.ENCODER} with random weights, as asked")
        origin["key"] = "random weights"
    else:
        path = pretrained_path(args, config)
        said, found = _load(encoder, path, args.key)
        say(said)
        say(f"the encoder that is judged: {describe_origin(found)}")
        origin |= {"checkpoint": os.path.abspath(path), **found}
    origin["weights"] = weights_digest(encoder)
    return encoder.requires_grad_(False).eval(), origin


def describe_origin(origin: dict[str, Any]) -> str:
    """Which encoder of a file it is, and from when, in a few words."""
    epoch, step = origin.get("epoch"), origin.get("step")
    when = "of an unknown epoch" if epoch is None else f"of epoch {epoch}"
    return f"{origin.get('key')} {when}" + ("" if step is None else f", after update {step}")


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
    return _load(encoder, path, key)[0]


def _load(encoder: nn.Module, path: str, key: str) -> tuple[str, dict[str, Any]]:
    """As ``load_encoder_weights``, with the ``method``, ``key``, ``epoch`` and ``step``."""
    whole = state = _read(path)
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
    said = (
        f"{path}: weights of {family} (in {where}, prefix {prefix or 'none'!r}), "
        f"{count} of {count} loaded, {len(weights) - len(own)} of other parts left out"
    )
    named = [*(name for name in inside if name in ("teacher", "student")), prefix.strip(".")]
    return said, _origin(whole, "/".join(filter(None, named)) or "the only one of its file")


def _origin(state: dict, key: str) -> dict[str, Any]:
    """What a checkpoint says of its encoder, in its ``provenance`` or, if it is older, elsewhere.

    Args:
        state: the checkpoint, which may hold anything.
        key: which encoder of the file was taken; one that was taken from another file before
            keeps its name.
    """
    stored = state.get("provenance")
    stored = stored if isinstance(stored, dict) else {}
    text = state.get("config")
    found = METHOD.search(text) if isinstance(text, str) else None
    method, first = stored.get("method"), stored.get("key")
    origin = {
        "method": method if isinstance(method, str) else found and found[1],
        "key": first if isinstance(first, str) else key,
    }
    for name in ("epoch", "step"):
        number = stored.get(name) if stored else state.get(name)
        origin[name] = number if type(number) is int else None
    data = stored.get("data")  # that it was trained on
    if isinstance(data, dict) and isinstance(data.get("images"), dict):
        images = {str(name): n for name, n in data["images"].items() if type(n) is int}
        origin["data"] = {"digest": str(data.get("digest")), "images": images}
    return origin


def _read(path: str) -> dict:
    if not path.endswith(".safetensors"):
        return read_checkpoint(path)
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get("provenance", "null")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the weights ({error})") from error
    with contextlib.suppress(ValueError, RecursionError):
        state["provenance"] = json.loads(said)
    return state


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
