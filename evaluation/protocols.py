"""The training recipes of linear evaluation and fine-tuning."""

import math
from typing import Any

import torch
from yacs.config import CfgNode

from data.source import ImageSource, PartOfSource
from utils.config import with_values
from utils.errors import UserError

# a configuration file describes pre-training, so these replace its keys; rates are for 512 images
PROTOCOLS: dict[str, dict[str, Any]] = {
    # the linear probe of MoBY (arXiv 2105.04553)
    "freeze": {
        "TRAIN.EPOCHS": 100,
        "TRAIN.WARMUP_EPOCHS": 5,
        "TRAIN.BASE_LR": 1.0,
        "TRAIN.WARMUP_LR": 0.0,
        "TRAIN.MIN_LR": 0.0,
        "TRAIN.WEIGHT_DECAY": 0.0,
        "TRAIN.CLIP_GRAD": 0.0,
        "TRAIN.LR_SCHEDULER.NAME": "cosine",
        "TRAIN.OPTIMIZER.NAME": "sgd",
        "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
    },
    # the fine-tuning of MAE (arXiv 2111.06377, table 9), with AUG.* and MODEL.LABEL_SMOOTHING
    "finetune": {
        "TRAIN.EPOCHS": 100,
        "TRAIN.WARMUP_EPOCHS": 5,
        "TRAIN.BASE_LR": 2e-3,
        "TRAIN.WARMUP_LR": 0.0,
        "TRAIN.MIN_LR": 1e-6,
        "TRAIN.WEIGHT_DECAY": 0.05,
        "TRAIN.CLIP_GRAD": 0.0,
        "TRAIN.LR_SCHEDULER.NAME": "cosine",
        "TRAIN.OPTIMIZER.NAME": "adamw",
    },
}


def apply_protocol(
    config: CfgNode, opts: list[str], rates: list[float] | None
) -> tuple[CfgNode, list[float]]:
    """Replace pre-training's TRAIN.* by those of the protocol that LINEAR_EVAL.WEIGHTS names.

    Args:
        config: the configuration as it was read.
        opts: ``KEY VALUE ...`` of ``--opts``, which override the protocol.
        rates: of ``--lr``, which override TRAIN.BASE_LR.

    Returns:
        the configuration of the evaluation, and the base rate of each head. The schedule is for
        its TRAIN.BASE_LR: the rate of fine-tuning, or 1 for a probe, where each head multiplies
        it by its own rate.

    Raises:
        UserError: impossible rates, or several for fine-tuning.
    """
    weights = config.LINEAR_EVAL.WEIGHTS
    protocol = {k: v for k, v in PROTOCOLS[weights].items() if k not in opts[::2]}
    rates = rates or [protocol.get("TRAIN.BASE_LR", config.TRAIN.BASE_LR)]
    if weights == "finetune" and len(rates) > 1:
        raise UserError("fine-tuning takes one --lr; only heads on a frozen encoder train at once")
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f"--lr takes different positive rates, got {rates}")
    scheduled = 1.0 if weights == "freeze" else rates[0]
    return with_values(config, protocol | {"TRAIN.BASE_LR": scheduled}), rates


def hold_out(targets: torch.Tensor, seed: int, every: int) -> torch.Tensor:
    """Draw the training images that are held out to choose by.

    Args:
        targets: class numbers (N,), or (N, C) for several labels an image.
        seed: of the draw.
        every: one of so many images is held out, of each class if an image has one.

    Returns:
        which images are held out, N of bool.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    if targets.ndim == 1:
        order = order[targets.cpu()[order].argsort(stable=True)]  # class by class
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    held_out[order[::every]] = True
    return held_out


def set_aside(train: ImageSource, seed: int) -> tuple[PartOfSource, PartOfSource]:
    """The images to train on, and a tenth of each class to choose epoch and rate by."""
    held_out = hold_out(torch.tensor(train.labels), seed, 10)
    kept, aside = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    return PartOfSource(train, kept.tolist()), PartOfSource(train, aside.tolist())
