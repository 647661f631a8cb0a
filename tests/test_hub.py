"""torch.hub gives the backbones, also to a program with modules of the same names."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import hubconf
from models.encoder import ENCODERS, create_encoder


def test_every_encoder_is_there():
    entries = {n: f for n, f in vars(hubconf).items() if callable(f) and not n.startswith("_")}
    assert set(entries) == {*ENCODERS, "load_encoder"}
    assert all(entries[name].__doc__.startswith(name) for name in ENCODERS)
    assert all(importlib.util.find_spec(package) for package in hubconf.dependencies)


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_the_weights_of_a_checkpoint(tmp_path, name):
    encoders = {key: create_encoder(name, 64).eval() for key in ("encoder", "encoder_k")}
    state = {f"{k}.{n}": v for k, e in encoders.items() for n, v in e.state_dict().items()}
    torch.save({"model": state}, tmp_path / "c.pth")
    images = torch.randn(2, 3, 64, 64)
    for key, encoder in encoders.items():
        loaded = torch.hub.load(
            str(ROOT), name, source="local", checkpoint=tmp_path / "c.pth", key=key, img_size=64
        )
        assert not loaded.training
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), encoder(images), rtol=1e-5, atol=1e-5)


def test_a_caller_with_modules_of_the_same_names(tmp_path):
    """Its own stay its own, before and after."""
    for name in ("utils", "models", "data"):
        (tmp_path / f"{name}.py").write_text(f"owner = 'caller of {name}'")
    code = (
        "import torch, utils\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'vit_nano', source='local', img_size=32)\n"
        "import models, data\n"
        "print(utils.owner, models.owner, data.owner, model(torch.zeros(1, 3, 32, 32)).shape[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[-2] == "caller of utils caller of models caller of data 128"
