"""Mistakes that are planted into the code, each of which the pretended GPU must show.

PYTHONPATH=tests python -m fake_cuda.mistakes    # a line of JSON each: name, what is seen
"""

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from fake_cuda.device import CUDA, DeviceLog, build_guard, pretend, reason_not_to_run
from fake_cuda.recipes import Recipe, count
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

SMALL = Recipe("moby", "vit_nano", 0)
IMAGES = Recipe("moby", "timm/resnet18", 0, processes=1)


def tensors(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Single operators on a tensor of the device, (4, 3)."""
    return {
        "a product with a tensor of the host": lambda: x @ torch.empty(3, 2),
        "an index of the host": lambda: x.index_copy_(0, torch.arange(2), x[:2]),
        "a mask of the host": lambda: torch.where(torch.empty(4, 3, dtype=torch.bool), x, x),
        "item": lambda: x.sum().item(),
        "if": lambda: bool(x.sum() > 0),
        "a mask": lambda: x[x > 0],
        "nonzero": lambda: torch.nonzero(x),
        "cpu": lambda: x.cpu(),
        "tolist": lambda: x.tolist(),
        "a constant": lambda: torch.tensor([1.0], device=CUDA),
        "memory that is not pinned": lambda: torch.empty(3).to(CUDA, non_blocking=True),
        "nothing wrong": lambda: torch.where(x > 0, x, 0).sum(0),
    }


def normalize_from_host(images: torch.Tensor) -> torch.Tensor:
    """``data.loader.normalize`` with a constant from the host."""
    return images.float() / torch.tensor([255.0], device=images.device)


def separate(self) -> list:
    """``Update._copy_statistics`` with a copy of each."""
    layers = [m for m in self.ddp.modules() if isinstance(m, nn.BatchNorm2d)]
    return [([b], b.flatten().clone()) for layer in layers for b in layer.buffers()]


def torchs_own(self, x: torch.Tensor) -> torch.Tensor:
    """``SyncBatchNorm._forward_cuda`` by torch's SyncBatchNorm."""
    from torch.nn.modules._functions import SyncBatchNorm

    statistics = self.running_mean, self.running_var, self.eps, self.momentum
    world = torch.distributed.group.WORLD
    return SyncBatchNorm.apply(x, self.weight, self.bias, *statistics, world, 2)


def read_loss(loss: torch.Tensor) -> torch.Tensor:
    """``poisoned_if_not_finite`` that looks."""
    return loss if loss.isfinite() else loss * torch.nan


def timms_lars(groups, lr, momentum):
    """The optimizer of which a GradScaler asks whether to make its step."""
    import timm.optim

    return timm.optim.Lars(groups, lr=lr, momentum=momentum)


def planted() -> dict[str, tuple[Recipe, object]]:
    """Changes of the project's code, by what they are."""
    crooked = "main_pretrain.normalize", lambda images: images.float().contiguous()
    return {
        "nothing wrong in an update": (SMALL, patch("fake_cuda.recipes.BATCH", 4)),
        "a constant of normalize": (SMALL, patch("main_pretrain.normalize", normalize_from_host)),
        "torch's SyncBatchNorm": (
            SMALL,
            patch("models.batch_norm.SyncBatchNorm._forward_cuda", torchs_own),
        ),
        "timm's LARS": (
            Recipe("moby", "vit_nano", 0, optimizer="lars"),
            patch("optimizer.Lars", timms_lars),
        ),
        "a loss that is looked at": (
            SMALL,
            patch("utils.update.poisoned_if_not_finite", read_loss),
        ),
        "pageable batches": (SMALL, patch("fake_cuda.recipes.PINNED", False)),
        "rows that are read again": (
            SMALL,
            patch("fake_cuda.recipes.longest_rows", lambda rows: None),
        ),
        "a copy of each statistic": (
            IMAGES,
            patch("utils.update.Update._copy_statistics", separate),
        ),
        "views that are channels first": (IMAGES, patch(*crooked)),
    }


def seen_in(recipe: Recipe, folder: str) -> list[str]:
    """What an update and a line of the log show that should not be."""
    counts = count(recipe, folder)
    seen = [*counts.waits, *counts.crooked]
    if sum(counts.read.values()) > 1:
        seen.append(f"a line waits {sum(counts.read.values())} times")
    if counts.kept > 0.05 * counts.launches:
        seen.append(f"{counts.kept} of {counts.launches} launches keep statistics")
    return seen


def main() -> None:
    """Plant each mistake."""
    if reason := reason_not_to_run():
        sys.exit(reason)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        pretend(build_guard(Path(folder)))
        log = DeviceLog()
        with FakeTensorMode(), log:
            for name, function in tensors(torch.empty(4, 3, device=CUDA)).items():
                log.clear()
                try:
                    function()
                    seen = list(log.waits)
                except Exception as error:
                    seen = [type(error).__name__]
                print(json.dumps([name, seen]), flush=True)
        for name, (recipe, change) in planted().items():
            with change:
                print(json.dumps([name, seen_in(recipe, folder)]), flush=True)


if __name__ == "__main__":
    main()
