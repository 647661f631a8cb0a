"""Which of torch's kernels the layers of a backbone run on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from utils.update import Precision


def choose_kernels(model: nn.Module, precision: Precision) -> None:
    """Let the layers of ``model`` run on the fastest kernels of the device and precision.

    On the CPU fused attention is slower in two cases: backward in bfloat16, and with a position
    bias that learns (Swin), whose gradient the fused kernel does not give.
    """
    cpu = precision.device_type == "cpu"
    # "Any", as torch's types allow no attributes of other types
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "fused_attn"):
            bias = getattr(layer, "relative_position_bias_table", None)
            learns = bias is not None and bias.requires_grad
            layer.fused_attn = not (cpu and (precision.enabled or learns))
        if type(layer) is nn.Linear:
            layer.__class__ = Linear  # takes what a Linear takes, and holds the same weights


class Linear(nn.Linear):
    """nn.Linear by ``linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear; float32 on the CPU by oneDNN, which torch itself uses for bfloat16 alone.

    x of (..., in), weight of out x in, bias of out -> (..., out).
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() or not ONEDNN
    if plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


# the operator that torch.compile uses for constant weights
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        # this product is as fast by torch's own; faster with the longer side first
        longer = rows.shape[1] >= inputs.shape[1]
        return (
            _product(grad, weight.T, None) if of_x else None,
            (rows.T @ inputs if longer else (inputs.T @ rows).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
