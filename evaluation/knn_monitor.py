"""The k-NN accuracy of the encoder while it trains."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from yacs.config import CfgNode

from data.dataset import TestImages
from data.loader import build_test_images, num_workers
from data.opening import DataPath, open_splits
from data.source import ImageSource
from utils.errors import UserError
from utils.run import Run

MOST_TRAIN, MOST_VAL = 10_000, 5_000  # images; from a larger data set, evenly spread
NEIGHBOURS, TEMPERATURE = 20, 0.07
UNREADABLE = -1


class KnnMonitor:
    """Classifies val images by train images every TRAIN.KNN_FREQ epochs, and after the last.

    It does not change the training. An image that cannot be read is left out.

    Args:
        config: the configuration; with TRAIN.KNN_FREQ 0 nothing is measured.
        train: the source of the training images.
        run: device, precision and log.

    Raises:
        UserError: no val images, or classes or labels that k-NN cannot use.
    """

    def __init__(self, config: CfgNode, train: ImageSource, run: Run) -> None:
        self.config, self.run = config, run
        if not config.TRAIN.KNN_FREQ:
            return
        try:
            # a few val images are not worth the memory of all
            _, val = open_splits(DataPath.of(config, cache_mode="no"), train=train)
        except UserError as error:
            raise UserError(f"TRAIN.KNN_FREQ: {error}") from error
        if np.ndim(val.labels) > 1:
            raise UserError("TRAIN.KNN_FREQ needs one class an image: set it to 0")
        self.num_classes = len(train.classes)
        size = config.DATA.IMG_SIZE
        self.train = _ReadableImages(build_test_images(config, train), size, MOST_TRAIN)
        self.val = _ReadableImages(build_test_images(config, val), size, MOST_VAL)

    def after(self, epoch: int, encoder: nn.Module) -> dict[str, float]:
        """``knn``, the accuracy from 0 to 1, if it is due after ``epoch``; all processes call it.

        Args:
            epoch: from 0.
            encoder: images (B, 3, H, W) -> features (B, F).
        """
        every = self.config.TRAIN.KNN_FREQ
        last = epoch + 1 == self.config.TRAIN.EPOCHS
        if not every or not (last or (epoch + 1) % every == 0):
            return {}
        training = encoder.training
        encoder.eval()
        try:
            with torch.random.fork_rng(devices=[]):  # the loader seeds its workers
                return {"knn": self._accuracy(encoder)}
        finally:
            encoder.train(training)

    def _accuracy(self, encoder: nn.Module) -> float:
        from evaluation.knn import knn_classify  # only here: most runs measure nothing

        train, train_labels = self._encode(encoder, self.train)
        val, val_labels = self._encode(encoder, self.val)
        if not len(train) or not len(val):
            return float("nan")
        device = self.run.device
        k = min(NEIGHBOURS, len(train))
        given = (train.to(device), train_labels.to(device), val, [k], TEMPERATURE)
        best = knn_classify(*given, self.num_classes)[k][:, 0]
        return (best == val_labels).float().mean().item()

    def _encode(self, encoder: nn.Module, images: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        from evaluation.features import extract_features

        features, labels = extract_features(
            encoder.forward,  # not the compiled one, which would be compiled again for this
            images,
            self.run,
            batch_size=self.config.DATA.BATCH_SIZE,
            num_workers=num_workers(self.config),
            label="k-NN",
        )
        # features that are not finite have no neighbours
        usable = (labels != UNREADABLE) & features.isfinite().all(1)
        return features[usable], labels[usable]


class _ReadableImages(Dataset):
    """At most ``most`` images, evenly spread; a bad one is black, with label ``UNREADABLE``."""

    def __init__(self, images: TestImages, size: int, most: int) -> None:
        self.images, self.size = images, size
        self.chosen = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return self.images[self.chosen[index]]
        except UserError:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), UNREADABLE
