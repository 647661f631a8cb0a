"""Write a checkpoint's backbone for other programs: timm, transformers, .pth, and ONNX.

    python -m tools.export_backbone --cfg FILE --output OUT --tag TAG --format timm \\
        --out vit.safetensors
"""

import argparse
import inspect
import json
import os
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from torch import nn
from yacs.config import CfgNode

from data.augmentation import MEAN, STD
from models import build_encoder
from models.encoder import ENCODERS, PREFIX, create_timm_backbone, full_name
from models.families import to_transformers
from models.network import LEARNED, Network, network_asked, network_of
from models.pretrained import (
    add_pretrained_arguments,
    build_pretrained_encoder,
    load_encoder_weights,
)
from models.swin import WINDOW, microsoft_weights
from tools import hugging_face
from utils.arguments import TRAINING, number_in, parse_arguments
from utils.checkpoint import save_checkpoint
from utils.config import with_values
from utils.errors import UserError
from utils.provenance import cost, gather_provenance
from utils.run import run_script

# timm's model with the same layers, and the arguments of its constructor
TIMM_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_nano": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4},
    ),
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {"num_heads": 12}),
    "vit_base": ("vit_base_patch16_224", {}),
    "vit_large": ("vit_large_patch16_224", {}),
    "vit_huge": ("vit_huge_patch14_224", {}),
    "swin_tiny": ("swin_tiny_patch4_window7_224", {"strict_img_size": False}),
    "swin_small": ("swin_small_patch4_window7_224", {"strict_img_size": False}),
    "swin_base": ("swin_base_patch4_window7_224", {"strict_img_size": False}),
    "swin_large": ("swin_large_patch4_window7_224", {"strict_img_size": False}),
}
PROCESSOR = (
    "The model is the same, its processor is not quite: transformers rounds resized images in its "
    "own way, so that features of one photograph can differ (lowest cosine measured: 0.990)."
)
LARGEST_DIFFERENCE = 1e-4  # of features, relative to the largest

Features = Callable[[torch.Tensor], torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this tool."""
    add_pretrained_arguments(parser)
    parser.add_argument("--format", choices=list(WRITERS), required=True, help="what to write")
    parser.add_argument("--out", metavar="PATH", required=True, help="the file or folder to write")
    parser.add_argument(
        "--size", type=number_in(1, 16384), help="side of the images (default: DATA.IMG_SIZE)"
    )


def main() -> None:
    """Load, write, and compare the features of what was written."""
    started = time.monotonic()
    args, config = parse_arguments(__doc__, add_arguments, unused=TRAINING)
    config = with_values(config, {"DATA.IMG_SIZE": args.size or config.DATA.IMG_SIZE})
    encoder, origin = build_pretrained_encoder(args, config, print, learns=True)
    computed = {"AMP_OPT_LEVEL": "O0"}  # whatever the machine has
    config = with_values(config, Network(**origin["network"]).by_key() | computed)
    suffix, write = WRITERS[args.format]
    if not args.out.endswith(suffix):
        raise UserError(f"--out {args.out}: the name of a file of {args.format} ends in {suffix}")
    try:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        cpu = torch.device("cpu")
        provenance = gather_provenance(config, cpu, origin, origin.get("data"))
        provenance |= cost(cpu, started)
        written = write(encoder, config, args.out, describe(args, config, origin), provenance)
    except OSError as error:
        raise UserError(f"{args.out}: cannot write ({error.strerror or error})") from error
    if written is not None:
        difference = compare(encoder, written, config.DATA.IMG_SIZE)
        print(f"{args.out} written, its features differ by {difference:.1e} at most")


def describe(args: argparse.Namespace, config: CfgNode, origin: dict[str, Any]) -> dict[str, str]:
    """What a reader of the file must know, as text."""
    return {
        "method": "none" if args.random_weights else origin["method"] or "unknown",
        "encoder": config.MODEL.ENCODER,
        "network": json.dumps(network_asked(config).known()),
        "key": args.key,
        "image_size": str(config.DATA.IMG_SIZE),
        "image_mean": json.dumps(MEAN),
        "image_std": json.dumps(STD),
    }


def timm_call(config: CfgNode) -> tuple[str, dict]:
    """The name and arguments of ``timm.create_model`` for the configured encoder.

    Raises:
        UserError: timm has no such layers, or none for images of this size.
    """
    name, size = full_name(config.MODEL.ENCODER), config.DATA.IMG_SIZE
    if config.MODEL.REPLACE_LN_WITH_BN:
        raise UserError("MODEL.REPLACE_LN_WITH_BN: timm has no such model, take pth or onnx")
    network = network_asked(config).known()
    if name.startswith(PREFIX):
        with torch.device("meta"):
            _, options = create_timm_backbone(name, img_size=size, **network)
        return name.removeprefix(PREFIX), {"num_classes": 0, **options}
    ours = inspect.signature(ENCODERS[name]).parameters
    patch = network.get("patch_size", ours["patch_size"].default)
    # of this project's, what the name does not say
    network = {key: value for key, value in network.items() if ours[key].default != value}
    name, options = TIMM_MODELS[name]
    options = options | network
    if name.startswith("swin"):
        # as models/swin.py: the windows keep their size, smaller images are padded
        size = max(size, network.get("window_size", WINDOW) * patch * 8)
    if config.DATA.IMG_SIZE % patch:
        raise UserError(f"--size must be a multiple of {patch}, the patches of {name}")
    sized = {} if size == 224 else {"img_size": size}
    return name, {"num_classes": 0, **options, **sized}


def write_timm(
    encoder: nn.Module, config: CfgNode, path: str, metadata: dict, provenance: dict
) -> Features:
    """Write safetensors under timm's names and print the call that reads them."""
    name, options = timm_call(config)
    metadata = metadata | {"timm_model": name, "timm_options": json.dumps(options)}
    hugging_face.write_weights(path, encoder.state_dict(), header(metadata, provenance))
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    print(f"timm.create_model({name!r}{arguments}, checkpoint_path={path!r})")
    return timm.create_model(name, **options, checkpoint_path=path).eval()


def write_timm_hub(
    encoder: nn.Module, config: CfgNode, path: str, metadata: dict, provenance: dict
) -> Features:
    """Write a folder that timm reads from a disk, and from the Hub once it was uploaded."""
    name, options = timm_call(config)
    shown = os.path.basename(os.path.normpath(path))
    usage = f'import timm\n\nmodel = timm.create_model("local-dir:{shown}", pretrained=True)'
    card = hugging_face.model_card("timm", f"```python\n{usage}\n```\n", metadata, provenance)
    head = header(metadata, provenance)
    hugging_face.write_folder(path, encoder.state_dict(), head, {}, card)
    hugging_face.write_timm_config(os.path.join(path, "config.json"), config, name, options)
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def write_transformers(
    encoder: nn.Module, config: CfgNode, path: str, metadata: dict, provenance: dict
) -> Features | None:
    """Write a folder for ``ViTModel`` or ``SwinModel`` of transformers, without a pooler."""
    described = hugging_face.transformers_config(config, encoder)
    (kind,) = described["architectures"]
    vit = kind == "ViTModel"
    pooler = ", add_pooling_layer=False" if vit else ""
    feature = "last_hidden_state[:, 0]" if vit else "pooler_output"
    shown = os.path.basename(os.path.normpath(path))
    usage = f"""```python
from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained("{shown}")
model = {kind}.from_pretrained("{shown}"{pooler})
features = model(**processor(images, return_tensors="pt")).{feature}
```

{PROCESSOR}
"""
    files = {
        "config.json": described,
        "preprocessor_config.json": hugging_face.image_processor(config),
    }
    weights = to_transformers(hugging_face.plain_weights(encoder))
    card = hugging_face.model_card("transformers", usage, metadata, provenance)
    hugging_face.write_folder(path, weights, header(metadata, provenance), files, card)
    print(PROCESSOR)
    try:
        import transformers
    except ImportError:
        print(f"{path} written, not compared: transformers is not installed")
        return None
    if vit:
        reader = transformers.ViTModel.from_pretrained(path, add_pooling_layer=False).eval()
        return lambda images: reader(images).last_hidden_state[:, 0]
    swin = transformers.SwinModel.from_pretrained(path).eval()
    return lambda images: swin(images).pooler_output


def header(metadata: dict[str, str], provenance: dict[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file, which are text."""
    return metadata | {"provenance": json.dumps(provenance), "format": "pt"}


def write_pth(
    encoder: nn.Module, config: CfgNode, path: str, metadata: dict, provenance: dict
) -> Features:
    """Write the weights under the names of Microsoft's Swin, DeiT's ViT or torchvision's ResNet.

    They are in ``model``, where Swin, DeiT and Detectron2 look, and in ``state_dict``, where
    MMEngine looks. The file holds them once.
    """
    if isinstance(encoder, TimmSwinTransformer):
        weights = microsoft_weights(encoder)
    else:
        weights = encoder.state_dict()
    warning = find_misreading(config, encoder)
    if warning:
        metadata = metadata | {"warning": warning}
        print(f"warning: {warning}")
    state = {"model": weights, "state_dict": weights, "metadata": metadata}
    save_checkpoint(state | {"provenance": provenance}, path)
    copy = build_encoder(config, 0.0)
    load_encoder_weights(copy, path)
    return copy.eval()


def find_misreading(config: CfgNode, encoder: Any) -> str | None:
    """What a published builder gets wrong without a word, None if it gets all right."""
    heads, width = network_of(encoder).num_heads, encoder.num_features
    if heads and heads != LEARNED.get(width, heads):
        return (
            f"this ViT has {heads} heads, those of DeiT, timm and DINO have {LEARNED[width]} with "
            f"weights of the same shapes: tell the builder num_heads={heads}"
        )
    if config.MODEL.REPLACE_LN_WITH_BN:
        return "norm2 of each block is a BatchNorm: a builder with LayerNorm gives other features"
    return None


def write_onnx(
    encoder: nn.Module, config: CfgNode, path: str, metadata: dict, provenance: dict
) -> Features | None:
    """Write an ONNX graph, ``images`` (B, 3, S, S) -> ``features`` (B, F), of any batch size."""
    try:
        import onnxscript  # noqa: F401 what torch needs for it
    except ImportError as error:
        needed = "pip install onnxscript onnxruntime (extra [onnx])"
        raise UserError(f"--format onnx needs packages: {needed}") from error
    example = torch.zeros(2, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
    program = torch.onnx.export(
        encoder,
        (example,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with ``dynamo``
    program.model.metadata_props.update(metadata | {"provenance": json.dumps(provenance)})
    program.save(path)
    try:
        import onnxruntime
    except ImportError:
        print(f"{path} written, not compared: onnxruntime is not installed")
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def compare(encoder: nn.Module, written: Features, size: int) -> float:
    """The largest difference in features of three random images, relative to the largest feature.

    Raises:
        RuntimeError: more than rounding explains.
    """
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = encoder(images)
    difference = float((written(images) - expected).abs().max() / expected.abs().max())
    if not difference < LARGEST_DIFFERENCE:
        raise RuntimeError(f"the features of what was written differ by {difference:.1e}")
    return difference


# by format: what the name of the file ends in, nothing for a folder, and what writes it
WRITERS: dict[str, tuple[str, Callable[..., Features | None]]] = {
    "timm": (".safetensors", write_timm),
    "timm-hub": ("", write_timm_hub),
    "transformers": ("", write_transformers),
    "pth": (".pth", write_pth),
    "onnx": (".onnx", write_onnx),
}

if __name__ == "__main__":
    run_script(main)
