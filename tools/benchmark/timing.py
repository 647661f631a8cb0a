"""Timing what runs in turn, and in processes of its own."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.distributed import init_process_group, leave_group

Function = Callable[[], object]
# new processes are copies of one that has imported what they need, and nothing more
CONTEXT = mp.get_context("forkserver")


def compare(rounds: int, **functions: Function) -> dict[str, float]:
    """Median seconds of each function, run in turn, after one round that does not count."""
    return _medians(rounds, 1, {name: partial(_seconds, f) for name, f in functions.items()})


def compare_apart(
    rounds: int,
    warm_up: int,
    inside: dict[str, Function],
    **builders: tuple[Callable[..., Function], tuple],
) -> dict[str, float]:
    """As ``compare``, with functions in processes of their own, which wait while others run.

    Then a process's own settings, such as how it allocates memory, affect only itself.

    Args:
        rounds: timed runs of each.
        warm_up: runs before them that do not count.
        inside: functions that this process runs in turn with the others.
        builders: by name a function of a module and its arguments; it returns what is timed.

    Raises:
        SystemExit: a process ended.
    """
    pipes, processes = {}, []
    for name, (build, arguments) in builders.items():
        pipes[name], other = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_host, args=(other, build, arguments), daemon=True)
        process.start()
        other.close()  # so that the pipe ends with the process
        processes.append(process)

    def ask(name: str) -> float:
        try:
            pipes[name].send(True)
            return pipes[name].recv()
        except (EOFError, OSError) as error:
            raise SystemExit(f"the process that measures {name} ended") from error

    timers = {name: partial(ask, name) for name in builders}
    timers |= {name: partial(_seconds, function) for name, function in inside.items()}
    medians = _medians(rounds, warm_up, timers)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return medians


def _host(connection: Connection, build: Callable[..., Function], arguments: tuple) -> None:
    function = build(*arguments)
    while connection.recv():
        connection.send(_seconds(function))


def in_group(processes: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns in the first of new processes, a process group.

    Each of several has one core on the CPU.

    Raises:
        mp.ProcessRaisedException, mp.ProcessExitedException: one of them has failed.
    """
    results = CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (processes, f"file://{folder}/store", results, function, arguments)
        mp.start_processes(_member, given, processes, start_method="forkserver")
    return results.get()


def _member(
    rank: int,
    processes: int,
    address: str,
    results: SimpleQueue,
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    if processes == 1:
        init_process_group(0)
    elif torch.cuda.is_available():
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
        dist.init_process_group("nccl", address, rank=rank, world_size=processes, device_id=device)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", address, rank=rank, world_size=processes)
    found = function(*arguments)
    if rank == 0:
        results.put(found)
    leave_group()


def _medians(
    rounds: int, warm_up: int, timers: Mapping[str, Callable[[], float]]
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in timers}
    for round_ in range(warm_up + rounds):
        for name, timer in timers.items():
            seconds = timer()
            if round_ >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(function: Function) -> float:
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
