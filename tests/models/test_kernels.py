"""models/kernels.py: other kernels, the same results."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import kernels
from models.encoder import create_encoder
from utils.update import Precision

CPU = torch.device("cpu")
sizes = st.integers(1, 40)


@given(sizes, sizes, sizes, st.booleans(), st.booleans())
def test_linear_and_its_gradients(rows, inputs, outputs, has_bias, transposed):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, inputs, generator=generator)
    if transposed:
        x = x.transpose(0, 1)
    x.requires_grad_()
    weight = torch.randn(outputs, inputs, generator=generator).requires_grad_()
    bias = torch.randn(outputs, generator=generator).requires_grad_() if has_bias else None
    learned = [t for t in (x, weight, bias) if t is not None]
    output = kernels.linear(x, weight, bias)
    assert not kernels.ONEDNN or output.grad_fn.name() == "_LinearBackward"
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(output, expected)
    grad = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad(output, learned, grad)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, learned, grad), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_linear_in_other_types():
    layer = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(x, layer.weight, layer.bias).dtype == torch.bfloat16
    assert kernels.linear(x[:0], layer.weight, layer.bias).shape == (0, 3)
    layer.double()
    assert kernels.linear(x.double(), layer.weight, layer.bias).dtype == torch.float64


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
@pytest.mark.parametrize("level", ["O0", "O1"])
def test_a_backbone_computes_the_same(name, level):
    torch.manual_seed(0)
    plain = create_encoder(name, 32)
    fast = copy.deepcopy(plain)
    precision = Precision(level, CPU)
    kernels.choose_kernels(fast, precision)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert any(type(m) is nn.Linear for m in plain.modules())
    assert not any(type(m) is nn.Linear for m in fast.modules())
    images = torch.randn(2, 3, 32, 32)
    direction = torch.randn(plain.num_features)
    results = []
    for encoder in (plain, fast):
        with precision.autocast():
            features = encoder(images).float()
        (features @ direction).sum().backward()
        results.append([features, *(p.grad for p in encoder.parameters() if p.requires_grad)])
    for actual, wanted in zip(*results, strict=True):
        difference = (actual - wanted).norm()
        assert difference <= (1e-4 if level == "O0" else 0.1) * wanted.norm() + 1e-5


def test_attention_is_fused_where_that_is_faster():
    def fused(encoder: nn.Module, level: str) -> set[bool]:
        kernels.choose_kernels(encoder, Precision(level, CPU))
        return {m.fused_attn for m in encoder.modules() if hasattr(m, "fused_attn")}

    for name in ("vit_nano", "swin_tiny"):
        assert fused(create_encoder(name, 32), "O1") == {False}
        assert fused(create_encoder(name, 32).requires_grad_(False), "O0") == {True}
    assert fused(create_encoder("vit_nano", 32), "O0") == {True}
    assert fused(create_encoder("swin_tiny", 32), "O0") == {False}
