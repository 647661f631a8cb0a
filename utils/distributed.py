"""The process group: nccl on GPUs, gloo on the CPU, one process without a launcher."""

import inspect
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import LostPeer, UserError, reading
from utils.launchers import launched, local_rank, local_world_size

try:
    # imported before any group is made, because its default arguments would keep that group
    from diffdist.functional import all_gather as gather
except ImportError:
    gather = dist.all_gather

# the newer name first, since the older one warns where there are both
gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

if TYPE_CHECKING:
    from utils.group import Peers

T = TypeVar("T")
Outcome = tuple[Any, UserError | None]
NOTHING: Outcome = (None, None)

SHARED = "/dev/shm"  # where data workers leave their batches
BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine

_peers: "Peers | None" = None  # the launcher's processes
_sharing: int | None = None  # processes of this machine that use the same processors


def init_process_group(local_rank: int, timeout: float = 1800) -> torch.device:
    """Join the launcher's process group, or make one of a single process; returns the device.

    Args:
        local_rank: number of the GPU.
        timeout: seconds until waiting for another process is an error.

    Raises:
        UserError: the group cannot form, or there is no such GPU, or it cannot be used.
    """
    global _peers, _sharing
    device = torch.device("cpu")
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        device = _claim_gpu(local_rank)
        options = {"device_id": device}  # else nccl guesses the GPU from the rank
    backend = "nccl" if options else "gloo"
    if launched():
        from utils.group import form_group  # a single process needs none

        _peers = form_group(backend, timeout, **options)
        _sharing = _count_sharing()
    else:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **options)
    return device


def _claim_gpu(number: int) -> torch.device:
    """The GPU, after a first use, which fails here if another process holds or fills it.

    Raises:
        UserError: there is no such GPU, or it cannot be used.
    """
    gpus = torch.cuda.device_count()
    if number >= gpus:
        raise UserError(
            f"LOCAL_RANK is {number}, but this process sees {gpus} GPUs: start at most one process "
            "for each (--nproc_per_node), or show it more by CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", number)
    advice = "end what holds it or fills its memory, or choose another by CUDA_VISIBLE_DEVICES"
    with reading(f"GPU {number}", f"cannot be used, {advice}"):
        torch.cuda.set_device(device)
        torch.zeros((), device=device)
    return device


def leave_group() -> None:
    """End this process's part of the group, when the others end theirs."""
    global _peers, _sharing
    if _peers:
        _peers.leave()
        _peers = _sharing = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 outside a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 outside a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_terminal() -> bool:
    """Whether this process shows progress bars: the first, if standard error is a terminal."""
    return rank() == 0 and sys.stderr.isatty()


def processors() -> int:
    """How many processors this process may keep busy, at least 1.

    Those that it may run on are divided among the processes of the group that may run there too,
    and the quota of its cgroups among all processes of the machine.
    """
    own = len(os.sched_getaffinity(0)) // (_sharing or local_world_size())
    return max(1, int(min(own, cgroup_quota() / local_world_size())))


def check_shared_memory(workers: int, ahead: int, batch_bytes: int) -> None:
    """Refuse data workers whose batches do not fit into the machine's shared memory.

    Torch would end in the middle of an epoch, with a bus error or a long traceback.

    Args:
        workers: of this process.
        ahead: batches that each worker holds ready.
        batch_bytes: of one batch.

    Raises:
        UserError: what is free is less than what the processes of this machine may need.
    """
    if not os.path.isdir(SHARED):  # torch has another way there
        return
    free, processes = shutil.disk_usage(SHARED).free / 1e6, local_world_size()
    needed = processes * workers * ahead * batch_bytes / 1e6
    if needed > free:
        raise UserError(
            f"{SHARED} has {free:.4g} MB free, but {needed:.4g} MB of shared memory are needed "
            f"({processes} processes x {workers} workers x {ahead} batches x "
            f"{batch_bytes / 1e6:.3g} MB): enlarge it (docker run --shm-size), lower "
            "DATA.NUM_WORKERS, or lower --batch-size"
        )


def cgroup_quota(root: str = "/") -> float:
    """The processors that a container or job may keep busy at a time, infinite without a limit.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    quotas = [math.inf]
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # of version 1 by the names of the controllers; version 2 has none, and may lie beside it
        tops = (controllers, "cpu") if controllers else ("", "unified")
        for top in (Path(root, "sys/fs/cgroup", name) for name in tops):
            inner = Path(path.lstrip("/"))  # may not be seen in a container, where top is its own
            quotas += [_quota(top / folder) for folder in (inner, *inner.parents)]
    return min(quotas)


def _quota(cgroup: Path) -> float:
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((cgroup / name).read_text() for name in files)
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return math.inf


def _count_sharing() -> int:
    """Processes of this machine that may run on one of this process's processors, at most."""
    own = set(os.sched_getaffinity(0))
    machine = BOOT.read_text() if BOOT.exists() else ""
    everyone = all_gather_objects([machine, sorted(own)])
    there = [n for place, usable in everyone if place == machine for n in usable if n in own]
    return max(there.count(number) for number in own)


def all_gather_objects(value: T) -> list[T]:
    """``value`` of each process in the order of ranks.

    Each process may come late: the others wait as long as it lives, whatever DIST_TIMEOUT is.

    Raises:
        LostPeer: a process has died, or shows no sign of life.
    """
    return _peers.gather(value) if _peers else [value]


def wait_for_all() -> None:
    """Wait until every process is here, as ``all_gather_objects`` waits."""
    all_gather_objects(None)


def check_agreement(
    facts: dict[str, object],
    advice: str = "start all processes with the same arguments, code and data",
) -> None:
    """Compare what each process holds of ``facts``; every process has to call it.

    Args:
        facts: short values, by names that a user knows.
        advice: what to do if they differ.

    Raises:
        UserError: on every process: which one differs from the first, and in what.
    """
    first, *others = all_gather_objects(facts)
    for number, theirs in enumerate(others, 1):
        for name in first.keys() | theirs.keys():
            if first.get(name) != theirs.get(name):
                raise UserError(
                    f"process {number} differs from process 0: {name} is {theirs.get(name)}, not "
                    f"{first.get(name)}: {advice}"
                )


def ask_all(flags: list[bool]) -> Callable[[], list[bool]]:
    """Begin to ask which of ``flags`` are set on any process; every process has to call it.

    Returns:
        a function that waits for the answer, as ``all_gather_objects`` waits.
    """
    if not _peers:
        return lambda: flags
    peers, anywhere = _peers, torch.tensor(flags, dtype=torch.int32)
    work = peers.begin_maximum(anywhere)

    def answer() -> list[bool]:
        peers.wait(work)
        return [bool(flag) for flag in anywhere.tolist()]

    return answer


def on_first_process(function: Callable[[], T]) -> T:
    """Call ``function`` on the first process only, and return its result on every process.

    The call may take long: the others wait as ``all_gather_objects`` does.

    Raises:
        UserError: on every process, if ``function`` raises it.
        LostPeer: a process has died, or shows no sign of life.
    """
    outcome = _attempt(function) if rank() == 0 else NOTHING
    result, failure = all_gather_objects(outcome)[0]
    if failure:
        raise failure
    return result


def first_on_each_node(function: Callable[[], T]) -> T:
    """Call ``function`` on every process, on the first of each node before its others.

    So the others find what the first has kept. The call may take long, see ``on_first_process``.

    Raises:
        UserError: on every process, if ``function`` raises it on the first of a node.
        LostPeer: a process has died, or shows no sign of life.
    """
    first = local_rank() == 0
    result, failure = _attempt(function) if first else NOTHING
    for failed in all_gather_objects(failure):
        if failed:
            raise failed
    if not first:
        result = function()
    wait_for_all()  # one machine may take minutes more
    return result


def _attempt(function: Callable[[], Any]) -> Outcome:
    try:
        return function(), None
    except UserError as error:
        return None, error


def lost_peer(error: BaseException | None) -> bool:
    """Whether ``error`` says that another process of the group died or does not answer."""
    text = str(error).lower()
    known = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out")
    return isinstance(error, (LostPeer, dist.DistError)) or (
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


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """As ``all_gather_batch``, by torch into one tensor: what is gathered needs no list."""
    tensor = tensor.detach().contiguous()
    together = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    gather_rows(together, tensor)
    return together


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
    # kernels of 1 x 1: the strides of channels-last differ, the order in memory does not
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )
