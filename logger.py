"""The log of a run: one file for each process, and the console of the first."""

import logging
import os
import sys

from termcolor import colored
from tqdm import tqdm


class _ConsoleHandler(logging.Handler):
    """Writes through tqdm, so that a log line does not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def create_logger(folder: str, rank: int) -> logging.Logger:
    """Log to ``<folder>/log_rank<rank>.txt`` and, on rank 0, to standard output."""
    logger = logging.getLogger("synco")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    plain = "[%(asctime)s] (%(filename)s %(lineno)d): %(levelname)s %(message)s"
    file = logging.FileHandler(os.path.join(folder, f"log_rank{rank}.txt"), encoding="utf-8")
    file.setFormatter(logging.Formatter(plain, "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)
    if rank == 0:
        console = _ConsoleHandler()
        where = colored("[%(asctime)s]", "green") + colored("(%(filename)s %(lineno)d)", "yellow")
        console.setFormatter(
            logging.Formatter(where + ": %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        logger.addHandler(console)
    return logger
