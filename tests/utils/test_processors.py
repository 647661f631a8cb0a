"""What a process may use of its machine: affinity, quotas of cgroups, shared memory."""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import spawn

import utils.distributed
from utils.distributed import cgroup_quota, check_shared_memory, processors, rank
from utils.errors import UserError

V1 = "4:cpu,cpuacct:/jobs/7\n3:memory:/jobs/7\n0::/\n"


def write(root: Path, cgroup: str, files: dict[str, str]) -> None:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def v2(folder: str, text: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}/cpu.max": text}


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    own = f"sys/fs/cgroup/{folder}"
    return {f"{own}/cpu.cfs_quota_us": f"{quota}\n", f"{own}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/jobs/7\n", v2("jobs/7", "150000 100000\n"), 1.5),
        ("0::/jobs/7\n", v2("jobs/7", "max 100000\n"), math.inf),
        # the least of the folders above counts
        ("0::/jobs/7\n", v2("jobs/7", "900000 100000\n") | v2("jobs", "400000 100000\n"), 4),
        # a container sees its own cgroup at the top
        ("0::/docker/7\n", v2("", "200000 100000\n"), 2),
        ("0::/\n", v2("", "50000 100000\n"), 0.5),
        (V1, v1("cpu,cpuacct/jobs/7", 300_000), 3),
        (V1, v1("cpu/jobs/7", 300_000, 50_000), 6),
        (V1, v1("cpu,cpuacct/jobs/7", -1), math.inf),
        (V1, v1("cpu,cpuacct", 250_000), 2.5),
        (V1, v1("memory/jobs/7", 100_000), math.inf),
        # both versions side by side
        ("3:memory:/\n0::/jobs\n", v2("unified/jobs", "700000 100000\n"), 7),
        ("0::/jobs\n", v2("jobs", ""), math.inf),
        ("0::/jobs\n", v2("jobs", "100000 0\n"), math.inf),
        ("0::/jobs\n", {}, math.inf),
    ],
)
def test_the_quota_of_a_cgroup(tmp_path, cgroup, files, quota):
    write(tmp_path, cgroup, files)
    assert cgroup_quota(str(tmp_path)) == quota


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert cgroup_quota(str(tmp_path)) == math.inf


@pytest.mark.parametrize(
    ("usable", "quota", "processes", "sharing", "own"),
    [
        (8, math.inf, 1, None, 8),
        (8, math.inf, 2, None, 4),  # before a group is joined, all processes use the same
        (8, math.inf, 3, None, 2),
        (2, math.inf, 4, None, 1),
        (8, 3.9, 1, None, 3),
        (8, 0.5, 1, None, 1),
        (64, 8.0, 4, 4, 2),  # the quota is of all processes
        (16, math.inf, 4, 1, 16),  # each is bound to processors of its own, as by srun
        (16, 20.0, 4, 1, 5),
    ],
)
def test_what_is_divided_among_whom(monkeypatch, usable, quota, processes, sharing, own):
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)  # of the whole machine
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(usable)))
    monkeypatch.setattr(utils.distributed, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(utils.distributed, "local_world_size", lambda: processes)
    monkeypatch.setattr(utils.distributed, "_sharing", sharing)
    assert processors() == own


def bound(_, folder: str) -> None:
    """Three processes, of which the first two share two of their processors."""
    usable = ({0, 1, 2}, {1, 2, 3, 4}, {5, 6})[rank()]
    os.sched_getaffinity = lambda process: usable
    Path(folder, f"{rank()}.json").write_text(json.dumps(utils.distributed._count_sharing()))


@pytest.mark.slow
def test_processes_that_are_bound_apart_do_not_share(tmp_path):
    spawn(bound, 3, str(tmp_path))
    assert [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(3)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("processes", "workers", "fits"), [(1, 0, True), (1, 2, True), (2, 2, False), (1, 3, False)]
)
def test_shared_memory_that_is_too_small_is_told_before_workers_start(
    monkeypatch, tmp_path, processes, workers, fits
):
    """What is free must do for the batches that all workers of the machine hold ready."""
    monkeypatch.setattr(utils.distributed, "SHARED", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8_000_000))
    monkeypatch.setattr(utils.distributed, "local_world_size", lambda: processes)
    with contextlib.nullcontext() if fits else pytest.raises(UserError) as raised:
        check_shared_memory(workers, 4, 1_000_000)
    if not fits:
        needed = f"8 MB free, but {4 * processes * workers} MB"
        assert needed in str(raised.value) and "--shm-size" in str(raised.value)


def test_a_system_without_shared_memory_files_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(utils.distributed, "SHARED", str(tmp_path / "none"))
    check_shared_memory(10**6, 10**6, 10**6)
