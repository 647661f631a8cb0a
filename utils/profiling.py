"""What the time of some updates goes to: torch's profiler."""

import os

from torch.profiler import ProfilerActivity, profile, schedule

from utils.checkpoint import TEMPORARY
from utils.distributed import rank
from utils.errors import UserError
from utils.run import Run

TRACE = "trace.json"
WARM_UP = 3  # updates before, in which memory grows and kernels are chosen
ROWS = 20  # of the table


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
        self.updates, self.run = updates, run
        activities = [ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None
        if rank() == 0:
            when = schedule(wait=WARM_UP - 1, warmup=1, active=updates, repeat=1)
            self._profiler = profile(
                activities=activities, schedule=when, on_trace_ready=self._write
            )
            self._profiler.start()

    def step(self) -> None:
        """Count an update that has been made."""
        if self._profiler:
            self._profiler.step()

    def _write(self, profiler: profile) -> None:
        path, cuda = os.path.join(self.run.folder, TRACE), self.run.device.type == "cuda"
        # torch knows it by this name in all versions
        sort_by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        averages = profiler.key_averages()
        table = averages.table(sort_by=sort_by, row_limit=ROWS, max_name_column_width=60)
        self.run.logger.info("%d updates by operation:\n%s", self.updates, table)
        profiler.export_chrome_trace(path + TEMPORARY)
        try:
            os.replace(path + TEMPORARY, path)
        except OSError as error:  # torch has said why it wrote nothing; it is not worth the run
            self.run.logger.error("%s: cannot write the trace (%s)", path, error.strerror)
        else:
            self.run.logger.info("%s saved: open it in ui.perfetto.dev or chrome://tracing", path)
        self._profiler = None  # its events take memory
