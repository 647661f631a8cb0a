"""The training recipes of linear evaluation and fine-tuning."""

import math

from yacs.config import CfgNode

from utils.config import set_key
from utils.errors import UserError

# what a configuration file, which is of pre-training, does not say; rates are for 512 images
PROTOCOLS = {
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


def apply_protocol(config: CfgNode, opts: list[str], rates: list[float] | None) -> list[float]:
    """Set the TRAIN.* of the protocol of LINEAR_EVAL.WEIGHTS in place of pre-training's.

    Args:
        config: the configuration; its TRAIN.BASE_LR becomes what the schedule is of: the rate of
            fine-tuning, or 1, of which the rate of each head of a probe is a multiple.
        opts: ``KEY VALUE ...`` of ``--opts``, which go before the protocol.
        rates: of ``--lr``, which go before TRAIN.BASE_LR.

    Returns:
        the base rate of each head.

    Raises:
        UserError: rates that cannot be, or several for fine-tuning.
    """
    weights = config.LINEAR_EVAL.WEIGHTS
    for key, value in PROTOCOLS[weights].items():
        if key not in opts[::2]:
            set_key(config, key, str(value))
    rates = rates or [config.TRAIN.BASE_LR]
    if weights == "finetune" and len(rates) > 1:
        raise UserError("fine-tuning takes one --lr; only heads on a frozen encoder train at once")
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f"--lr takes different positive rates, got {rates}")
    config.TRAIN.BASE_LR = 1.0 if weights == "freeze" else rates[0]
    return rates
