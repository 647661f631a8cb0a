"""What is exported gives the same features elsewhere."""

import ast
import json
import re
import sys

import pytest
import timm
import torch
from helpers import ROOT, fresh, reference
from safetensors import safe_open

from models.encoder import ENCODERS, create_encoder
from models.pretrained import load_encoder_weights
from tools import export_backbone
from utils.config import load_config
from utils.errors import UserError


def checkpoint(path, name, size=224):
    """A pre-training checkpoint of two encoders; the encoder and the momentum one."""
    encoders = {key: create_encoder(name, size) for key in ("encoder", "encoder_k")}
    state = {"config": load_config(str(ROOT / "configs/synco_vit_tiny.yaml")).dump()}
    state["model"] = {}
    for number, (prefix, encoder) in enumerate(encoders.items()):
        generator = torch.Generator().manual_seed(number)
        for parameter in encoder.parameters():
            if parameter.ndim == 1 or parameter.shape[0] == 1:  # those begin alike
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise if parameter.requires_grad else 0
        for key, value in encoder.state_dict().items():
            state["model"][f"{prefix}.{key}"] = value
    torch.save(state, path)
    return [encoder.eval() for encoder in encoders.values()]


def export(monkeypatch, name, path, out, *flags, size=224):
    arguments = ["--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--pretrained", path, "--out", out]
    opts = ["--opts", "MODEL.ENCODER", name, "DATA.IMG_SIZE", str(size)]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments), *flags, *opts])
    export_backbone.main()


def call_of(printed):
    """The printed ``timm.create_model(...)``, made."""
    tree = ast.parse(re.search(r"timm\.create_model\(.*\)", printed)[0], mode="eval").body
    options = {word.arg: ast.literal_eval(word.value) for word in tree.keywords}
    return timm.create_model(*[ast.literal_eval(a) for a in tree.args], **options).eval()


@torch.no_grad()
def same(first, second, size):
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(first(images), second(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, size",
    [("vit_nano", 64), ("vit_tiny", 224), ("vit_small", 96), ("swin_tiny", 224), ("swin_tiny", 64)],
)
def test_timm_reads_it_and_gives_the_same_features(tmp_path, monkeypatch, capsys, name, size):
    encoder, _ = checkpoint(tmp_path / "c.pth", name, size)
    out = tmp_path / "new" / "e.safetensors"
    export(monkeypatch, name, tmp_path / "c.pth", out, "--format", "timm", size=size)
    same(call_of(capsys.readouterr().out), encoder, size)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["method"], metadata["encoder"], metadata["key"]) == ("synco", name, "encoder")
    assert json.loads(metadata["image_mean"])[0] == 0.485
    entry = json.loads(metadata["provenance"])
    assert (entry["method"], entry["encoder"], entry["key"]) == ("synco", name, "encoder")
    assert entry["checkpoint"] == str(tmp_path / "c.pth") and len(entry["weights"]) == 64
    # and the evaluations read it again
    copy = create_encoder(name, size).eval()
    assert "timm" in load_encoder_weights(copy, str(out))
    same(copy, encoder, size)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_has_a_model_of_timm(name):
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), ["MODEL.ENCODER", name])
    timm_name, options = export_backbone.timm_call(config)
    with torch.device("meta"):
        theirs = timm.create_model(timm_name, **options)
        own = create_encoder(name)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (own, theirs)]
    assert shapes[0] == shapes[1]
    attention = [m.num_heads for m in own.modules() if hasattr(m, "num_heads")]
    assert attention == [m.num_heads for m in theirs.modules() if hasattr(m, "num_heads")]


def test_the_momentum_encoder_and_a_backbone_of_timm(tmp_path, monkeypatch, capsys):
    name = "timm/resnet18"
    encoder, momentum = checkpoint(tmp_path / "c.pth", name)
    flags = ("--format", "timm", "--key", "encoder_k")
    out = tmp_path / "e.safetensors"
    export(monkeypatch, name, tmp_path / "c.pth", out, *flags, size=64)
    exported = call_of(capsys.readouterr().out)
    same(exported, momentum, 64)
    with pytest.raises(AssertionError):
        same(exported, encoder, 64)


@pytest.mark.parametrize("name", ["swin_tiny", "vit_small"])
def test_pth_has_the_published_names(tmp_path, monkeypatch, name):
    encoder, _ = checkpoint(tmp_path / "c.pth", name)
    export(monkeypatch, name, tmp_path / "c.pth", tmp_path / "e.pth", "--format", "pth")
    written = torch.load(tmp_path / "e.pth", weights_only=True)
    weights = written["model"]
    assert written["provenance"]["method"] == "synco" and written["provenance"]["seconds"] > 0
    published = reference("state_dict.json")[name]
    shapes = published["parameters"] | published["buffers"]
    assert {key: list(value.shape) for key, value in weights.items()} == shapes
    copy, _ = fresh(name, 5)
    load_encoder_weights(copy, str(tmp_path / "e.pth"))
    same(copy.eval(), encoder, 224)


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("vit_nano", 32), ("swin_tiny", 64)])
def test_onnx_of_any_batch_gives_the_same_features(tmp_path, monkeypatch, name, size):
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder, _ = checkpoint(tmp_path / "c.pth", name, size)
    out = str(tmp_path / "e.onnx")
    export(monkeypatch, name, tmp_path / "c.pth", out, "--format", "onnx", size=size)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, size, size)
        (features,) = session.run(["features"], {"images": images.numpy()})
        with torch.no_grad():
            expected = encoder(images)
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-5, atol=1e-5)
    assert [value.shape[0] for value in (*session.get_inputs(), *session.get_outputs())] == [
        *("batch", "batch")
    ]
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["encoder"] == json.loads(metadata["provenance"])["encoder"] == name


def test_mistakes(tmp_path, monkeypatch):
    checkpoint(tmp_path / "c.pth", "vit_nano", 32)
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        export(monkeypatch, "vit_nano", tmp_path / "c.pth", tmp_path / "e.pth", "--format", "timm")
    out = tmp_path / "e.safetensors"
    with pytest.raises(UserError, match="multiple of 8"):
        flags = ("--format", "timm", "--size", "33")
        export(monkeypatch, "vit_nano", tmp_path / "c.pth", out, *flags)
    with pytest.raises(UserError, match="another model"):
        export(monkeypatch, "vit_tiny", tmp_path / "c.pth", out, "--format", "timm")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match=r"e\.safetensors: cannot write"):
        export(monkeypatch, "vit_nano", tmp_path / "c.pth", out, "--format", "timm")
    with pytest.raises(UserError, match="argument --size"):
        flags = ("--format", "timm", "--size", "-4")
        export(monkeypatch, "vit_nano", tmp_path / "c.pth", tmp_path / "f.safetensors", *flags)


def test_features_that_differ_are_no_export(tmp_path):
    encoder = create_encoder("vit_nano", 32).eval()
    with pytest.raises(RuntimeError, match="differ"):
        export_backbone.compare(encoder, lambda images: encoder(images) * 1.001, 32)
