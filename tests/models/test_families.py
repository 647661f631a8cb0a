"""Each family of checkpoints under its true names, in each kind of file, from each wrapper."""

import json
import re
import shutil
from functools import partial
from typing import NamedTuple

import pytest
import timm
import torch
from helpers import REFERENCE, ROOT, reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from models.encoder import create_encoder
from models.families import FAMILIES, HUGGING_FACE, SEQUENTIAL, TIMM, WRAPPERS, find_weights
from models.network import network_said
from models.pretrained import load_encoder_weights
from models.swin import SwinTransformer
from models.vit import VisionTransformer
from utils.errors import UserError
from utils.weights_file import read_weights

TRANSFORMERS = reference("transformers.json")


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


def small_swin():
    return SwinTransformer(
        16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=2
    )


IMAGES = torch.sin(0.1 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64))


def of_transformers(kind):
    """A model of the package, as it was written, its features, and an encoder like it."""
    path = REFERENCE / f"transformers_{kind}.safetensors"
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        assert f"transformers {file.metadata()['transformers']}" == TRANSFORMERS["version"]
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
        encoder = small_swin()
    return weights, weights.pop("features"), encoder.eval()


class Row(NamedTuple):
    """A row of the documentation's table."""

    containers: list[str | None]  # None: the file itself
    online: str
    momentum: str | None  # None: refused
    names: str


def documented():
    """The rows of the table in docs/evaluation.md, by whose checkpoints they are of."""
    text = (ROOT / "docs/evaluation.md").read_text()
    table = text.split("## Weights that `--pretrained` reads")[1].strip().split("\n\n")[0]
    rows, prefixes = {}, {"none": "", "refused": None}
    for line in table.splitlines()[2:]:
        whose, places, online, momentum, names = (c.strip() for c in line.strip("|").split("|"))
        containers = re.findall(r"`(\w+)`", places) + [None] * ("the file itself" in places)
        online, momentum = (prefixes.get(cell, cell.strip("`")) for cell in (online, momentum))
        rows[whose] = Row(containers, online, momentum, names)
    return rows


ROWS = documented()
DIALECTS = {
    "timm's": TIMM,
    "Microsoft's": TIMM,  # models/swin.py translates them
    "numbers": SEQUENTIAL,
    "Hugging Face's ViT": HUGGING_FACE,
    "Hugging Face's Swin": HUGGING_FACE,
}
PATCH = "patch_embed.proj.weight"
DOWN = "layers.0.downsample.norm.bias"
PROJECTION = "embeddings.patch_embeddings.projection.weight"
VIT = "encoder.layer.0.attention.attention.query.weight"
SWIN = "encoder.layers.0.blocks.0.attention.self.query.weight"
MOBY = ["queue1", "queue_ptr", "projector.linear_hidden.1.weight", "predictor.linear_out.bias"]
# some names in a true file of each row: of the encoders, and of other parts
TRUE = {
    "this project, and SynCo-v2 and MoBY with a ViT": (
        [f"encoder.{PATCH}", f"encoder_k.{PATCH}"],
        MOBY,
    ),
    "SynCo-v2 and MoBY with a Swin": ([f"encoder.{DOWN}", f"encoder_k.{DOWN}"], MOBY),
    "this project: a probe or a fine-tuned model": ([f"encoder.{PATCH}"], ["heads.0.weight"]),
    "MoCo v3": (
        [f"module.base_encoder.{PATCH}", f"module.momentum_encoder.{PATCH}"],
        ["module.base_encoder.head.0.weight", "module.predictor.0.weight"],
    ),
    "DINO": ([f"backbone.{PATCH}"], ["head.mlp.0.weight", "head.last_layer.weight_g"]),
    "iBOT": ([f"backbone.{PATCH}"], ["backbone.masked_embed", "head.mlp.0.weight"]),
    "timm, DeiT, and DINO's backbone alone": ([PATCH], ["head.weight", "head.bias"]),
    "MAE": ([PATCH], ["mask_token", "decoder_pos_embed", "decoder_embed.weight"]),
    "Microsoft's Swin": (
        [PATCH, DOWN],
        ["head.weight", "layers.0.blocks.0.attn.relative_position_index"],
    ),
    "solo-learn": (  # after 1.0.2
        [f"backbone.{PATCH}", f"momentum_backbone.{PATCH}"],
        ["projector.0.weight", "classifier.weight", "queue"],
    ),
    "solo-learn 1.0.2": (
        [f"encoder.{PATCH}", f"momentum_encoder.{PATCH}"],
        ["projector.0.weight", "classifier.weight"],
    ),
    # lightly 1.6.0, as its examples name the parts
    "lightly": (
        [f"backbone.{PATCH}", f"backbone_momentum.{PATCH}"],
        ["projection_head.layers.0.weight"],
    ),
    "lightly: a ResNet in `nn.Sequential`": (
        ["backbone.0.weight", "backbone.4.0.conv1.weight", "backbone_momentum.1.running_mean"],
        ["projection_head.0.weight"],
    ),
    "lightly: DINO": (
        [f"student_backbone.{PATCH}", f"teacher_backbone.{PATCH}"],
        ["student_head.layers.0.weight"],
    ),
    "lightly: DINOv2": (
        [f"student_backbone.vit.{PATCH}", f"teacher_backbone.vit.{PATCH}"],
        ["student_backbone.mask_token", "student_head.layers.0.weight"],
    ),
    "lightly: MAE": (
        [f"backbone.vit.{PATCH}"],
        ["backbone.mask_token", "decoder.decoder_embed.weight"],
    ),
    "lightly: a masked ViT": ([f"vit.{PATCH}"], ["mask_token"]),
    "a Lightning module's model": ([f"model.{PATCH}"], ["loss.weight"]),
    "Hugging Face's ViT": ([f"vit.{PROJECTION}", f"vit.{VIT}"], ["classifier.weight"]),
    "Hugging Face's Swin": ([f"swin.{PROJECTION}", f"swin.{SWIN}"], ["classifier.weight"]),
    "Hugging Face's ViT without a classifier": ([PROJECTION, VIT], ["pooler.dense.weight"]),
    "Hugging Face's Swin without a classifier": ([PROJECTION, SWIN], []),
}
WRAPPED = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


def families(row):
    """Those whose prefixes a row names: one, or one for each encoder."""
    return [
        family
        for family in FAMILIES
        if family.dialect is DIALECTS[row.names]
        and (family.online == row.online or row.momentum in family.momentum)
    ]


def test_the_table_and_the_families_agree():
    """No row without a family, nobody in a family without a row, true names for each."""
    found = {whose: families(row) for whose, row in ROWS.items()}
    owners = {family: re.split(", | or ", family.name) for family in FAMILIES}
    for whose, of in found.items():
        assert any(owner in whose for family in of for owner in owners[family]), whose
    for family in FAMILIES:
        rows = [whose for whose, of in found.items() if family in of]
        assert [o for o in owners[family] if not any(o in whose for whose in rows)] == []
    assert TRUE.keys() == ROWS.keys()


def sample(names, seed):
    """A blank encoder, weights of one like it under these names, images, and their features."""
    if names.startswith("Hugging Face's "):
        kind = names.split()[-1].lower()
        weights, features, blank = of_transformers(kind)
        weights = {n.removeprefix(f"{kind}."): v for n, v in weights.items() if n.startswith(kind)}
        return blank, weights, IMAGES.float().view(2, 3, 16, 16), features
    make = {
        "timm's": partial(nano, seed),
        "Microsoft's": small_swin,
        "numbers": partial(create_encoder, "timm/resnet18", 32),
    }[names]
    torch.manual_seed(seed)
    real = make().eval()
    weights = real.state_dict()
    if names == "Microsoft's":  # the downsampling ends the stage before
        weights = {n.replace("layers.1.down", "layers.0.down"): v for n, v in weights.items()}
    elif names == "numbers":  # of torchvision's children
        children = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
        parts = {name: name.split(".", 1) for name in weights}
        weights = {f"{children[a]}.{b}": weights[name] for name, (a, b) in parts.items()}
    images = torch.sin(torch.arange(2 * 3 * 32 * 32)).view(2, 3, 32, 32)
    with torch.no_grad():
        features = real(images)
    torch.manual_seed(9)
    return (nano(9) if names == "timm's" else make()).eval(), weights, images, features


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("whose", ROWS)
def test_both_encoders_of_each_family(tmp_path, whose, wrapper):
    """Of each row of the documentation's table, in each place that it names."""
    row, (own, others) = ROWS[whose], TRUE[whose]
    blank, weights, images, features = sample(row.names, 0)
    state, expected = below(row.online, weights), {"encoder": features, "encoder_k": features}
    if row.momentum not in (row.online, None):
        _, weights, _, expected["encoder_k"] = sample(row.names, 1)
        state |= below(row.momentum, weights)
    assert [name for name in own if WRAPPERS.sub("", name) not in state] == []
    state |= {WRAPPERS.sub("", name): torch.zeros(2) for name in others}
    state = below(wrapper, state)
    for container in row.containers:
        torch.save({container: state, "epoch": 3} if container else state, tmp_path / "c.pth")
        for key, wanted in expected.items():
            if key == "encoder_k" and row.momentum is None:
                with pytest.raises(UserError, match="no encoder weights found"):
                    load_encoder_weights(blank, str(tmp_path / "c.pth"), key)
                continue
            line = load_encoder_weights(blank, str(tmp_path / "c.pth"), key)
            assert any(f"weights of {family.name} (in " in line for family in families(row)), line
            with torch.no_grad():
                torch.testing.assert_close(blank(images), wanted, rtol=1e-4, atol=1e-4)


def test_an_encoder_compiled_within_a_wrapped_model(tmp_path):
    one = nano()
    torch.save({"model": below("module.encoder._orig_mod.", one.state_dict())}, tmp_path / "c.pth")
    encoder, line = load(tmp_path / "c.pth")
    assert "prefix 'module.encoder._orig_mod.'" in line
    assert_equal(encoder, one)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("names", ["written", "without the classifier", "in memory"])
def test_features_of_transformers(tmp_path, kind, names):
    weights, features, encoder = of_transformers(kind)
    if names == "without the classifier":
        inner = {n.removeprefix(f"{kind}."): v for n, v in weights.items()}
        weights = {n: v for n, v in inner.items() if not n.startswith("classifier")}
        weights["pooler.dense.bias"] = torch.zeros(16)
    elif names == "in memory":  # as torch.save writes a state_dict of version 5
        weights = {own: weights[n] for n, own in TRANSFORMERS[kind].items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    said = load_encoder_weights(encoder, str(tmp_path / "pytorch_model.bin"))
    assert "Hugging Face's" in said
    with torch.no_grad():
        found = encoder(IMAGES.float().view(2, 3, 16, 16))
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-4)


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


CONTAINERS = (
    *("target_encoder", "encoder", "state_dict_ema", "model_state_dict", "model_ema", "module"),
    *("net", "online_network", "backbone", "ema.model", "a.b.c.d.e"),
)


def inside(container, weights):
    for name in reversed(container.split(".")):
        weights = {name: weights, "epoch": 3}
    return weights


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
def test_the_only_mapping_that_fits_is_found(tmp_path, container, prefix):
    """Whatever it is called, beside an optimizer and a head that hold tensors too."""
    one = nano()
    state = inside(container, below(prefix, one.state_dict()))
    state |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "head": {"weight": IMAGES}}
    torch.save(state, tmp_path / "c.pth")
    encoder, said = load(tmp_path / "c.pth")
    assert_equal(encoder, one)
    assert f"(in {container.replace('.', '/')}, prefix" in said


def test_of_several_that_fit_one_is_chosen(tmp_path):
    """By its place; a container that this field knows needs no choice."""
    encoder, target, path = nano(), nano(1), str(tmp_path / "c.pth")
    parts = {"encoder": encoder.state_dict(), "nets": {"target": target.state_dict()}}
    torch.save(parts | {"epoch": 3}, path)
    with pytest.raises(
        UserError, match=r"several parts of it fit: encoder, nets\.target: choose one by --contai"
    ):
        load(path)
    for container, wanted in (("encoder", encoder), ("nets.target", target)):
        blank = nano(9)
        load_encoder_weights(blank, path, container=container)
        assert_equal(blank, wanted)
    with pytest.raises(
        UserError, match=r"it has no nets\.x, its containers are: encoder, nets, ne"
    ):
        load_encoder_weights(nano(9), path, container="nets.x")
    torch.save({"model": target.state_dict(), "model_ema": parts["encoder"]}, path)
    assert_equal(load(path)[0], target)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"epoch": 3, "x": {"y": [1, {"z": "w"}]}}, r"\(it holds no tensors\)"),
        ({"a": {"b": torch.ones(2)}}, r"\(its names are like b, in a\)"),
        ({"w": torch.ones(2)}, r"\(its names are like w\)"),
        ({"list": [1, {"x": torch.ones(2)}]}, r"\(its tensors have no names\)"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "its tensors have no names"),
    ],
)
def test_a_file_is_said_to_hold_no_tensors_only_if_it_does(tmp_path, state, said):
    state["itself"] = state  # as a pickle can hold
    with pytest.raises(UserError, match=said):
        find_weights(state, "", "encoder", "c.pth")


def changed(name, value):
    return lambda weights: weights | {name: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            changed("register_tokens", torch.ones(1, 4, 128)),
            "the file has register_tokens, the enco",
        ),
        (changed("cls_token", torch.ones(1, 2, 128)), "its cls_token is 1x2x128 not 1x1x128"),
        (lambda w: {n: v for n, v in w.items() if n != "cls_token"}, "the file has no cls_token)"),
        (changed("blocks.0.ls1.gamma", torch.ones(128)), "the file has blocks.0.ls1.gamma, the"),
        (
            lambda w: {n: v for n, v in w.items() if n[:6] != "blocks"},
            "attn.qkv.weight and 57 more)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_with_what_the_file_has(tmp_path, change, said):
    torch.save(change(nano().state_dict()), tmp_path / "c.pth")
    with pytest.raises(UserError) as error:
        load(tmp_path / "c.pth")
    assert str(error.value).startswith(f"{tmp_path / 'c.pth'}: checkpoint of another model (")
    assert said in str(error.value) and str(error.value).count(";") <= 2


def test_another_network_is_named_before_its_weights(tmp_path):
    torch.save(create_encoder("vit_tiny", 32).state_dict(), tmp_path / "c.pth")
    with pytest.raises(
        UserError,
        match=r"of another model: it looks like MODEL\.ENCODER vit_tiny \(its cls_token is",
    ):
        load(tmp_path / "c.pth")
