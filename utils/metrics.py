"""The figures of a run: averaged over updates and processes, and one JSON line each in a file."""

import json
import logging
import math
import os
from collections.abc import Callable

import torch

from utils.distributed import mean_over_processes, rank

METRICS = "metrics.jsonl"


class Averages:
    """Means of figures over updates and processes, without a synchronisation before ``read``.

    Updates that were skipped count in none of the means.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(0)  # of no meaning before the first update
        self._names: tuple[str, ...] = ()
        self.updates = 0  # since the last reading, skipped ones included

    def add(self, figures: dict[str, torch.Tensor], finite: torch.Tensor) -> None:
        """Take the scalars of one update, on the device; ``finite``: whether it was made."""
        self._names = tuple(figures)
        values = torch.stack([finite.float(), *(v.float() for v in figures.values())])
        values = torch.where(finite, values, 0)
        self._sums = self._sums + values if self.updates else values
        self.updates += 1

    def read(self) -> dict[str, float]:
        """The means, and ``skipped``, the number of updates that were; then begins anew.

        Every process has to call it. NaN, if all updates were skipped.
        """
        made, *sums = mean_over_processes(self._sums.clone()).tolist()
        means = [total / made if made else math.nan for total in sums]
        skipped = self.updates - round(made)
        self.updates = 0
        return dict(zip(self._names, means, strict=True)) | {"skipped": skipped}


class MetricsFile:
    """``metrics.jsonl`` of a run folder: one JSON object a line, written by the first process.

    Args:
        folder: the run folder.
        step: updates made so far; lines of later ones, which a run left that is now continued
            from before them, are dropped.
        logger: gets a warning when the file cannot be written, which stops no training.
    """

    def __init__(self, folder: str, step: int, logger: logging.Logger) -> None:
        self.path, self.logger, self._failed = os.path.join(folder, METRICS), logger, rank() > 0
        self._guard(self._drop_after, step)

    def write(self, kind: str, figures: dict[str, float | int]) -> None:
        """Append one line: its ``kind`` (``train`` or ``epoch``) and figures; NaN becomes null."""
        line = {"kind": kind} | {n: v if math.isfinite(v) else None for n, v in figures.items()}
        self._guard(self._append, json.dumps(line))

    def _append(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _drop_after(self, step: int) -> None:
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
        kept = [line for line in lines if _step(line) <= step]
        if kept != lines:
            temporary = self.path + ".tmp"
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(kept)
            os.replace(temporary, self.path)

    def _guard(self, function: Callable[..., None], argument: str | int) -> None:
        if self._failed:
            return
        try:
            function(argument)
        except OSError as error:
            self._failed = True
            self.logger.error("%s: cannot write (%s), given up", self.path, error.strerror)


def _step(line: str) -> float:
    """The number of updates that a line tells of; infinite for one that was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
