"""Batches on their way to a GPU: each one copy from pinned memory, and one ahead of its use."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from data.dataset import Views

ALIGNMENT = 16  # bytes: where a tensor of any type may begin


class FlatBatch(NamedTuple):
    """A batch whose tensors lie behind one another, but for ``Views.replaced``: the host reads it.

    Attributes:
        memory: their bytes, uint8 of one dimension.
        layout: of each its first byte, type and shape.
        replaced: of ``Views``; None for a batch of another kind.
    """

    memory: torch.Tensor
    layout: list[tuple[int, torch.dtype, list[int]]]
    replaced: torch.Tensor | None


def flatten(samples: list[tuple[Any, ...]]) -> FlatBatch:
    """The collate function of a loader: what ``default_collate`` gives, with one memory."""
    batch = default_collate(samples)
    replaced, parts, layout, end = None, [], [], 0
    if isinstance(batch, Views):
        replaced = batch.replaced
        batch = [batch.first, batch.second, batch.label, batch.draws]
    for tensor in batch:
        layout.append((end, tensor.dtype, list(tensor.shape)))
        own = tensor.contiguous().view(-1).view(torch.uint8)
        gap = -len(own) % ALIGNMENT
        parts += [own, own.new_zeros(gap)]
        end += len(own) + gap
    return FlatBatch(torch.cat(parts), layout, replaced)


def unflatten(memory: torch.Tensor, batch: FlatBatch) -> Views | list[torch.Tensor]:
    """What ``batch`` was made of, with tensors that are views of ``memory``, which has its bytes."""
    tensors = []
    for start, dtype, shape in batch.layout:
        size = math.prod(shape) * dtype.itemsize
        tensors.append(memory[start : start + size].view(dtype).view(shape))
    if batch.replaced is None:
        return tensors
    first, second, label, draws = tensors
    return Views(first, second, batch.replaced, label, draws)


def prefetch(updates: Iterable[Iterable[FlatBatch]]) -> Iterator[list[Any]]:
    """The micro-batches of each update, on the current GPU but for ``Views.replaced``.

    While one update computes, those of the next are copied, by a stream of their own; the host
    waits for neither. Two updates' batches are on the device at a time.
    """
    stream = torch.cuda.Stream()

    def copy(micro_batches: Iterable[FlatBatch]) -> tuple[list, Any]:
        with torch.cuda.stream(stream):
            copied = [(b.memory.to("cuda", non_blocking=True), b) for b in micro_batches]
        return copied, stream.record_event()

    def hand_out(copied: list, ready: Any) -> list[Any]:
        current = torch.cuda.current_stream()
        current.wait_event(ready)
        for memory, _ in copied:
            memory.record_stream(current)  # it must not be given away before it was used
        return [unflatten(*pair) for pair in copied]

    ahead = None
    for micro_batches in updates:
        following = copy(micro_batches)
        if ahead:
            yield hand_out(*ahead)
        ahead = following
    if ahead:
        yield hand_out(*ahead)
