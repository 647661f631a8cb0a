"""The command line that all scripts share, and its way into the configuration."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from yacs.config import CfgNode

from utils.config import KEYS, check_ranges, load_config, with_values
from utils.distributed import local_rank
from utils.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parse_arguments(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: list[str] | None = None,
) -> tuple[argparse.Namespace, CfgNode]:
    """Read the command line.

    Args:
        description: first line of ``--help``.
        add_arguments: adds the flags of one script.
        argv: the arguments, by default those of the process.

    Returns:
        the parsed flags, and the configuration with the flags written into it, frozen.

    Raises:
        UserError: unknown flag, missing file, unknown key or value of the wrong type;
            LOCAL_RANK is no number.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument  # a flag whose ``dest`` is a key sets that key
    add("--cfg", required=True, metavar="FILE", help="configuration file (YAML)")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="override configuration keys")
    add("--batch-size", dest="DATA.BATCH_SIZE", type=int, metavar="N", help="images per process")
    add("--data-path", dest="DATA.DATA_PATH", metavar="DIR", help="folder of the data set")
    add("--output", dest="OUTPUT", metavar="DIR", help="root of the run folders (default: output)")
    add("--tag", dest="TAG", help="name of the run (default: default)")
    add("--resume", dest="MODEL.RESUME", metavar="PATH", help="continue from this checkpoint")
    add("--accumulation-steps", dest="TRAIN.ACCUMULATION_STEPS", type=int, metavar="N",
        help="micro-batches for one update")
    add("--use-checkpoint", dest="TRAIN.USE_CHECKPOINT", action="store_true",
        help="activation checkpointing to save memory")
    add("--amp-opt-level", dest="AMP_OPT_LEVEL",
        choices=KEYS["AMP_OPT_LEVEL"].allowed,
        help="O0: float32; bfloat16, float16 (with loss scaling): autocast; O1, O2: autocast to "
        "bfloat16, or float16 on older GPUs; auto, the default: what the device computes in for "
        "pre-training and fine-tuning, else O0")
    add("--compile", dest="COMPILE", action="store_true",
        help="compile the encoders of pre-training: slow start")
    add("--zip", dest="DATA.ZIP_MODE", action="store_true", help="read train.zip and val.zip")
    add("--cache-mode", dest="DATA.CACHE_MODE", choices=["no", "full", "part"],
        help="zipped images kept in memory: none, all, or a share that each process has of its own")
    add("--eval", dest="EVAL_MODE", action="store_true", help="evaluate only")
    add("--throughput", dest="THROUGHPUT_MODE", action="store_true", help="measure the speed only")
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    # fmt: on
    if add_arguments:
        add_arguments(parser)
    args = parser.parse_args(argv)

    given = _flagged(args)
    given["LOCAL_RANK"] = local_rank(args.local_rank or 0)
    config = with_values(load_config(args.cfg, args.opts), given)
    check_ranges(config)
    return args, config


def given_keys(args: argparse.Namespace) -> set[str]:
    """The keys that the command line has set, by ``--opts`` or by a flag of their own."""
    return {*args.opts[::2], *_flagged(args)}


def _flagged(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k.isupper() and v is not None and v is not False}


def add_tracker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--tensorboard`` and ``--wandb``."""
    parser.add_argument(
        "--tensorboard",
        dest="TENSORBOARD",
        action="store_true",
        help="write the figures for TensorBoard too",
    )
    parser.add_argument(
        "--wandb",
        dest="WANDB",
        action="store_true",
        help="send the figures to Weights & Biases too",
    )


def number_in(least: float, most: float) -> Callable[[str], float]:
    """A ``type`` of argparse: numbers from ``least`` to ``most``, whole ones if ``least`` is."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not least <= value <= most:
            raise ValueError
        return value

    return number
