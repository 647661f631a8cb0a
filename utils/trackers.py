"""TensorBoard and Weights & Biases, for those who ask for them."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from utils.config import as_dict
from utils.distributed import on_first_process
from utils.errors import UserError
from utils.run import Run

# takes the place, see ``progress.clock``, and figures by the names under which they will be shown
Writer = Callable[[float, dict[str, float]], None]
STEPS = 1000  # of TensorBoard, which counts whole ones, an epoch


class Tracker:
    """Sends the figures of a run elsewhere; after a failure it stops, and training goes on."""

    def __init__(self, name: str, writer: Writer, run: Run) -> None:
        self.name, self.run = name, run
        self._writer: Writer | None = writer

    def write(self, kind: str, epochs: float, figures: dict[str, float]) -> None:
        """Send ``figures`` of the place ``epochs`` as ``<kind>/<name>``."""
        if self._writer is None:
            return
        try:
            self._writer(epochs, {f"{kind}/{name}": value for name, value in figures.items()})
        except Exception as error:  # whatever goes wrong there
            self._writer = None
            self.run.logger.error("%s fails (%s), given up", self.name, error)


def open_trackers(run: Run, resumed_at: float | None) -> list[Tracker]:
    """The trackers that TENSORBOARD and WANDB ask for; every process has to call it.

    Args:
        run: folder, configuration and log.
        resumed_at: the place that the run goes on from; without it, the run begins anew.

    Returns:
        the trackers on the first process, none on the others.

    Raises:
        UserError: a package that is not installed, or that does not start.
    """
    opened: list[Tracker] = []

    def open_all() -> None:
        for key, name, package, opener in TRACKERS:
            if not run.config[key]:
                continue
            try:
                opened.append(Tracker(name, opener(run, resumed_at), run))
            except ImportError as error:
                raise UserError(f"{key}: {name} is missing: pip install {package}") from error
            except Exception as error:  # no login, no network, a full disk
                raise UserError(f"{key}: {name} does not start ({error}): leave it out") from error

    on_first_process(open_all)
    return opened


def _tensorboard(run: Run, resumed_at: float | None) -> Writer:
    from torch.utils.tensorboard import SummaryWriter  # slow, and few runs need it

    # hides what an earlier start wrote beyond the place from which the run goes on, or all
    first = 0 if resumed_at is None else round(STEPS * resumed_at) + 1
    events = SummaryWriter(os.path.join(run.folder, "tensorboard"), purge_step=first)
    events.flush()

    def write(epochs: float, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            events.add_scalar(name, value, round(STEPS * epochs))
        events.flush()  # a run may end at any time

    return write


def _wandb(run: Run, resumed_at: float | None) -> Writer:
    import wandb  # an optional package

    path = Path(run.folder, "wandb_id.txt")
    if resumed_at is None or not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    remote = wandb.init(
        project="synco-v2",
        name=f"{run.config.MODEL.NAME}/{run.config.TAG}",
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        config=as_dict(run.effective),
        dir=run.folder,
    )
    remote.define_metric("epochs")
    remote.define_metric("*", step_metric="epochs")
    # what is there cannot be taken back, so that it is not told again
    told = {} if resumed_at is None else dict(remote.summary)

    def write(epochs: float, figures: dict[str, float]) -> None:
        kind = next(iter(figures)).split("/")[0]
        place = {"epochs": epochs, f"{kind}/epochs": epochs}
        if epochs > told.get(f"{kind}/epochs", -1.0):
            remote.log(figures | place)

    return write


TRACKERS = (
    ("TENSORBOARD", "TensorBoard", "tensorboard", _tensorboard),
    ("WANDB", "Weights & Biases", "wandb (extra [wandb])", _wandb),
)
