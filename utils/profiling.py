"""What the time of some updates goes to: torch's profiler."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

from utils.checkpoint import TEMPORARY
from utils.distributed import rank
from utils.errors import UserError
from utils.run import Run

TRACE = "trace.json"
WARM_UP = 3  # updates before, in which memory grows and kernels are chosen
ROWS = 20  # of the table
B = TypeVar("B")


class Profile:
    """Profiles some updates of a run, on its first process; then the run goes on as usual.

    The trace, which chrome://tracing and ui.perfetto.dev open, is written into the run folder.
    The log gets a table of the operations that took longest.

    Args:
        updates: how many, after ``WARM_UP`` others.
        left: updates that the run will still make.
        run: its folder and log.

    Raises:
        UserError: fewer are left.
    """

    def __init__(self, updates: int, left: int, run: Run) -> None:
        if left < updates + WARM_UP:
            raise UserError(
                f"--profile {updates} needs {updates + WARM_UP} updates, as {WARM_UP} warm up, but "
                f"the run has only {left} left"
            )
        self.updates, self.run, self._made = updates, run, 0
        activities = [ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)

    def around(self, watch: Callable[[Iterable[B]], Iterator[B]]) -> Callable:
        """``watch``, whose updates are counted and profiled over all epochs."""

        def watched(updates: Iterable[B]) -> Iterator[B]:
            for update in watch(updates):
                yield update  # it is made here
                if rank() == 0:
                    self._count()

        return watched

    def _count(self) -> None:
        self._made += 1
        if self._made == WARM_UP:
            self._profiler.start()
        if self._made == WARM_UP + self.updates:
            self._profiler.stop()
            self._write()

    def _write(self) -> None:
        path, cuda = os.path.join(self.run.folder, TRACE), self.run.device.type == "cuda"
        averages = self._profiler.key_averages()
        # torch knows it by this name in all versions
        sort_by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = averages.table(sort_by=sort_by, row_limit=ROWS, max_name_column_width=60)
        self.run.logger.info("%d updates by operation:\n%s", self.updates, table)
        self._profiler.export_chrome_trace(path + TEMPORARY)
        try:
            os.replace(path + TEMPORARY, path)
        except OSError as error:  # torch has said why it wrote nothing; it is not worth the run
            self.run.logger.error("%s: cannot write the trace (%s)", path, error.strerror)
        else:
            self.run.logger.info("%s saved: open it in ui.perfetto.dev or chrome://tracing", path)
        del self._profiler  # its events take memory
