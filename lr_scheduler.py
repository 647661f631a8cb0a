"""The learning rate of each update, on timm's schedulers."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from yacs.config import CfgNode

from utils.errors import UserError

# keys that only some schedules read: the linear one ends at 1% of the base rate, as published
READ_BY = {
    "TRAIN.MIN_LR": ("cosine",),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": ("step",),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": ("step",),
}
REFERENCE_BATCH = 512  # images an update for which the configured rates hold


@dataclass(frozen=True)
class Rates:
    """Learning rates: the highest, that at the start of the warm-up, and that at the end."""

    base: float
    warmup: float
    minimum: float

    def by_key(self) -> dict[str, float]:
        """By the names of the keys that they stand for in ``config.json``."""
        return {
            "TRAIN.BASE_LR": self.base,
            "TRAIN.WARMUP_LR": self.warmup,
            "TRAIN.MIN_LR": self.minimum,
        }


def scaled_rates(config: CfgNode, images_per_update: int) -> Rates:
    """BASE_LR, WARMUP_LR and MIN_LR of the section TRAIN, scaled to the images of one update."""
    train, scale = config.TRAIN, images_per_update / REFERENCE_BATCH
    return Rates(train.BASE_LR * scale, train.WARMUP_LR * scale, train.MIN_LR * scale)


def without_effect(config: CfgNode, given: Collection[str]) -> list[str]:
    """What of the schedule does nothing in this configuration, in lines for the log.

    Args:
        config: the configuration.
        given: the keys that the command line has set.
    """
    train = config.TRAIN
    name = train.LR_SCHEDULER.NAME
    idle = [key for key, schedules in READ_BY.items() if key in given and name not in schedules]
    lines = [
        f"{key} has no effect: TRAIN.LR_SCHEDULER.NAME {name} does not read it" for key in idle
    ]
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        lines.append(
            f"TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} is not below TRAIN.EPOCHS {train.EPOCHS}: "
            "the rate never reaches TRAIN.BASE_LR"
        )
    return lines


def build_scheduler(
    config: CfgNode,
    optimizer: torch.optim.Optimizer,
    rates: Rates,
    steps_per_epoch: int,
    after_warmup: bool = False,
) -> Scheduler:
    """The schedule that ``config.TRAIN`` names; ``step_update(t)`` sets the rate of update ``t``.

    Args:
        config: its section TRAIN names the schedule and its epochs.
        optimizer: its groups are set.
        rates: from ``scaled_rates``.
        steps_per_epoch: updates an epoch.
        after_warmup: the cosine begins at its end, as in MAE (arXiv 2111.06377), not with it.

    Raises:
        UserError: unknown name.
    """
    train = config.TRAIN
    total = train.EPOCHS * steps_per_epoch
    warmup = train.WARMUP_EPOCHS * steps_per_epoch
    shared = {"warmup_t": warmup, "warmup_lr_init": rates.warmup, "t_in_epochs": False}
    name = train.LR_SCHEDULER.NAME
    if name == "cosine":
        return CosineLRScheduler(
            optimizer,
            t_initial=max(1, total - warmup) if after_warmup else total,
            lr_min=rates.minimum,
            warmup_prefix=after_warmup,
            **shared,
        )
    if name == "linear":
        return PolyLRScheduler(
            optimizer,
            t_initial=max(1, total - warmup),
            power=1.0,
            lr_min=0.01 * rates.base,
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
