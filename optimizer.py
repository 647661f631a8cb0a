"""The optimizer, and which parameters weight decay skips."""

from typing import Any, cast

import torch
from timm.optim import Lars, param_groups_weight_decay
from torch import nn
from yacs.config import CfgNode

from models.momentum import MomentumMethod
from utils.errors import UserError


def build_optimizer(
    config: CfgNode, model: nn.Module, base_lr: float, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that ``config.TRAIN.OPTIMIZER`` names, for the parameters that learn.

    Args:
        config: its section TRAIN has the optimizer's settings.
        model: what learns.
        base_lr: the rate, scaled to the images of an update.
        groups: its parameters in groups of torch, in which timm's ``lr_scale`` multiplies the
            scheduled rate. By default weight decay skips one-dimensional parameters, biases and
            what ``model.no_weight_decay()`` names; LARS adapts no rate of theirs.

    Raises:
        UserError: unknown name.
    """
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    groups = groups or param_groups_weight_decay(
        model,
        train.WEIGHT_DECAY,
        no_weight_decay_list=cast(MomentumMethod, model).no_weight_decay(),
    )
    if options.NAME == "adamw":
        return torch.optim.AdamW(
            groups, base_lr, betas=tuple(options.BETAS), eps=options.EPS, fused=True
        )
    if options.NAME == "sgd":
        sgd = torch.optim.SGD(
            groups, base_lr, momentum=options.MOMENTUM, nesterov=options.MOMENTUM > 0, fused=True
        )
        if options.MOMENTUM:
            # torch leaves the buffers as they come from memory if the first step is skipped
            for group in sgd.param_groups:
                for p in group["params"]:
                    sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if options.NAME == "lars":
        on_gpu = any(p.is_cuda for group in groups for p in group["params"])
        return (DeviceLars if on_gpu else Lars)(groups, lr=base_lr, momentum=options.MOMENTUM)
    raise UserError(f"TRAIN.OPTIMIZER.NAME must be adamw, sgd or lars, got {options.NAME!r}")


class DeviceLars(Lars):
    """timm's LARS for GPUs: whether a step is skipped is read there, and the host does not wait.

    A GradScaler gives ``grad_scale`` and ``found_inf`` to an optimizer that says it takes them.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; none if ``found_inf`` is 1."""
        scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients = [cast(torch.Tensor, p.grad) for p in weights]
            if not weights:
                continue
            if scale is not None:
                torch._foreach_div_(gradients, scale)
            decay = group["weight_decay"]
            if decay:
                weight_norms = torch.stack(torch._foreach_norm(weights))
                norms = torch.stack(torch._foreach_norm(gradients))
                ratios = group["trust_coeff"] * weight_norms
                ratios /= norms + decay * weight_norms + group["eps"]
                ratios = torch.where((weight_norms > 0) & (norms > 0), ratios, 1.0)
                torch._foreach_add_(gradients, weights, alpha=decay)
                torch._foreach_mul_(gradients, list(ratios.unbind()))
            buffers = [self._buffer(p) for p in weights] if group["momentum"] else []
            # what is behind SGD(fused=True): the only step here that can be skipped on the device
            torch._fused_sgd_(
                weights,
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
                found_inf=found_inf,
            )

    def _buffer(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]
