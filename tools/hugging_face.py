"""The folders in which Hugging Face's programs look for a model: weights, config.json, a card."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn
from yacs.config import CfgNode

from data.augmentation import INTERPOLATION, MEAN, STD
from models import METHODS
from models.swin import SwinTransformer, microsoft_weights
from models.vit import VisionTransformer
from tools.compare import CONFIG, RESULTS, read_json, read_run
from utils.checkpoint import replacing
from utils.config import NETWORK, TRAINING, settings
from utils.errors import UserError
from utils.run import write_text


def write_folder(
    path: str,
    weights: Mapping[str, torch.Tensor],
    header: Mapping[str, str],
    files: Mapping[str, dict[str, Any]],
    card: ModelCard,
) -> None:
    """Write model.safetensors with its header, files of JSON by their names, and README.md."""
    os.makedirs(path, exist_ok=True)
    write_weights(os.path.join(path, "model.safetensors"), weights, header)
    for name, content in files.items():
        write_text(os.path.join(path, name), json.dumps(content, indent=2) + "\n")
    card.save(os.path.join(path, "README.md"))


def write_weights(
    path: str, weights: Mapping[str, torch.Tensor], header: Mapping[str, str]
) -> None:
    """Write safetensors, whole or not at all."""
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    with replacing(path) as file:
        file.write(save(contiguous, dict(header)))


def write_timm_config(
    path: str, config: CfgNode, architecture: str, options: dict[str, Any]
) -> None:
    """Write config.json for timm.

    Args:
        path: of the file.
        config: the configuration.
        architecture: timm's name.
        options: of its constructor.
    """
    size = config.DATA.IMG_SIZE
    with torch.device("meta"):
        model = timm.create_model(architecture, **options)
    transform = {
        "input_size": (3, size, size),
        "interpolation": config.DATA.INTERPOLATION,
        "crop_pct": size / (size + 32) if config.TEST.CROP else 1.0,  # as data.dataset
        "crop_mode": "center" if config.TEST.CROP else "squash",
        "mean": MEAN,
        "std": STD,
    }
    arguments = {name: value for name, value in options.items() if name != "num_classes"}
    save_config_for_hf(model, path, model_args=arguments, data_config=transform)


def transformers_config(config: CfgNode, encoder: nn.Module) -> dict[str, Any]:
    """config.json for transformers: its ViT or Swin with the layers of an encoder.

    Raises:
        UserError: transformers has no such layers, or shrinks the windows of a Swin.
    """
    size, name = config.DATA.IMG_SIZE, config.MODEL.ENCODER
    shared = {
        "image_size": size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
    }
    if config.MODEL.REPLACE_LN_WITH_BN or not isinstance(
        encoder, (VisionTransformer, SwinTransformer)
    ):
        what = "MODEL.REPLACE_LN_WITH_BN" if config.MODEL.REPLACE_LN_WITH_BN else name
        raise UserError(f"{what}: --format transformers takes a plain ViT or Swin of this project")
    norm: Any = encoder.norm
    patch: Any = encoder.patch_embed
    shared |= {"layer_norm_eps": norm.eps, "patch_size": patch.patch_size[0]}
    if isinstance(encoder, VisionTransformer):
        block: Any = encoder.blocks[0]
        return shared | {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": encoder.embed_dim,
            "num_hidden_layers": len(encoder.blocks),
            "num_attention_heads": block.attn.num_heads,
            "intermediate_size": block.mlp.fc1.out_features,
        }
    stages: Any = encoder.layers
    first: Any = stages[0].blocks[0]
    window = first.attn.window_size[0]
    least = window * shared["patch_size"] * 2 ** (len(stages) - 1)
    if size < least:
        raise UserError(
            f"--size {size}: transformers shrinks the windows of a Swin on images below {least} "
            "pixels: take that size, or timm-hub"
        )
    return shared | {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "embed_dim": first.mlp.fc1.in_features,
        "hidden_size": encoder.num_features,
        "depths": [len(stage.blocks) for stage in stages],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in stages],
        "window_size": window,
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": False,
    }


def image_processor(config: CfgNode) -> dict[str, Any]:
    """preprocessor_config.json for transformers: the test-time transform."""
    size = config.DATA.IMG_SIZE
    square = {"height": size, "width": size}
    return {
        # only this one resizes by the short side
        "image_processor_type": "BitImageProcessor" if config.TEST.CROP else "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size + 32} if config.TEST.CROP else square,
        "resample": int(INTERPOLATION[config.DATA.INTERPOLATION]),
        "do_center_crop": config.TEST.CROP,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def plain_weights(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under timm's names for a ViT, under Microsoft's without buffers for a Swin."""
    if not isinstance(encoder, SwinTransformer):
        return encoder.state_dict()
    buffers = ("relative_position_index", "attn_mask")
    weights = microsoft_weights(encoder)
    return {name: value for name, value in weights.items() if not name.endswith(buffers)}


def model_card(
    library: str, usage: str, metadata: Mapping[str, str], provenance: Mapping[str, Any]
) -> ModelCard:
    """README.md of a model: what it is, how to load it, its data, recipe and results.

    Args:
        library: ``timm`` or ``transformers``.
        usage: how to load it, in Markdown.
        metadata: what an export says of its encoder.
        provenance: of the export. The recipe and the results are those of the run folder in which
            its checkpoint lies, the results only if these very weights were judged.
    """
    method, own = metadata["method"], metadata["method"] in METHODS
    head = ModelCardData(
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=["image-feature-extraction", "self-supervised-learning", library],
        license="cc-by-nc-4.0" if own else "unknown",
    )
    trained = f"pre-trained without labels by {method}" if own else f"(method: {method})"
    folder = Path(provenance.get("checkpoint") or "").parent
    facts = {
        "Encoder of the checkpoint": provenance.get("key"),
        "Epoch, update": f"{provenance.get('epoch')}, {provenance.get('step')}",
        "Side of the images": f"{metadata['image_size']} pixels",
        "Mean, deviation": f"{metadata['image_mean']}, {metadata['image_std']}",
        **recipe_data(provenance),
        "SHA-256 of the weights": provenance.get("weights"),
        "Code": f"version {provenance.get('version')}, commit {provenance.get('commit')}",
    }
    licence = (
        "`license` above is that of the code that this was trained with, if it was: CC BY-NC 4.0. "
        "Put another one there for weights that come from elsewhere."
    )
    none = "No config.json lies beside the checkpoint.\n"
    unjudged = "No evaluation of these weights lies beside the checkpoint.\n"
    parts = [
        f"---\n{head}\n---\n",
        f"# {metadata['encoder']} {trained}\n",
        "An encoder without a classifier: normalised images (B, 3, H, W) to features (B, F).\n",
        usage,
        "## Weights and data\n",
        as_table(("what", "value"), facts),
        "## Recipe\n",
        as_table(("key", "value"), recipe(folder)) or none,
        "## Results\n",
        as_table(("figure", "value"), results(folder, provenance.get("weights"))) or unjudged,
        f"## Licence\n\n{licence}\n",
    ]
    return ModelCard("\n".join(parts))


def recipe_data(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """How many images of which list the encoder was trained on, if that is known."""
    data = provenance.get("data")
    if not isinstance(data, dict):
        return {"Data": "unknown"}
    images = ", ".join(f"{count} {split}" for split, count in data.get("images", {}).items())
    return {"Images": images, "SHA-256 of their list": data.get("digest")}


def recipe(folder: Path) -> dict[str, Any]:
    """What the config.json of a run says that its weights depend on."""
    if not (folder / CONFIG).is_file():
        return {}
    return settings(read_json(folder / CONFIG), NETWORK | TRAINING)


def results(folder: Path, digest: str | None) -> dict[str, Any]:
    """The figures of the evaluations in a run folder that judged the weights of a digest."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob(f"*/{RESULTS}")):
        provenance = read_json(file).get("provenance")
        if digest and isinstance(provenance, dict) and provenance.get("weights") == digest:
            for name, judged in read_run(file).results.items():
                found |= {f"{name} {figure}": v for figure, v in judged.figures.items()}
    return found


def as_table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """A Markdown table of two columns, nothing if it has no rows."""
    if not rows:
        return ""
    cells = [head, ("---", "---"), *rows.items()]
    return "".join(f"| {name} | {_cell(value)} |\n" for name, value in cells)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
