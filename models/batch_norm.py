"""Batch normalisation synchronised across processes, on GPUs and on the CPU."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from utils.distributed import all_gather_batch, mean_over_processes, world_size

M = TypeVar("M", bound=nn.Module)


class _MeanOverProcesses(torch.autograd.Function):
    """The average over the processes, whose gradient reaches the inputs of all of them."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return mean_over_processes(x.clone())

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return mean_over_processes(gradient.clone())


class _BatchNormOfAll(torch.autograd.Function):
    """BatchNorm with the statistics of all processes, by the kernels of torch's SyncBatchNorm.

    Torch's own leaves out processes without rows, which it has to read from the device. Here each
    has as many rows, so the host waits for nothing.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        """(N, C, ...) -> (N, C, ...); the running statistics change in place."""
        own = torch.cat(torch.batch_norm_stats(x, eps))  # 2C: mean, inverse deviation
        means, deviations = all_gather_batch(own[None]).chunk(2, dim=1)  # PxC
        rows = own.new_full((world_size(),), x.numel() // x.shape[1])
        mean, deviation = torch.batch_norm_gather_stats_with_counts(
            x, means, deviations, running_mean, running_var, momentum, eps, rows
        )
        ctx.save_for_backward(x, weight, mean, deviation, rows.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, deviation, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, deviation, rows = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, deviation, weight, *ctx.needs_input_grad[:3]
        )
        of_x = None
        if ctx.needs_input_grad[0]:
            together = torch.cat(sums)
            dist.all_reduce(together)
            # torch's annotation of it lacks the last argument
            of_x = torch.batch_norm_backward_elemt(  # type: ignore[call-arg]
                gradient, x, mean, deviation, weight, *together.chunk(2), rows
            )
        return of_x, of_weight, of_bias, None, None, None, None


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm of the last dimension with the statistics of all processes.

    In training, every process must hold the same number of rows.
    """

    channels = -1  # the dimension
    momentum: float
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C), in the type of ``x``."""
        together = self.training and world_size() > 1
        if together and x.is_cuda:
            return self._forward_cuda(x)
        rows = x.movedim(self.channels, -1)
        if together:
            y = self._forward_gloo(rows.float()).to(x.dtype)
        else:
            y = super().forward(rows.reshape(-1, self.num_features)).view_as(rows)
        return y.movedim(-1, self.channels)

    def _forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.num_features) if self.channels == -1 else x
        rows = rows.contiguous(memory_format=_layout(rows))
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        return _BatchNormOfAll.apply(rows, self.weight, self.bias, *statistics).view_as(x)

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


def _layout(x: torch.Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def synchronize_batch_norm(module: M, device: torch.device) -> M:
    """Move ``module`` to ``device``, with BatchNorms that synchronise between processes."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _synchronized(child))
    return module.to(device)


def _synchronized(layer: _BatchNorm) -> _BatchNorm:
    if isinstance(layer, SyncBatchNorm) or world_size() == 1:
        return layer
    new = _SyncBatchNormAct(layer)
    new.load_state_dict(layer.state_dict())
    for name, parameter in layer.named_parameters(recurse=False):
        getattr(new, name).requires_grad_(parameter.requires_grad)
    return new.train(layer.training)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the outputs of ``module`` for one image depend on the other images of its batch."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())
