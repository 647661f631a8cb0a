"""How a script starts and ends."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from yacs.config import CfgNode

from logger import create_logger
from utils.config import to_json
from utils.distributed import init_process_group, rank, world_size
from utils.errors import UserError
from utils.precision import Precision


@dataclass(frozen=True)
class Run:
    """What every script has once it has started."""

    folder: str
    device: torch.device
    precision: Precision
    logger: logging.Logger


def start(config: CfgNode, folder: str | None = None) -> Run:
    """Join the process group, seed, make ``folder`` and write the log's head and config.json.

    Args:
        config: the configuration; its OUTPUT is the run folder.
        folder: where this script writes, by default the run folder.

    Raises:
        UserError: the folder cannot be written.
    """
    device = init_process_group(config.LOCAL_RANK)
    folder = folder or config.OUTPUT
    try:
        os.makedirs(folder, exist_ok=True)
        logger = create_logger(folder, rank())
        if rank() == 0:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                file.write(to_json(config))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the run folder ({error.strerror})") from error
    torch.manual_seed(config.SEED)  # the same weights and queues on every process
    logger.info(
        "%d processes, torch %s, %s, configuration:\n%s",
        world_size(),
        torch.__version__,
        device,
        to_json(config).rstrip(),
    )
    return Run(folder, device, Precision(config.AMP_OPT_LEVEL, device), logger)


def write_results(run: Run, results: dict[str, Any]) -> None:
    """Write ``results.json``, on the first process."""
    if rank() == 0:
        path = os.path.join(run.folder, "results.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2, allow_nan=False)
        run.logger.info("%s written", path)


def run_script(main: Callable[[], None]) -> None:
    """Run ``main``; a user's mistake ends it with one line on standard error and exit code 1."""
    try:
        main()
    except UserError as error:
        # an error that a data worker raised comes with its traceback around it
        message = str(error).rsplit("UserError: ", 1)[-1].strip()
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
        # without waiting for peers that may be inside a collective: the launcher ends them
        sys.stdout.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
