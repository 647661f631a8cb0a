"""The command line that all scripts share, and its way into the configuration."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from yacs.config import CfgNode

from utils.config import KEYS, check_ranges, load_config, with_values
from utils.distributed import local_rank
from utils.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults: of a flag that sets a key, the key's."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is None and action.dest in KEYS:
            default = KEYS[action.dest].default
        if isinstance(default, list):
            default = " ".join(map(str, default))
        if default in (None, False, "", argparse.SUPPRESS):
            return text
        return f"{text} (default: {default})"


def command_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults, and ends what it cannot read in one line.

    Args:
        description: the docstring of a module: what its command does, and after a blank line more
            of it and how it is called.
    """
    purpose, _, example = description.partition("\n\n")
    called = os.path.basename(sys.argv[0])
    if not called.endswith(".py"):  # an installed command
        example = re.sub(r"python (-m tools\.)?\w+(\.py)?", called, example)
    return _Parser(description=purpose, epilog=example, formatter_class=_Help, allow_abbrev=False)


def add_out(parser: argparse.ArgumentParser, what: str, default: str | None = None) -> None:
    """Add ``--out``, which ``--output`` is another name of; required without a default."""
    parser.add_argument(
        *("--out", "--output"), default=default, required=not default, metavar="FILE", help=what
    )


# of those that all scripts share, those of no use to a script that trains nothing
TRAINING = (
    *("--resume", "--eval", "--throughput"),
    *("--accumulation-steps", "--use-checkpoint", "--compile"),
)


def parse_arguments(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: list[str] | None = None,
    needs_cfg: bool = True,
    unused: Sequence[str] = (),
) -> tuple[argparse.Namespace, CfgNode]:
    """Read the command line; without any, say what to do and end.

    Args:
        description: the script's docstring: what it does, and after a blank line how it is called.
        add_arguments: adds the flags of one script.
        argv: the arguments, by default those of the process.
        needs_cfg: whether there must be a recipe.
        unused: flags that are taken, since all scripts share them, but that ``--help`` leaves out.

    Returns:
        the parsed flags, and the configuration with the flags written into it, frozen.

    Raises:
        UserError: unknown flag, missing file, unknown key or value of the wrong type;
            LOCAL_RANK is no number.
    """
    parser = command_parser(description)
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        lines = f"{parser.description}\n{parser.epilog}\n--help lists the flags.".splitlines()
        print("\n".join(filter(None, lines)), file=sys.stderr)
        raise SystemExit(1)
    parser._optionals.title = "of this script alone"
    # fmt: off
    # a flag whose ``dest`` is a key sets that key
    add = parser.add_argument_group("what to run; a recipe may have other defaults").add_argument
    add("--cfg", required=needs_cfg, default="", metavar="FILE",
        help="recipe: a YAML file, or the name of one that comes with the code")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="override configuration keys")
    add("--data-path", dest="DATA.DATA_PATH", metavar="DIR", help="folder of the data set")
    add("--output", dest="OUTPUT", metavar="DIR", help="root of the run folders")
    add("--tag", dest="TAG", help="name of the run")
    about = "begin from this checkpoint; later starts continue the run's own"
    add("--resume", dest="MODEL.RESUME", metavar="PATH", help=about)
    add("--eval", dest="EVAL_MODE", action="store_true", help="evaluate only")
    add("--throughput", dest="THROUGHPUT_MODE", action="store_true", help="measure the speed only")
    add = parser.add_argument_group("batches and precision").add_argument
    add("--batch-size", dest="DATA.BATCH_SIZE", type=int, metavar="N", help="images per process")
    add("--accumulation-steps", dest="TRAIN.ACCUMULATION_STEPS", type=int, metavar="N",
        help="micro-batches for one update")
    add("--use-checkpoint", dest="TRAIN.USE_CHECKPOINT", action="store_true",
        help="activation checkpointing to save memory")
    add("--amp-opt-level", dest="AMP_OPT_LEVEL",
        choices=KEYS["AMP_OPT_LEVEL"].allowed,
        help="O0: float32; bfloat16, float16 (with loss scaling): autocast; O1, O2: autocast to "
        "bfloat16, or float16 on older GPUs; auto: what the device computes in for "
        "pre-training and fine-tuning, else O0")
    add("--compile", dest="COMPILE", action="store_true",
        help="compile the encoders of pre-training: slow start")
    add = parser.add_argument_group("reading images").add_argument
    add("--zip", dest="DATA.ZIP_MODE", action="store_true", help="read train.zip and val.zip")
    add("--cache-mode", dest="DATA.CACHE_MODE", choices=["no", "full", "part"],
        help="zipped images kept in memory: none, all, or a share that each process has of its own")
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    # fmt: on
    if add_arguments:
        add_arguments(parser)
    for action in parser._actions:
        if not set(unused).isdisjoint(action.option_strings):
            action.help = argparse.SUPPRESS
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
