"""The optimizer, and which parameters weight decay skips."""

from typing import Any, cast

import torch
from timm.optim import param_groups_weight_decay
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
            what ``model.no_weight_decay()`` names.

    Raises:
        UserError: unknown name.
    """
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    name = options.NAME.lower()
    groups = groups or param_groups_weight_decay(
        model,
        train.WEIGHT_DECAY,
        no_weight_decay_list=cast(MomentumMethod, model).no_weight_decay(),
    )
    if name == "adamw":
        return torch.optim.AdamW(
            groups, base_lr, betas=tuple(options.BETAS), eps=options.EPS, fused=True
        )
    if name == "sgd":
        sgd = torch.optim.SGD(
            groups, base_lr, momentum=options.MOMENTUM, nesterov=options.MOMENTUM > 0, fused=True
        )
        if options.MOMENTUM:
            # torch leaves the buffers as they come from memory if the first step is skipped
            for group in sgd.param_groups:
                for p in group["params"]:
                    sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if name == "lars":
        return Lars(groups, base_lr, options.MOMENTUM)
    raise UserError(f"TRAIN.OPTIMIZER.NAME must be adamw, sgd or lars, got {options.NAME!r}")


class Lars(torch.optim.Optimizer):
    """SGD with momentum, whose gradients of weights are scaled to the length of the weights.

    The gradient g of a parameter w of two or more dimensions becomes
    ``TRUST |w| / |g + decay w|`` times ``g + decay w``, whatever the decay; where one of the norms
    is 0, it is not scaled. Other parameters get neither. The step reads on the device whether it
    is to be skipped, so that the host does not wait: a GradScaler gives ``grad_scale`` and
    ``found_inf`` to an optimizer that says it takes them.

    Source: You et al. 2017 (arXiv 1708.03888), as in MoCo v3 (arXiv 2104.02057).

    Args:
        groups: parameters, with their ``weight_decay``.
        lr: learning rate.
        momentum: of the steps; without dampening, not Nesterov's.
    """

    TRUST = 0.001

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; none if ``found_inf`` is 1."""
        scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [cast(torch.Tensor, p.grad) for p in parameters]
            if not parameters:
                continue
            if scale is not None:
                torch._foreach_div_(gradients, scale)
            weights = [p for p in parameters if p.ndim > 1]
            if weights:
                own = [cast(torch.Tensor, w.grad) for w in weights]
                if group["weight_decay"]:
                    torch._foreach_add_(own, weights, alpha=group["weight_decay"])
                lengths = torch.stack(torch._foreach_norm(weights))
                norms = torch.stack(torch._foreach_norm(own))
                ratios = self.TRUST * lengths / norms
                ratios = torch.where((lengths > 0) & (norms > 0), ratios, 1.0)
                # a kernel for each weight: no list of factors on the device goes in one
                torch._foreach_mul_(own, list(ratios.unbind()))
            buffers = [self._buffer(p) for p in parameters] if group["momentum"] else []
            # what is behind SGD(fused=True): the only step here that can be skipped on the device
            torch._fused_sgd_(
                parameters,
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=found_inf,
            )

    def _buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]
