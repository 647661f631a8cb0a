"""The learning rate of each update, on timm's schedulers."""

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from yacs.config import CfgNode

from utils.errors import UserError

REFERENCE_BATCH = 512  # images an update for which the configured rates hold


def scale_learning_rates(config: CfgNode, world_size: int) -> None:
    """Scale BASE_LR, WARMUP_LR and MIN_LR, in place, to the images of one update."""
    images = config.DATA.BATCH_SIZE * world_size * max(1, config.TRAIN.ACCUMULATION_STEPS)
    for key in ("BASE_LR", "WARMUP_LR", "MIN_LR"):
        config.TRAIN[key] *= images / REFERENCE_BATCH


def build_scheduler(
    config: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Scheduler:
    """The schedule that ``config.TRAIN`` names; ``step_update(t)`` sets the rate of update ``t``.

    Args:
        config: the configuration with its rates already scaled.
        optimizer: its groups are set.
        steps_per_epoch: updates an epoch.

    Raises:
        UserError: unknown name.
    """
    train = config.TRAIN
    total = train.EPOCHS * steps_per_epoch
    warmup = train.WARMUP_EPOCHS * steps_per_epoch
    shared = {"warmup_t": warmup, "warmup_lr_init": train.WARMUP_LR, "t_in_epochs": False}
    name = train.LR_SCHEDULER.NAME
    if name == "cosine":
        return CosineLRScheduler(
            optimizer, t_initial=total, lr_min=train.MIN_LR, warmup_prefix=False, **shared
        )
    if name == "linear":
        return PolyLRScheduler(
            optimizer,
            t_initial=max(1, total - warmup),
            power=1.0,
            lr_min=0.01 * train.BASE_LR,
            warmup_prefix=True,
            **shared,
        )
    if name == "step":
        return StepLRScheduler(
            optimizer,
            decay_t=train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch,
            decay_rate=train.LR_SCHEDULER.DECAY_RATE,
            warmup_prefix=False,
            **shared,
        )
    raise UserError(f"TRAIN.LR_SCHEDULER.NAME must be cosine, linear or step, got {name!r}")
