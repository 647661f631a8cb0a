"""Every family of checkpoints, under its own names, loads whole or is refused."""

import argparse
import json

import pytest
import torch
from helpers import ROOT, fresh, reference
from safetensors.torch import save_file

from models import build_method
from models.encoder import create_encoder
from models.pretrained import (
    add_pretrained_arguments,
    build_pretrained_encoder,
    load_encoder_weights,
    open_encoder,
)
from utils.config import load_config
from utils.errors import UserError


def microsoft(weights):
    """Swin's weights under Microsoft's names, with the buffers that its checkpoints have."""
    published = reference("state_dict.json")["swin_tiny"]
    named = {}
    for name, value in weights.items():
        layer = name.split(".")[1] if ".downsample." in name else None
        if layer:  # there it ends the stage before
            name = name.replace(f"layers.{layer}.", f"layers.{int(layer) - 1}.")
        named[name] = value
    assert set(named) == set(published["parameters"])
    return named | {name: torch.zeros(shape) for name, shape in published["buffers"].items()}


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def wrapper(weights, other):
    """The published MoBY or SynCo-v2: two encoders, heads and queues."""
    shapes = reference("state_dict.json")["moby_wrapper"]
    rest = {name: torch.zeros([min(s, 2) for s in shape]) for name, shape in shapes.items()}
    return {"model": prefixed("encoder.", weights) | prefixed("encoder_k.", other) | rest}


def dino(weights, other):
    heads = {"module.head.mlp.0.weight": torch.zeros(2), "module.head.last_layer.weight_g": 1}
    heads = {name: torch.as_tensor(value) for name, value in heads.items()}
    return {
        "student": prefixed("module.backbone.", other) | heads,
        "teacher": prefixed("backbone.", weights) | heads,
        "epoch": 300,
    }


def moco(weights, other):
    heads = {
        f"module.{part}.0.weight": torch.zeros(2) for part in ("base_encoder.head", "predictor")
    }
    both = prefixed("module.base_encoder.", weights) | prefixed("module.momentum_encoder.", other)
    return {"state_dict": both | heads, "optimizer": {}, "arch": "vit_small"}


def learned(weights, extra=()):
    """timm's and DeiT's ViT, whose positions are learned, with a classifier."""
    head = {"head.weight": torch.zeros(10, 384), "head.bias": torch.zeros(10)}
    return weights | {"pos_embed": torch.randn(1, 197, 384)} | head | dict(extra)


DISTILLED = {"head_dist.weight": torch.zeros(10, 384), "head_dist.bias": torch.zeros(10)}
# encoder, what the file holds, the family that is named
FAMILIES = {
    "this project": (
        "vit_tiny",
        lambda w, o: wrapper(w, o),
        "this project, SynCo-v2, MoBY or solo-learn",
    ),
    "published SynCo-v2 or MoBY": (
        "swin_tiny",
        lambda w, o: wrapper(microsoft(w), microsoft(o)),
        "this project, SynCo-v2, MoBY or solo-learn",
    ),
    "Microsoft's Swin": (
        "swin_tiny",
        lambda w, _: {
            "model": microsoft(w)
            | {"head.weight": torch.zeros(10, 768), "head.bias": torch.zeros(10)}
        },
        "Microsoft's Swin",
    ),
    "DINO": ("vit_small", dino, "DINO"),
    "DINO, from a module": (
        "vit_small",
        lambda w, _: {"teacher": prefixed("module.backbone.", w)},
        "DINO",
    ),
    "DINO, backbone alone": ("vit_small", lambda w, _: w, "timm"),
    "MoCo v3": ("vit_small", moco, "MoCo v3"),
    "timm": ("vit_small", lambda w, _: learned(w), "timm"),
    "DeiT": ("vit_small", lambda w, _: {"model": learned(w)}, "DeiT"),
    "DeiT, distilled head": ("vit_small", lambda w, _: {"model": learned(w, DISTILLED)}, "DeiT"),
    "timm under DistributedDataParallel": (
        "vit_small",
        lambda w, _: {"state_dict": prefixed("module.", learned(w))},
        "timm",
    ),
    "linear probe": (
        "vit_small",
        lambda w, _: {
            "model": prefixed("encoder.", w) | {"heads.0.weight": torch.zeros(2, 384)},
            "lr": [1.0],
        },
        "this project",
    ),
}


def network(family):
    """Learned positions mean 6 heads, see test_network.py."""
    return {"num_heads": 6} if any(word in family for word in ("timm", "DeiT")) else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_whole(tmp_path, family):
    name, write, label = FAMILIES[family]
    _, weights = fresh(name)
    _, other = fresh(name, 1)
    state = write(dict(weights), other)
    path = str(tmp_path / "weights.pth")
    torch.save(state, path)
    encoder, before = fresh(name, 2, **network(family))
    said = load_encoder_weights(encoder, path)
    assert label in said
    count = len(weights)
    assert f"{count} of {count} loaded" in said
    for key, value in encoder.state_dict().items():
        if key == "pos_embed" and not encoder.fixed_positions:
            assert value.shape == weights[key].shape and not value.equal(weights[key])
        else:
            assert value.equal(weights[key]), key
        assert key == "pos_embed" or not value.equal(before[key]), key


@pytest.mark.parametrize("family", ["this project", "MoCo v3"])
def test_the_momentum_encoder_on_demand(tmp_path, family):
    name, write, _ = FAMILIES[family]
    _, weights = fresh(name)
    encoder, other = fresh(name, 1)
    path = str(tmp_path / "weights.pth")
    torch.save(write(weights, other), path)
    encoder, _ = fresh(name, 2)
    load_encoder_weights(encoder, path, "encoder_k")
    assert all(value.equal(other[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("method", ["byol", "moby", "synco"])
def test_what_this_project_trains_loads(tmp_path, method):
    opts = ["MODEL.ENCODER", "vit_nano", "MODEL.CONTRAST_NUM_NEGATIVE", "8", "MODEL.N_HARD", "4"]
    model = build_method(load_config(str(ROOT / f"configs/{method}_vit_tiny.yaml"), opts))
    path = str(tmp_path / "weights.pth")
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    encoder = create_encoder("vit_nano")
    load_encoder_weights(encoder, path)
    for key, value in model.encoder.state_dict().items():
        assert encoder.state_dict()[key].equal(value), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_weight_is_named(tmp_path, family):
    """Whichever family: one line with the name of what is missing, and no guess."""
    name, write, _ = FAMILIES[family]
    _, weights = fresh(name)
    state = write(dict(weights), fresh(name, 1)[1])
    removed = 0
    for part in [state, *(v for v in state.values() if isinstance(v, dict))]:
        for key in [k for k in part if k.endswith("blocks.1.mlp.fc1.weight")]:
            del part[key]
            removed += 1
    assert removed
    path = str(tmp_path / "weights.pth")
    torch.save(state, path)
    with pytest.raises(UserError) as error:
        load_encoder_weights(create_encoder(name, **network(family)), path)
    message = str(error.value)
    assert "weights.pth: " in message and "blocks.1.mlp.fc1.weight" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"encoder.cls_token": torch.zeros(1)}}, "no encoder weights found"),
        ({"epoch": 3}, "it holds no tensors"),
        ({}, "it holds no tensors"),
        ([1, 2], "expected a dict"),
    ],
)
def test_what_is_no_encoder_is_named(tmp_path, state, message):
    path = str(tmp_path / "weights.pth")
    torch.save(state, path)
    with pytest.raises(UserError, match=message) as error:
        load_encoder_weights(create_encoder("vit_nano"), path)
    assert "weights.pth: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("saved", "asked"), [("vit_tiny", "vit_small"), ("vit_tiny", "swin_tiny")])
def test_another_encoder_is_named(tmp_path, saved, asked):
    path = str(tmp_path / "weights.pth")
    torch.save(fresh(saved)[1], path)
    with pytest.raises(UserError, match=r"weights\.pth: checkpoint of another model") as error:
        load_encoder_weights(create_encoder(asked), path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (
            lambda w: w,
            "weights of timm, DeiT, MAE or Microsoft's Swin (in the file itself, prefix 'none')",
        ),
        (lambda w: {"model": w}, "(in model, prefix 'none')"),
        (
            lambda w: {"state_dict": {"teacher": prefixed("backbone.", w), "x": 1}},
            "solo-learn or lightly (in state_dict/teacher, prefix 'backbone.')",
        ),
    ],
)
def test_the_line_says_where_weights_were(tmp_path, wrap, said):
    encoder, weights = fresh("vit_nano")
    other = {"fc.weight": torch.zeros(3), "head.bias": torch.zeros(3)}
    path = str(tmp_path / "weights.pth")
    torch.save(wrap(weights | other), path)
    line = load_encoder_weights(encoder, path)
    count = len(encoder.state_dict())
    left = 0 if "teacher" in said else 2
    assert said in line and line.startswith(f"{path}: ")
    if not left:
        assert f"{count} of {count} loaded, 2 of other parts left out" in line
    else:
        assert line.endswith(f"{count} of {count} loaded, 2 of other parts left out")


def origin_of(tmp_path, state, *flags, name="c.pth"):
    """What is said of the encoder in a file, and the lines that say it."""
    path, said = tmp_path / name, []
    if name.endswith(".pth"):
        torch.save(state, path)
    else:
        save_file(state[0], path, state[1])
    parser = argparse.ArgumentParser()
    add_pretrained_arguments(parser)
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), ["MODEL.ENCODER", "vit_small"])
    given = parser.parse_args(["--pretrained", str(path), *flags])
    _, origin = build_pretrained_encoder(given, config, said.append)
    assert origin["encoder"] == "vit_small" and len(origin["weights"]) == 64
    return origin, said


def test_the_encoder_that_is_judged_is_named(tmp_path):
    """The one that was asked for, or what the file has, and its epoch if the file says it."""
    (_, one), (_, other) = fresh("vit_small"), fresh("vit_small", 1)
    config = load_config(str(ROOT / "configs/synco_vit_small.yaml"))
    ours = {"model": prefixed("encoder.", one) | prefixed("encoder_k.", other)}
    ours |= {"epoch": 4, "step": 50, "config": config.dump()}
    origin, said = origin_of(tmp_path, ours, "--key", "encoder_k")
    assert (origin["key"], origin["epoch"], origin["step"]) == ("encoder_k", 4, 50)
    assert origin["method"] == "synco" and origin["checkpoint"] == str(tmp_path / "c.pth")
    assert said[-1] == "the encoder that is judged: encoder_k of epoch 4, after update 50"
    assert origin["weights"] != origin_of(tmp_path, ours)[0]["weights"]

    origin, said = origin_of(tmp_path, dino(one, other), "--key", "encoder_k")
    assert (origin["key"], origin["epoch"], origin["method"]) == ("teacher/backbone", 300, None)
    origin, said = origin_of(tmp_path, moco(one, other), "--key", "encoder_k")
    assert origin["key"] == "module.momentum_encoder"
    assert said[-1].endswith("module.momentum_encoder of an unknown epoch")
    assert origin_of(tmp_path, one)[0]["key"] == "the only one of its file"


def test_what_was_taken_from_a_run_keeps_its_name(tmp_path):
    (_, one) = fresh("vit_small")
    entry = {"method": "byol", "key": "encoder_k", "epoch": 7, "step": 9}
    entry["data"] = {"digest": "d", "images": {"train": 3, "odd": "x"}}
    probe = {"model": prefixed("encoder.", one), "epoch": 99, "provenance": entry}
    expected = {"method": "byol", "key": "encoder_k", "epoch": 7, "step": 9}
    expected["data"] = {"digest": "d", "images": {"train": 3}}
    assert origin_of(tmp_path, probe)[0].items() >= expected.items()
    exported = (one, {"provenance": json.dumps(entry)})
    found, _ = origin_of(tmp_path, exported, name="e.safetensors")
    assert found.items() >= expected.items()
    damaged = (one, {"provenance": "{"})
    assert origin_of(tmp_path, damaged, name="e.safetensors")[0]["epoch"] is None


@pytest.mark.parametrize("entry", [3, [], {"method": 3, "key": 4, "epoch": "x", "data": []}])
def test_provenance_of_another_kind_is_left_out(tmp_path, entry):
    (_, one) = fresh("vit_small")
    state = {"model": prefixed("encoder.", one), "provenance": entry, "config": 3, "step": True}
    origin, _ = origin_of(tmp_path, state)
    assert (origin["method"], origin["key"]) == (None, "encoder")
    assert (origin["epoch"], origin["step"]) == (None, None)


@pytest.mark.parametrize("said", [None, "vit_nano"])
@pytest.mark.parametrize("replaced", [True, False])
def test_norms_of_a_file_are_those_of_its_encoder(tmp_path, said, replaced):
    """Whether its encoder is named or told by the shapes; one of timm is built by its name."""
    encoder = create_encoder("vit_nano", 32, replace_ln_with_bn=replaced)
    torch.save(encoder.state_dict(), tmp_path / "w.pth")
    opened, config = open_encoder(str(tmp_path / "w.pth"), encoder=said, img_size=32)
    assert config.MODEL.REPLACE_LN_WITH_BN is replaced and config.DATA.IMG_SIZE == 32
    assert opened.state_dict().keys() == encoder.state_dict().keys()


def test_an_encoder_of_timm_is_opened_by_its_name(tmp_path):
    encoder = create_encoder("timm/resnet18", 32)
    torch.save(encoder.state_dict(), tmp_path / "w.pth")
    opened, config = open_encoder(str(tmp_path / "w.pth"), encoder="timm/resnet18")
    assert opened.state_dict()["conv1.weight"].equal(encoder.state_dict()["conv1.weight"])
    assert not config.MODEL.REPLACE_LN_WITH_BN
    with pytest.raises(UserError, match="nothing tells which encoder its weights are of"):
        open_encoder(str(tmp_path / "w.pth"))
