"""How a script starts and ends."""

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from logger import create_logger
from utils.checkpoint import Checkpoint, replacing
from utils.config import changed_settings, configuration_facts, run_folder, to_json, with_values
from utils.distributed import (
    check_agreement,
    init_process_group,
    leave_group,
    lost_peer,
    on_first_process,
    rank,
    world_size,
)
from utils.errors import UserError, end_with, reading
from utils.lock import lock_folder
from utils.provenance import cost, source_digest
from utils.update import LEVELS, Precision


@dataclass(frozen=True)
class Run:
    """What every script has once it has started.

    Attributes:
        folder: where it writes.
        device: where it computes.
        precision: in which type of number.
        logger: of this process.
        config: the configuration as it was read.
        derived: what follows from it and the start, by dotted keys, such as scaled rates.
        provenance: what its checkpoints say of where they come from.
        started: of ``time.monotonic``, in seconds.
    """

    folder: str
    device: torch.device
    precision: Precision
    logger: logging.Logger
    config: CfgNode
    derived: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def effective(self) -> CfgNode:
        """What ``config.json`` shows: the configuration with what follows from it."""
        own = {"OUTPUT": run_folder(self.config), "AMP_OPT_LEVEL": self.precision.level}
        return with_values(self.config, own | self.derived)


def start(config: CfgNode, folder: str | None = None, trains: bool = False) -> Run:
    """Join the process group, seed, make and lock ``folder``, write the log's head.

    config.json is left as it is until the script has found nothing wrong, see ``write_config``.

    Args:
        config: the configuration.
        folder: where this script writes, by default the run folder; --eval and --throughput write
            into a folder below it.
        trains: whether an encoder learns: AMP_OPT_LEVEL auto is what the device computes in, else
            O0, so that figures do not depend on the machine.

    Raises:
        UserError: the folder cannot be written, another start writes it, or the processes differ
            in configuration, code or precision.
    """
    keep_freed_memory()
    device = init_process_group(config.LOCAL_RANK, config.DIST_TIMEOUT)
    code = {"the program's source (sha256)": source_digest()}
    check_agreement(configuration_facts(config) | code)
    level = config.AMP_OPT_LEVEL
    level = "O0" if level == "auto" and not trains else level
    precision = Precision(level, device, trains and config.TRAIN.TF32)
    check_same_precision(precision)
    folder = folder or run_folder(config)
    if config.EVAL_MODE or config.THROUGHPUT_MODE:  # the run itself may be training
        folder = os.path.join(folder, "eval" if config.EVAL_MODE else "throughput")
    with reading(folder, "cannot write the run folder"):
        os.makedirs(folder, exist_ok=True)
        on_first_process(lambda: lock_folder(folder, config.TRAIN.WAIT_FOR_LOCK))
        logger = create_logger(folder, rank())
    torch.manual_seed(config.SEED)  # the same weights and queues on every process
    run = Run(folder, device, precision, logger, config)
    place = os.path.join(folder, "config.json")  # written once nothing is wrong
    logger.info(f"{world_size()} processes, torch {torch.__version__}, {device}; settings: {place}")
    logger.info("settings other than the keys' defaults:\n%s", changed_settings(config))
    log_precision(precision, logger)
    return run


def written_config(state: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a checkpoint was written with, nothing for one of another program."""
    with contextlib.suppress(yaml.YAMLError, AttributeError, RecursionError):
        found = yaml.safe_load(state.get("config") or "")
        return found if isinstance(found, dict) else {}
    return {}


def keep_precision(run: Run, checkpoint: Checkpoint | None) -> Run:
    """``run`` with the precision of the checkpoint that it goes on from, if the device has it.

    An AMP_OPT_LEVEL that was asked for stays. Every process has to call it.

    Args:
        run: as it would begin anew.
        checkpoint: one that says no precision has O0.

    Raises:
        UserError: the processes differ.
    """
    if not checkpoint:
        return run
    said, now = written_config(checkpoint.state).get("AMP_OPT_LEVEL"), run.precision
    before = said if said in LEVELS[1:] else "O0"
    if run.config.AMP_OPT_LEVEL == "auto":
        kept = Precision(before, run.device, run.config.TRAIN.TF32)
        if kept.native or before in ("O1", "O2"):  # these are what the device makes of them
            now = kept
    check_same_precision(now)
    if now.level != before:
        run.logger.warning(
            f"{checkpoint.path} was written with AMP_OPT_LEVEL {before}, it goes on with "
            f"{now.level}: from here on products are in {now.about}"
        )
    elif now.level != run.precision.level:
        run.logger.info("as the checkpoint that the run goes on from:")
        log_precision(now, run.logger)
    return replace(run, precision=now)


def check_same_precision(precision: Precision) -> None:
    """Refuse processes that compute in other types; every process has to call it."""
    advice = "give all one that each has, such as --amp-opt-level O0"
    check_agreement({"the precision": precision.about}, advice)


def log_precision(precision: Precision, logger: logging.Logger) -> None:
    """Log in which type the products are, and why."""
    logger.info("precision: %s", precision.about)
    if precision.emulated:
        kind = str(precision.dtype).removeprefix("torch.")
        logger.warning(f"this processor has no {kind}: {precision.level} is slower here than O0")


def write_config(run: Run) -> None:
    """Write ``config.json``, the configuration in effect, on the first process.

    Raises:
        UserError: it cannot be written.
    """
    if rank() == 0:
        path = os.path.join(run.folder, "config.json")
        with reading(path, "cannot write"):
            write_text(path, to_json(run.effective))


def write_text(path: str, text: str) -> None:
    """Write a file whole or not at all; on return it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode())


def write_results(run: Run, results: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write ``results.json`` with its entry ``provenance``, and config.json beside it.

    The first process writes.

    Args:
        run: its folder gets the file.
        results: the figures.
        provenance: from ``gather_provenance``.

    Raises:
        UserError: a figure is not finite, or the file cannot be written.
    """
    if rank() > 0:
        return
    path = os.path.join(run.folder, "results.json")
    entry = {"provenance": provenance | cost(run.device, run.started)}
    with reading(path, "cannot write the results"):  # a figure that is not finite is refused
        write_text(path, json.dumps(results | entry, indent=2, allow_nan=False))
    write_config(run)
    run.logger.info("%s written", path)


def log_table(run: Run, rows: list[list[str]]) -> None:
    """Log figures as a table: the first row is the head, the first column says what is in a row."""
    run.logger.info("results:\n%s", aligned(rows, figures=True))


def aligned(rows: list[list[str]], figures: bool = False) -> str:
    """Rows of cells as text with columns in line; figures, beside a first column, on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if figures and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_pictures(run: Run, draw: Callable[[str], None]) -> None:
    """Call ``draw`` with the folder ``pictures/`` below the run's, on the first process.

    It comes after the figures: a picture that fails ends nothing, and the log has a warning.
    """
    if rank() > 0:
        return
    folder = os.path.join(run.folder, "pictures")
    try:
        os.makedirs(folder, exist_ok=True)
        draw(folder)
    except Exception as error:  # whatever it is, the evaluation has succeeded
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        run.logger.warning("%s: not all pictures could be drawn (%s)", folder, reason)
    else:
        run.logger.info("pictures written into %s", folder)


# what a full memory is called: by torch, the processor's allocator, nccl, cuBLAS and cuDNN
FULL = ("out of memory", "allocate memory", "STATUS_ALLOC_FAILED")


def run_script(main: Callable[[], None]) -> None:
    """Run ``main``; a user's mistake ends it with one line on standard error and exit code 1.

    So does a process of the group that died or does not answer.
    """
    try:
        main()
    except SystemExit:
        leave_group()
        raise
    except KeyboardInterrupt:
        end_with(128 + signal.SIGINT, "interrupted")
    except Exception as error:
        sys.stdout.flush()  # the end is at once, without peers, which may be inside a collective
        if reason := fault(error):
            end_with(1, f"error: {reason}")
        if world_size() == 1:
            raise
        failed = f"error: process {rank()} of the group failed: {type(error).__name__}"
        end_with(1, failed, traceback.format_exc())
    leave_group()


def fault(error: Exception) -> str | None:
    """What has failed around the program, such as memory, a disk or a peer; None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        # the error of a data worker comes wrapped in its traceback
        return str(error).rsplit("UserError: ", 1)[-1].strip()
    if isinstance(error, MemoryError) or any(words in text for words in FULL):
        return f"out of memory, lower --batch-size ({text[:200]})"
    if lost_peer(error):
        return f"another process of the group died, or did not answer in time ({text[:200]})"
    if "allocate shared memory" in text:
        return f"shared memory is full: enlarge /dev/shm, lower DATA.NUM_WORKERS ({text[-200:]})"
    # a worker that is killed while it hands over a batch resets the connection
    dead = isinstance(error, RuntimeError) and text.startswith("DataLoader worker")
    if dead or isinstance(error, ConnectionError):
        return f"a data worker died, as when memory runs out: lower DATA.NUM_WORKERS ({text[:200]})"
    return text if isinstance(error, OSError) else None


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
