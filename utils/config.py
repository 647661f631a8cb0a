"""The configuration: every key with its default, read from YAML files, flags and ``--opts``."""

import ast
import difflib
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from enum import Flag, auto
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from utils.errors import UserError, reading


class Use(Flag):
    """What depends on a key; who asks whether a setting matters asks for one of these."""

    NETWORK = auto()  # the encoder's shape and arithmetic, and so all that follows
    TRAINING = auto()  # what a pre-training learns
    CLASSIFIER = auto()  # the figures of a probe or of a fine-tuning
    FINE_TUNING = auto()  # those of a fine-tuning alone
    FEATURE = auto()  # the feature of an image: k-NN, retrieval, video, exports
    PLACE = auto()  # where things lie, when they are saved and what is logged: no figure


NETWORK, TRAINING, CLASSIFIER, FINE_TUNING, FEATURE, PLACE = Use


class Key(NamedTuple):
    """One key of the configuration.

    Attributes:
        default: its type is the key's type.
        uses: what depends on it.
        allowed: the least and the largest number (of each element of a list), or the words.
        about: what it is.
        effect: whether anything follows from it; if not, published files may hold it all the same.
        local: whether processes of a group may differ in it.
    """

    default: Any
    uses: Use
    allowed: tuple[float, float] | tuple[str, ...] = ()
    about: str = ""
    effect: bool = True
    local: bool = False


KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
KINDS |= dict.fromkeys((list, tuple), "a list")
COUNT, SHARE, WORKERS = (0, 10**9), (0, 1), (0, 1024)
# fmt: off
KEYS = {
    "BASE": Key([""], PLACE, (), "files that this one overrides, by paths relative to it"),
    "DATA.BATCH_SIZE": Key(64, TRAINING | CLASSIFIER, (1, 10**6), "images per process"),
    "DATA.DATA_PATH": Key("", PLACE, (), "folder of the data set", local=True),
    "DATA.DATASET": Key("imagenet", TRAINING | CLASSIFIER | FEATURE, (), "a name of the table "
        "of data sets"),
    "DATA.IMG_SIZE": Key(224, TRAINING | CLASSIFIER | FEATURE, (1, 16384), "side of an image in "
        "pixels, any"),
    "DATA.INTERPOLATION": Key("bicubic", CLASSIFIER | FEATURE, ("bicubic", "bilinear",
        "nearest"), "of the test resize"),
    "DATA.BACKEND": Key("opencv", TRAINING, ("opencv", "pil", "device"), "of the views of "
        "pre-training; "
        "`device`: their colours are changed there, for whole batches"),
    "DATA.ZIP_MODE": Key(False, PLACE, (), "read `train.zip` and `val.zip`"),
    "DATA.CACHE_MODE": Key("part", PLACE, ("no", "full", "part"), "zipped images kept in memory"),
    "DATA.MAX_BAD_FRACTION": Key(0.001, PLACE, SHARE, "share of unreadable images at which "
        "pre-training "
        "stops; below it they are replaced"),
    "DATA.PIN_MEMORY": Key(True, PLACE, (), "on a GPU: batches in memory that it copies faster"),
    "DATA.NUM_WORKERS": Key(8, PLACE, WORKERS, "per process, at most its share of the "
        "processors that it "
        "may use", local=True),
    "DATA.TRAINING_IMAGES": Key(0, PLACE, COUNT, "`config.json` has the number that was found"),
    "MODEL.TYPE": Key("moby", TRAINING, (), "`moby`, `byol` or `synco`"),
    "MODEL.ENCODER": Key("swin_tiny", NETWORK, (), "`vit_{nano,tiny,small,base,large,huge}`, "
        "`swin_{tiny,small,base,large}`, `resnet{50,101,152,200}`, or `timm/<name>` for any "
        "backbone of timm, such as `timm/convnext_tiny`"),
    "MODEL.NUM_HEADS": Key(0, NETWORK, (0, 1024), "of a ViT's blocks; 0: as the weights or the "
        "encoder say"),
    "MODEL.PATCH_SIZE": Key(0, NETWORK, (0, 1024), "pixels, of a ViT or a Swin; 0: likewise"),
    "MODEL.WINDOW_SIZE": Key(0, NETWORK, (0, 1024), "patches, of a Swin; 0: likewise"),
    "MODEL.NAME": Key("moby__swin_tiny", PLACE, (), "first folder of a run"),
    "MODEL.RESUME": Key("", PLACE, (), "checkpoint to begin from, see `--resume`"),
    "MODEL.NUM_CLASSES": Key(1000, PLACE, (1, 10**7), "the data set tells", effect=False),
    "MODEL.DROP_RATE": Key(0.0, TRAINING | CLASSIFIER, (0, 0.99), "dropout"),
    "MODEL.DROP_PATH_RATE": Key(0.1, PLACE, (0, 0.99), "the next two tell, and in evaluations a "
        "flag",
        effect=False),
    "MODEL.ONLINE_DROP_PATH_RATE": Key(0.2, TRAINING, (0, 0.99), "stochastic depth of the encoder"),
    "MODEL.TARGET_DROP_PATH_RATE": Key(0.0, TRAINING, (0, 0.99), "and of the key encoder"),
    "MODEL.LABEL_SMOOTHING": Key(0.1, CLASSIFIER, (0, 0.99), "of fine-tuning; a probe's "
        "protocol has its own"),
    "MODEL.CONTRAST_MOMENTUM": Key(0.99, TRAINING, SHARE, "of the key encoder at the start; "
        "rises to 1 by a "
        "cosine"),
    "MODEL.CONTRAST_TEMPERATURE": Key(0.2, TRAINING, (1e-4, 1e4), "divides the similarities"),
    "MODEL.CONTRAST_NUM_NEGATIVE": Key(4096, TRAINING, (1, 10**9), "length of a queue"),
    "MODEL.PROJ_NUM_LAYERS": Key(2, TRAINING, (0, 100), "linear layers of the projector"),
    "MODEL.PRED_NUM_LAYERS": Key(2, TRAINING, (0, 100), "and of the predictor"),
    "MODEL.STOP_GRAD_CONV1": Key(False, TRAINING, (), "keep the patch projection of a ViT or "
        "Swin as it is"),
    "MODEL.REPLACE_LN_WITH_BN": Key(False, NETWORK, (), "BatchNorm in place of the LayerNorm "
        "before an MLP"),
    "MODEL.N_HARD": Key(256, TRAINING, (1, 10**9), "most similar keys that synthetic negatives "
        "start from"),
    "MODEL.N1": Key(128, TRAINING, COUNT, "interpolated negatives of a query"),
    "MODEL.N2": Key(128, TRAINING, COUNT, "extrapolated"),
    "MODEL.N3": Key(128, TRAINING, COUNT, "mixed"),
    "MODEL.N4": Key(128, TRAINING, COUNT, "with noise"),
    "MODEL.N5": Key(128, TRAINING, COUNT, "perturbed along the gradient"),
    "MODEL.N6": Key(128, TRAINING, COUNT, "adversarial, along the gradient's sign"),
    "MODEL.WARMUP_EPOCHS": Key(30, TRAINING, COUNT, "first epoch, from 0, with synthetic "
        "negatives"),
    "MODEL.COOLDOWN_EPOCHS": Key(100, TRAINING, COUNT, "last epoch with them"),
    "MODEL.ALPHA": Key([0.0, 0.5], TRAINING, (-100, 100), "range of the interpolation coefficient"),
    "MODEL.BETA": Key([1.0, 1.5], TRAINING, (-100, 100), "of the extrapolation coefficient"),
    "MODEL.GAMMA": Key([0.0, 1.0], TRAINING, (-100, 100), "of the mixing coefficient"),
    "MODEL.SIGMA": Key(0.1, TRAINING, (0, 100), "standard deviation of the noise"),
    "MODEL.DELTA": Key(0.01, TRAINING, (-100, 100), "step along the gradient"),
    "MODEL.ETA": Key(0.01, TRAINING, (-100, 100), "step along the gradient's sign"),
    "MODEL.OPTIONS": Key({}, TRAINING, (), "further arguments of a method's constructor, by name"),
    "TRAIN.START_EPOCH": Key(0, PLACE, COUNT, "of a run without a checkpoint"),
    "TRAIN.EPOCHS": Key(300, TRAINING | CLASSIFIER, (1, 10**9), "of the whole run"),
    "TRAIN.WARMUP_EPOCHS": Key(20, TRAINING | CLASSIFIER, COUNT, "in which the rate rises"),
    "TRAIN.WEIGHT_DECAY": Key(0.05, TRAINING | CLASSIFIER, (0, 100), "not of biases and "
        "one-dimensional weights"),
    "TRAIN.BASE_LR": Key(5e-4, TRAINING | CLASSIFIER, (0, 1e6), "for 512 images an update; "
        "scaled to the images of yours, "
        "as are the next two"),
    "TRAIN.WARMUP_LR": Key(5e-7, TRAINING | CLASSIFIER, (0, 1e6), "at the start"),
    "TRAIN.MIN_LR": Key(5e-6, TRAINING | CLASSIFIER, (0, 1e6), "at the end, if it is cosine"),
    "TRAIN.CLIP_GRAD": Key(5.0, TRAINING | CLASSIFIER, (0, 1e12), "largest norm of the "
        "gradient; 0: any"),
    "TRAIN.AUTO_RESUME": Key(True, PLACE, (), "continue from the run folder's newest checkpoint"),
    "TRAIN.WAIT_FOR_LOCK": Key(60.0, PLACE, (0, 1e9), "seconds to wait for a run folder that "
        "another start"
        " uses; 0: none"),
    "TRAIN.KEEP_CHECKPOINTS": Key(0, PLACE, COUNT, "how many `ckpt_epoch_N.pth` stay; 0: all"),
    "TRAIN.SAVE_MINUTES": Key(30.0, PLACE, (0, 1e9), "between checkpoints within an epoch; 0: "
        "none"),
    "TRAIN.SAVE_STEPS": Key(0, PLACE, COUNT, "updates between checkpoints within an epoch; 0: "
        "none"),
    "TRAIN.ON_SAVE_ERROR": Key("continue", PLACE, ("continue", "stop"), "when a checkpoint "
        "cannot be "
        "written"),
    "TRAIN.SAVE_PATIENCE": Key(10.0, PLACE, (0, 1e9), "minutes to go on trying to write the "
        "last one"),
    "TRAIN.KNN_FREQ": Key(0, PLACE, COUNT, "epochs between k-NN accuracies of the val images; "
        "0: none"),
    "TRAIN.PROBE": Key(False, PLACE, (), "a linear classifier that learns beside pre-training, "
        "and changes"
        " nothing of it; its accuracy comes into the log"),
    "TRAIN.MAX_SKIPPED_UPDATES": Key(20, PLACE, (1, 10**9), "updates in a row with a loss or "
        "gradient that"
        " is not finite, after which the run stops"),
    "TRAIN.ACCUMULATION_STEPS": Key(0, TRAINING | CLASSIFIER, COUNT, "micro-batches in an "
        "update; 0 and 1: no more"),
    "TRAIN.USE_CHECKPOINT": Key(False, PLACE, (), "activation checkpointing: less memory, more "
        "time"),
    "TRAIN.TF32": Key(False, TRAINING | CLASSIFIER, (), "allow TF32 products of float32 in the "
        "encoder, never in logits "
        "and loss; only newer GPUs have them"),
    "TRAIN.LR_SCHEDULER.NAME": Key("cosine", TRAINING | CLASSIFIER, (), "`cosine`, `linear` or "
        "`step`"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key(30, TRAINING | CLASSIFIER, (1, 10**9), "of `step`: "
        "epochs between drops"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key(0.1, TRAINING | CLASSIFIER, SHARE, "of `step`: factor "
        "of a drop"),
    "TRAIN.OPTIMIZER.NAME": Key("adamw", TRAINING | CLASSIFIER, (), "`adamw`, `sgd` or `lars`, "
        "in any case"),
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, TRAINING | CLASSIFIER, (1e-30, 1), "of `adamw`"),
    "TRAIN.OPTIMIZER.BETAS": Key((0.9, 0.999), TRAINING | CLASSIFIER, (0, 0.9999999), "of `adamw`"),
    "TRAIN.OPTIMIZER.MOMENTUM": Key(0.9, TRAINING | CLASSIFIER, (0, 0.9999999), "of `sgd` and "
        "`lars`"),
    "LINEAR_EVAL.PRETRAINED": Key("", PLACE, (), "checkpoint of the encoder, see `--pretrained`"),
    "LINEAR_EVAL.WEIGHTS": Key("freeze", CLASSIFIER, ("freeze", "finetune"), "a linear probe or "
        "fine-tuning"),
    "AUG.COLOR_JITTER": Key(0.4, FINE_TUNING, (0, 10), "of fine-tuning, as all down to MIXUP_MODE"),
    "AUG.AUTO_AUGMENT": Key("rand-m9-mstd0.5-inc1", FINE_TUNING, (), "timm's name, or `none`"),
    "AUG.REPROB": Key(0.25, FINE_TUNING, SHARE, "probability of random erasing"),
    "AUG.REMODE": Key("pixel", FINE_TUNING, (), "`pixel`, `rand` or `const`"),
    "AUG.RECOUNT": Key(1, FINE_TUNING, (1, 1000), "erased boxes"),
    "AUG.MIXUP": Key(0.8, FINE_TUNING, (0, 1000), "alpha; 0: off"),
    "AUG.CUTMIX": Key(1.0, FINE_TUNING, (0, 1000), "alpha; 0: off"),
    "AUG.CUTMIX_MINMAX": Key(None, FINE_TUNING, SHARE, "least and largest side of the box, in "
        "place of alpha"),
    "AUG.MIXUP_PROB": Key(1.0, FINE_TUNING, SHARE, "of either"),
    "AUG.MIXUP_SWITCH_PROB": Key(0.5, FINE_TUNING, SHARE, "of cutmix where both are on"),
    "AUG.MIXUP_MODE": Key("batch", FINE_TUNING, (), "`batch`, `pair` or `elem`"),
    "AUG.SSL_AUG": Key(False, TRAINING, (), "two views of an image, which pre-training needs"),
    "AUG.SSL_AUG_TYPE": Key("byol", TRAINING, (), "`byol`, `simclr`, or `custom`: AUG.VIEW1 and "
        "AUG.VIEW2"),
    "AUG.SSL_AUG_CROP": Key(0.08, TRAINING, (1e-6, 1), "smallest crop of `byol` (`simclr` has "
        "0.2)"),
    **{f"AUG.VIEW{view}.{name}": key for view, blur, solarize in ((1, 1.0, 0.0), (2, 0.1, 0.2))
        for name, key in {
            "CROP": Key([0.08, 1.0], TRAINING, (1e-6, 1), "of a view of `custom`, as all down to "
                "INTERPOLATION: least and largest share of the area"),
            "RATIO": Key([0.75, 1.3333], TRAINING, (0.01, 100), "least and largest width over "
                "height"),
            "FLIP": Key(0.5, TRAINING, SHARE, "probability of a mirror image"),
            "JITTER": Key(0.8, TRAINING, SHARE, "probability of the next four"),
            "BRIGHTNESS": Key(0.4, TRAINING, (0, 10), "factors from 1 - this to 1 + this, not "
                "below 0"),
            "CONTRAST": Key(0.4, TRAINING, (0, 10), "likewise"),
            "SATURATION": Key(0.2, TRAINING, (0, 10), "likewise"),
            "HUE": Key(0.1, TRAINING, (0, 0.5), "largest turn of the colour circle, either way"),
            "GREY": Key(0.2, TRAINING, SHARE, "probability of grey"),
            "BLUR": Key(blur, TRAINING, SHARE, "probability of a Gaussian blur"),
            "BLUR_SIGMA": Key([0.1, 2.0], TRAINING, (0, 1000), "its least and largest deviation "
                "in pixels"),
            "SOLARIZE": Key(solarize, TRAINING, SHARE, "probability of solarising"),
            "SOLARIZE_FROM": Key(128, TRAINING, (0, 256), "the values from this one up are "
                "inverted"),
            "INTERPOLATION": Key("bilinear", TRAINING, ("bilinear", "bicubic", "nearest"), "of "
                "the resize"),
        }.items()},
    "AUG.SSL_LINEAR_AUG": Key(False, PLACE, (), "a probe always crops and flips", effect=False),
    "TEST.CROP": Key(True, CLASSIFIER | FEATURE, (), "crop the middle, else resize to a square"),
    "AMP_OPT_LEVEL": Key("auto", TRAINING | CLASSIFIER | FEATURE, ("auto", "O0", "O1", "O2",
        "bfloat16", "float16"), "float32 (O0) "
        "or autocast, see the flag; `config.json` has what `auto` became"),
    "COMPILE": Key(False, TRAINING, (), "the encoders by torch.compile"),
    "OUTPUT": Key("output", PLACE, (), "root of the run folders"),
    "TAG": Key("default", PLACE, (), "second folder of a run"),
    "SAVE_FREQ": Key(100, PLACE, (1, 10**9), "epochs between the checkpoints that are kept"),
    "PRINT_FREQ": Key(10, PLACE, (1, 10**9), "updates between log lines"),
    "TENSORBOARD": Key(False, PLACE, (), "send the figures of the log there"),
    "WANDB": Key(False, PLACE, (), "and to Weights & Biases"),
    "SEED": Key(0, TRAINING | CLASSIFIER, (0, 2**63 - 1), "of all random draws"),
    "EVAL_MODE": Key(False, PLACE, (), "see `--eval`"),
    "THROUGHPUT_MODE": Key(False, PLACE, (), "see `--throughput`"),
    "LOCAL_RANK": Key(0, PLACE, WORKERS, "number of the GPU, from the launcher", local=True),
    "DIST_TIMEOUT": Key(600.0, PLACE, (1, 1e7), "seconds until waiting for another process is "
        "an error"),
}
# fmt: on


def settings(config: Mapping[str, Any], uses: Use) -> dict[str, Any]:
    """The values of ``config`` that any of ``uses`` depends on, by dotted key.

    Args:
        config: nested; keys that it lacks, as one of an older version does, have their default.
        uses: such as ``NETWORK | FEATURE``.

    Returns:
        plain values as JSON has them, lists in place of tuples.
    """
    given = dict(leaves(config))
    options = {key: key_of(key) for key in given if key.startswith(OPTIONS)}
    found = {
        key: given.get(key, entry.default)
        for key, entry in (KEYS | options).items()
        if entry.effect and entry.uses & uses
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


OPTIONS = "MODEL.OPTIONS."


def key_of(name: str) -> Key:
    """The entry of a key; a further argument of a method is a key that the table does not have."""
    return Key(None, TRAINING) if name.startswith(OPTIONS) else KEYS[name]


def configuration_facts(config: CfgNode) -> dict[str, object]:
    """Each key with its value, except those in which processes may differ."""
    return {k: repr(v) for k, v in leaves(as_dict(config)) if not key_of(k).local}


def changed_settings(config: CfgNode) -> str:
    """What differs from the keys' defaults, without what only says where things lie.

    Returns:
        a line for each section, such as ``TRAIN: EPOCHS 100, BASE_LR 0.001``.
    """
    lines: dict[str, list[str]] = {}
    for key, value in leaves(as_dict(config)):
        entry = key_of(key)
        if value != entry.default and entry.effect and entry.uses != PLACE:
            section, _, name = key.rpartition(".")
            lines.setdefault(section, []).append(f"{name} {value}")
    return "\n".join(f"{name or 'also'}: {', '.join(values)}" for name, values in lines.items())


def _defaults() -> CfgNode:
    root: dict[str, Any] = {}
    for key, entry in KEYS.items():
        *sections, name = key.split(".")
        node = root
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = entry.default
    config = CfgNode(root)
    config.MODEL.OPTIONS.set_new_allowed(True)
    return config


DEFAULTS = _defaults()
MOST_VALUES = 10_000  # of a file; a few lines of YAML that refer to each other can stand for more


def load_config(path: str, opts: list[str] | None = None) -> CfgNode:
    """The defaults, overridden by the YAML file ``path`` (its BASE files first), then by ``opts``.

    Args:
        path: a YAML file; where there is none, the name of a shipped recipe, see
            ``utils.recipes``; empty for the defaults alone.
        opts: ``KEY VALUE KEY VALUE ...`` as given to ``--opts``.

    Raises:
        UserError: missing or malformed file, unknown key or value of the wrong type.
    """
    config = DEFAULTS.clone()
    file = Path(path)
    if path and (file.is_dir() or not file.exists()):
        from utils.recipes import find_recipe  # only here: most runs name a file

        file = find_recipe(path)
    if path:
        _merge_file(config, file, ())
    opts = opts or []
    if len(opts) % 2:
        raise UserError(f"--opts takes KEY VALUE pairs, but {opts[-1]!r} has no value")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        set_key(config, key, text)
    return config


def set_key(config: CfgNode, key: str, text: str) -> None:
    """Set one dotted ``key`` of ``config`` from its text on the command line."""
    *sections, name = key.split(".")
    parent = config
    for section in sections:
        parent = parent.get(section) if isinstance(parent, CfgNode) else None
    _merge_value(parent, name, _parse(text), key, "--opts", text)


def with_values(config: CfgNode, values: dict[str, Any]) -> CfgNode:
    """A frozen copy of ``config`` with other ``values`` of dotted keys."""
    changed = config.clone()
    changed.defrost()
    for key, value in values.items():
        *sections, name = key.split(".")
        reduce(getitem, sections, changed)[name] = value
    changed.freeze()
    return changed


def check_ranges(config: CfgNode) -> None:
    """Refuse values that the table of keys does not allow.

    Raises:
        UserError: the first such key, and what it may be.
    """
    for key, entry in KEYS.items():
        value, allowed = reduce(getitem, key.split("."), config), entry.allowed
        if not allowed or value is None:
            continue
        if isinstance(allowed[0], str):
            if value not in allowed:
                raise UserError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
            continue
        low, high = allowed
        for number in value if isinstance(value, (list, tuple)) else [value]:
            real = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not real or not low <= number <= high:
                raise UserError(f"{key} must be from {low:.8g} to {high:.8g}, got {value!r}")


def markdown_table() -> str:
    """The table of keys in Markdown."""
    lines = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for key, (default, _, allowed, about, effect, _) in KEYS.items():
        if key.startswith("AUG.VIEW2."):
            continue  # in the row of the other view
        values = [json.dumps(default)]
        if (other := key.replace("VIEW1", "VIEW2")) != key:
            values += [json.dumps(KEYS[other].default)]
            key = f"{key}`, `{other}"
        if allowed and isinstance(allowed[0], str):
            words = ", ".join(f"`{word}`" for word in allowed)
        else:
            words = "{:.8g} to {:.8g}".format(*allowed) if allowed else ""
        mark = "" if effect else "**no effect**: "
        defaults = ", ".join(f"`{value}`" for value in dict.fromkeys(values))
        lines.append(f"| `{key}` | {defaults} | {words} | {mark}{about} |")
    return "\n".join(lines)


def run_folder(config: CfgNode) -> str:
    """``<OUTPUT>/<MODEL.NAME>/<TAG>``."""
    return os.path.join(config.OUTPUT, config.MODEL.NAME, config.TAG)


def as_dict(config: CfgNode) -> dict[str, Any]:
    """``config`` as plain nested dictionaries."""
    return {k: as_dict(v) if isinstance(v, CfgNode) else v for k, v in config.items()}


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries by dotted names."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_json(config: CfgNode) -> str:
    """``config`` as the text of ``config.json``, without the keys that have no effect."""
    content = as_dict(config)
    for key in (key for key, entry in KEYS.items() if not entry.effect):
        *sections, name = key.split(".")
        del reduce(getitem, sections, content)[name]
    return json.dumps(content, indent=2) + "\n"


def _merge_file(config: CfgNode, path: Path, including: tuple[Path, ...]) -> None:
    if path.resolve() in including:
        raise UserError(f"{path}: BASE files include each other")
    with reading(path, "cannot read the configuration"):
        text = path.read_text(encoding="utf-8")
    with reading(path, "not a valid YAML file"):
        content = yaml.safe_load(text)
        if _values(content, {}) > MOST_VALUES:
            raise UserError(f"{path}: it stands for more than {MOST_VALUES} values")
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: a configuration is a YAML mapping of keys, this is no mapping")
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: BASE must be a list of files, got {reprlib.repr(bases)}")
    for base in filter(None, bases):
        _merge_file(config, path.parent / base, (*including, path.resolve()))
    for key, value in content.items():
        _merge_value(config, key, value, str(key), str(path))


def _values(node: Any, known: dict[int, float]) -> float:
    """The number of values that a tree stands for, infinite for one that holds itself."""
    if not isinstance(node, (dict, list, tuple, set)):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        children = [*node, *node.values()] if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def _merge_value(
    parent: Any, name: Any, value: Any, key: str, where: str, text: str | None = None
) -> None:
    if not isinstance(parent, CfgNode) or not (name in parent or parent.is_new_allowed()):
        close = difflib.get_close_matches(key, KEYS, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise UserError(f"{where}: unknown configuration key {key}{hint}")
    if isinstance(parent.get(name), CfgNode):
        if not isinstance(value, dict):
            raise UserError(
                f"{where}: {key} is a section of keys, not a value ({reprlib.repr(value)})"
            )
        for child, child_value in value.items():
            _merge_value(parent[name], child, child_value, f"{key}.{child}", where)
        return
    if text is not None and isinstance(parent.get(name), str):
        value = text
    default = KEYS[key].default if key in KEYS else None
    try:
        parent[name] = _coerce(value, default)
    except (ValueError, TypeError, OverflowError):
        kind = KINDS.get(type(default), "a plain value")
        # reprlib, because a few YAML lines of references can stand for billions of values
        raise UserError(f"{where}: {key} must be {kind}, got {reprlib.repr(value)}") from None


def _coerce(value: Any, default: Any) -> Any:
    """``value`` as the type of ``default``; YAML reads 1e-3 as text and 5 as an int."""
    if default is None:
        json.dumps(value)  # refuses what config.json cannot hold, such as dates
        return value
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, float):
        number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        if number and math.isfinite(float(value)):
            return float(value)
    elif isinstance(default, (list, tuple)):
        if isinstance(value, (list, tuple)) and (
            not default or isinstance(default[0], str) or len(value) == len(default)
        ):
            element = default[0] if default else None
            return type(default)(_coerce(v, element) for v in value)
    elif isinstance(value, type(default)) and not isinstance(value, bool):
        return value
    raise ValueError(value)


def _parse(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


if __name__ == "__main__":
    print(markdown_table())
