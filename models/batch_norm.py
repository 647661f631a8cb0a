"""Batch normalisation synchronised across processes, on GPUs and on the CPU."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from utils.distributed import all_gather_rows, world_size

M = TypeVar("M", bound=nn.Module)


class _BatchNormByGloo(torch.autograd.Function):
    """BatchNorm with the statistics of all processes, for any device and group.

    Each direction exchanges once: a wait for the other processes costs more than what is sent.
    What lies between is done by torch's own kernels, several times as fast as step by step.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        """(N, C, ...) -> (N, C, ...); the running statistics change in place."""
        rows = x.float()
        own = torch.stack(torch.batch_norm_update_stats(rows, None, None, 0.0))  # mean, variance
        means, variances = all_gather_rows(own[None]).unbind(1)  # PxC
        mean = means.mean(0)
        # no difference of sums of squares, which would cancel in float32
        var = (variances + (means - mean).square()).mean(0)
        ctx.rows = x.numel() // len(mean) * world_size()
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (ctx.rows / max(ctx.rows - 1, 1)), momentum)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        return F.batch_norm(rows, mean, var, weight, bias, eps=eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, deviation = ctx.saved_tensors
        own, rows = gradient.float(), x.float()
        # the sums of the gradient times the normalised rows, and of the gradient
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            own, rows, weight, None, None, mean, deviation, True, 0.0, [False, True, True]
        )
        of_x = None
        if ctx.needs_input_grad[0]:
            # two processes gather in half the time that gloo takes to add
            sums = all_gather_rows(torch.stack([of_weight, of_bias])[None]).sum(0)
            mean_product, mean_own = sums / ctx.rows
            mean, mean_own, slope, scale = (
                v.view(-1, *[1] * (x.ndim - 2))
                for v in (mean, mean_own, deviation * mean_product, deviation * weight)
            )
            # rows are centred first: their mean can be far larger than what they differ by
            of_x = torch.addcmul(own, rows - mean, slope, value=-1).sub_(mean_own).mul_(scale)
            of_x = of_x.to(x.dtype)
        return of_x, of_weight, of_bias, None, None, None, None


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
        means, deviations = all_gather_rows(own[None]).chunk(2, dim=1)  # PxC
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
        if together:
            return self._forward_gloo(x)
        rows = x.movedim(self.channels, -1)
        y = super().forward(rows.reshape(-1, self.num_features)).view_as(rows)
        return y.movedim(-1, self.channels)

    def _forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.num_features) if self.channels == -1 else x
        rows = rows.contiguous(memory_format=_layout(rows))
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        return _BatchNormOfAll.apply(rows, self.weight, self.bias, *statistics).view_as(x)

    def _forward_gloo(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        bias: torch.Tensor = self.bias
        if not self.affine:
            weight, bias = torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        rows = x.reshape(-1, self.num_features) if self.channels == -1 else x
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        return _BatchNormByGloo.apply(rows, weight, bias, *statistics).view_as(x)


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
