"""The configuration: every key with its default, read from YAML files, flags and ``--opts``."""

import ast
import difflib
import json
import math
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from utils.errors import UserError

# fmt: off
DEFAULTS = CfgNode(
    {
        "BASE": [""],  # files that this one overrides, by paths relative to it
        "DATA": {
            "BATCH_SIZE": 64,  # per process
            "DATA_PATH": "", "DATASET": "imagenet", "IMG_SIZE": 224,
            "INTERPOLATION": "bicubic",  # of the test-time resize
            "BACKEND": "opencv",  # of the views of pre-training: opencv or pil
            "ZIP_MODE": False, "CACHE_MODE": "part",
            "MAX_BAD_FRACTION": 0.001,  # share of bad images at which pre-training stops
            "PIN_MEMORY": True,
            "NUM_WORKERS": 8,  # per process, at most its share of the cores
            "TRAINING_IMAGES": 0,  # config.json has the number that was found
        },
        "MODEL": {
            "TYPE": "moby", "ENCODER": "swin_tiny", "NAME": "moby__swin_tiny", "RESUME": "",
            "NUM_CLASSES": 1000, "DROP_RATE": 0.0, "DROP_PATH_RATE": 0.1, "LABEL_SMOOTHING": 0.1,
            "ONLINE_DROP_PATH_RATE": 0.2, "TARGET_DROP_PATH_RATE": 0.0,
            "CONTRAST_MOMENTUM": 0.99, "CONTRAST_TEMPERATURE": 0.2, "CONTRAST_NUM_NEGATIVE": 4096,
            "PROJ_NUM_LAYERS": 2, "PRED_NUM_LAYERS": 2,
            "STOP_GRAD_CONV1": False, "REPLACE_LN_WITH_BN": False,
            # most similar keys of a query; interpolated, extrapolated, mixed, noise, perturbed
            # and adversarial negatives
            "N_HARD": 256, "N1": 128, "N2": 128, "N3": 128, "N4": 128, "N5": 128, "N6": 128,
            "WARMUP_EPOCHS": 30,  # first and last epoch, from 0, with synthetic negatives
            "COOLDOWN_EPOCHS": 100,
            "ALPHA": [0.0, 0.5],  # range of the interpolation coefficient
            "BETA": [1.0, 1.5],  # range of the extrapolation coefficient
            "GAMMA": [0.0, 1.0],  # range of the mixing coefficient
            "SIGMA": 0.1,  # standard deviation of the noise
            "DELTA": 0.01,  # step along the gradient
            "ETA": 0.01,  # step along the gradient's sign
            "OPTIONS": {},  # further arguments of a method's constructor, by name
        },
        "TRAIN": {
            "START_EPOCH": 0, "EPOCHS": 300, "WARMUP_EPOCHS": 20, "WEIGHT_DECAY": 0.05,
            "BASE_LR": 5e-4, "WARMUP_LR": 5e-7, "MIN_LR": 5e-6,  # for a total batch of 512
            "CLIP_GRAD": 5.0,  # 0 turns clipping off
            "AUTO_RESUME": True,
            "KEEP_CHECKPOINTS": 0,  # how many ckpt_epoch_N.pth stay, 0: all
            "SAVE_MINUTES": 30.0,  # between checkpoints within an epoch, 0: none
            "SAVE_STEPS": 0,  # updates between checkpoints within an epoch, 0: none
            "ON_SAVE_ERROR": "continue",  # or stop, when a checkpoint cannot be written
            "KNN_FREQ": 0,  # epochs between k-NN accuracies of the val images, 0: none
            "MAX_SKIPPED_UPDATES": 20,  # in a row, for a loss or gradient that is not finite
            "ACCUMULATION_STEPS": 0,  # micro-batches in an update; 0 and 1 mean none
            "USE_CHECKPOINT": False,
            "LR_SCHEDULER": {"NAME": "cosine", "DECAY_EPOCHS": 30, "DECAY_RATE": 0.1},
            "OPTIMIZER": {"NAME": "adamw", "EPS": 1e-8, "BETAS": (0.9, 0.999), "MOMENTUM": 0.9},
        },
        "LINEAR_EVAL": {"PRETRAINED": "", "WEIGHTS": "freeze"},
        "AUG": {
            "COLOR_JITTER": 0.4, "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
            "REPROB": 0.25, "REMODE": "pixel", "RECOUNT": 1,
            "MIXUP": 0.8, "CUTMIX": 1.0, "CUTMIX_MINMAX": None,
            "MIXUP_PROB": 1.0, "MIXUP_SWITCH_PROB": 0.5, "MIXUP_MODE": "batch",
            "SSL_AUG": False, "SSL_AUG_TYPE": "byol", "SSL_AUG_CROP": 0.08, "SSL_LINEAR_AUG": False,
        },
        "TEST": {"CROP": True},
        "AMP_OPT_LEVEL": "O0",
        "COMPILE": False,  # the encoders by torch.compile
        "OUTPUT": "output", "TAG": "default",
        "SAVE_FREQ": 100,  # epochs between the checkpoints that are kept
        "PRINT_FREQ": 10,  # updates between log lines
        "TENSORBOARD": False,  # send the figures of the log there
        "WANDB": False,  # and to Weights & Biases
        "SEED": 0, "EVAL_MODE": False, "THROUGHPUT_MODE": False, "LOCAL_RANK": 0,
        "DIST_TIMEOUT": 600.0,  # seconds until waiting for another process is an error
    }
)
# fmt: on
DEFAULTS.MODEL.OPTIONS.set_new_allowed(True)


def load_config(path: str, opts: list[str] | None = None) -> CfgNode:
    """The defaults, overridden by the YAML file ``path`` (its BASE files first), then by ``opts``.

    Args:
        path: a YAML file.
        opts: ``KEY VALUE KEY VALUE ...`` as given to ``--opts``.

    Raises:
        UserError: missing or malformed file, unknown key or value of the wrong type.
    """
    config = DEFAULTS.clone()
    _merge_file(config, Path(path), ())
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
        node = changed
        for section in sections:
            node = node[section]
        node[name] = value
    changed.freeze()
    return changed


def run_folder(config: CfgNode) -> str:
    """``<OUTPUT>/<MODEL.NAME>/<TAG>``."""
    return os.path.join(config.OUTPUT, config.MODEL.NAME, config.TAG)


def as_dict(config: CfgNode) -> dict[str, Any]:
    """``config`` as plain nested dictionaries."""
    return {k: as_dict(v) if isinstance(v, CfgNode) else v for k, v in config.items()}


def to_json(config: CfgNode) -> str:
    """``config`` as the text of ``config.json``."""
    return json.dumps(as_dict(config), indent=2) + "\n"


def _merge_file(config: CfgNode, path: Path, including: tuple[Path, ...]) -> None:
    try:
        if path.resolve() in including:
            raise UserError(f"{path}: BASE files include each other")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a valid YAML file ({reason})") from error
    if content is None:
        content = {}
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


def _merge_value(
    parent: Any, name: Any, value: Any, key: str, where: str, text: str | None = None
) -> None:
    if not isinstance(parent, CfgNode) or not (name in parent or parent.is_new_allowed()):
        known = list(_leaves(DEFAULTS))
        close = difflib.get_close_matches(key, known, n=1)
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
    default = DEFAULTS
    for part in key.split("."):
        default = default.get(part)
    try:
        parent[name] = _coerce(value, default)
    except (ValueError, TypeError, OverflowError):
        kind = "plain value" if default is None else type(default).__name__
        # reprlib, because a few YAML lines of references can stand for billions of values
        raise UserError(f"{where}: {key} must be a {kind}, got {reprlib.repr(value)}") from None


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


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name
