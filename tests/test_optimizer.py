"""Optimizers and what weight decay skips."""

import pytest
import torch
from helpers import ROOT
from timm.optim import Lars

from models import build_method
from optimizer import DeviceLars, build_optimizer
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_of_gpus_is_timms(momentum, decay):
    """Scaled gradients, a weight of zeros, one without a gradient, and steps that are skipped."""
    torch.manual_seed(0)
    values = [torch.randn(3, 4), torch.randn(5), torch.zeros(2, 2), torch.randn(2)]
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in values] for _ in "ab")
    own, plain = (
        kind(
            [{"params": weights[:1], "weight_decay": decay}, {"params": weights[1:]}],
            lr=0.3,
            momentum=momentum,
        )
        for kind, weights in ((DeviceLars, ours), (Lars, theirs))
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(5):
        gradients = [torch.randn(v.shape) for v in values[:3]]
        bad = number in (0, 3)
        for weight, other, gradient in zip(ours, theirs, gradients, strict=False):
            weight.grad = scaler.scale(gradient)
            other.grad = gradient.clone()
        if bad:
            ours[1].grad[2] = torch.inf
        else:
            plain.step()
        before = [w.clone() for w in ours]
        scaler.step(own)
        scaler.update(8.0)
        assert all(a.equal(b) for a, b in zip(before, ours, strict=True)) == bad
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for weight, other in zip(ours, theirs, strict=True):
        assert own.state[weight].keys() == plain.state[other].keys()
        torch.testing.assert_close(dict(own.state[weight]), dict(plain.state[other]))
    # each goes on from the other's state
    own.load_state_dict(plain.state_dict())
    plain.load_state_dict(own.state_dict())


def test_lars_asks_the_host_only_on_the_cpu():
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), ["TRAIN.OPTIMIZER.NAME", "lars"])
    kinds = {}
    for device in ("cpu", "cuda"):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.__class__ = type("On", (torch.nn.Parameter,), {"is_cuda": device == "cuda"})
        kinds[device] = type(build_optimizer(config, None, 0.1, [{"params": [weight]}]))
    assert kinds == {"cpu": Lars, "cuda": DeviceLars}
    assert not hasattr(Lars([torch.zeros(1)]), "_step_supports_amp_scaling")
    assert DeviceLars([torch.zeros(1)])._step_supports_amp_scaling
