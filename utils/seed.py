"""Random numbers that follow from what they are for, so that workers and resumes change nothing."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

STREAMS = 8


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
    """Draws of N(0, 1) in float32, on the CPU by all its cores.

    torch draws there on one core. These come from STREAMS generators, seeded by torch's default
    one, so that the number of cores changes nothing.
    """
    if device.type != "cpu":
        return torch.randn(shape, device=device)
    values = torch.empty(shape)
    seeds = torch.randint(2**63 - 1, (STREAMS,)).tolist()

    def fill(part: torch.Tensor, seed: int) -> None:
        part.normal_(generator=torch.Generator().manual_seed(seed))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # chunk gives fewer parts where there are fewer values
        list(pool.map(fill, values.flatten().chunk(STREAMS), seeds))
    return values
