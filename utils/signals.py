"""Stopping at a signal: all processes after the same update, with a checkpoint."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from utils.distributed import ask_all, lost_peer, world_size
from utils.errors import end_with

# exit codes
RESUMABLE = 75  # stopped by a signal, start again to continue (EX_TEMPFAIL)
NOT_SAVED = 74  # trained to the end, but the last checkpoint could not be written (EX_IOERR)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# a launcher passes the terminal's SIGINT on, so that one Ctrl-C arrives twice
SECOND_AFTER = 1.0


class StopSignals:
    """Notices SIGTERM, SIGUSR1, SIGINT and SIGHUP, and lets the processes agree on when to stop.

    SIGHUP stays ignored where it was ignored at the start, as ``nohup`` does.

    Before ``training`` is called, a signal ends the process at once, with RESUMABLE: there is
    nothing to save. From then on it is noted for ``agree``. A second SIGINT ends at once.

    A thread waits for the signals. The main thread may be inside a collective for long, where
    Python runs no handlers.
    """

    def __init__(self) -> None:
        self.requested = ""  # name of the signal
        self._training = False
        self._first_interrupt: float | None = None
        self._pending: Callable[[], list[bool]] = lambda: [False, False]
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._noticed = SIGNALS[:-1] if ignored else SIGNALS
        self._before = {number: signal.signal(number, _ignore) for number in self._noticed}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # a forked child shares the pipe: its signals are not this process's
        os.register_at_fork(after_in_child=self._leave)
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error and self.requested and (lost_peer(error) or lost_peer(error.__cause__)):
            end_with(
                RESUMABLE, f"{self.requested}: another process has ended, no checkpoint written"
            )
        self._training = False
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._writer, b"\0")  # no signal has this number: it ends the thread

    def training(self) -> None:
        """From now on there is something to save."""
        self._training = True

    def agree(self, save: bool) -> tuple[bool, bool]:
        """Whether any process wants to stop, and whether any wants to save; alike on all.

        Every process has to call it once per update. In a group it gives the answer as of the call
        before, so that no process waits for the others or for the GPU.

        Args:
            save: whether this process wants to save.
        """
        answer = ask_all([bool(self.requested), save])
        if world_size() > 1:
            answer, self._pending = self._pending, answer
        stop, save = answer()
        return stop, save

    def _watch(self) -> None:
        while number := os.read(self._reader, 1)[0]:
            if number not in self._noticed:
                continue
            now = time.monotonic()
            if number == signal.SIGINT:
                if self._first_interrupt and now - self._first_interrupt > SECOND_AFTER:
                    end_with(128 + number, "interrupted again: ends at once, without a checkpoint")
                self._first_interrupt = self._first_interrupt or now
            self.requested = self.requested or signal.Signals(number).name
            if not self._training:
                end_with(RESUMABLE, f"stopped by {self.requested} before training began")

    def _leave(self) -> None:
        if signal.getsignal(signal.SIGTERM) is _ignore:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def end_stopped(logger: logging.Logger, step: int, saved: int) -> NoReturn:
    """End a run after ``step`` updates, as a signal asked.

    Args:
        logger: gets a line.
        step: updates made.
        saved: those in the last checkpoint that could be written.

    Raises:
        SystemExit: RESUMABLE.
    """
    lost = f", the last {step - saved} of which are not saved" if saved < step else ""
    logger.info("stopped by a signal after update %d%s: start again", step, lost)
    raise SystemExit(RESUMABLE)


def shield_workers(loader: DataLoader) -> None:
    """Let the workers ignore the signals, which a terminal and a scheduler send to all processes.

    The workers end with their process.
    """
    # unlike atexit, this is also called at the end of a process of multiprocessing
    Finalize(None, _end_workers, exitpriority=0)
    loader.worker_init_fn = partial(_start_shielded, loader.worker_init_fn)


def let_workers_die_quietly() -> None:
    """Let the loader notice a dead worker when it waits for its batch, not within an update.

    torch raises an error in the main thread at once, wherever that is.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _start_shielded(start: Callable[[int], None] | None, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_process_ended
    if start:
        start(worker)


def _unless_process_ended(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print no traceback of the thread that hands batches over, when their process was killed."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_workers() -> None:
    """Kill the workers before Python sends them the SIGTERM that they ignore and waits for them."""
    let_workers_die_quietly()  # this end is none of theirs
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _ignore(number: int, frame: object) -> None:
    """Do nothing: without a Python handler, the wake-up file would not get the signal."""
