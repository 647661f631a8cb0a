"""Batch normalisation synchronised across processes, on GPUs and on the CPU."""

from typing import TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from utils.distributed import mean_over_processes, world_size

M = TypeVar("M", bound=nn.Module)


class _MeanOverProcesses(torch.autograd.Function):
    """The average over the processes, whose gradient reaches the inputs of all of them."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return mean_over_processes(x.clone())

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return mean_over_processes(gradient.clone())


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm of the last dimension with the statistics of all processes, by gloo on the CPU.

    In training, every process must hold the same number of rows. On GPUs,
    ``synchronize_batch_norm`` uses torch's SyncBatchNorm instead, which runs only there.
    """

    channels = -1  # the dimension
    momentum: float
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C), in the type of ``x``."""
        rows = x.movedim(self.channels, -1)
        if self.training and world_size() > 1:
            y = self._forward_gloo(rows.float()).to(x.dtype)
        else:
            y = super().forward(rows.reshape(-1, self.num_features)).view_as(rows)
        return y.movedim(-1, self.channels)

    def _forward_gloo(self, rows: torch.Tensor) -> torch.Tensor:
        dims = tuple(range(rows.ndim - 1))
        # two reductions, because a difference of sums of squares would cancel in float32
        mean = _MeanOverProcesses.apply(rows.mean(dims))
        centered = rows - mean
        var = _MeanOverProcesses.apply(centered.square().mean(dims))
        with torch.no_grad():
            n = rows.numel() // self.num_features * world_size()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / max(n - 1, 1)), self.momentum)
        scaled = centered * torch.rsqrt(var + self.eps)
        return scaled * self.weight + self.bias if self.affine else scaled


class _SyncBatchNormAct(SyncBatchNorm):
    """The same for images, (B, C, ...), and then what timm does after its BatchNorm."""

    channels = 1

    def __init__(self, plain: _BatchNorm) -> None:
        super().__init__(plain.num_features, plain.eps, plain.momentum, plain.affine)
        self.drop = getattr(plain, "drop", nn.Identity())
        self.act = getattr(plain, "act", nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class _CudaSyncBatchNorm(nn.SyncBatchNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


def synchronize_batch_norm(module: M, device: torch.device) -> M:
    """Move ``module`` to ``device``, with BatchNorms of the kind that synchronises there."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _synchronized(child, device))
    return module.to(device)


def _synchronized(layer: _BatchNorm, device: torch.device) -> _BatchNorm:
    own = isinstance(layer, SyncBatchNorm)
    new: _BatchNorm
    if device.type == "cuda":
        if not own:
            return convert_sync_batchnorm(layer)
        new = _CudaSyncBatchNorm(layer.num_features, layer.eps, layer.momentum)
    elif own or world_size() == 1:
        return layer
    else:
        new = _SyncBatchNormAct(layer)
    new.load_state_dict(layer.state_dict())
    for name, parameter in layer.named_parameters(recurse=False):
        getattr(new, name).requires_grad_(parameter.requires_grad)
    return new.train(layer.training)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the outputs of ``module`` for one image depend on the other images of its batch."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())
