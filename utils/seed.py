"""Random numbers that follow from what they are for, so that workers and resumes change nothing."""

import random

import numpy as np
import torch


def derive_seed(*keys: int) -> int:
    """A 64-bit seed from non-negative whole numbers such as (seed, rank, step).

    Zeros at the end change nothing: compare only seeds from equally many numbers.
    """
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
