"""What an evaluation knows from the run that it judges."""

import argparse
import glob
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from utils.arguments import given_keys, parse_arguments
from utils.checkpoint import LATEST
from utils.config import FEATURE, KEYS, NETWORK, check_ranges, leaves, settings, with_values
from utils.errors import UserError, reading
from utils.run import Run

CONFIG = "config.json"
# how it is measured, which no pre-training's recipe decides
MEASURED = {key: KEYS[key].default for key in ("AMP_OPT_LEVEL", "TRAIN.TF32")}
# flags with which no run's weights are judged
ELSEWHERE = ("pretrained", "random_weights", "baseline", "load_features")


def parse_evaluation(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    unused: Sequence[str] = (),
) -> tuple[argparse.Namespace, CfgNode, list[str]]:
    """Read the command line of an evaluation, with the network and the images of its run.

    config.json beside the checkpoint says the encoder, and how images are sized, cropped and
    resized; the command line comes before it, a recipe after it.

    Returns:
        flags and configuration, as ``parse_arguments`` gives them, and a line for each way in
        which images are taken otherwise than in the run.

    Raises:
        UserError: as ``parse_arguments``; none or several runs that could be meant, or one with
            another network than the command line asks for.
    """
    args, config = parse_arguments(description, add_arguments, None, False, unused)
    given = given_keys(args)
    config = with_values(config, {k: v for k, v in MEASURED.items() if k not in given})
    file = args.pretrained or config.LINEAR_EVAL.PRETRAINED
    folder = Path(file).parent if file else _find_run(args, config, given)
    if folder is None or not (folder / CONFIG).exists() or (folder.parent / CONFIG).exists():
        if not args.cfg and not (file or getattr(args, "load_features", None)):
            raise UserError(f"{config.OUTPUT}: no run with {CONFIG} and {LATEST}: give --cfg")
        return args, config, []
    path = folder / CONFIG
    with reading(path, "not the configuration of a run"):
        said = dict(leaves(json.loads(path.read_text(encoding="utf-8"))))
    known: dict[str, Any] = {}
    lines = []
    for key in settings({}, NETWORK | FEATURE).keys() - {"DATA.DATASET", *MEASURED}:
        default = KEYS[key].default
        if type(said.get(key)) is not type(default):
            continue
        asked = dict(leaves(config))[key]
        if key not in given:
            known[key] = said[key]
        elif asked != said[key] and said[key] and KEYS[key].uses & NETWORK:
            raise UserError(f"{path}: the run has {key} {said[key]}, not {asked}: leave it out")
        elif asked != said[key] and not KEYS[key].uses & NETWORK:
            lines.append(f"{key} is {asked}, the run has {said[key]}")
    if not file:
        known |= {"MODEL.NAME": folder.parent.name, "TAG": folder.name}
    elif not args.cfg and isinstance(said.get("MODEL.NAME"), str):
        known |= {k: said[k] for k in ("MODEL.NAME",) if k not in given}
    config = with_values(config, known)
    check_ranges(config)
    return args, config, sorted(lines)


def log_notes(run: Run, notes: list[str]) -> None:
    """Log the lines of ``parse_evaluation``."""
    for line in notes:
        run.logger.warning(line)


def _find_run(args: argparse.Namespace, config: CfgNode, given: set[str]) -> Path | None:
    """The folder of the run that a command line means, None if there is none."""
    name = config.MODEL.NAME if args.cfg or "MODEL.NAME" in given else "*"
    name, tag = (part if part == "*" else glob.escape(part) for part in (name, config.TAG))
    if "TAG" not in given and not Path(config.OUTPUT, config.MODEL.NAME, tag, LATEST).exists():
        tag = "*"
    found = sorted(path.parent for path in Path(config.OUTPUT).glob(f"{name}/{tag}/{LATEST}"))
    needed = not any(getattr(args, flag, None) for flag in ELSEWHERE)
    needed &= not (config.EVAL_MODE and config.MODEL.RESUME)
    if len(found) > 1 and needed:
        names = ", ".join(str(path.relative_to(config.OUTPUT)) for path in found)
        raise UserError(f"{config.OUTPUT}: several runs, choose one by --tag (and --cfg): {names}")
    return found[0] if len(found) == 1 and needed else None
