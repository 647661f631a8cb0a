"""Where in the epochs a run is, also for another number of images an update."""

import torch
from torch import nn
from yacs.config import CfgNode

from utils.checkpoint import checkpoint_to_resume, read_checkpoint, restore_training
from utils.distributed import world_size
from utils.launch import Run


def images_per_update(config: CfgNode) -> int:
    """Of all processes and micro-batches."""
    return config.DATA.BATCH_SIZE * world_size() * max(1, config.TRAIN.ACCUMULATION_STEPS)


def locate(epoch: int, images: int, per_update: int, steps_per_epoch: int) -> tuple[int, int]:
    """The update with which to continue after ``images`` images of ``epoch``.

    Args:
        epoch: from 0.
        images: images of the epoch's order that were seen; those of a whole epoch or more mean
            that the epoch is complete.
        per_update: images an update takes now, of all processes.
        steps_per_epoch: updates of an epoch now.

    Returns:
        the number of the update, and by how many images it and those after it in the epoch start
        before their usual place, less than ``per_update``.
    """
    first = -(-images // per_update)
    if first >= steps_per_epoch:
        return (epoch + 1) * steps_per_epoch, 0
    return epoch * steps_per_epoch + first, first * per_update - images


def resume(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    run: Run,
) -> tuple[str | None, int, int]:
    """Load the checkpoint to continue from, if there is one.

    Returns:
        its path, the update to continue with, and the images by which that starts early.
    """
    path = checkpoint_to_resume(config, run.folder, run.logger)
    if not path:
        return None, config.TRAIN.START_EPOCH * steps_per_epoch, 0
    state = read_checkpoint(path, run.device)
    also = ("epoch", "step", "rng_state")
    restore_training(state, path, model, optimizer, run.precision.scaler, also)
    torch.set_rng_state(state["rng_state"].cpu())
    now, images = images_per_update(config), config.DATA.TRAINING_IMAGES
    seen = state.get("images", images)  # older checkpoints: the whole epoch
    step, shift = locate(state["epoch"], seen, now, steps_per_epoch)
    if state.get("images_per_update", now) != now:
        run.logger.warning(
            "%s was written with %d images an update, now there are %d: update %d becomes update "
            "%d, and the base rate is %.3g",
            *(path, state["images_per_update"], now, state["step"], step, config.TRAIN.BASE_LR),
        )
    if state.get("training_images", images) != images:
        run.logger.warning(
            "%s was written with %d images in the data set, now there are %d: the order of the "
            "epoch is another, images may come twice",
            *(path, state["training_images"], images),
        )
    run.logger.info("resumed from %s at update %d", path, step)
    return path, step, shift
