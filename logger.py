"""The log of a run: one file for each process, and the console of the first."""

import contextlib
import logging
import os
import sys

from termcolor import colored
from tqdm import tqdm


class _ConsoleHandler(logging.Handler):
    """Writes through tqdm, so that a log line does not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a closed terminal ends no run
            encoding = sys.stdout.encoding or "utf-8"  # of a batch job it may be ASCII
            line = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


class _FileHandler(logging.Handler):
    """Opens the file for each line, so that it goes on after a full disk or a lost mount."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        with (
            contextlib.suppress(OSError),
            open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(self.format(record) + "\n")


def create_logger(folder: str, rank: int) -> logging.Logger:
    """Log to ``<folder>/log_rank<rank>.txt`` and, on rank 0, to standard output."""
    logger = logging.getLogger("synco")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    plain = "[%(asctime)s] (%(filename)s %(lineno)d): %(levelname)s %(message)s"
    path = os.path.join(folder, f"log_rank{rank}.txt")
    with open(path, "a"):
        pass  # fails now, where it cannot be written
    file = _FileHandler(os.path.abspath(path))
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
