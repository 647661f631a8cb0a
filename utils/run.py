"""How a script starts and ends."""

import ctypes
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from yacs.config import CfgNode

from logger import create_logger
from utils.agreement import check_agreement, code_facts, configuration_facts
from utils.config import run_folder, to_json, with_values
from utils.distributed import (
    init_process_group,
    leave_group,
    lost_peer,
    rank,
    say_goodbye,
    world_size,
)
from utils.errors import UserError
from utils.update import Precision


@dataclass(frozen=True)
class Run:
    """What every script has once it has started."""

    folder: str
    device: torch.device
    precision: Precision
    logger: logging.Logger


def start(config: CfgNode, folder: str | None = None) -> Run:
    """Join the process group, seed, make ``folder``, and write the log's head and config.json.

    Args:
        config: the configuration.
        folder: where this script writes, by default the run folder.

    Raises:
        UserError: the folder cannot be written, or the processes differ in configuration or code.
    """
    keep_freed_memory()
    device = init_process_group(config.LOCAL_RANK, config.DIST_TIMEOUT)
    check_agreement(configuration_facts(config) | code_facts())
    folder = folder or run_folder(config)
    try:
        os.makedirs(folder, exist_ok=True)
        logger = create_logger(folder, rank())
        effective = write_config(config, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the run folder ({error.strerror})") from error
    torch.manual_seed(config.SEED)  # the same weights and queues on every process
    said = f"{world_size()} processes, torch {torch.__version__}, {device}, configuration:"
    logger.info("%s\n%s", said, to_json(effective).rstrip())
    precision = Precision(config.AMP_OPT_LEVEL, device)
    if precision.emulated:
        logger.warning("this processor has no bfloat16: O1 is slower here than O0")
    return Run(folder, device, precision, logger)


def write_config(config: CfgNode, folder: str, derived: dict[str, Any] | None = None) -> CfgNode:
    """Write ``config.json`` with the values that are in effect, on the first process.

    Args:
        config: the configuration as it was read.
        folder: where it is written.
        derived: what follows from it and the run, by dotted keys; OUTPUT becomes the run folder.

    Returns:
        the configuration in effect.

    Raises:
        OSError: it cannot be written.
    """
    effective = with_values(config, {"OUTPUT": run_folder(config)} | (derived or {}))
    if rank() == 0:
        path = os.path.join(folder, "config.json")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(to_json(effective))
        os.replace(path + ".tmp", path)
    return effective


def write_results(run: Run, results: dict[str, Any]) -> None:
    """Write ``results.json``, on the first process."""
    if rank() == 0:
        path = os.path.join(run.folder, "results.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2, allow_nan=False)
        run.logger.info("%s written", path)


def run_script(main: Callable[[], None]) -> None:
    """Run ``main``; a user's mistake ends it with one line on standard error and exit code 1.

    So does a process of the group that died or does not answer.
    """
    try:
        main()
    except UserError as error:
        # the error of a data worker comes wrapped in its traceback
        _fail(str(error).rsplit("UserError: ", 1)[-1].strip())
    except SystemExit:
        leave_group()
        raise
    except Exception as error:
        if world_size() == 1:
            raise
        if lost_peer(error):
            reason = " ".join(str(error).split())[:200]
            _fail(f"another process of the group died, or did not answer in time ({reason})")
        traceback.print_exc()
        _fail(f"process {rank()} of the group failed: {type(error).__name__}")
    leave_group()


def _fail(message: str) -> None:
    """Say why, and end without waiting for peers that may be inside a collective."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    say_goodbye()
    os._exit(1)


# parameters of mallopt in <malloc.h> of the GNU C library
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30  # bytes


def keep_freed_memory() -> None:
    """Let later tensors on the CPU use freed memory again; without the GNU C library, do nothing.

    By default, pieces of over 32 MB go back to the system and return page by page, filled with
    zeros, which takes a fifth of the time of a training step. With this call, a process keeps as
    much as it needed at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
