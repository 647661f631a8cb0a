"""Optimizers and what weight decay skips."""

import pytest
import timm.optim
import torch
from helpers import ROOT

from models import build_method
from optimizer import Lars, build_optimizer
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


@pytest.mark.parametrize("name", ["AdamW", "LARS", "SGD"])
def test_names_are_taken_in_any_case(name):
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), ["TRAIN.OPTIMIZER.NAME", name])
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]
    kind = type(build_optimizer(config, None, 0.1, groups))
    assert kind.__name__ == TYPES[name.lower()]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_adapts_every_weight(momentum, decay):
    """Also one without decay; not biases, and not weights of zeros. Some steps are skipped."""
    torch.manual_seed(0)
    shapes = [(3, 4), (1, 1, 5), (5,), (2, 2), (2,)]
    values = [torch.randn(shape) for shape in shapes]
    values[3].zero_()
    decays = [decay, 0.0, 0.0, decay, 0.0]  # the second is a class token
    ours = [torch.nn.Parameter(v.clone()) for v in values]
    moments = [torch.zeros_like(v) for v in values]
    of_group = [{"params": [ours[i] for i in (0, 3)], "weight_decay": decay}]
    own = Lars([*of_group, {"params": [ours[i] for i in (1, 2, 4)]}], 0.3, momentum)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(5):
        gradients = [torch.randn(v.shape) for v in values[:4]]  # the last one has none
        bad = number in (0, 3)
        for weight, gradient in zip(ours, gradients, strict=False):
            weight.grad = scaler.scale(gradient)
        if bad:
            ours[2].grad[2] = torch.inf
        else:
            for i, gradient in enumerate(gradients):
                if values[i].ndim > 1:
                    gradient = gradient + decays[i] * values[i]
                    if values[i].any():
                        gradient = 0.001 * values[i].norm() / gradient.norm() * gradient
                moments[i] = momentum * moments[i] + gradient
                values[i] = values[i] - 0.3 * moments[i]
        before = [w.clone() for w in ours]
        scaler.step(own)
        scaler.update(8.0)
        assert all(a.equal(b) for a, b in zip(before, ours, strict=True)) == bad
        torch.testing.assert_close([w.data for w in ours], values, rtol=1e-5, atol=1e-6)


def test_lars_goes_on_from_older_checkpoints():
    """Which timm's wrote."""
    weights = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    older = timm.optim.Lars([{"params": weights, "weight_decay": 0.1}], lr=0.3, momentum=0.9)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    older.step()
    for weight in weights:  # some versions of timm scale the gradient in place
        weight.grad = torch.ones_like(weight)
    own = Lars([{"params": weights, "weight_decay": 0.2}], 0.1, 0.5)
    own.load_state_dict(older.state_dict())
    group = own.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 0.1)
    moment = older.state[weights[1]]["momentum_buffer"].clone()
    before = weights[1].detach().clone()
    own.step()
    torch.testing.assert_close(weights[1].data, before - 0.3 * (0.9 * moment + 1))
