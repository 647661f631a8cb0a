"""The images that pre-training could not read and replaced."""

import logging

import torch
import torch.distributed as dist

from data.source import ImageSource
from utils.distributed import world_size
from utils.errors import UserError

NAMED = 3  # bad images in the error


class BadImages:
    """Collects the bad images of all processes, logs each once, and stops when they are many.

    A resumed run starts to count anew, and meets them again.

    Args:
        source: the images.
        max_fraction: the run goes on while no larger share of the images is bad.
        logger: of this process.

    Raises:
        UserError: a share outside [0, 1].
    """

    def __init__(self, source: ImageSource, max_fraction: float, logger: logging.Logger) -> None:
        if not 0 <= max_fraction <= 1:
            raise UserError(f"DATA.MAX_BAD_FRACTION must lie between 0 and 1, got {max_fraction}")
        self.source, self.max_fraction, self.logger = source, max_fraction, logger
        self.bad: dict[int, str] = {}  # of all processes: index and reason
        self._new: dict[int, str] = {}  # of this process, since the last check

    def note(self, replaced: torch.Tensor) -> None:
        """Remember the third item of a batch of ``TwoViews``: an index where one was replaced."""
        for index in replaced[replaced >= 0].tolist():
            if index not in self.bad and index not in self._new:
                self._new[index] = self._reason(index)

    def check(self) -> None:
        """Exchange and log what was noted; every process has to call it.

        Raises:
            UserError: on every process, if more than ``max_fraction`` of the images are bad.
        """
        noted = [self._new]
        if world_size() > 1:
            noted = [{}] * world_size()
            dist.all_gather_object(noted, self._new)
        self._new = {}
        for process, new in enumerate(noted):
            for index in sorted(new.keys() - self.bad.keys()):
                self.bad[index] = new[index]
                self.logger.warning("process %d replaced a bad image: %s", process, new[index])
        total = len(self.source.names)
        if len(self.bad) > self.max_fraction * total:
            some = "; ".join(list(self.bad.values())[:NAMED])
            raise UserError(
                f"{len(self.bad)} of {total} images are bad, which is more than "
                f"DATA.MAX_BAD_FRACTION {self.max_fraction:g} (python -m tools.check_data lists "
                f"all): {some}"
            )

    def _reason(self, index: int) -> str:
        try:
            self.source.read_image(index)
        except UserError as error:
            return str(error)
        return f"{self.source.names[index]}: could be read only at a second try"
