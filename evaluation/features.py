"""The feature extractor of all evaluations."""

import logging
from collections.abc import Callable, Sized
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from yacs.config import CfgNode

from data.loader import build_test_images, num_workers
from data.loader import normalize as normalize_images
from data.source import ImageSource
from utils.distributed import check_shared_memory, on_terminal, rank, world_size
from utils.errors import UserError
from utils.run import Run
from utils.signals import shield_workers


@torch.inference_mode()
def extract_features(
    encoder: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    run: Run,
    *,
    batch_size: int,
    num_workers: int,
    normalize: bool = True,
    label: str = "features",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of every image of a data set, exactly once and in its order.

    Each process encodes its part. Images of unequal size need a batch of 1. Each process needs
    memory for all features, and for its own part once more.

    Args:
        encoder: images (B, 3, H, W) -> features (B, F), in eval mode on ``run.device``.
        dataset: items are (uint8 3 x H x W, label); it has a length.
        run: device and precision.
        batch_size: images in a batch of one process.
        num_workers: data workers of each process.
        normalize: L2-normalise the features.
        label: what the progress bar says.

    Returns:
        features (N, F) in float32 and labels (N, ...), on the CPU of every process.
    """
    total = len(cast(Sized, dataset))
    # all processes encode equally many, so that rows can be gathered; repeats are dropped later
    rows = -(-total // world_size())
    own = [i % total for i in range(rank(), rows * world_size(), world_size())]
    loader = DataLoader(
        Subset(dataset, own),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=run.device.type == "cuda",
    )
    shield_workers(loader)  # so that a training run that measures its encoder ends cleanly
    features = labels = torch.empty(0)
    filled = 0
    for images, targets in tqdm(loader, desc=label, disable=not on_terminal(), leave=False):
        with run.precision.autocast():
            output = encoder(normalize_images(images.to(run.device, non_blocking=True)))
        output = output.float()
        if normalize:
            output = F.normalize(output, dim=1)
        if not filled:
            features = torch.zeros(rows, output.shape[1])
            labels = torch.zeros(rows, *targets.shape[1:], dtype=targets.dtype)
        features[filled : filled + len(output)] = output.cpu()
        labels[filled : filled + len(output)] = targets
        filled += len(output)
    return _interleave(features, total, run), _interleave(labels, total, run)


def encode_images(
    config: CfgNode,
    encoder: Callable[[torch.Tensor], torch.Tensor],
    source: ImageSource,
    run: Run,
    normalize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels of all images of ``source``, see ``extract_features``."""
    workers, size = num_workers(config), config.DATA.IMG_SIZE
    check_shared_memory(workers, 2, 3 * config.DATA.BATCH_SIZE * size**2)  # as torch reads ahead
    return extract_features(
        encoder,
        build_test_images(config, source),
        run,
        batch_size=config.DATA.BATCH_SIZE,
        num_workers=workers,
        normalize=normalize,
    )


def check_features(features: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    """Refuse features whose figures would mean nothing.

    Args:
        features: what should be (N, F).
        labels: what should be (N,), or (N, C) for several labels an image.
        name: what to call them in an error.

    Raises:
        UserError: other sizes or kinds, or a value that is not finite.
    """
    if features.layout != torch.strided or not features.is_floating_point():
        raise UserError(f"the {name} features must be dense real numbers")
    if features.ndim != 2 or labels.ndim not in (1, 2) or len(features) != len(labels):
        raise UserError(
            f"{name} features {tuple(features.shape)} and labels {tuple(labels.shape)}: need "
            "one row of features and of labels for each image"
        )
    if not len(features):
        raise UserError(f"there are no {name} features")
    bad = ~features.isfinite().all(1)
    if bad.any():
        raise UserError(f"the {name} features of image {int(bad.nonzero()[0])} are not finite")


def unit_length(features: torch.Tensor, name: str) -> torch.Tensor:
    """Features (N, F) of length 1; those of other lengths are normalised, with a warning."""
    if (features.norm(dim=1) - 1).abs().max() < 1e-2:  # as dumped, also in 16 bits
        return features
    logging.getLogger("synco").warning("the %s features have other lengths: normalised", name)
    return F.normalize(features)


def _interleave(own: torch.Tensor, total: int, run: Run) -> torch.Tensor:
    """Rows rank, rank + world size, ... of each process -> all ``total`` rows in order."""
    if world_size() == 1:
        return own
    gathered = own.new_empty(len(own), world_size(), *own.shape[1:])
    for start in range(world_size()):
        part = (own if start == rank() else torch.empty_like(own)).to(run.device)
        dist.broadcast(part, start)
        gathered[:, start] = part.cpu()
    return gathered.flatten(0, 1)[:total]
