"""The network in a file is the network that is judged."""

import argparse
from functools import partial

import pytest
import timm
import torch
from helpers import ROOT
from torch import nn

from models import build_encoder
from models.encoder import ENCODERS, create_encoder
from models.network import Network, name_encoder, network_in, network_of
from models.pretrained import (
    build_pretrained_encoder,
    describe_origin,
    load_encoder_weights,
    read_encoder_for,
)
from models.swin import SwinTransformer
from models.vit import VisionTransformer, are_fixed_positions, fixed_positions
from utils.config import load_config
from utils.errors import UserError


@pytest.fixture
def shallow(monkeypatch):
    """Encoders of the true widths and heads, with few blocks."""
    for name, width, heads in (("vit_small", 384, 12), ("vit_base", 768, 12)):
        few = partial(VisionTransformer, embed_dim=width, depth=2, num_heads=heads)
        monkeypatch.setitem(ENCODERS, name, few)
    few = partial(SwinTransformer, embed_dim=96, depths=(2, 2), num_heads=(3, 6))
    monkeypatch.setitem(ENCODERS, "swin_tiny", few)


def small_of_timm(**options):
    """The ViT-S of timm, DeiT and DINO, 6 heads and learned positions, with weights that tell."""
    torch.manual_seed(0)
    options = {"depth": 2, "num_classes": 0, "dynamic_img_size": True} | options
    model = timm.create_model("vit_small_patch16_224", **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def config(name="vit_small", size=64, *opts):
    opts = ["MODEL.ENCODER", name, "DATA.IMG_SIZE", str(size), *opts]
    return load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)


def judged(path, *given):
    """The encoder that an evaluation judges, its origin, and the log."""
    said = []
    args = argparse.Namespace(pretrained=str(path), random_weights=False, key="encoder")
    encoder, origin = build_pretrained_encoder(args, config(*given), said.append)
    assert describe_origin(origin) in said[-1]
    return encoder, origin, said


@torch.no_grad()
def same(first, second, size=64):
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(first(images), second(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_small", "timm/vit_small_patch16_224"])
@pytest.mark.parametrize("size", [64, 80])
def test_learned_positions_are_of_6_heads(tmp_path, shallow, name, size):
    """DINO's full checkpoint, also at another grid, as one of timm too."""
    real = (
        small_of_timm(img_size=64) if name == "vit_small" else small_of_timm(img_size=64, depth=12)
    )
    state = {"backbone." + key: value for key, value in real.state_dict().items()}
    torch.save({"teacher": state, "epoch": 3}, tmp_path / "d.pth")
    encoder, origin, said = judged(tmp_path / "d.pth", name, size)
    assert origin["network"] == {"num_heads": 6, "patch_size": 16}
    assert ("the network of these weights has MODEL.NUM_HEADS 6" in said) == (name == "vit_small")
    same(encoder, real, size)


def test_fixed_positions_are_of_12_heads(tmp_path, shallow):
    """MoCo v3 and this project, also where timm's network of that name has 6."""
    real = create_encoder("vit_small", 64).eval()
    torch.save(
        {"module.base_encoder." + k: v for k, v in real.state_dict().items()}, tmp_path / "m"
    )
    encoder, origin, _ = judged(tmp_path / "m", "vit_small")
    assert origin["network"]["num_heads"] == 12
    same(encoder, real)
    weights = real.state_dict()
    assert network_in(weights, {}, Network(), False, "m").num_heads == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(tmp_path, shallow, dtype):
    """Rounded positions are fixed ones still."""
    real = create_encoder("vit_small", 64).eval()
    weights = {key: value.to(dtype) for key, value in real.state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    encoder, origin, _ = judged(tmp_path / "w.pth", "vit_small", 80)
    assert origin["network"]["num_heads"] == 12 and encoder.fixed_positions
    for key, value in encoder.state_dict().items():
        assert value.dtype == torch.float32
        if key != "pos_embed":
            assert value.equal(weights[key].float()), key


@pytest.mark.parametrize("window, patch", [(12, 4), (7, 2), (6, 4)])
def test_the_window_of_a_swin(tmp_path, shallow, window, patch):
    options = {"window_size": window, "patch_size": patch, "depths": (2, 2), "num_heads": (3, 6)}
    size = window * patch * 2
    name = "swin_tiny_patch4_window7_224"
    real = timm.create_model(name, img_size=size, num_classes=0, **options).eval()
    for parameter in real.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save({"model": real.state_dict()}, tmp_path / "s.pth")
    encoder, origin, said = judged(tmp_path / "s.pth", "swin_tiny", size)
    assert origin["network"] == {"patch_size": patch, "window_size": window}
    expected = {"WINDOW_SIZE": window} if window != 7 else {"PATCH_SIZE": patch}
    for key, value in expected.items():
        assert f"the network of these weights has MODEL.{key} {value}" in said
    same(encoder, real, size)


def test_patches_of_a_vit(tmp_path, shallow):
    real = small_of_timm(img_size=64, patch_size=8)
    torch.save(real.state_dict(), tmp_path / "p.pth")
    encoder, origin, _ = judged(tmp_path / "p.pth", "vit_small")
    assert origin["network"] == {"num_heads": 6, "patch_size": 8}
    same(encoder, real)


def test_a_key_settles_what_a_file_cannot_tell(tmp_path, shallow):
    real = small_of_timm(img_size=64, num_heads=4)
    torch.save(real.state_dict(), tmp_path / "p.pth")
    encoder, origin, _ = judged(tmp_path / "p.pth", "vit_small", 64, "MODEL.NUM_HEADS", "4")
    assert origin["network"]["num_heads"] == 4
    same(encoder, real)

    odd = VisionTransformer(img_size=32, embed_dim=128, patch_size=8, depth=5, num_heads=4)
    odd.pos_embed.data.normal_()
    torch.save(odd.state_dict(), tmp_path / "o.pth")
    with pytest.raises(UserError, match=r"does not tell how many heads its ViT has: set MODEL.NUM"):
        judged(tmp_path / "o.pth", "vit_nano")
    encoder, _, _ = judged(tmp_path / "o.pth", "vit_nano", 32, "MODEL.NUM_HEADS", "8")
    assert network_of(encoder).num_heads == 8


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("PATCH_SIZE", 16, "its network has MODEL.PATCH_SIZE 8, not 16: leave that key out"),
        ("WINDOW_SIZE", 7, "MODEL.WINDOW_SIZE: vit_small has no such thing, leave it out"),
        ("NUM_HEADS", 7, "MODEL.ENCODER vit_small: no such network"),
    ],
)
def test_a_key_that_contradicts_is_refused(tmp_path, shallow, key, value, message):
    torch.save(small_of_timm(patch_size=8).state_dict(), tmp_path / "p.pth")
    with pytest.raises(UserError, match=message) as error:
        judged(tmp_path / "p.pth", "vit_small", 64, f"MODEL.{key}", str(value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        {"provenance": {"network": {"num_heads": 12}}},
        {"config": "MODEL:\n  ENCODER: vit_small\n  NUM_HEADS: 12\n"},
        {"config": "MODEL:\n  ENCODER: vit_small\n"},  # before the key
    ],
)
def test_what_a_file_says_counts_more_than_its_positions(tmp_path, shallow, said):
    real = small_of_timm(img_size=64, num_heads=12)
    torch.save({"model": real.state_dict()} | said, tmp_path / "c.pth")
    encoder, origin, _ = judged(tmp_path / "c.pth", "vit_small")
    assert origin["network"]["num_heads"] == 12
    same(encoder, real)
    if "ENCODER" not in said.get("config", ""):
        with pytest.raises(UserError, match=r"MODEL\.NUM_HEADS 12, not 6"):
            judged(tmp_path / "c.pth", "vit_small", 64, "MODEL.NUM_HEADS", "6")


@pytest.mark.parametrize(
    "said",
    [
        {"provenance": {"network": {"num_heads": "x"}}},
        {"provenance": {"network": {"num_heads": -6}}},
        {"provenance": {"network": {"num_heads": 7}}},  # does not divide 384
        {"config": "MODEL:\n  ENCODER: vit_base\n  NUM_HEADS: 0\n"},  # of another width
        {"config": 3, "provenance": []},
    ],
)
def test_what_a_file_says_wrongly_does_not_count(tmp_path, shallow, said):
    torch.save({"model": small_of_timm().state_dict()} | said, tmp_path / "c.pth")
    assert judged(tmp_path / "c.pth", "vit_small")[1]["network"]["num_heads"] == 6


def test_a_judged_encoder_written_again_keeps_its_heads(tmp_path, shallow):
    torch.save(small_of_timm(img_size=64).state_dict(), tmp_path / "d.pth")
    encoder, origin, _ = judged(tmp_path / "d.pth", "vit_small")
    model = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": model, "provenance": origin}, tmp_path / "again.pth")
    _, adapted = read_encoder_for(config(), str(tmp_path / "again.pth"), "encoder")
    assert network_of(build_encoder(adapted, 0.0)).num_heads == 6
    with pytest.raises(UserError, match="num heads 6, the encoder has 12: build it with"):
        load_encoder_weights(create_encoder("vit_small", 64), str(tmp_path / "again.pth"))


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_the_encoder_to_name_is_named(name):
    with torch.device("meta"):
        weights = create_encoder(name).state_dict()
    assert name_encoder(weights) == name


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152"])
def test_the_resnet_to_name_is_named(name):
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    assert name_encoder(weights) == name
    assert name_encoder({}) is None


def test_another_encoder_is_refused_with_its_name(tmp_path):
    torch.save(create_encoder("vit_tiny", 64).state_dict(), tmp_path / "t.pth")
    with pytest.raises(
        UserError, match=r"of another model: it looks like MODEL.ENCODER vit_tiny \("
    ):
        judged(tmp_path / "t.pth", "vit_nano")


def test_positions_of_any_vit_of_timm_are_interpolated(tmp_path):
    """With registers or without a class token, whose positions have other numbers of tokens."""
    for name in ("vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256"):
        small, large = (create_encoder(f"timm/{name}", size).eval() for size in (64, 96))
        nn.init.normal_(small.pos_embed)
        torch.save(small.state_dict(), tmp_path / "w.pth")
        load_encoder_weights(large, str(tmp_path / "w.pth"))
        for size in (64, 96, 128):  # once, from the file's grid to that of the image
            same(large, small, size)


@pytest.mark.parametrize("name", ["vit_nano", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_learned_positions_of_a_file_serve_every_size(tmp_path, name, size):
    """Not by way of DATA.IMG_SIZE; of an encoder that learns they fit its images."""
    real, heads = create_encoder(name, 64).eval(), 4 if name == "vit_nano" else 3
    nn.init.normal_(real.pos_embed)
    torch.save(
        {"model": real.state_dict(), "provenance": {"network": {"num_heads": heads}}},
        tmp_path / "w.pth",
    )
    encoder, *_ = judged(tmp_path / "w.pth", name, size)
    if name == "vit_nano":
        real.fixed_positions = False
    for image in (32, 48, 64, 96):
        same(encoder, real, image)
    args = argparse.Namespace(
        pretrained=str(tmp_path / "w.pth"), random_weights=False, key="encoder"
    )
    learning, _ = build_pretrained_encoder(args, config(name, size), str, learns=True)
    assert learning.pos_embed.shape == create_encoder(name, size).pos_embed.shape
    same(learning, real, size)


def test_fixed_positions_are_known():
    fixed = fixed_positions((4, 4), 384)
    assert are_fixed_positions(fixed) and are_fixed_positions(fixed.bfloat16())
    assert not are_fixed_positions(fixed + 0.01)
    for other in (torch.zeros(1, 17, 384), torch.zeros(1, 16, 384), torch.zeros(1, 17, 6)):
        assert not are_fixed_positions(other)
    assert not are_fixed_positions(fixed.long())
