"""The process group: nccl on GPUs, gloo on the CPU, one process without a launcher."""

import datetime
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

try:
    # imported before any group is made, because its default arguments would keep that group
    from diffdist.functional import all_gather as gather
except ImportError:
    gather = dist.all_gather

T = TypeVar("T")


def init_process_group(local_rank: int, timeout: float = 1800) -> torch.device:
    """Join the launcher's process group, or make one of a single process; returns the device.

    Args:
        local_rank: number of the GPU.
        timeout: seconds until waiting for another process is an error.
    """
    # nccl: end the process when a peer is gone, rather than wait for ever
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        wait = datetime.timedelta(seconds=timeout)
        store, number, processes = next(dist.rendezvous("env://", timeout=wait))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # each machine counts its own restarts
            # the launcher's store outlives a restart, with the addresses of the dead processes
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"restart_{restart}", store)
        options = {"store": store, "rank": number, "world_size": processes, "timeout": wait}
        dist.init_process_group(backend, **options)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def rank() -> int:
    """Number of this process, 0 outside a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 outside a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def all_gather_objects(value: T) -> list[T]:
    """``value`` of each process in the order of ranks; pickle must be able to take it."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_first_process(function: Callable[[], T]) -> T:
    """Call ``function`` on the first process only, and return its result on every process.

    Raises:
        UserError: on every process, if ``function`` raises it.
    """
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except UserError as raised:
            box[1] = str(raised)
    if world_size() > 1:
        dist.broadcast_object_list(box)
    result, error = box
    if error is not None:
        raise UserError(error)
    return result


def lost_peer(error: BaseException | None) -> bool:
    """Whether ``error`` says that another process of the group died or does not answer."""
    text = str(error).lower()
    known = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out")
    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or (
        world_size() > 1 and isinstance(error, RuntimeError) and any(k in text for k in known)
    )


def all_gather_batch(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ...) of each process -> (world size x B, ...) in the order of ranks, without gradient.

    It uses diffdist, as MoBY's published code does, or torch where diffdist does not import.
    """
    tensor = tensor.detach().contiguous()
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    gather(parts, tensor)
    return torch.cat(parts)


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The average of ``tensor`` over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def data_parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Average the gradients of ``model`` over the processes; its buffers are left alone.

    Buffers need no broadcast: synchronised BatchNorm and gathered keys keep them equal.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    # torch 2.15 renamed the argument
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )
