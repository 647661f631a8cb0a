"""The training recipes of linear evaluation and fine-tuning."""

import argparse
import logging
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from yacs.config import CfgNode

from data.source import ImageSource, PartOfSource
from lr_scheduler import Rates
from models.encoder import Backbone
from models.patch_features import ClassTokens, has_class_token
from utils.arguments import number_in
from utils.config import as_dict, leaves, with_values
from utils.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """How a classifier is trained on an encoder.

    Attributes:
        name: of ``--protocol``, and in results.json.
        keys: a configuration file describes pre-training, so these replace its keys; rates are
            for 512 images.
        drop_path_rate: stochastic depth of the encoder while the classifier learns. A frozen
            encoder with any is in train mode.
        group: options of the optimizer's groups of weights.
        rate_by_epoch: the rate stays for an epoch; else each update has its own.
        last_blocks: of a ViT the class tokens of so many blocks are the feature; 0: its own.
    """

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    drop_path_rate: float = 0.0
    group: dict[str, Any] = field(default_factory=dict)
    rate_by_epoch: bool = False
    last_blocks: int = 0


_SGD = {
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
    "MODEL.LABEL_SMOOTHING": 0.0,
}
# the linear probe of MoBY's code (arXiv 2105.04553)
MOBY = Protocol(
    "moby",
    _SGD
    | {
        "TRAIN.WARMUP_LR": 5e-7,
        "TRAIN.MIN_LR": 5e-6,
        "TRAIN.CLIP_GRAD": 5.0,
        "MODEL.LABEL_SMOOTHING": 0.1,
        "DATA.INTERPOLATION": "bilinear",
    },
    drop_path_rate=0.2,
)
# the probe of version 0.1: neither features nor gradients are disturbed
PLAIN = Protocol("plain", _SGD)
# the linear evaluation of DINO's code (arXiv 2104.14294), whose rate of 1e-3 is for 256 images
DINO = Protocol(
    "dino",
    _SGD
    | {
        "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.BASE_LR": 2e-3,
        "DATA.BATCH_SIZE": 128,
        "DATA.INTERPOLATION": "bicubic",
    },
    group={"nesterov": False},
    rate_by_epoch=True,
    last_blocks=4,
)
# logistic regression on frozen features, which makes no updates
LBFGS = Protocol("lbfgs")
# the fine-tuning of MAE (arXiv 2111.06377, table 9), with AUG.* and MODEL.LABEL_SMOOTHING
MAE = Protocol(
    "mae",
    {
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
    drop_path_rate=0.2,
)
PROBES = {protocol.name: protocol for protocol in (MOBY, PLAIN, DINO)}
PROTOCOLS = PROBES | {protocol.name: protocol for protocol in (LBFGS, MAE)}
BEFORE = {"freeze": PLAIN, "finetune": MAE}  # of checkpoints that do not name theirs


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--protocol``, and what it leaves open."""
    add = parser.add_argument
    text = f"whose linear probe, see docs/evaluation.md (default: {MOBY.name})"
    add("--protocol", choices=list(PROBES), help=text)
    text = "stochastic depth (default: 0.2 in fine-tuning and --protocol moby, else 0)"
    add("--drop-path-rate", type=number_in(0.0, 0.99), help=text)
    text = "of --protocol dino: a ViT's last blocks whose class tokens are joined (default: 4)"
    add("--n-last-blocks", type=number_in(1, 1000), help=text)
    text = "of --protocol dino: join the mean of a ViT's patch tokens as well"
    add("--avgpool-patchtokens", action="store_true", help=text)


def choose_protocol(args: argparse.Namespace, weights: str) -> Protocol:
    """The protocol of a command line.

    Args:
        args: with ``protocol`` and ``probe``.
        weights: LINEAR_EVAL.WEIGHTS.

    Raises:
        UserError: flags that do not go together.
    """
    frozen, lbfgs = weights == "freeze", args.probe == "lbfgs"
    if lbfgs and not frozen:
        raise UserError("--probe lbfgs needs a frozen encoder: leave LINEAR_EVAL.WEIGHTS at freeze")
    if args.protocol and (lbfgs or not frozen):
        what = "--probe lbfgs" if lbfgs else "fine-tuning"
        raise UserError(
            f"--protocol {args.protocol} is of a probe by SGD, {what} has its own: leave it out"
        )
    if not frozen:
        return MAE
    return LBFGS if lbfgs else PROBES[args.protocol or MOBY.name]


def choose_tokens(
    args: argparse.Namespace, protocol: Protocol, encoder: Backbone
) -> ClassTokens | None:
    """What the heads see of ``encoder``: class tokens of several blocks, or None for its feature.

    Raises:
        UserError: ``--n-last-blocks`` or ``--avgpool-patchtokens`` where they mean nothing.
    """
    if protocol.last_blocks and has_class_token(encoder):
        tokens = ClassTokens(args.n_last_blocks or protocol.last_blocks, args.avgpool_patchtokens)
        tokens.check(encoder)
        return tokens
    if args.n_last_blocks or args.avgpool_patchtokens:
        raise UserError(
            "--n-last-blocks and --avgpool-patchtokens are of --protocol dino and a ViT with a "
            "class token: leave them out"
        )
    return None


def apply_protocol(
    config: CfgNode, protocol: Protocol, given: Collection[str], rates: list[float] | None = None
) -> tuple[CfgNode, list[float]]:
    """Replace keys of pre-training by those of a protocol.

    Args:
        config: the configuration as it was read.
        protocol: of the evaluation.
        given: keys that ``--opts`` and flags have set, which override the protocol.
        rates: of ``--lr``, which override TRAIN.BASE_LR.

    Returns:
        the configuration of the evaluation, and the base rate of each head. The schedule is for
        its TRAIN.BASE_LR: the rate of fine-tuning, or 1 for a probe, where each head multiplies
        it by its own rate.

    Raises:
        UserError: impossible rates, or several for fine-tuning.
    """
    keys = {key: value for key, value in protocol.keys.items() if key not in given}
    rates = rates or [keys.get("TRAIN.BASE_LR", config.TRAIN.BASE_LR)]
    frozen = config.LINEAR_EVAL.WEIGHTS == "freeze"
    if not frozen and len(rates) > 1:
        raise UserError("fine-tuning takes one --lr; only heads on a frozen encoder train at once")
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f"--lr takes different positive rates, got {rates}")
    return with_values(config, keys | {"TRAIN.BASE_LR": 1.0 if frozen else rates[0]}), rates


def head_schedule(scaled: Rates, rate: float) -> Rates:
    """The schedule of a head, which multiplies each rate of it by ``rate``, its own.

    So only its highest rate grows with its own: it begins and ends at those of the configuration.
    """
    return Rates(scaled.base, scaled.warmup / rate, scaled.minimum / rate)


def hold_out(targets: torch.Tensor, seed: int, every: int) -> torch.Tensor:
    """Draw the training images that are held out to choose by.

    The last image of a class is never taken.

    Args:
        targets: class numbers (N,), or (N, C) for several labels an image, 1 for those it has.
        seed: of the draw.
        every: one of so many images is held out, at least 2; of each class if an image has one.

    Returns:
        which images are held out, N of bool.
    """
    generator = torch.Generator().manual_seed(seed)
    order, targets = torch.randperm(len(targets), generator=generator), targets.cpu()
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    if targets.ndim == 1:
        order = order[targets[order].argsort(stable=True)]  # class by class
        held_out[order[::every]] = True
        counts = targets.bincount()
        held_out &= counts[targets] > 1
        without = (counts > 0) & (targets[held_out].bincount(minlength=len(counts)) == 0)
    else:
        held_out[order[::every]] = True
        has = targets == 1  # NxC
        for label in (has.any(0) & ~has[~held_out].any(0)).nonzero()[:, 0]:
            held_out[has[:, label].nonzero()[0]] = False
        without = has.any(0) & ~has[held_out].any(0)
    if without.any():
        logging.getLogger("synco").warning(
            "%d classes have no image that is held out: they have no say in what is chosen",
            int(without.sum()),
        )
    return held_out


def set_aside(train: ImageSource, seed: int) -> tuple[PartOfSource, PartOfSource]:
    """The images to train on, and a tenth of each class to choose epoch and rate by.

    Raises:
        UserError: no class has an image to spare.
    """
    held_out = hold_out(torch.tensor(train.labels), seed, 10)
    kept, aside = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if not len(aside):
        raise UserError("no class has a second image to hold out: leave --select out")
    return PartOfSource(train, kept.tolist()), PartOfSource(train, aside.tolist())


# what changes the figures; batches may change, and more epochs may follow
SETTINGS = re.compile(
    r"SEED|DATA\.(IMG_SIZE|INTERPOLATION)|TEST\.CROP|MODEL\.(LABEL_SMOOTHING|DROP_RATE)"
    r"|TRAIN\.(WARMUP_EPOCHS|WEIGHT_DECAY|WARMUP_LR|MIN_LR|CLIP_GRAD|OPTIMIZER\..*)"
    r"|TRAIN\.LR_SCHEDULER\..*"
)
AUGMENTATION = re.compile(r"AUG\.(?!SSL|VIEW).*")  # of fine-tuning


def settings(config: CfgNode, drop_path_rate: float, layer_decay: float) -> dict[str, Any]:
    """The settings of an evaluation on which its figures depend, by name."""
    frozen = config.LINEAR_EVAL.WEIGHTS == "freeze"
    found: dict[str, Any] = {"--drop-path-rate": drop_path_rate}
    found |= {} if frozen else {"--layer-decay": layer_decay}
    for key, value in leaves(as_dict(config)):
        if SETTINGS.fullmatch(key) or (not frozen and AUGMENTATION.fullmatch(key)):
            found[key] = value
    return found


def differing(identity: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """The names of what a checkpoint's identity has otherwise; an older one has not all."""
    known = {name: identity[name] for name in ("data", "settings")} | state
    names = [name for name, value in identity.items() if known.get(name) != value]
    if names == ["settings"] and isinstance(known["settings"], dict):
        names = [k for k, v in identity["settings"].items() if known["settings"].get(k) != v]
    return [name for name in names if name != "settings" or len(names) == 1]
