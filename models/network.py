"""Which network weights are of, also where their shapes do not tell."""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import yaml
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from yacs.config import CfgNode

from models.encoder import ENCODERS, PREFIX
from models.vit import VisionTransformer, are_fixed_positions
from utils.config import KEYS, with_values
from utils.errors import UserError

PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
QKV = "blocks.0.attn.qkv.weight"
TABLE = re.compile(r"^layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$")
# Heads of a ViT by its width, where positions are learned: timm, DeiT, DINO and iBOT.
LEARNED = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# Stages of a ResNet with bottlenecks, by the blocks of its third.
RESNETS = {6: "resnet50", 23: "resnet101", 36: "resnet152"}


class Network(NamedTuple):
    """What the name of an encoder leaves open; 0 is unknown, or that it has no such thing.

    Attributes:
        num_heads: attention heads in each block of a ViT.
        patch_size: side of a patch of a ViT or a Swin in pixels.
        window_size: side of a window of a Swin in patches.
    """

    num_heads: int = 0
    patch_size: int = 0
    window_size: int = 0

    def known(self) -> dict[str, int]:
        """What is not 0."""
        return {name: value for name, value in self._asdict().items() if value}

    def by_key(self) -> dict[str, int]:
        """What is known, by the keys of the configuration."""
        return {f"MODEL.{name.upper()}": value for name, value in self.known().items()}


def network_of(encoder: nn.Module) -> Network:
    """The network of an encoder that was built."""
    if isinstance(encoder, TimmVisionTransformer):
        block: Any = encoder.blocks[0]
        return Network(block.attn.num_heads, encoder.patch_embed.patch_size[0])
    if isinstance(encoder, TimmSwinTransformer):
        patches: Any = encoder.patch_embed
        first: Any = encoder.layers[0]
        return Network(0, patches.patch_size[0], first.blocks[0].attn.window_size[0])
    return Network()


def network_said(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its network, for ``network_in``; it may hold anything."""
    said = _within(state, "provenance", "network")
    if isinstance(said, Mapping):
        return dict(said)
    told = state.get("hugging_face")
    if isinstance(told, Mapping):
        return {"num_heads": told.get("num_attention_heads")}
    model = configured(state)
    return {"num_heads": model.get("NUM_HEADS", 0), "encoder": model.get("ENCODER")}


def encoder_said(state: Mapping[str, Any]) -> str | None:
    """The MODEL.ENCODER that a checkpoint names; it may hold anything."""
    of_timm = _within(state, "hugging_face", "architecture")
    for name in (
        _within(state, "provenance", "encoder"),
        configured(state).get("ENCODER"),
        f"{PREFIX}{of_timm}" if of_timm else None,
    ):
        if isinstance(name, str) and name:
            return name
    return None


def image_size_said(state: Mapping[str, Any]) -> int:
    """The side of the images that a checkpoint names, 0 if it names none."""
    input_size = _within(state, "hugging_face", "pretrained_cfg", "input_size")
    for size in (
        configured(state, "DATA").get("IMG_SIZE"),
        _within(state, "metadata", "image_size"),
        _within(state, "hugging_face", "image_size"),
        input_size[-1] if isinstance(input_size, list) and input_size else None,
    ):
        if str(size).isdecimal():
            return int(str(size))
    return 0


def transform_said(state: Mapping[str, Any]) -> dict[str, Any]:
    """How a checkpoint's configuration resizes and crops test images, by its keys."""
    said: dict[str, Any] = {}
    if (mode := configured(state, "DATA").get("INTERPOLATION")) in KEYS[
        "DATA.INTERPOLATION"
    ].allowed:
        said["DATA.INTERPOLATION"] = mode
    if isinstance(crop := configured(state, "TEST").get("CROP"), bool):
        said["TEST.CROP"] = crop
    return said


def _within(node: Any, *names: str) -> Any:
    """An entry of nested dictionaries, None where there is none."""
    for name in names:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def configured(state: Mapping[str, Any], section: str = "MODEL") -> dict[str, Any]:
    """The plain keys of a section of a checkpoint's configuration: text, or a CfgNode elsewhere."""
    config = state.get("config")
    if isinstance(config, str) and "<<" not in config:  # merged again and again, it fills memory
        with contextlib.suppress(
            yaml.YAMLError, RecursionError, ValueError
        ):  # then it says nothing
            config = yaml.safe_load(config)
    from utils.stand_in import entries_of  # only here: an update needs none of it

    entries = entries_of(entries_of(config).get(section))
    return {key: value for key, value in entries.items() if isinstance(value, (str, int))}


def network_in(
    weights: Mapping[str, torch.Tensor],
    said: Mapping[str, Any],
    asked: Network,
    own: bool,
    path: str,
) -> Network:
    """The network that weights are of.

    Shapes tell the sides of patches and windows. They do not tell the heads of a ViT: the file may
    say them, the configuration may, or the positions do. With fixed ones the network is MoCo v3's
    or this project's, with learned ones that of timm, DeiT, DINO and iBOT.

    Args:
        weights: under the names of timm.
        said: what the file says: ``num_heads``, or the ``encoder`` by its name.
        asked: what the configuration asks for.
        own: whether the encoder is of this project, not one that timm names exactly.
        path: what to call the file in an error.

    Raises:
        UserError: nothing tells the heads of a ViT of this project.
    """
    patches = weights.get(PATCHES)
    patch = patches.shape[-1] if patches is not None and patches.ndim == 4 else 0
    tables = [v for name, v in weights.items() if TABLE.match(name) and v.ndim == 2]
    if tables:  # of (2 window - 1) ** 2 rows
        return Network(0, patch, (round(tables[0].shape[0] ** 0.5) + 1) // 2)
    positions = weights.get(POSITIONS)
    if positions is None or positions.ndim != 3 or QKV not in weights:
        return Network(0, patch)
    width = positions.shape[2]
    heads = _said_heads(said, width) or asked.num_heads
    if not heads and are_fixed_positions(positions):
        heads = _own_heads(width)
    elif not heads and own:
        heads = LEARNED.get(width, 0)
    if own and not heads:
        raise UserError(
            f"{path}: the file does not tell how many heads its ViT has: set MODEL.NUM_HEADS"
        )
    return Network(heads, patch)


def network_asked(config: CfgNode) -> Network:
    """What the configuration asks for by its keys."""
    return Network(*(config.MODEL[name.upper()] for name in Network._fields))


def adapt(
    config: CfgNode,
    encoder: nn.Module,
    weights: Mapping[str, torch.Tensor],
    said: Mapping[str, Any],
    path: str,
) -> CfgNode:
    """The configuration with MODEL.NUM_HEADS, PATCH_SIZE and WINDOW_SIZE as the weights have them.

    What ``encoder``, the configured one, has anyway stays as it is.

    Raises:
        UserError: the configuration asks for something else, or the heads cannot be told.
    """
    asked = network_asked(config)
    different = _differences(encoder, weights, said, asked, path)
    for key in different.keys() & asked.by_key().keys():
        raise UserError(
            f"{path}: its network has {key} {different[key]}, not {asked.by_key()[key]}: "
            "leave that key out"
        )
    return with_values(config, different)


def network_changes(config: CfgNode, adapted: CfgNode) -> list[str]:
    """What ``adapt`` has changed, in lines for the log."""
    before = network_asked(config).by_key()
    after = network_asked(adapted).by_key()
    return [
        f"the network of these weights has {key} {value}"
        for key, value in after.items()
        if before.get(key) != value
    ]


def check_network(
    encoder: nn.Module, weights: Mapping[str, torch.Tensor], said: Mapping[str, Any], path: str
) -> None:
    """Refuse an encoder with other heads, patches or windows than the weights have.

    Raises:
        UserError: the key of the configuration that builds the right one.
    """
    for key, value in _differences(encoder, weights, said, Network(), path).items():
        name = key.removeprefix("MODEL.").lower()
        raise UserError(
            f"{path}: its network has {name.replace('_', ' ')} {value}, the encoder has "
            f"{network_of(encoder).by_key()[key]}: build it with {key} {value}"
        )


def name_encoder(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The MODEL.ENCODER whose weights these seem to be, None where that cannot be told."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if "layer1.0.conv3.weight" in shapes:
        return RESNETS.get(len({n.split(".")[1] for n in shapes if n.startswith("layer3.")}))
    width = shapes.get(PATCHES, (0,))[0]
    depths: Any = len({n.split(".")[1] for n in shapes if n.startswith("blocks.")})
    if any(TABLE.match(name) for name in shapes):
        blocks = {tuple(n.split(".")[1:4:2]) for n in shapes if TABLE.match(n)}
        stages = sorted({int(stage) for stage, _ in blocks})
        depths = tuple(sum(int(s) == stage for s, _ in blocks) for stage in stages)
    for name, encoder in ENCODERS.items():
        options = encoder.keywords
        if (options["embed_dim"], options.get("depth") or options.get("depths")) == (width, depths):
            return name
    return None


def _differences(
    encoder: nn.Module,
    weights: Mapping[str, torch.Tensor],
    said: Mapping[str, Any],
    asked: Network,
    path: str,
) -> dict[str, int]:
    """What the weights have otherwise than an encoder of their kind and width, by key."""
    built, own = network_of(encoder).by_key(), isinstance(encoder, VisionTransformer)
    projection, theirs = (named.get(PATCHES) for named in (encoder.state_dict(), weights))
    if projection is None or theirs is None or projection.shape[:2] != theirs.shape[:2]:
        return {}  # loading will say what differs
    found = network_in(weights, said, asked, own, path).by_key()
    return {key: found[key] for key in found if built.get(key, found[key]) != found[key]}


def _said_heads(said: Mapping[str, Any], width: int) -> int:
    heads, encoder = said.get("num_heads"), said.get("encoder")
    if type(heads) is int and heads > 0 and width % heads == 0:
        return heads
    options = ENCODERS[encoder].keywords if encoder in ENCODERS else {}
    return options.get("num_heads", 0) if options.get("embed_dim") == width else 0


def _own_heads(width: int) -> int:
    options = [encoder.keywords for encoder in ENCODERS.values()]
    return next((o["num_heads"] for o in options if o["embed_dim"] == width and "depth" in o), 0)
