"""Optimizers and what weight decay skips."""

import pytest
import torch
from helpers import ROOT

from models import build_method
from optimizer import build_optimizer
from utils.config import load_config
from utils.errors import UserError

TYPES = {"adamw": "AdamW", "sgd": "SGD", "lars": "Lars"}


@pytest.mark.parametrize("encoder", ["vit_nano", "swin_tiny"])
@pytest.mark.parametrize("name", sorted(TYPES))
def test_weight_decay_skips_biases_norms_and_positions(name, encoder):
    opts = ["MODEL.ENCODER", encoder, "DATA.IMG_SIZE", "32", "TRAIN.OPTIMIZER.NAME", name]
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
    method = build_method(config)
    optimizer = build_optimizer(config, method, 0.001)
    assert type(optimizer).__name__ == TYPES[name]
    names = {p: n for n, p in method.named_parameters()}
    decays = {
        names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert set(decays) == {n for n, p in method.named_parameters() if p.requires_grad}
    for parameter, decay in decays.items():
        skipped = (
            parameter.endswith((".bias", "cls_token", "relative_position_bias_table"))
            or ".norm" in parameter
            or "linear_hidden.2" in parameter
        )
        assert decay == (0 if skipped else 0.05), parameter
    before = {n: p.clone() for n, p in method.named_parameters()}
    method(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), epoch=0).loss.backward()
    optimizer.step()
    assert not method.projector.linear_out.weight.equal(before["projector.linear_out.weight"])
    assert method.projector_k.linear_out.weight.equal(before["projector_k.linear_out.weight"])


def test_sgd_is_nesterov():
    config = load_config(
        str(ROOT / "configs/moby_vit_tiny.yaml"),
        ["MODEL.ENCODER", "vit_nano", "DATA.IMG_SIZE", "32", "TRAIN.OPTIMIZER.NAME", "sgd"],
    )
    group = build_optimizer(config, build_method(config), 0.001).param_groups[0]
    assert group["nesterov"] and group["momentum"] == 0.9


def test_unknown_optimizer_is_named():
    config = load_config(
        str(ROOT / "configs/moby_vit_tiny.yaml"),
        ["MODEL.ENCODER", "vit_nano", "DATA.IMG_SIZE", "32", "TRAIN.OPTIMIZER.NAME", "adam3"],
    )
    with pytest.raises(UserError, match="must be adamw, sgd or lars, got 'adam3'"):
        build_optimizer(config, build_method(config), 0.001)
