"""The loaders of the scripts."""

import os

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from yacs.config import CfgNode

from data.augmentation import view_augmentations
from data.dataset import TestImages, TwoViews
from data.sampler import EpochBatches
from data.source import FolderSource, ZipSource, open_source
from utils.distributed import local_world_size, rank, world_size
from utils.errors import UserError


def build_source(config: CfgNode, split: str) -> FolderSource | ZipSource:
    """The images of ``train`` or ``val`` where ``config.DATA`` says."""
    data = config.DATA
    return open_source(data.DATA_PATH, split, data.ZIP_MODE, data.CACHE_MODE, rank(), world_size())


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
        persistent_workers=workers > 0,
        **_worker_options(config, workers),
    )


def build_test_loader(config: CfgNode, source: FolderSource | ZipSource) -> DataLoader:
    """This process's part of the images, in order, as (uint8 images, labels).

    Image i goes to process i mod world size, so that the parts differ by one image at most.
    """
    dataset: Dataset = TestImages(
        source, config.DATA.IMG_SIZE, config.DATA.INTERPOLATION, config.TEST.CROP
    )
    own = range(rank(), len(dataset), world_size())
    return DataLoader(
        Subset(dataset, own),
        batch_size=config.DATA.BATCH_SIZE,
        **_worker_options(config, num_workers(config)),
    )


def num_workers(config: CfgNode) -> int:
    """DATA.NUM_WORKERS, but no more than this process's share of the cores."""
    share = max(1, (os.cpu_count() or 1) // local_world_size())
    return min(config.DATA.NUM_WORKERS, share)


def _worker_options(config: CfgNode, workers: int) -> dict:
    return {
        "num_workers": workers,
        "pin_memory": config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        "prefetch_factor": 4 if workers else None,
    }
