"""Where a run is."""

from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from utils.distributed import world_size
from utils.errors import UserError

COUNTS = ("epoch", "step", "images", "images_per_update", "training_images")


def images_per_update(config: CfgNode) -> int:
    """Images of one update, over all processes and micro-batches."""
    return config.DATA.BATCH_SIZE * world_size() * max(1, config.TRAIN.ACCUMULATION_STEPS)


@dataclass(frozen=True)
class EpochSize:
    """How an epoch divides into updates; images that fill no update are left out.

    Attributes:
        images: in the data set.
        images_per_update: of all processes and micro-batches.
    """

    images: int
    images_per_update: int

    @property
    def updates(self) -> int:
        """Updates of an epoch."""
        return self.images // self.images_per_update


@dataclass
class Progress:
    """Where a run is: epoch, updates, and images of the epoch.

    Attributes:
        size: of an epoch.
        epoch: the epoch, from 0.
        step: updates made so far.
        images_seen: images of the epoch's order that were seen.
    """

    size: EpochSize
    epoch: int = 0
    step: int = 0
    images_seen: int = 0

    def advance(self) -> None:
        """Count one update."""
        self.step += 1
        self.images_seen += self.size.images_per_update

    @property
    def steps_of_epoch(self) -> int:
        """Updates made of the epoch; one that was begun with other batches counts as made."""
        return self.step - self.epoch * self.size.updates

    @property
    def epoch_ended(self) -> bool:
        """Whether all updates of the epoch are made."""
        return self.steps_of_epoch == self.size.updates

    @property
    def epochs(self) -> float:
        """The clock of a run: the epochs that were made, with the share of images of the last."""
        return clock(self.state_dict())

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.images_seen = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The place for a checkpoint; an epoch that has ended counts all its images."""
        seen = self.size.images if self.epoch_ended else self.images_seen
        return {
            "epoch": self.epoch,
            "step": self.step,
            "images": seen,
            "images_per_update": self.size.images_per_update,
            "training_images": self.size.images,
        }


def clock(state: dict[str, Any]) -> float:
    """``Progress.epochs`` of a checkpoint, as it was when that was written.

    It is worked out from images, since a number of updates means another place after a change of
    batch, accumulation or processes. Both of the same images are the same number.

    Args:
        state: with ``Progress.state_dict``; older ones are from the end of an epoch.
    """
    whole = state.get("training_images", 1)
    return state["epoch"] + state.get("images", whole) / whole


def place_of(state: dict[str, Any], size: EpochSize, path: str) -> Progress:
    """The place of a checkpoint, even if updates or data had another size then.

    Args:
        state: the checkpoint, with ``Progress.state_dict``; older ones are from the end of an
            epoch and have no ``images``.
        size: of an epoch now.
        path: what to call the checkpoint in an error.

    Returns:
        the place. Of other data the same share of the epoch counts as seen, so that ``epochs``
        never goes back. An epoch that has no update left may not have been saved or logged.

    Raises:
        UserError: a count that is none.
    """
    for name in COUNTS:
        count = state.get(name, 1)
        if not isinstance(count, int) or count < 0:
            raise UserError(f"{path}: damaged, its {name} is {str(count)[:50]!r}")
    seen, epoch = state.get("images", size.images), state["epoch"]
    before = state.get("training_images") or size.images
    if before != size.images:
        seen = -(-seen * size.images // before)
    begun = min(size.updates, -(-seen // size.images_per_update))
    return Progress(size, epoch, epoch * size.updates + begun, seen)
