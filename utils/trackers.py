"""TensorBoard and Weights & Biases, for those who ask for them."""

import os
import uuid
from collections.abc import Callable
from typing import Any

from yacs.config import CfgNode

from utils.config import as_dict
from utils.distributed import on_first_process
from utils.errors import UserError
from utils.run import Run

# takes the number of updates made, and figures by the names under which they will be shown
Writer = Callable[[int, dict[str, float]], None]


class Tracker:
    """Sends the figures of a run elsewhere; after a failure it stops, and training goes on."""

    def __init__(self, name: str, writer: Writer, run: Run) -> None:
        self.name, self.run = name, run
        self._writer: Writer | None = writer

    def write(self, kind: str, step: int, figures: dict[str, float]) -> None:
        """Send ``figures`` after ``step`` updates as ``<kind>/<name>``."""
        if self._writer is None:
            return
        try:
            self._writer(step, {f"{kind}/{name}": value for name, value in figures.items()})
        except Exception as error:  # whatever goes wrong there
            self._writer = None
            self.run.logger.error("%s fails (%s), given up", self.name, error)


def open_trackers(config: CfgNode, run: Run, step: int) -> list[Tracker]:
    """The trackers that TENSORBOARD and WANDB ask for; every process has to call it.

    Args:
        config: the configuration of the run.
        run: folder and log.
        step: updates made so far.

    Returns:
        the trackers on the first process, none on the others.

    Raises:
        UserError: a package that is not installed, or that does not start.
    """
    opened: list[Tracker] = []

    def open_all() -> None:
        for key, name, package, opener in TRACKERS:
            if not config[key]:
                continue
            try:
                opened.append(Tracker(name, opener(config, run, step), run))
            except ImportError as error:
                raise UserError(f"{key}: {name} is missing: pip install {package}") from error
            except Exception as error:  # no login, no network, a full disk
                raise UserError(f"{key}: {name} does not start ({error}): leave it out") from error

    on_first_process(open_all)
    return opened


def _tensorboard(config: CfgNode, run: Run, step: int) -> Writer:
    from torch.utils.tensorboard import SummaryWriter

    folder = os.path.join(run.folder, "tensorboard")
    # hides what an earlier start of the run wrote beyond the step it now continues from
    events = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            events.add_scalar(name, value, step)
        events.flush()  # a run may end at any time

    return write


def _wandb(config: CfgNode, run: Run, step: int) -> Writer:
    import wandb

    path = os.path.join(run.folder, "wandb_id.txt")
    if step and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            number = file.read().strip()
    else:
        number = uuid.uuid4().hex
        with open(path, "w", encoding="utf-8") as file:
            file.write(number)
    settings: dict[str, Any] = {"config": as_dict(config), "dir": run.folder}
    name = f"{config.MODEL.NAME}/{config.TAG}"
    remote = wandb.init(project="synco-v2", name=name, id=number, resume="allow", **settings)

    def write(step: int, figures: dict[str, float]) -> None:
        remote.log(figures, step=step)

    return write


TRACKERS = (
    ("TENSORBOARD", "TensorBoard", "tensorboard", _tensorboard),
    ("WANDB", "Weights & Biases", "wandb (extra [wandb])", _wandb),
)
