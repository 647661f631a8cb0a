"""Tasks of srun and mpirun join one group without a launcher."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from forked import Script
from helpers import ROOT, arguments, free_port, run_script

from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.launchers import STARTERS, Place, first_host, launched, local_world_size, read_place

RESULT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
OPENMPI += ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SCHEDULERS = {name for names in STARTERS for name in names if name} | {
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"),
    *("SLURM_NODELIST", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "PMIX_NAMESPACE", "PBS_JOBID"),
}


def slurm(rank: int, tasks: int, local: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_LOCALID": str(local),
        "SLURM_NODELIST": "node[1-4]",
    } | more


@pytest.fixture
def task(monkeypatch):
    """What ``launched`` says and sets in an environment: ``task(variables, gpus)``."""

    before = dict(os.environ)

    def run(variables: dict[str, str], gpus: int = 0) -> tuple[bool, list[str | None]]:
        for name in {*RESULT, *SCHEDULERS}:
            os.environ.pop(name, None)
        os.environ.update(variables)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        return launched(), [os.environ.get(name) for name in RESULT]

    yield run
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("localhost", "localhost"),
        ("a,b,c", "a"),
        ("node[01-03,7]", "node01"),
        ("node[7,01-03],other", "node7"),
        ("gpu-a[3],gpu-b[1-2]", "gpu-a3"),
        ("rack[2-3]node[05-06].cluster", "rack2node05.cluster"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        (slurm(1, 2, 1), 0, ["1", "2", "1", "2", "node1"]),
        (
            slurm(5, 6, 1, SLURM_STEP_NODELIST="n[08-10]", SLURM_NODEID="2")
            | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"},
            4,
            ["5", "6", "1", "2", "n08"],
        ),
        (
            slurm(3, 4, 0, SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="3,1"),
            4,
            ["3", "4", "0", "1", "node1"],
        ),
        # each task sees one GPU, its own
        (slurm(1, 2, 1), 1, ["1", "2", "0", "2", "node1"]),
        (slurm(1, 2, 1, MASTER_ADDR="head"), 0, ["1", "2", "1", "2", "head"]),
        (dict(zip(OPENMPI, "1212", strict=True)), 4, ["1", "2", "1", "2", "localhost"]),
        (dict(zip(HYDRA, "1212", strict=True)), 4, ["1", "2", "1", "2", "localhost"]),
        # mpirun's daemons are tasks of srun, one on each machine
        (
            slurm(1, 2, 0) | dict(zip(OPENMPI, "5814", strict=True)),
            4,
            ["5", "8", "1", "4", "node1"],
        ),
        # srun --mpi=pmi2
        (
            slurm(1, 2, 1) | dict(zip(HYDRA[:2], "12", strict=True)),
            0,
            ["1", "2", "1", "2", "node1"],
        ),
        (
            dict(zip(HYDRA[:2], "38", strict=True)) | {"MASTER_ADDR": "head"},
            2,
            ["3", "8", "1", "8", "head"],
        ),
    ],
)
def test_a_task_joins(task, variables, gpus, expected):
    joins, found = task(variables, gpus)
    assert joins and found[:5] == expected
    assert 10000 <= int(found[5]) < 30000


def test_steps_and_jobs_use_other_ports_and_a_given_one_stays(task):
    ports = {
        task(slurm(1, 2, 1, **more))[1][5]
        for more in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"})
    }
    assert len(ports) == 3
    assert task(slurm(0, 2, 0))[1][5] == task(slurm(1, 2, 1))[1][5]
    assert task(slurm(1, 2, 1, MASTER_PORT="29500"))[1][5] == "29500"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # python in a job script, where no step runs
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"},
        slurm(0, 1, 0),
        dict(zip(OPENMPI, "0101", strict=True)),
        # one process by mpirun, from a step of several tasks
        slurm(1, 2, 0) | dict(zip(OPENMPI, "0101", strict=True)),
    ],
)
def test_a_lone_process_stays_alone(task, variables):
    assert task(variables) == (False, [None] * 6)


def test_a_launchers_variables_go_first(task):
    given = {"RANK": "3", "WORLD_SIZE": "4"}
    assert task(slurm(1, 2, 1) | given) == (True, ["3", "4", None, None, None, None])


@pytest.mark.parametrize("names", [HYDRA, HYDRA[:2], OPENMPI])
def test_without_the_first_host_all_but_the_first_refuse(task, names):
    """On several machines."""
    first = dict(zip(names, "0402", strict=False))
    assert task(first) == (False, [None] * 6)
    for rank in "13":
        with pytest.raises(UserError, match=f"task {rank} of 4 does not know .* by torchrun"):
            task(first | {names[0]: rank})


def test_the_configuration_knows_the_place_on_the_machine(task, monkeypatch):
    task({})
    variables = slurm(5, 6, 1, SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="2(x3)")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, config = parse_arguments("", argv=["--cfg", str(ROOT / "configs/demo.yaml")])
    assert config.LOCAL_RANK == 1 and local_world_size() == 2


@pytest.fixture
def place(monkeypatch):
    """Set the launcher's variables: ``place(RANK="1", ...)``."""
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

    def set_all(**values: str) -> None:
        for name, value in (given | values).items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "2", "RANK is 2, WORLD_SIZE 2"),
        ("RANK", "-1", "RANK is -1"),
        ("RANK", "one", "RANK is 'one', which is no number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', which is no number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE 0"),
        ("WORLD_SIZE", None, "WORLD_SIZE is not set: start by torchrun"),
        ("MASTER_ADDR", None, "MASTER_ADDR not set: start by torchrun"),
        ("MASTER_ADDR", "", "MASTER_ADDR not set: start by torchrun"),
        ("MASTER_PORT", None, "MASTER_PORT is not set"),
        ("MASTER_PORT", "1e3", "MASTER_PORT is '1e3', which is no number"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(place, monkeypatch, name, value, message):
    place()
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        read_place()


def test_what_the_launcher_says(place):
    place()
    assert read_place() == Place(1, 2, "localhost", 29500)


def finished(output) -> list[str]:
    """That one run of two processes was written, once."""
    folder = output / "run" / "default"
    steps = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in steps if x["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    return sorted(p.name for p in folder.glob("log_rank*.txt"))


@pytest.mark.slow
def test_two_tasks_of_srun_are_one_run(imagenet, tmp_path, monkeypatch):
    for name in {*RESULT, *SCHEDULERS}:
        monkeypatch.delenv(name, raising=False)
    port = {"MASTER_PORT": free_port()}
    tasks = []
    for number in range(2):
        place = port | slurm(number, 2, number, SLURM_NODELIST="localhost")
        given = arguments("moby", imagenet, tmp_path)
        tasks.append(Script("main_pretrain.py", *given, environment=place))
    texts = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts
    for number, text in enumerate(texts):
        assert f"task {number} joins 2 processes, the first at localhost:" in text
    assert finished(tmp_path) == ["log_rank0.txt", "log_rank1.txt"]


def slurm_runs() -> bool:
    """Whether a SLURM takes jobs here."""
    if not shutil.which("srun"):
        return False
    answer = subprocess.run(
        ["sinfo", "-h", "-o", "%a"], capture_output=True, text=True, check=False
    )
    return "up" in answer.stdout


MPIRUN = ["mpirun", "--oversubscribe", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "starter",
    [
        pytest.param(
            [*MPIRUN, "-n", "2"],
            marks=pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun (openmpi-bin)"),
            id="mpirun",
        ),
        pytest.param(
            ["srun", "--ntasks=2", "--overcommit"],
            marks=pytest.mark.skipif(not slurm_runs(), reason="no SLURM (slurm-wlm) takes jobs"),
            id="srun",
        ),
    ],
)
def test_two_tasks_of_the_real_one_are_one_run(imagenet, tmp_path, starter):
    environment = {k: v for k, v in os.environ.items() if k not in {*RESULT, *SCHEDULERS}}
    command = [*starter, sys.executable, ROOT / "main_pretrain.py"]
    done = subprocess.run(
        [*map(str, command), *map(str, arguments("moby", imagenet, tmp_path))],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert finished(tmp_path) == ["log_rank0.txt", "log_rank1.txt"]


@pytest.mark.slow
@pytest.mark.skipif(not slurm_runs(), reason="no SLURM (slurm-wlm) takes jobs")
def test_a_job_script_of_the_real_slurm_starts_one_process(imagenet, tmp_path):
    """Though its allocation is for several tasks."""
    command = [sys.executable, ROOT / "main_pretrain.py", *arguments("moby", imagenet, tmp_path)]
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n" + shlex.join(map(str, command)) + "\n")
    log = tmp_path / "job.txt"
    flags = ["--wait", "--ntasks=2", "--overcommit", "--output", log]
    done = subprocess.run(["sbatch", *map(str, flags), script], timeout=200, check=False)
    assert done.returncode == 0 and "1 processes" in log.read_text(), log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["key", "data"])
def test_a_mistake_of_all_processes_is_printed_once_by_torchrun(imagenet, tmp_path, mistake):
    """Before the group forms, and when its processes have agreed on it."""
    data = tmp_path if mistake == "data" else imagenet
    opts = ("TRAIN.NO_SUCH", 1) if mistake == "key" else ()
    given = arguments("moby", data, tmp_path / "out", *opts)
    done = run_script("main_pretrain.py", *given, processes=3)
    assert done.returncode == 1
    before, after = done.stdout.split("Traceback", 1)  # of torchrun itself
    said = [line for line in before.splitlines() if line.startswith("main_pretrain.py: ")]
    assert len(said) == 1 and said[0].startswith("main_pretrain.py: error: "), done.stdout
    assert said[0] in after.split("Root Cause")[1] and "Traceback" not in after, done.stdout
