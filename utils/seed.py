"""Random numbers that follow from what they are for, so that workers and resumes change nothing."""

import random

import cv2
import numpy as np
import torch


def derive_seed(*keys: int) -> int:
    """A 64-bit seed from non-negative whole numbers such as (seed, rank, step)."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed every random draw of one update: drop path, dropout and synthetic negatives."""
    # manual_seed takes signed 64-bit numbers
    torch.manual_seed(derive_seed(seed, rank, step) >> 1)


def seed_libraries(*keys: int) -> None:
    """Seed the generators of Python, numpy and torch, from which timm's augmentations draw."""
    seed = derive_seed(*keys) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def normal(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Draws of N(0, 1) in float32; on the CPU by OpenCV, which takes half the time of torch.

    Its generator is seeded by torch's default one.
    """
    if device.type != "cpu":
        return torch.randn(shape, device=device)
    values = torch.empty(shape)
    if values.numel():  # OpenCV refuses to fill nothing
        cv2.setRNGSeed(int(torch.randint(2**31 - 1, ())))
        cv2.randn(values.view(1, -1).numpy(), np.zeros(1), np.ones(1))
    return values
