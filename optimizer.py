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
        return Lars(groups, lr=base_lr, momentum=options.MOMENTUM)
    raise UserError(f"TRAIN.OPTIMIZER.NAME must be adamw, sgd or lars, got {options.NAME!r}")
