"""The training recipes of linear evaluation and fine-tuning."""

import argparse
import contextlib
import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from data.source import ImageSource, PartOfSource
from evaluation.identity import differences, identity_said
from lr_scheduler import Rates
from models.encoder import Backbone
from models.patch_features import ClassTokens, has_class_token
from utils.arguments import number_in
from utils.checkpoint import LATEST, read_checkpoint
from utils.config import (
    CLASSIFIER,
    FEATURE,
    FINE_TUNING,
    KEYS,
    NETWORK,
    leaves,
    settings,
    with_values,
)
from utils.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """How a classifier is trained on an encoder.

    Attributes:
        name: of ``--protocol``, and in results.json.
        keys: what differs from the defaults of the configuration; rates are for 512 images.
        drop_path_rate: stochastic depth of the encoder while the classifier learns. A frozen
            encoder with any is in train mode.
        group: options of the optimizer's groups of weights.
        rate_by_epoch: the rate stays for an epoch; else each update has its own.
        last_blocks: of a ViT the class tokens of so many blocks are the feature; 0: its own.
        layer_decay: of fine-tuning's rate from a layer to the one before.
        as_mae: the rate falls after the warm-up to a MIN_LR that no batch scales, and the
            classifier is that of ``LinearClassifiers`` with ``as_mae``.
    """

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    drop_path_rate: float = 0.0
    group: dict[str, Any] = field(default_factory=dict)
    rate_by_epoch: bool = False
    last_blocks: int = 0
    layer_decay: float = 0.75
    as_mae: bool = False


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
_ADAMW = {
    "TRAIN.EPOCHS": 100,
    "TRAIN.WARMUP_EPOCHS": 5,
    "TRAIN.BASE_LR": 2e-3,
    "TRAIN.WARMUP_LR": 0.0,
    "TRAIN.MIN_LR": 1e-6,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.CLIP_GRAD": 0.0,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.OPTIMIZER.NAME": "adamw",
}
# what was called MAE's fine-tuning until version 0.2
MAE_V0_2 = Protocol("mae-v0.2", _ADAMW, drop_path_rate=0.2)
# The fine-tuning of MAE's code (arXiv 2111.06377), FINETUNE.md: for ViT-B and all that it does not
# name, for ViT-L and for ViT-H. Its rates are for 256 images.
_MAE = _ADAMW | {"DATA.BATCH_SIZE": 32, "DATA.INTERPOLATION": "bicubic", "AUG.COLOR_JITTER": 0.0}
MAE = Protocol(
    "mae", _MAE | {"TRAIN.BASE_LR": 1e-3}, drop_path_rate=0.1, layer_decay=0.65, as_mae=True
)
_LARGE = replace(MAE, keys=_MAE | {"TRAIN.EPOCHS": 50}, drop_path_rate=0.2, layer_decay=0.75)
MAE_OF = {
    "vit_large": _LARGE,
    "vit_huge": replace(_LARGE, keys=_LARGE.keys | {"DATA.BATCH_SIZE": 16}, drop_path_rate=0.3),
}
# all that a classifier depends on, but what follows from the encoder and the command line
_STAY = {"SEED", "LINEAR_EVAL.WEIGHTS", *settings({}, NETWORK | FEATURE)}
DEFAULT_KEYS = {
    key: KEYS[key].default for key in settings({}, CLASSIFIER | FINE_TUNING) if key not in _STAY
}
PROBES = {protocol.name: protocol for protocol in (MOBY, PLAIN, DINO)}
FINE_TUNINGS = {protocol.name: protocol for protocol in (MAE, MAE_V0_2)}
PROTOCOLS = PROBES | FINE_TUNINGS | {LBFGS.name: LBFGS}
BEFORE = {"freeze": PLAIN, "finetune": MAE_V0_2}  # of checkpoints that do not name theirs


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--protocol``, and what it leaves open."""
    add = parser.add_argument
    text = f"see docs/evaluation.md (default: {MOBY.name} for a probe, {MAE.name} for fine-tuning)"
    add("--protocol", choices=[*PROBES, *FINE_TUNINGS], help=text)
    text = "stochastic depth (default: the protocol's)"
    add("--drop-path-rate", type=number_in(0.0, 0.99), help=text)
    text = "of --protocol dino: a ViT's last blocks whose class tokens are joined (default: 4)"
    add("--n-last-blocks", type=number_in(1, 1000), help=text)
    text = "of --protocol dino: join the mean of a ViT's patch tokens as well"
    add("--avgpool-patchtokens", action="store_true", help=text)


def choose_protocol(args: argparse.Namespace, config: CfgNode, folder: str) -> Protocol:
    """The protocol of a command line.

    A fine-tuning that version 0.2 began keeps its protocol, if none is asked for.

    Args:
        args: with ``protocol`` and ``probe``.
        config: names the encoder, and whether it learns.
        folder: of the fine-tuning.

    Raises:
        UserError: flags that do not go together.
    """
    frozen, lbfgs = config.LINEAR_EVAL.WEIGHTS == "freeze", args.probe == "lbfgs"
    if lbfgs and not frozen:
        raise UserError("--probe lbfgs needs a frozen encoder: leave LINEAR_EVAL.WEIGHTS at freeze")
    kind = "--probe lbfgs" if lbfgs else "a probe by SGD" if frozen else "fine-tuning"
    fitting = {LBFGS.name: LBFGS} if lbfgs else PROBES if frozen else FINE_TUNINGS
    name = args.protocol or next(iter(fitting))
    if name not in fitting:
        raise UserError(f"--protocol {name} is not for {kind}, which has {', '.join(fitting)}")
    if frozen or name != MAE.name:
        return fitting[name]
    begun = config.MODEL.RESUME or os.path.join(folder, LATEST)
    if not args.protocol and os.path.exists(begun):
        with contextlib.suppress(UserError):  # whoever reads it in earnest will say why
            if protocol_said(read_checkpoint(begun), frozen) is MAE_V0_2:
                return MAE_V0_2
    return next((MAE_OF[size] for size in MAE_OF if size in config.MODEL.ENCODER), MAE)


def protocol_said(state: Mapping[str, Any], frozen: bool) -> Protocol:
    """The protocol of a checkpoint of classifiers; one of version 0.1 names none."""
    name = state.get("protocol")
    if name == MAE.name and not identity_said(state.get("provenance")):
        return MAE_V0_2
    return PROTOCOLS.get(str(name), BEFORE["freeze" if frozen else "finetune"])


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
    """Replace the keys that describe pre-training by those of a protocol.

    The encoder, the seed, and how images are resized and cropped stay, unless the protocol has
    them.

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
    keys = {k: v for k, v in (DEFAULT_KEYS | protocol.keys).items() if k not in given}
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


# a training that has not ended may go on with its batches divided otherwise
DIVISION = ("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS", "processes")


def changes(
    state: Mapping[str, Any], new: Mapping[str, Any], config: CfgNode, asked: bool
) -> tuple[list[str], list[str]]:
    """Why a checkpoint of classifiers must not go on as another evaluation, in words.

    Args:
        state: the checkpoint.
        new: the identity of the evaluation that would go on from it.
        config: its configuration as it was read.
        asked: the checkpoint was named. It may go on with more epochs, or another batch.

    Returns:
        what forbids it, and what differs and may: an AMP_OPT_LEVEL that nobody asks for, and, until
        the training has ended, how the images of an update are divided.
    """
    frozen = config.LINEAR_EVAL.WEIGHTS == "freeze"
    old = identity_of(state, frozen)
    words = differences(old, new)
    allowed = []
    if not frozen and config.AMP_OPT_LEVEL == "auto":
        words.pop("AMP_OPT_LEVEL", None)  # whoever keeps it says so
    ended = state.get("judged", state.get("epoch", 0)) + 1 >= old.get("TRAIN.EPOCHS", math.inf)
    if asked or (not ended and _images(old) == _images(new)):
        allowed += [words.pop(name) for name in DIVISION if name in words]
    if asked and old.get("TRAIN.EPOCHS", 0) < new["TRAIN.EPOCHS"] and "TRAIN.EPOCHS" in words:
        allowed.append(words.pop("TRAIN.EPOCHS"))
    return list(words.values()), allowed


def identity_of(state: Mapping[str, Any], frozen: bool) -> dict[str, Any]:
    """The identity of a checkpoint of classifiers; before version 0.3 it is spread over it."""
    provenance = state.get("provenance")
    if known := identity_said(provenance):
        return known
    old: dict[str, Any] = {"--protocol": protocol_said(state, frozen).name}
    for now, before in {
        **{"weights": "encoder", "images": "data", "--lr": "lr", "--select": "select"},
        **{"class tokens": "class_tokens"},
    }.items():
        if before in state:
            old[now] = state[before]
    if isinstance(provenance, dict) and "processes" in provenance:
        old["processes"] = provenance["processes"]
    with contextlib.suppress(yaml.YAMLError):
        written = yaml.safe_load(str(state.get("config")))
        config = dict(leaves(written)) if isinstance(written, dict) else {}
        for key in (*DIVISION, "TRAIN.EPOCHS", "AMP_OPT_LEVEL"):
            if key in config:
                old[key] = config[key]
    said = state.get("settings")
    old |= said if isinstance(said, dict) else {}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in old.items()}


def _images(of: Mapping[str, Any]) -> int:
    """Images of an update."""
    batch, steps, processes = (of.get(name) or 1 for name in DIVISION)
    return batch * steps * processes
