"""The loaders of the scripts."""

import argparse
import gc
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate
from yacs.config import CfgNode

from data.augmentation import MEAN, STD, configured_views
from data.dataset import CropAndFlip, RandAugmented, TestImages, TrainImages, TwoViews, Views
from data.opening import DataPath, open_splits, open_train
from data.source import CostlySource, ImageSource
from utils.distributed import (
    all_gather_objects,
    check_shared_memory,
    first_on_each_node,
    on_first_process,
    processors,
    rank,
    wait_for_all,
    world_size,
)
from utils.errors import UserError, reading
from utils.progress import EpochSize, images_per_update
from utils.seed import derive_seed
from utils.signals import let_workers_die_quietly, shield_workers


class EpochBatches(Sampler):
    """The batches of one process in one epoch, each a list of (epoch, index).

    All processes shuffle alike, by seed and epoch. They cut the order into global batches, and
    each takes its part. So N processes read the same images as one process with an N times larger
    batch. A last global batch that is not full is left out.

    Args:
        num_images: images in the data set.
        batch_size: images in a batch of one process.
        rank, world_size: this process and the number of processes.
        seed: the run's seed.
        multiple: keep a multiple of so many batches (micro-batches of an update).

    Raises:
        ValueError: not even one global batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        multiple: int = 1,
    ) -> None:
        self.batches = num_images // (batch_size * world_size * multiple) * multiple
        if not self.batches:
            raise ValueError(
                f"one update takes {batch_size * world_size * multiple} images, but there are "
                f"only {num_images}"
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size, self.multiple = rank, world_size, multiple
        self.epoch, self.images_seen = 0, 0

    def start_at(self, epoch: int, images_seen: int = 0) -> None:
        """Let the next iteration continue ``epoch`` after ``images_seen`` images of its order.

        Images read in batches of another size may end within a batch. The epoch then keeps its
        number of updates: an update that was begun counts as made.
        """
        self.epoch, self.images_seen = epoch, images_seen

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch) >> 1)
        order = torch.randperm(self.num_images, generator=generator)
        together = self.batch_size * self.world_size
        begun = -(-self.images_seen // (together * self.multiple)) * self.multiple
        start = self.images_seen + self.rank * self.batch_size
        for _ in range(begun, self.batches):
            batch = order[start : start + self.batch_size].tolist()
            yield [(self.epoch, index) for index in batch]
            start += together


class TrainingLoader(DataLoader):
    """The micro-batches of each update, lists of batches, in the order of an epoch.

    Its length is the number of updates in a whole epoch. With pinned memory, the batches are on the
    GPU, but for what the host reads.

    Attributes:
        size: how the images of an epoch divide into updates.
    """

    batch_sampler: EpochBatches
    dataset: TwoViews | TrainImages

    def __init__(self, dataset: TwoViews | TrainImages, size: EpochSize, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.size = size

    def start_at(self, epoch: int, images_seen: int = 0) -> None:
        """Let the next iteration continue ``epoch`` after ``images_seen`` images of its order."""
        self.batch_sampler.start_at(epoch, images_seen)

    def __len__(self) -> int:
        return self.size.updates

    @property
    def ahead(self) -> int:
        """Updates that are read before they are asked for, at most."""
        batches = self.num_workers * (self.prefetch_factor or 0)
        return -(-batches // self.batch_sampler.multiple) + self.pin_memory

    def __iter__(self) -> Iterator[list[Any]]:  # type: ignore[override]
        if not self.pin_memory:
            return self._updates()
        from data.prefetch import prefetch  # only a GPU needs it

        return prefetch(self._updates())

    def _updates(self) -> Iterator[list[Any]]:
        batches = super().__iter__()
        let_workers_die_quietly()
        while micro_batches := list(itertools.islice(batches, self.batch_sampler.multiple)):
            yield micro_batches


def build_pretraining_loader(config: CfgNode, split: str = "train") -> TrainingLoader:
    """Batches of ``TwoViews`` through an EpochBatches sampler.

    A batch is ``Views``. Bad images are replaced in the training images alone; one of another split
    is an error.

    Raises:
        UserError: no data, an unknown augmentation, or a batch larger than the data set.
    """
    source = open_train(DataPath.of(config), labelled=False)
    if split != "train":
        _, source = open_splits(DataPath.of(config), labelled=False, train=source)
    if isinstance(source, CostlySource):
        source.log_cost()
    with reading("AUG", "cannot draw views"):
        views = configured_views(config.AUG)
    data = config.DATA
    images = TwoViews(source, views, data.IMG_SIZE, config.SEED, data.BACKEND)
    if split != "train":
        images.replacements = 0
    return _training_loader(config, images, 2 * 3)  # two views in three colours


def build_classification_loader(config: CfgNode, source: ImageSource) -> TrainingLoader:
    """Batches of one view and its label, through an EpochBatches sampler.

    A linear probe gets uint8 crops. Fine-tuning gets normalised float32 crops, augmented as AUG
    says. The rest is as in ``build_pretraining_loader``.

    Raises:
        UserError: an augmentation that timm does not know, or a batch larger than the data set.
    """
    data = config.DATA
    augment: CropAndFlip | RandAugmented
    if config.LINEAR_EVAL.WEIGHTS == "freeze":
        augment, pixel_bytes = CropAndFlip(data.IMG_SIZE), 3
    else:
        with reading("AUG", "timm refuses the augmentation"):
            augment = RandAugmented(data.IMG_SIZE, data.INTERPOLATION, config.AUG)
        pixel_bytes = 3 * 4  # of float32
    return _training_loader(config, TrainImages(source, augment, config.SEED), pixel_bytes)


def _training_loader(
    config: CfgNode, dataset: TwoViews | TrainImages, pixel_bytes: int
) -> TrainingLoader:
    """The loader of ``dataset``, an image of which has so many bytes a pixel."""
    with reading(config.DATA.DATA_PATH, "too few images"):
        sampler = EpochBatches(
            len(dataset),
            config.DATA.BATCH_SIZE,
            rank(),
            world_size(),
            config.SEED,
            max(1, config.TRAIN.ACCUMULATION_STEPS),
        )
    workers = num_workers(config)
    pinned, collate = config.DATA.PIN_MEMORY and torch.cuda.is_available(), default_collate
    if pinned:
        from data.prefetch import flatten as collate  # type: ignore[assignment]
    # A worker shares the memory of what exists now until Python's first full garbage collection
    # in it, which marks each object and so copies it. What is frozen is not marked.
    gc.collect()
    gc.freeze()
    loader = TrainingLoader(
        dataset,
        EpochSize(len(dataset), images_per_update(config)),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=pinned,
        collate_fn=collate,
        worker_init_fn=quiet_worker,
    )
    batch_bytes = pixel_bytes * config.DATA.BATCH_SIZE * config.DATA.IMG_SIZE**2
    check_shared_memory(workers, loader.prefetch_factor or 0, batch_bytes)
    shield_workers(loader)
    return loader


def quiet_worker(worker: int) -> None:
    """Keep libjpeg's messages about damaged images off the terminal, but not Python's."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)


def build_test_images(config: CfgNode, source: ImageSource) -> TestImages:
    """The images of ``source`` with the test-time transform of ``config``."""
    return TestImages(source, config.DATA.IMG_SIZE, config.DATA.INTERPOLATION, config.TEST.CROP)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 images, (B, 3, H, W) -> float32 with ImageNet's mean and deviation, on their device.

    The memory layout does not change.
    """
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


@cache  # a copy to a GPU would wait for it each time
def _statistics(device: torch.device) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False):  # else they would serve inference alone
        return tuple(
            (255 * torch.tensor(values)).view(3, 1, 1).to(device) for values in (MEAN, STD)
        )


def num_workers(config: CfgNode) -> int:
    """DATA.NUM_WORKERS, but no more than the processors that this process may keep busy."""
    return min(config.DATA.NUM_WORKERS, processors())


NAMED = 3  # bad images in the error


class BadImages:
    """Collects the bad images of all processes, logs each once, and stops when there are many.

    A resumed run counts from zero, because it meets them again.

    Args:
        source: the images.
        max_fraction: the largest share of bad images with which the run goes on.
        logger: of this process.
    """

    def __init__(self, source: ImageSource, max_fraction: float, logger: logging.Logger) -> None:
        self.source, self.max_fraction, self.logger = source, max_fraction, logger
        self.bad: dict[int, str] = {}  # of all processes: index and reason
        self._new: dict[int, str] = {}  # of this process, since the last check

    def note(self, micro_batches: list[Views]) -> None:
        """Remember the images that were replaced."""
        for batch in micro_batches:
            for index in batch.replaced[batch.replaced >= 0].tolist():
                if index not in self.bad and index not in self._new:
                    self._new[index] = self._reason(index)

    def check(self) -> None:
        """Exchange and log what was noted; every process has to call it.

        Raises:
            UserError: on every process, if more than ``max_fraction`` of the images are bad.
        """
        noted = all_gather_objects(self._new)
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
        return str(UserError(f"{self.source.names[index]}: could be read only at a second try"))
