"""The folders for timm and transformers: their features, their transform, their card."""

import json
import os
import re
import sys

import pytest
import timm
import torch
import yaml
from helpers import REFERENCE, ROOT, TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from evaluation.encoder import build_transform
from models import build_method
from models.families import from_transformers, to_transformers
from models.swin import SwinTransformer
from synco_vit import load_encoder
from tools import export_backbone, hugging_face
from utils.config import load_config, to_json, with_values
from utils.errors import UserError
from utils.provenance import weights_digest

# square, as transformers rounds the margins of a crop in its own way
PHOTO = Image.effect_noise((80, 80), 60).convert("RGB")


def write_run(folder, *opts):
    """A run folder with a checkpoint, a configuration and two evaluations, one of other weights."""
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), [*TINY, *opts])
    torch.manual_seed(0)
    method = build_method(config)
    for parameter in method.encoder.parameters():
        if parameter.ndim == 1:  # those begin alike
            torch.nn.init.normal_(parameter.data)
    folder.mkdir(parents=True)
    provenance = {"method": "synco", "encoder": config.MODEL.ENCODER, "epoch": 7, "step": 70}
    provenance["data"] = {"digest": "abc", "images": {"train": 1234}}
    state = {"model": method.state_dict(), "config": config.dump(), "provenance": provenance}
    torch.save(state, folder / "checkpoint.pth")
    (folder / "config.json").write_text(to_json(config))
    own = weights_digest(method.encoder)
    for name, digest, top1 in (("knn_imagenet", own, 71.25), ("knn_cifar10", "other", 12.5)):
        (folder / name).mkdir()
        results = {
            "dataset": name,
            "knn": {"20": {"top1": top1}},
            "provenance": {"weights": digest},
        }
        (folder / name / "results.json").write_text(json.dumps(results))
    return method.encoder.eval(), config


def export(monkeypatch, run, out, kind, *opts, size=None):
    words = ["--cfg", "synco_vit_tiny", "--pretrained", run / "checkpoint.pth", "--format", kind]
    words += ["--out", out, *(["--size", size] if size else [])]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, [*words, "--opts", *TINY, *opts])])
    export_backbone.main()


@torch.no_grad()
def assert_same(one, other, size):
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(one(images), other(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "opts"),
    [
        ("vit_nano", ()),
        ("vit_nano", ("MODEL.NUM_HEADS", "8", "MODEL.PATCH_SIZE", "4")),
        ("swin_tiny", ("MODEL.WINDOW_SIZE", "4", "TEST.CROP", "False")),
        ("timm/resnet18", ("DATA.INTERPOLATION", "bilinear")),
    ],
)
def test_timm_makes_the_same_model_of_the_folder(tmp_path, monkeypatch, encoder, opts):
    opts = ("MODEL.ENCODER", encoder, *opts)
    expected, config = write_run(tmp_path / "run", *opts)
    export(monkeypatch, tmp_path / "run", tmp_path / "new/hub", "timm-hub", *opts)
    model = timm.create_model(f"local-dir:{tmp_path / 'new/hub'}", pretrained=True).eval()
    assert_same(model, expected, 32)
    assert model.num_classes == 0
    # and the transform that timm makes of it is that of the evaluations
    data = resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 32, 32)
    theirs, own = create_transform(**data)(PHOTO), build_transform(config)(PHOTO)
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5)
    # this project reads it, too
    again = load_encoder(tmp_path / "new/hub")
    assert_same(again, expected, 32)
    assert again.transform(PHOTO).shape == (3, 32, 32)
    with safe_open(tmp_path / "new/hub/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["provenance"])["method"] == "synco"


@pytest.mark.parametrize(
    ("encoder", "strides", "order"),
    [("vit_nano", [8, 8, 8], "NCHW"), ("swin_tiny", [4, 8, 16, 32], "NHWC")],
)
def test_timm_gives_the_maps_of_the_folder_for_detection(
    tmp_path, monkeypatch, encoder, strides, order
):
    opts = ("MODEL.ENCODER", encoder)
    expected, _ = write_run(tmp_path / "run", *opts)
    export(monkeypatch, tmp_path / "run", tmp_path / "hub", "timm-hub", *opts)
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, features_only=True)
    assert model.feature_info.reduction() == strides
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        maps = model.eval()(images)
        own = expected.forward_intermediates(images, intermediates_only=True)  # NCHW
    for found, true in zip(maps, own[-len(strides) :], strict=True):
        found = found if order == "NCHW" else found.permute(0, 3, 1, 2)
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_names_are_those_that_transformers_wrote(kind):
    """And the values: q, k and v are parted as they were joined."""
    written = load_file(REFERENCE / f"transformers_{kind}.safetensors")
    start = f"{kind}."
    theirs = {n.removeprefix(start): v for n, v in written.items() if n.startswith(start)}
    ours = to_transformers(from_transformers(theirs))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("encoder", "opts", "size"),
    [
        ("vit_nano", (), 32),
        ("vit_nano", ("MODEL.NUM_HEADS", "8", "TEST.CROP", "False"), 40),
        ("swin_tiny", ("MODEL.WINDOW_SIZE", "2"), 64),
        ("swin_tiny", ("MODEL.WINDOW_SIZE", "2"), 96),
    ],
)
def test_transformers_gives_the_same_features(tmp_path, monkeypatch, capsys, encoder, opts, size):
    opts = ("MODEL.ENCODER", encoder, *opts)
    _, config = write_run(tmp_path / "run", *opts)
    folder = tmp_path / "hub"
    export(monkeypatch, tmp_path / "run", folder, "transformers", *opts, size=size)
    said = capsys.readouterr().out
    # read by this project, which takes the heads from config.json
    again = load_encoder(folder)
    assert again.transform(PHOTO).shape == (3, size, size)
    config = with_values(config, {"DATA.IMG_SIZE": size})
    sized = load_encoder(tmp_path / "run", img_size=size)
    assert_same(again, sized, size)
    described = json.loads((folder / "config.json").read_text())
    heads = described["num_attention_heads" if encoder == "vit_nano" else "num_heads"]
    assert heads == (
        8 if "MODEL.NUM_HEADS" in opts else 4 if encoder == "vit_nano" else [3, 6, 12, 24]
    )

    transformers = pytest.importorskip("transformers")
    assert "features differ by" in said
    kind = described["architectures"][0]
    pooler = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    model, loading = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **pooler
    )
    assert not any(loading[part] for part in ("missing_keys", "unexpected_keys"))
    feature = lambda x: model.eval()(x).last_hidden_state[:, 0]  # noqa: E731
    if kind == "SwinModel":
        feature = lambda x: model.eval()(x).pooler_output  # noqa: E731
    assert_same(feature, sized, size)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(PHOTO, return_tensors="pt").pixel_values[0]
    difference = (theirs - build_transform(config)(PHOTO)).abs().max()
    assert difference < 0.05  # of about 5: it may resize tensors, not PIL images


def test_the_card_says_data_recipe_results_and_licence(tmp_path, monkeypatch):
    write_run(tmp_path / "run", "TRAIN.BASE_LR", "0.125", "DATA.DATA_PATH", "/secret/place")
    export(monkeypatch, tmp_path / "run", tmp_path / "hub", "timm-hub")
    card = (tmp_path / "hub/README.md").read_text()
    _, head, body = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["license"] == "cc-by-nc-4.0" and head["library_name"] == "timm"
    rows = dict(
        line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")
    )
    assert rows["Images"] == "1234 train" and rows["Epoch, update"] == "7, 70"
    assert rows["TRAIN.BASE_LR"] == "0.125" and rows["MODEL.TYPE"] == "synco"
    assert rows["knn_imagenet knn.20.top1"] == "71.25"
    assert rows["MODEL.N_HARD"] and "SAVE_FREQ" not in rows  # the defaults too, but no place
    assert "knn_cifar10" not in body  # of other weights
    assert "/secret" not in card and str(tmp_path) not in card
    monkeypatch.chdir(tmp_path)  # and its example runs
    exec(re.search(r"```python\n(.*?)```", body, re.DOTALL)[1], names := {})
    assert names["model"].num_features == 128


def test_a_card_of_weights_alone_says_what_is_missing(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    os.rename(tmp_path / "run/checkpoint.pth", tmp_path / "checkpoint.pth")
    export(monkeypatch, tmp_path, tmp_path / "hub", "transformers")
    card = (tmp_path / "hub/README.md").read_text()
    assert "lowest cosine measured" in card  # of features by transformers' own processor
    assert "No config.json lies beside" in card and "No evaluation of these weights" in card


def test_mistakes(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot write"):
        export(monkeypatch, tmp_path / "run", tmp_path / "file", "timm-hub")
    opts = ("MODEL.ENCODER", "timm/resnet18")
    write_run(tmp_path / "resnet", *opts)
    with pytest.raises(UserError, match="takes a plain ViT or Swin of this project"):
        export(monkeypatch, tmp_path / "resnet", tmp_path / "hub", "transformers", *opts)
    config = load_config(str(ROOT / "configs/moby_swin_tiny.yaml"), ["DATA.IMG_SIZE", "128"])
    with pytest.raises(UserError, match="below 224 pixels: take that size"):
        hugging_face.transformers_config(config, SwinTransformer(128))
    assert not (tmp_path / "hub").exists()
