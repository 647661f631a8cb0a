"""Weights of each encoder under the names and shapes that published code has."""

import sys

import pytest
import timm
import torch
import torchvision
from helpers import ROOT, fresh, reference

from models import build_encoder
from models.encoder import ENCODERS, RESNETS, create_encoder
from models.network import network_of
from models.pretrained import load_encoder_weights
from models.swin import microsoft_weights
from tools import export_backbone
from utils.config import load_config

# width, blocks, side of a patch: DeiT, MAE and timm
VITS = {
    "vit_tiny": (192, 12, 16),
    "vit_small": (384, 12, 16),
    "vit_base": (768, 12, 16),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 14),
}
# width, blocks and heads of each stage: Microsoft
SWINS = {
    "swin_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
# blocks of each stage: torchvision, which has no name for the last
BLOCKS = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnet200": (3, 24, 36, 3),
}


def layer(name, inputs, outputs, *kernel):
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, width):
    """A transformer block of DeiT and, but for its positions, of Microsoft."""
    return {
        **norm(f"{name}.norm1", width),
        **layer(f"{name}.attn.qkv", width, 3 * width),
        **layer(f"{name}.attn.proj", width, width),
        **norm(f"{name}.norm2", width),
        **layer(f"{name}.mlp.fc1", width, 4 * width),
        **layer(f"{name}.mlp.fc2", 4 * width, width),
    }


def deit(width, depth, patch):
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + (224 // patch) ** 2, width)}
    shapes |= layer("patch_embed.proj", 3, width, patch, patch)
    for i in range(depth):
        shapes |= block(f"blocks.{i}", width)
    return shapes | norm("norm", width)


def microsoft(width, depths, heads):
    """At 224 pixels: 56, 28, 14 and 7 patches a side, windows of 7, shifted where there are two."""
    shapes = layer("patch_embed.proj", 3, width, 4, 4) | norm("patch_embed.norm", width)
    for i, depth in enumerate(depths):
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            shapes |= block(name, width << i)
            shapes[f"{name}.attn.relative_position_bias_table"] = (169, heads[i])
            shapes[f"{name}.attn.relative_position_index"] = (49, 49)
            if j % 2 and i < 3:
                shapes[f"{name}.attn_mask"] = ((8 >> i) ** 2, 49, 49)
        if i < 3:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * width << i, 4 * width << i)
            shapes |= norm(f"layers.{i}.downsample.norm", 4 * width << i)
    return shapes | norm("norm", width << 3)


def shapes_of(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


def published(name):
    if name in VITS:
        return deit(*VITS[name])
    if name in SWINS:
        return microsoft(*SWINS[name])
    with torch.device("meta"):
        bottleneck = torchvision.models.resnet.Bottleneck
        weights = torchvision.models.ResNet(bottleneck, BLOCKS[name]).state_dict()
    return {key: shape for key, shape in shapes_of(weights).items() if not key.startswith("fc.")}


@pytest.mark.parametrize("name", ["vit_small", "vit_base", "swin_tiny", "swin_small", "swin_base"])
def test_the_tables_are_the_published_networks(name):
    """Written down from them."""
    stored = reference("state_dict.json")[name]
    shapes = stored["parameters"] | stored["buffers"]
    assert published(name) == {key: tuple(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", [*VITS, *SWINS, *BLOCKS])
def test_names_and_shapes(name):
    with torch.device("meta"):
        encoder = create_encoder(name)
    weights = microsoft_weights(encoder) if name in SWINS else encoder.state_dict()
    assert shapes_of(weights) == published(name)


def test_a_vit_huge_for_vitdet():
    """Whose patches are of 16 pixels."""
    with torch.device("meta"):
        encoder = create_encoder("vit_huge", patch_size=16)
    assert shapes_of(encoder.state_dict()) == deit(1280, 32, 16)


def test_every_encoder_is_in_a_table():
    assert {*VITS, *SWINS, *BLOCKS, "vit_nano"} == {*ENCODERS, *RESNETS}  # published nowhere


def test_the_buffers_of_a_swin():
    """Two patches see each other where both come from the same part of the shifted image."""
    weights = microsoft_weights(create_encoder("swin_tiny"))
    index = weights["layers.0.blocks.0.attn.relative_position_index"]
    y, x = torch.arange(49) // 7, torch.arange(49) % 7
    assert index.equal((y[:, None] - y + 6) * 13 + (x[:, None] - x + 6))
    assert index.dtype == torch.int64
    part = (torch.arange(14) >= 7).int() + (
        torch.arange(14) >= 11
    )  # whole, before, behind the edge
    parts = 3 * part[:, None] + part
    windows = parts.view(2, 7, 2, 7).transpose(1, 2).reshape(4, 49)
    expected = torch.where(windows[:, None] == windows[:, :, None], 0.0, -100.0)
    assert weights["layers.2.blocks.1.attn_mask"].equal(expected)


def config(name, *opts):
    opts = ["MODEL.ENCODER", name, *opts]
    return load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)


def write(config, path, size=224):
    """Write an encoder of random weights as the tool does; the encoder, and the file's content."""
    torch.manual_seed(0)
    encoder = build_encoder(config, 0.0).eval()
    network = {"network": network_of(encoder).known()}
    again = export_backbone.write_pth(encoder, config, str(path), {}, network)
    assert export_backbone.compare(encoder, again, size) < 1e-5
    return encoder, torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny", "resnet50"])
def test_readers_find_the_weights(tmp_path, name):
    """MMEngine looks into state_dict alone, DeiT and Microsoft into model; one copy is stored."""
    encoder, written = write(config(name), tmp_path / "e.pth")
    assert shapes_of(written["model"]) == published(name)
    assert written["state_dict"].keys() == written["model"].keys()
    stored = sum(v.numel() * v.element_size() for v in written["model"].values())
    assert (tmp_path / "e.pth").stat().st_size < 1.1 * stored
    if name == "resnet50":
        theirs = torchvision.models.resnet50()
        theirs.fc = torch.nn.Identity()
        theirs.load_state_dict(written["state_dict"])
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(images), encoder(images))


@pytest.mark.parametrize("name", ["timm/swin_tiny_patch4_window7_224", "timm/resnet18"])
def test_backbones_that_timm_names(tmp_path, name):
    """A Swin of timm has Microsoft's names too, and reads them."""
    encoder, written = write(config(name), tmp_path / "e.pth")
    swin = "swin" in name
    assert ("layers.0.downsample.reduction.weight" in written["model"]) == swin
    assert ("layers.0.blocks.1.attn_mask" in written["model"]) == swin
    torch.manual_seed(1)
    other = create_encoder(name)
    load_encoder_weights(other, str(tmp_path / "e.pth"))
    for key, value in encoder.state_dict().items():
        assert other.state_dict()[key].equal(value), key


@pytest.mark.parametrize(
    "name, opts, expected",
    [
        ("vit_small", (), "12 heads, those of DeiT, timm and DINO have 6"),
        ("vit_small", ("MODEL.NUM_HEADS", "6"), ""),
        ("vit_tiny", (), ""),
        ("vit_nano", (), ""),
        ("swin_tiny", (), ""),  # as wide as a ViT-B
        ("swin_tiny", ("MODEL.REPLACE_LN_WITH_BN", "True"), "norm2 of each block is a BatchNorm"),
        ("resnet50", (), ""),
    ],
)
def test_what_a_builder_would_misread_is_said(tmp_path, capsys, name, opts, expected):
    given = config(name, "DATA.IMG_SIZE", "64", *opts)
    _, written = write(given, tmp_path / "e.pth", 64)
    printed = capsys.readouterr().out
    warning = written["metadata"].get("warning", "")
    assert expected in warning and bool(expected) == bool(warning)
    assert (f"warning: {warning}\n" == printed) if warning else not printed


def test_a_builder_of_6_heads_does_misread(tmp_path, monkeypatch, capsys):
    """Without a word, so that the file and the export say it; with 12 heads it is right."""
    encoder, weights = fresh("vit_small", img_size=64)
    torch.save(weights, tmp_path / "c.pth")
    out = tmp_path / "e.pth"
    arguments = ["--cfg", ROOT / "configs/moby_vit_small.yaml", "--pretrained", tmp_path / "c.pth"]
    arguments += ["--format", "pth", "--out", out, "--size", "64"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export_backbone.main()
    assert "tell the builder num_heads=12" in capsys.readouterr().out
    written = torch.load(out, weights_only=True)
    assert written["metadata"]["network"] == '{"num_heads": 12, "patch_size": 16}'
    images, differences = torch.randn(2, 3, 64, 64), []
    for heads in (6, 12):
        deit = timm.create_model("deit_small_patch16_224", img_size=64, num_heads=heads)
        deit.reset_classifier(0)
        deit.load_state_dict(written["model"])
        with torch.no_grad():
            differences.append((deit.eval()(images) - encoder.eval()(images)).abs().max())
    assert differences[0] > 0.01 > 1e-4 > differences[1]
