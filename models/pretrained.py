"""Encoder weights from the checkpoints of this project and of others."""

import argparse
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from yacs.config import CfgNode

from models import build_encoder
from models.encoder import ENCODERS, Backbone, add_encoder_list
from models.families import LEFT_OUT, Found, find_weights
from models.network import (
    POSITIONS,
    adapt,
    check_network,
    configured,
    encoder_said,
    image_size_said,
    name_encoder,
    network_changes,
    network_of,
    network_said,
    transform_said,
)
from models.swin import rename_microsoft
from models.vit import fit_positions, take_grid
from utils.checkpoint import LATEST, load_model
from utils.config import DEFAULTS, check_ranges, run_folder, with_values
from utils.errors import UserError
from utils.provenance import weights_digest
from utils.run import Run
from utils.weights_file import read_weights

TOKENS = re.compile("token|pos_embed")


def add_pretrained_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--pretrained``, ``--random-weights``, ``--key`` and ``--list-encoders``."""
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
    parser.add_argument(
        "--container", metavar="PLACE", help="where in the file they lie, such as model.encoder"
    )
    add_encoder_list(parser)


def load_pretrained_encoder(
    args: argparse.Namespace, config: CfgNode, run: Run, drop_path_rate: float = 0.0, **how: bool
) -> tuple[Backbone, dict[str, Any]]:
    """The encoder of ``build_pretrained_encoder`` on the device of ``run``, and its origin."""
    encoder, origin = build_pretrained_encoder(args, config, run.logger.info, drop_path_rate, **how)
    return encoder.to(run.device), origin


def build_pretrained_encoder(
    args: argparse.Namespace,
    config: CfgNode,
    say: Callable[[str], Any],
    drop_path_rate: float = 0.0,
    learns: bool = False,
) -> tuple[Backbone, dict[str, Any]]:
    """The configured encoder with the weights that ``--pretrained`` names, frozen, in eval mode.

    Args:
        args: of ``add_pretrained_arguments``.
        config: the configuration.
        say: gets lines that say where the weights are from, and which encoder it is.
        drop_path_rate: stochastic depth.
        learns: whether it will go on learning, or be written, see ``EncoderFile.load``.

    Returns:
        the encoder, and the origin of its weights for ``gather_provenance``.

    Raises:
        UserError: no such file, or a weight of the encoder is missing from it.
    """
    origin: dict[str, Any] = {"encoder": config.MODEL.ENCODER}
    if args.random_weights:
        encoder = build_encoder(config, drop_path_rate)
        say(f"{config.MODEL.ENCODER} with random weights, as asked")
        origin["key"] = "random weights"
    else:
        path = pretrained_path(args, config)
        file, adapted = read_encoder_for(
            config, path, args.key, container=getattr(args, "container", None)
        )
        encoder = build_encoder(adapted, drop_path_rate)
        say(file.load(encoder, learns))
        for line in network_changes(config, adapted):
            say(line)
        say(f"the encoder that is judged: {describe_origin(file.origin)}")
        origin |= {"checkpoint": os.path.abspath(path), **file.origin}
    origin["network"] = network_of(encoder).known()
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


def load_encoder_weights(
    encoder: nn.Module, path: str, key: str = "encoder", container: str | None = None
) -> str:
    """Load the weights of a backbone from a checkpoint of any known family.

    Args:
        encoder: the backbone; all its weights must be in the file.
        path: the checkpoint, or the .safetensors of its weights.
        key: ``encoder`` or ``encoder_k``, of a pre-training checkpoint.
        container: where in the file the weights lie, names with dots between them.

    Returns:
        a line that says what was found and how many weights were loaded.

    Raises:
        UserError: not a checkpoint, or one of another encoder.
    """
    file = _encoder_in(read_weights(path), path, key, encoder, container)
    check_network(encoder, file.found.weights, file.network, path)
    return file.load(encoder)


class EncoderFile(NamedTuple):
    """An encoder's weights in a file.

    Attributes:
        path: of the file.
        found: the weights, and where they were.
        network: what the file says of its network, for ``models.network``.
        origin: ``method``, ``key``, ``epoch`` and ``step``.
    """

    path: str
    found: Found
    network: dict[str, Any]
    origin: dict[str, Any]

    def load(self, encoder: nn.Module, learns: bool = False) -> str:
        """Load all weights of ``encoder``; returns a line that says what was found.

        Args:
            encoder: a backbone of their kind.
            learns: whether it goes on learning, or is written: with learned positions for images
                of its own size, where others keep those of the file.
        """
        positions = self.found.weights.get(POSITIONS)
        if isinstance(encoder, TimmVisionTransformer) and positions is not None and not learns:
            take_grid(encoder, positions)
        expected = encoder.state_dict()
        # a backbone of timm may have a head.norm of its own
        own = {
            name: value
            for name, value in self.found.weights.items()
            if name in expected or not LEFT_OUT.search(name)
        }
        try:
            load_model(encoder, own, self.path)
        except UserError as error:
            likely = name_encoder(own)
            known = likely and likely != name_encoder(expected)
            different = _different(encoder, own)
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise UserError(
                f"{self.path}: checkpoint of another model"
                + (f": it looks like MODEL.ENCODER {likely}" if known else "")
                + f" ({'; '.join(different[:3])}{more})"
            ) from error
        others = self.found.others + len(self.found.weights) - len(own)
        where = "/".join(self.found.inside) or "the file itself"
        return (
            f"{self.path}: weights of {self.found.family} (in {where}, prefix "
            f"{self.found.prefix or 'none'!r}), {len(expected)} of {len(expected)} loaded, "
            f"{others} of other parts left out"
        )


def _different(encoder: nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    """What keeps weights from being loaded; of tokens and positions first, which tell most."""
    if isinstance(encoder, TimmSwinTransformer):
        rename_microsoft(encoder, weights, "")
    if isinstance(encoder, TimmVisionTransformer):
        fit_positions(encoder, weights, "")
    own, different = encoder.state_dict(), []
    for name in sorted(own | weights, key=lambda name: not TOKENS.search(name)):
        ours, theirs = own.get(name), weights.get(name)
        if ours is None:
            different.append(f"the file has {name}, the encoder has not")
        elif theirs is None:
            different.append(f"the file has no {name}")
        elif ours.shape != theirs.shape:
            sizes = " not ".join("x".join(map(str, value.shape)) for value in (theirs, ours))
            different.append(f"its {name} is {sizes}")
    return different


def _encoder_in(
    state: dict[str, Any], path: str, key: str, encoder: nn.Module, container: str | None
) -> EncoderFile:
    # a backbone of timm may have another name for its first convolution
    stem = next((name for name, value in encoder.state_dict().items() if value.ndim == 4), "")
    found = find_weights(state, stem, key, path, container or "")
    named = [name for name in found.inside if name not in ("model", "state_dict")]
    which = "/".join(filter(None, [*named, found.prefix.strip(".")]))
    origin = _origin(state, which or "the only one of its file")
    return EncoderFile(path, found, network_said(state), origin)


def read_encoder_for(
    config: CfgNode,
    path: str,
    key: str,
    state: dict[str, Any] | None = None,
    container: str | None = None,
) -> tuple[EncoderFile, CfgNode]:
    """Read the weights of the configured encoder.

    Args:
        config: the configuration.
        path: of the file.
        key: ``encoder`` or ``encoder_k``.
        state: what the file holds, if it has been read.
        container: where in it the weights lie, names with dots between them.

    Returns:
        the weights, and the configuration with the heads, patches and windows that they have.

    Raises:
        UserError: not a checkpoint with an encoder, or the configuration asks for another network.
    """
    with torch.device("meta"):  # which takes neither time nor memory
        encoder = build_encoder(config, 0.0)
    file = _encoder_in(state or read_weights(path), path, key, encoder, container)
    return file, adapt(config, encoder, file.found.weights, file.network, path)


def open_encoder(
    path: str,
    key: str = "encoder",
    encoder: str | None = None,
    img_size: int | None = None,
    container: str | None = None,
) -> tuple[Backbone, CfgNode]:
    """The encoder of a file without a configuration beside it.

    Args:
        path: weights of any family.
        key: ``encoder`` or ``encoder_k``, of a pre-training checkpoint.
        encoder: its MODEL.ENCODER, by default what the file says or its shapes tell.
        img_size: side of the images in pixels, by default what the file says, else that of
            ``DEFAULTS``.
        container: where in the file the weights lie, names with dots between them.

    Returns:
        the encoder with the weights, and the configuration that builds it.

    Raises:
        UserError: nothing tells which encoder it is, or as ``read_encoder_for``.
    """
    state = read_weights(path)
    name = encoder or encoder_said(state)
    changes = transform_said(state)
    if size := img_size or image_size_said(state):
        changes["DATA.IMG_SIZE"] = size
    if not name or name in ENCODERS:
        weights = find_weights(state, "", key, path, container or "").weights
        name = name or name_encoder(weights)
        replaced = any(weight.endswith(".norm2.running_mean") for weight in weights)
        changes["MODEL.REPLACE_LN_WITH_BN"] = replaced
    if not name:
        raise UserError(f"{path}: nothing tells which encoder its weights are of: name it")
    config = with_values(DEFAULTS, {"MODEL.ENCODER": name, **changes})
    check_ranges(config)
    file, adapted = read_encoder_for(config, path, key, state, container)
    loaded = build_encoder(adapted, 0.0)
    file.load(loaded)
    return loaded, adapted


def _origin(state: dict, key: str) -> dict[str, Any]:
    """What a checkpoint says of its encoder, in its ``provenance`` or, if it is older, elsewhere.

    Args:
        state: the checkpoint, which may hold anything.
        key: which encoder of the file was taken; one that was taken from another file before
            keeps its name.
    """
    stored = state.get("provenance")
    stored = stored if isinstance(stored, dict) else {}
    method, first = stored.get("method"), stored.get("key")
    origin: dict[str, Any] = {
        "method": method if isinstance(method, str) else configured(state).get("TYPE"),
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
