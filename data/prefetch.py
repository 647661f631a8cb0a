"""Batches on their way to a GPU: each one copy from pinned memory, and one ahead of its use."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate, get_worker_info

from data.dataset import Views

Layout = list[tuple[int, torch.dtype, list[int]]]
ALIGNMENT = 16  # bytes: where a tensor of any type may begin


class FlatBatch(NamedTuple):
    """A batch whose tensors lie behind one another, but for ``Views.replaced``: the host reads it.

    Attributes:
        memory: their bytes, uint8 of one dimension.
        layout: of each its first byte, type and shape.
        replaced: of ``Views``; None for a batch of another kind.
    """

    memory: torch.Tensor
    layout: Layout
    replaced: torch.Tensor | None


def flatten(samples: list[tuple[Any, ...]]) -> FlatBatch:
    """The collate function of a loader: what ``default_collate`` gives, stacked into one memory."""
    replaced, columns = None, list[Any](zip(*samples, strict=True))
    if isinstance(samples[0], Views):
        replaced = default_collate(columns.pop(Views._fields.index("replaced")))
    layout, end = [], 0
    for place, column in enumerate(columns):
        if not isinstance(column[0], torch.Tensor):
            columns[place] = column = default_collate(column).unbind()
        shape = [len(column), *column[0].shape]
        layout.append((end, column[0].dtype, shape))
        size = math.prod(shape) * column[0].element_size()
        end += size + -size % ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8)
    if get_worker_info():  # else it would be copied to memory that processes share
        memory.set_(torch.UntypedStorage._new_shared(end))
    for column, out in zip(columns, _parts(memory, layout), strict=True):
        torch.stack(column, out=out)
    return FlatBatch(memory, layout, replaced)


def unflatten(memory: torch.Tensor, batch: FlatBatch) -> Views | list[torch.Tensor]:
    """What ``batch`` was made of, with tensors that are views of ``memory``, which has its bytes."""
    tensors = _parts(memory, batch.layout)
    if batch.replaced is None:
        return tensors
    first, second, label, draws = tensors
    return Views(first, second, batch.replaced, label, draws)


def _parts(memory: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    tensors = []
    for start, dtype, shape in layout:
        size = math.prod(shape) * dtype.itemsize
        tensors.append(memory[start : start + size].view(dtype).view(shape))
    return tensors


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
