"""Each family of checkpoints under its true names, in each kind of file, from each wrapper."""

import json
import shutil
from functools import partial

import pytest
import timm
import torch
from helpers import REFERENCE, reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from models.encoder import create_encoder
from models.families import FAMILIES, find_weights
from models.network import network_said
from models.pretrained import load_encoder_weights
from models.swin import SwinTransformer
from models.vit import VisionTransformer
from utils.errors import UserError
from utils.weights_file import read_weights

HUGGING_FACE = reference("transformers.json")


def nano(seed=0):
    torch.manual_seed(seed)
    encoder = create_encoder("vit_nano", 32)
    for name, parameter in encoder.named_parameters():
        if name != "pos_embed":  # fixed
            nn.init.normal_(parameter.data, std=0.1)
    return encoder.eval()


def below(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def load(path, key="encoder"):
    encoder = nano(9)
    return encoder, load_encoder_weights(encoder, str(path), key)


def assert_equal(encoder, other):
    for name, value in other.state_dict().items():
        assert encoder.state_dict()[name].equal(value), name


# name in the log, container, the prefixes of the online and the momentum encoder, other parts
CHECKPOINTS = {
    "this project": ("this project", "model", "encoder.", "encoder_k.", ["queue1", "step"]),
    "MoCo v3": (
        "MoCo v3",
        "state_dict",
        "module.base_encoder.",
        "module.momentum_encoder.",
        ["module.predictor.0.weight"],
    ),
    "DINO": ("DINO", "teacher", "backbone.", "backbone.", ["head.mlp.0.weight"]),
    "iBOT": ("iBOT", "teacher", "backbone.", "backbone.", ["backbone.masked_embed"]),
    "solo-learn": (  # after 1.0.2
        "solo-learn",
        "state_dict",
        "backbone.",
        "momentum_backbone.",
        ["projector.0.weight", "classifier.weight", "queue"],
    ),
    "solo-learn 1.0.2": (
        "solo-learn",
        "state_dict",
        "encoder.",
        "momentum_encoder.",
        ["projector.0.weight", "classifier.weight"],
    ),
    "lightly, MoCo": (  # 1.6.0, as its examples name the parts
        "lightly",
        "state_dict",
        "backbone.",
        "backbone_momentum.",
        ["projection_head.layers.0.weight"],
    ),
    "lightly, DINO": (
        "lightly",
        "state_dict",
        "student_backbone.",
        "teacher_backbone.",
        ["student_head.layers.0.weight"],
    ),
    "lightly, MAE": ("lightly", "state_dict", "backbone.vit.", "backbone.vit.", ["decoder.x.bias"]),
    "lightly, masked ViT of DINOv2": (
        "lightly",
        "state_dict",
        "student_backbone.vit.",
        "teacher_backbone.vit.",
        ["student_head.x.bias"],
    ),
    "lightly, masked ViT": ("lightly", "state_dict", "vit.", "vit.", ["mask_token"]),
    "Lightning": ("a Lightning module", "state_dict", "model.", "model.", ["loss.weight"]),
    "MAE": ("MAE", "model", "", "", ["mask_token", "decoder_pos_embed", "decoder_embed.weight"]),
    "timm": ("timm", "state_dict", "", "", ["head.weight", "head.bias"]),
}
WRAPPED = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_both_encoders_of_each_family(tmp_path, family, wrapper):
    said, container, online, momentum, others = CHECKPOINTS[family]
    one, other = nano(0), nano(1)
    state = below(online, one.state_dict())
    if momentum != online:
        state |= below(momentum, other.state_dict())
    state |= {name: torch.zeros(2) for name in others}
    torch.save({container: below(wrapper, state), "epoch": 3}, tmp_path / "c.pth")
    encoder, line = load(tmp_path / "c.pth")
    assert said in line, line
    assert_equal(encoder, one)
    encoder, line = load(tmp_path / "c.pth", "encoder_k")
    assert said in line, line
    assert_equal(encoder, other if momentum != online else one)


def test_an_encoder_compiled_within_a_wrapped_model(tmp_path):
    one = nano()
    torch.save({"model": below("module.encoder._orig_mod.", one.state_dict())}, tmp_path / "c.pth")
    encoder, line = load(tmp_path / "c.pth")
    assert "prefix 'module.encoder._orig_mod.'" in line
    assert_equal(encoder, one)


def test_every_row_of_the_table_is_tested():
    tested = {online.removeprefix("module.") for _, _, online, _, _ in CHECKPOINTS.values()}
    assert {f.online for f in FAMILIES} - tested == {"swin."}  # see below


IMAGES = torch.sin(0.1 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64))


def of_transformers(kind):
    """A model of the package, as it was written, its features, and an encoder like it."""
    path = REFERENCE / f"transformers_{kind}.safetensors"
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        assert f"transformers {file.metadata()['transformers']}" == HUGGING_FACE["version"]
    if kind == "vit":
        encoder = timm.models.VisionTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=16,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            num_classes=0,
        )
    else:
        encoder = SwinTransformer(
            16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=2
        )
    return weights, weights.pop("features"), encoder.eval()


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("names", ["written", "without the classifier", "in memory"])
def test_features_of_transformers(tmp_path, kind, names):
    weights, features, encoder = of_transformers(kind)
    if names == "without the classifier":
        inner = {n.removeprefix(f"{kind}."): v for n, v in weights.items()}
        weights = {n: v for n, v in inner.items() if not n.startswith("classifier")}
        weights["pooler.dense.bias"] = torch.zeros(16)
    elif names == "in memory":  # as torch.save writes a state_dict of version 5
        weights = {own: weights[n] for n, own in HUGGING_FACE[kind].items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    said = load_encoder_weights(encoder, str(tmp_path / "pytorch_model.bin"))
    assert "Hugging Face's" in said
    with torch.no_grad():
        found = encoder(IMAGES.float().view(2, 3, 16, 16))
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-4)


def test_a_resnet_as_lightly_wraps_it(tmp_path):
    """nn.Sequential(*list(resnet.children())[:-1]), by torchvision's names of the children."""
    torch.manual_seed(0)
    real = create_encoder("timm/resnet18", 32).eval()
    children = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    state = {
        f"backbone.{children[name.split('.')[0]]}.{name.split('.', 1)[1]}": value
        for name, value in real.state_dict().items()
    }
    torch.save(
        {"state_dict": state | {"projection_head.0.weight": torch.ones(2)}}, tmp_path / "c.ckpt"
    )
    torch.manual_seed(1)
    encoder = create_encoder("timm/resnet18", 32).eval()
    assert "lightly" in load_encoder_weights(encoder, str(tmp_path / "c.ckpt"))
    assert_equal(encoder, real)


def shards(folder, state, suffix):
    """A state in two files, with the index beside them."""
    names = sorted(state)
    parts, written = {}, {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-0000{number}-of-00002{suffix}"
        content = {key: state[key].contiguous() for key in part}
        save = (
            partial(save_file, content)
            if suffix == ".safetensors"
            else partial(torch.save, content)
        )
        save(folder / name)
        parts |= dict.fromkeys(part, name)
        written[name] = content
    index = folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    index = index.with_name(index.name + ".index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    return index


@pytest.mark.parametrize(
    "name", ["c.pth", "c.pt", "c.bin", "c.ckpt", "c", "c.safetensors", "s.pth"]
)
def test_kinds_of_files(tmp_path, name):
    """The content tells, not the name."""
    one, path = nano(), tmp_path / name
    if name in ("c.safetensors", "s.pth"):
        save_file(one.state_dict(), path)
    else:
        torch.save({"state_dict": one.state_dict()}, path)
    assert_equal(load(path)[0], one)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path, suffix):
    one = nano()
    index = shards(tmp_path, one.state_dict(), suffix)
    for path in (index, tmp_path):  # the folder as well
        assert_equal(load(path)[0], one)
    (tmp_path / f"model-00002-of-00002{suffix}").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.*: no such file|cannot read"):
        load(index)


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "not a JSON file"),
        ("[]", "no index of shards"),
        ("{}", "no index of shards"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is no file beside it"),
        ('{"weight_map": {"a": ""}}', "which is no file beside it"),
        ('{"weight_map": {"missing": "w.safetensors"}}', "its shards have no missing"),
    ],
)
def test_an_index_that_is_none(tmp_path, index, message):
    save_file({"b": torch.ones(1)}, tmp_path / "w.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "model.safetensors.index.json")
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(
        UserError, match=r"a folder without model\.safetensors or pytorch_model\.bin"
    ):
        load(tmp_path)
    (tmp_path / "c.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="a Git LFS pointer"):
        load(tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{" + b"x" * 64)
    with pytest.raises(UserError, match="cannot read the weights"):
        load(tmp_path / "d.safetensors")


def test_heads_that_hugging_face_tells(tmp_path):
    shutil.copy(REFERENCE / "transformers_vit.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "model_type": "vit"}')
    path = str(tmp_path / "model.safetensors")
    assert network_said(read_weights(path)) == {"num_heads": 2}
    four = VisionTransformer(16, 4, 16, 2, 4)
    with pytest.raises(UserError, match="num heads 2, the encoder has 4"):
        load_encoder_weights(four, path)
    (tmp_path / "config.json").write_text("{")  # of no use
    assert network_said(read_weights(path))["num_heads"] == 0


def test_nothing_of_another_kind_is_taken_for_an_encoder():
    layers = {"backbone.0.weight": torch.ones(3, 3), "encoder.bias": torch.ones(3)}
    with pytest.raises(
        UserError, match=r"no encoder weights found in it \(its names are like back"
    ):
        find_weights({"model": layers}, "", "encoder", "c.pth")
