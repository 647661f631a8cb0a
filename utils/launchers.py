"""What a launcher says of this process, and what srun and mpirun say, put as torchrun would."""

import os
import re
import sys
import zlib
from dataclasses import dataclass

import torch

from utils.errors import UserError

# Variables of the task's number, of how many, of its number on the machine, and of how many there.
# The first row of which a task has the first three counts: mpirun starts its daemons by srun.
STARTERS = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    ("PMI_RANK", "PMI_SIZE", "", ""),
)
# what tells one set of tasks from another
JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PBS_JOBID")


@dataclass(frozen=True)
class Place:
    """This process's number of how many, and where the first one listens."""

    rank: int
    processes: int
    address: str
    port: int


def read_place() -> Place:
    """The place that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT give.

    Raises:
        UserError: one of them is missing or cannot be.
    """
    place = Place(
        environment_number("RANK"),
        environment_number("WORLD_SIZE"),
        os.environ.get("MASTER_ADDR") or "",
        environment_number("MASTER_PORT"),
    )
    if not place.address or not 0 <= place.rank < place.processes:
        raise UserError(
            f"RANK is {place.rank}, WORLD_SIZE {place.processes}, and MASTER_ADDR "
            f"{place.address or 'not set'}: start by torchrun, which sets all three"
        )
    return place


def environment_number(name: str) -> int:
    """The whole number of the environment variable ``name``.

    Raises:
        UserError: it is not set, or no number.
    """
    try:
        return int(os.environ[name])
    except (KeyError, ValueError) as error:
        said = (
            f"is {os.environ[name]!r}, which is no number" if name in os.environ else "is not set"
        )
        raise UserError(f"{name} {said}: start by torchrun, which sets it") from error


def launched() -> bool:
    """Whether this process is one of a group: of a launcher, or of tasks of srun or mpirun.

    Raises:
        UserError: it is one of several tasks, but the first one's host cannot be known.
    """
    if "RANK" not in os.environ:
        join_tasks()
    return "RANK" in os.environ


def local_rank(default: int = 0) -> int:
    """Number of this process on its machine, ``default`` if no launcher says.

    Raises:
        UserError: LOCAL_RANK is no number, or see ``launched``.
    """
    launched()
    return environment_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else default


def local_world_size() -> int:
    """Number of processes on this machine; without LOCAL_WORLD_SIZE, all of the group."""
    names = ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return next((environment_number(name) for name in names if name in os.environ), 1)


def join_tasks() -> None:
    """Set the variables of a launcher if this process is one of several tasks.

    They are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the last
    two stay if they are set. Where the first task's host cannot be known, the first task goes on
    alone.

    Raises:
        UserError: on each task but the first, if the first task's host cannot be known.
    """
    found = (names for names in STARTERS if all(os.environ.get(n) for n in names[:3] if n))
    rank, tasks, local, locals_ = (os.environ.get(n, "") for n in next(found, ("",) * 4))
    if tasks in ("", "0", "1"):
        return
    here = locals_ or _slurm_tasks_here()
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    address = os.environ.get("MASTER_ADDR")
    address = address or ("localhost" if here == tasks else first_host(hosts or ""))
    if not address:
        if rank == "0":
            return
        raise UserError(
            f"task {rank} of {tasks} does not know the first task's host: start by torchrun, or "
            "set MASTER_ADDR"
        )
    gpus = torch.cuda.device_count()
    if gpus == 1:  # srun --gpus-per-task=1 shows each task its own
        local = "0"
    elif not local:
        local = str(int(rank) % max(gpus, 1))
    job = " ".join(os.environ.get(name, "") for name in JOB)
    free = 10000 + zlib.crc32(job.encode()) % 20000  # below those that the kernel lends
    os.environ |= {"RANK": rank, "WORLD_SIZE": tasks, "LOCAL_RANK": local}
    os.environ |= {"LOCAL_WORLD_SIZE": here or tasks, "MASTER_ADDR": address}
    port = os.environ.setdefault("MASTER_PORT", str(free))
    # each says so, because a task that is alone by mistake would train a run of its own
    print(
        f"task {rank} joins {tasks} processes, the first at {address}:{port}",
        file=sys.stderr,
        flush=True,
    )


def first_host(hosts: str) -> str:
    """The first name in SLURM's list: ``node01`` of ``node[01-03,7],other``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _slurm_tasks_here() -> str:
    """The tasks of a step on this machine, as ``2(x3),1`` lists them for all."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    each: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [count] * int(times or 1)
    node = os.environ.get("SLURM_NODEID", "0")
    return each[int(node)] if node.isdecimal() and int(node) < len(each) else ""
