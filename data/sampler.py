"""Which images each process reads, and in which order."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from utils.seed import derive_seed


class EpochBatches(Sampler):
    """The batches of one process in one epoch, each a list of (epoch, index).

    All processes shuffle alike, by seed and epoch, and cut the order into global batches, of
    which each takes its part: N processes read the images of one process with an N times larger
    batch. A last global batch that is not full is left out.

    Args:
        num_images: images in the data set.
        batch_size: images a process and batch.
        rank, world_size: this process and the number of processes.
        seed: the run's seed.
        multiple: keep a number of batches that this divides (micro-batches of an update).

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
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first, self.shift = 0, 0, 0

    def set_position(self, epoch: int, first: int = 0, shift: int = 0) -> None:
        """Let the next iteration be of ``epoch``, from batch ``first`` on.

        All batches start ``shift`` images earlier: what was read with global batches of another
        size need not end where a batch ends.
        """
        self.epoch, self.first, self.shift = epoch, first, shift

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch) >> 1)
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for batch in range(self.first, self.batches):
            start = (batch * self.world_size + self.rank) * self.batch_size - self.shift
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]
