"""Where the checkpoints of each family keep an encoder's weights, and under which names."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from utils.errors import UserError
from utils.stand_in import entries_of

Named = Mapping[str, torch.Tensor]

# where checkpoints of this field keep their weights, the innermost last
CONTAINERS = ("model", "state_dict", "teacher", "student")
DEEPEST = 4  # containers in one another
# what DistributedDataParallel and torch.compile put into names, anywhere
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")
# heads and the other parts of a wrapper, or of a training that the encoder does not need
LEFT_OUT = re.compile(
    r"^(head|head_dist|fc|fc_norm|predictor|projector|projector_k|queue|contrast|classifier"
    r"|pooler|mask_token|masked_embed)\b|^(head|decoder)[._]|_head\."
)
# transformers' names -> timm's, one after the other
TRANSFORMERS = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layers\.", "layers."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.(?!blocks\.|downsample\.)", r"blocks.\1."),
    (r"\.attention\.(?:attention|self|relative_position_bias)\.", ".attn."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.attn\.(query|key|value)\.", lambda found: f".attn.{found[1][0]}_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
# and back, as transformers writes them, after q, k and v were parted
INTO_TRANSFORMERS = (
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^norm\.", "layernorm."),
    (r"^(blocks\.\d+|layers\.\d+\.blocks\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"^(blocks\.\d+)\.attn\.", r"\1.attention.attention."),
    (r"^(layers\.\d+\.blocks\.\d+)\.attn\.", r"\1.attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^blocks\.", "encoder.layer."),
    (r"^layers\.", "encoder.layers."),
)
# places of torchvision's ResNet in a Sequential of its children
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def from_transformers(weights: Named) -> dict[str, torch.Tensor]:
    """Hugging Face's ViT or Swin, as written or as in memory -> timm's, with q, k and v fused."""
    renamed: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        for pattern, replacement in TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        three = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in renamed for part in three):
            fused = torch.cat([renamed.pop(part) for part in three])
            renamed[name.replace(".q_proj.", ".qkv.")] = fused
    return renamed


def to_transformers(weights: Named) -> dict[str, torch.Tensor]:
    """timm's ViT, or Microsoft's Swin without buffers -> Hugging Face's, as written."""
    parted: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                parted[name.replace(".qkv.", f".{part}.")] = third
        else:
            parted[name] = value
    renamed: dict[str, torch.Tensor] = {}
    for name, value in parted.items():
        for pattern, replacement in INTO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def from_children(weights: Named) -> dict[str, torch.Tensor]:
    """``nn.Sequential(*resnet.children())``, as lightly's examples have it -> a ResNet's names."""
    split = {name: name.partition(".") for name in weights}
    return {
        f"{CHILDREN.get(first, first)}.{rest}": weights[name]
        for name, (first, _, rest) in split.items()
    }


class Dialect(NamedTuple):
    """Names within an encoder.

    Attributes:
        stems: its first weight, by which it is recognised.
        translate: to timm's names.
    """

    stems: tuple[str, ...]
    translate: Callable[[Named], dict[str, torch.Tensor]] = dict


TIMM = Dialect(("patch_embed.proj.weight", "conv1.weight", "stem.0.weight", "conv_stem.weight"))
HUGGING_FACE = Dialect(("embeddings.patch_embeddings.projection.weight",), from_transformers)
SEQUENTIAL = Dialect(("0.weight",), from_children)


class Family(NamedTuple):
    """Checkpoints with the same names.

    Attributes:
        name: whose they are, for the log.
        online: prefix of the encoder that learns, without the parts that wrappers add.
        momentum: prefixes of its momentum encoder, the first that fits is taken.
        dialect: the names below the prefix.
    """

    name: str
    online: str
    momentum: tuple[str, ...]
    dialect: Dialect = TIMM


BOTH = ("momentum_backbone.", "backbone_momentum.")
# The first that fits is taken. The tests walk through them.
FAMILIES = (
    Family("this project, SynCo-v2, MoBY or solo-learn", "encoder.", ("encoder_k.",)),
    Family("MoCo v3 or solo-learn", "base_encoder.", ("momentum_encoder.",)),
    Family("DINO, iBOT, solo-learn or lightly", "backbone.", (*BOTH, "backbone.")),
    Family("lightly", "student_backbone.", ("teacher_backbone.",)),
    Family("lightly", "backbone.", (*BOTH, "backbone."), SEQUENTIAL),
    Family("lightly", "backbone.vit.", ("backbone.vit.",)),
    Family("lightly", "student_backbone.vit.", ("teacher_backbone.vit.",)),
    Family("lightly", "vit.", ("vit.",)),
    Family("a Lightning module's model", "model.", ("model.",)),
    Family("timm, DeiT, MAE or Microsoft's Swin", "", ("",)),
    Family("Hugging Face's ViT", "vit.", ("vit.",), HUGGING_FACE),
    Family("Hugging Face's Swin", "swin.", ("swin.",), HUGGING_FACE),
    Family("Hugging Face's ViT or Swin", "", ("",), HUGGING_FACE),
)


class Found(NamedTuple):
    """The weights of an encoder in a checkpoint.

    Attributes:
        weights: under timm's names.
        family: its name.
        inside: the containers, the outermost first.
        prefix: of the names in the file.
        others: how many weights of other parts the file has.
    """

    weights: dict[str, torch.Tensor]
    family: str
    inside: tuple[str, ...]
    prefix: str
    others: int


def find_weights(state: Mapping, stem: str, key: str, path: str, container: str = "") -> Found:
    """The weights of an encoder in a checkpoint of any family.

    They lie in one of ``CONTAINERS``, or in the only other mapping of the file that fits.

    Args:
        state: the checkpoint, which may hold anything besides.
        stem: what the encoder calls its first convolution, if that is a name of its own.
        key: ``encoder`` or ``encoder_k``, of a checkpoint with two.
        path: what to call it in an error.
        container: where in the file the weights lie, names with dots between them.

    Raises:
        UserError: none of the families fits, or several mappings of the file do.
    """
    places = _mappings(state)
    if container:
        named = {".".join(place): place for place in places if place}
        if container not in named:
            raise UserError(f"{path}: it has no {container}, its containers are: {_some(named)}")
        places = {named[container]: places[named[container]]}
    known: tuple[str, ...] = ()
    for name in CONTAINERS:
        if (*known, name) in places:
            known = (*known, name)
    found = _fit(places[known], known, stem, key) if known in places else None
    if found:
        return found
    fitting = [found for place in places if (found := _fit(places[place], place, stem, key))]
    if len(fitting) > 1:
        names = _some(".".join(found.inside) or "the file itself" for found in fitting)
        raise UserError(f"{path}: several parts of it fit: {names}: choose one by --container")
    if fitting:
        return fitting[0]
    example = next((name for part in places.values() for name in _tensors(part)), None)
    inside = [".".join(place) for place in places if place and _tensors(places[place])]
    hint = f"its names are like {example}" if example else "its tensors have no names"
    hint += f", in {_some(inside)}" if inside else ""
    raise UserError(
        f"{path}: no encoder weights found in it "
        f"({hint if _holds_tensors(state) else 'it holds no tensors'})"
    )


def _holds_tensors(state: Any) -> bool:
    seen, queue = set(), [state]
    for node in queue:
        if torch.is_tensor(node):
            return True
        if id(node) not in seen and isinstance(node, (dict, list, tuple)):
            seen.add(id(node))
            queue += entries_of(node).values() or node
    return False


def _some(names: Iterable[str]) -> str:
    """The first five names, or ``none``."""
    return ", ".join(list(names)[:5]) or "none"


def _mappings(state: Mapping) -> dict[tuple[str, ...], Mapping]:
    """The checkpoint and all mappings within it by their places, each once."""
    places: dict[tuple[str, ...], Mapping] = {(): state}
    seen = {id(state)}
    queue: list[tuple[str, ...]] = [()]
    for place in queue:
        for name, value in places[place].items():
            inner = entries_of(value)
            if inner and isinstance(name, str) and id(inner) not in seen:
                seen.add(id(inner))
                places[(*place, name)] = inner
                queue.append((*place, name))
    return places


def _tensors(part: Mapping) -> Named:
    return {n: v for n, v in part.items() if isinstance(n, str) and torch.is_tensor(v)}


def _fit(part: Mapping, inside: tuple[str, ...], stem: str, key: str) -> Found | None:
    """The first family whose names these are."""
    tensors = _tensors(part)
    plain = {WRAPPERS.sub("", name): name for name in tensors}
    for family in FAMILIES:
        stems = (stem, *TIMM.stems) if family.dialect is TIMM else family.dialect.stems
        prefixes = (family.online,) if key == "encoder" else family.momentum
        for prefix in prefixes:
            first = next((s for s in stems if prefix + s in plain), None)
            if first is None or tensors[plain[prefix + first]].ndim != 4:
                continue
            below = {n[len(prefix) :]: tensors[plain[n]] for n in plain if n.startswith(prefix)}
            return Found(
                weights=family.dialect.translate(below),
                family=family.name,
                inside=inside,
                prefix=plain[prefix + first].removesuffix(first),
                others=len(tensors) - len(below),
            )
    return None
