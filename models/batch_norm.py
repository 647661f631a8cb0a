"""Batch normalisation over channels-last features, synchronised across processes."""

import torch
from torch import nn

from utils.distributed import mean_over_processes, world_size


class _MeanOverProcesses(torch.autograd.Function):
    """The average over the processes, whose gradient reaches the inputs of all of them."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return mean_over_processes(x.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return mean_over_processes(gradient.clone())


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm of the last dimension with the statistics of all processes, by gloo on the CPU.

    In training, every process must hold the same number of rows. ``synchronize_batch_norm`` puts
    torch's SyncBatchNorm, which runs on GPUs alone, in its place there.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C), in the type of ``x``."""
        rows = x.reshape(-1, x.shape[-1])  # NxC
        if self.training and world_size() > 1:
            return self._forward_gloo(rows.float()).to(x.dtype).view_as(x)
        return super().forward(rows).view_as(x)

    def _forward_gloo(self, rows: torch.Tensor) -> torch.Tensor:
        # two reductions, not one of the sum of squares: that difference cancels in float32
        mean = _MeanOverProcesses.apply(rows.mean(0))
        centered = rows - mean
        var = _MeanOverProcesses.apply(centered.square().mean(0))
        with torch.no_grad():
            n = rows.shape[0] * world_size()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / max(n - 1, 1)), self.momentum)
        return centered * (torch.rsqrt(var + self.eps) * self.weight) + self.bias


class _CudaSyncBatchNorm(nn.SyncBatchNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Move ``module`` to ``device``, its BatchNorms to the kind that synchronises there."""
    if device.type == "cuda":
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, SyncBatchNorm):
                    on_gpu = _CudaSyncBatchNorm(child.num_features, child.eps, child.momentum)
                    on_gpu.load_state_dict(child.state_dict())
                    on_gpu.requires_grad_(child.weight.requires_grad)
                    setattr(parent, name, on_gpu)
    return module.to(device)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the outputs of ``module`` for one image depend on the other images of its batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
