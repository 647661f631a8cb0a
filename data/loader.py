"""The loaders of the scripts."""

import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.augmentation import view_augmentations
from data.dataset import TestImages, TwoViews
from data.sampler import EpochBatches
from data.source import open_source
from data.transfer import open_transfer_set
from utils.distributed import local_world_size, rank, world_size
from utils.errors import UserError


def build_source(config: CfgNode, split: str, download: bool = False):
    """The labelled images of ``train`` or of ``val`` (the test split of a transfer set).

    Args:
        config: DATA.DATASET names the set and DATA.DATA_PATH its folder.
        split: ``train`` or ``val``.
        download: fetch the set if it is missing and torchvision can.

    Returns:
        an object with ``names``, ``labels``, ``classes`` and ``read_image(index)``.
    """
    data = config.DATA
    if data.DATASET == "imagenet":
        cache = (data.CACHE_MODE, rank(), world_size())
        return open_source(data.DATA_PATH, split, data.ZIP_MODE, *cache)
    split = "test" if split == "val" else split
    if download and rank() == 0:
        open_transfer_set(data.DATASET, data.DATA_PATH, split, download=True)
    dist.barrier()
    return open_transfer_set(data.DATASET, data.DATA_PATH, split)


def build_pretraining_loader(config: CfgNode, split: str = "train") -> DataLoader:
    """Batches of two uint8 views, (B, 3, S, S) each, through an EpochBatches sampler.

    Sets ``config.DATA.TRAINING_IMAGES`` to the number of images.

    Raises:
        UserError: no data, an unknown augmentation, or a batch larger than the data set.
    """
    source = build_source(config, split)
    config.DATA.TRAINING_IMAGES = len(source.names)
    try:
        views = view_augmentations(config.AUG.SSL_AUG_TYPE, config.AUG.SSL_AUG_CROP)
        sampler = EpochBatches(
            len(source.names),
            config.DATA.BATCH_SIZE,
            rank(),
            world_size(),
            config.SEED,
            max(1, config.TRAIN.ACCUMULATION_STEPS),
        )
    except ValueError as error:
        raise UserError(f"{config.DATA.DATA_PATH}: {error}") from error
    dataset = TwoViews(source, views, config.DATA.IMG_SIZE, config.SEED)
    workers = num_workers(config)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
    )


def build_test_images(config: CfgNode, source) -> TestImages:
    """The images of ``source`` with the test-time transform of ``config``."""
    return TestImages(source, config.DATA.IMG_SIZE, config.DATA.INTERPOLATION, config.TEST.CROP)


def num_workers(config: CfgNode) -> int:
    """DATA.NUM_WORKERS, but no more than this process's share of the cores."""
    share = max(1, (os.cpu_count() or 1) // local_world_size())
    return min(config.DATA.NUM_WORKERS, share)
