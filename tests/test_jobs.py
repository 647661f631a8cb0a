"""jobs/: the batch scripts, with the schedulers' commands and variables played on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY, free_port

SCRIPTS = sorted((ROOT / "jobs").iterdir())
NODES = 2

# each starts one process a node; SIGTERM ends them as the scheduler's own does
START = """#!/usr/bin/env bash
{shift}
for node in 0 1; do {variable}=$node "$@" & done
jobs -p > "$QUEUE.tasks"
trap '{stop}' TERM
code=0
for job in $(jobs -p); do
    while kill -0 "$job" 2>/dev/null; do
        wait "$job"
        own=$?
        if [ "$own" -gt "$code" ]; then code=$own; fi
        {bad_exit}
    done
done
exit {code}
"""
COMMANDS = {
    "srun": START.format(
        shift='while [ "${1#--}" != "$1" ]; do shift; done',
        variable="SLURM_NODEID",
        stop="kill -KILL $(jobs -p)",
        # --kill-on-bad-exit, for the second node alone, whose end comes last
        bad_exit='if [ "$own" -ne 0 ]; then kill $(jobs -p) 2>/dev/null; fi',
        code="$code",
    ),
    # A node's daemon starts the command without the variables of the job's shell. What it returns
    # is not handed on, and the tasks are not waited for after a signal.
    "pbsdsh": START.format(
        shift='[ "$1" = -- ] && shift\nset -- env -i PATH="$PATH" HOME="$HOME" "$@"',
        variable="PBS_NODENUM",
        stop="kill -TERM $(jobs -p); sleep 0.1; kill -KILL $(jobs -p); exit 1",
        bad_exit="",
        code="0",
    ),
    # signals the tasks, not the job's shell
    "scancel": '#!/usr/bin/env bash\nkill "-${1#--signal=}" $(cat "$QUEUE.tasks")\n',
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; echo localhost; else echo "$@" >> "$QUEUE"; fi
""",
    # takes the values of variables that have only a name from its environment, as PBS Pro does
    "qsub": """#!/usr/bin/env python3
import json, os, sys
words = sys.argv[1:]
options = [words[i : i + 2] for i in range(0, len(words) - 1, 2)]
names = next((value.split(",") for option, value in options if option == "-v"), [])
values = {name: os.environ[name] for name in names}
with open(os.environ["QUEUE"], "a") as file:
    print(json.dumps({"options": options, "script": words[-1], "variables": values}), file=file)
""",
    "cp": '#!/usr/bin/env bash\necho "$@" >> "$QUEUE.copies"\nsleep 1\nexec /bin/cp "$@"\n',
    "qstat": "#!/usr/bin/env bash\nprintf '%s\\n' \"$QSTAT\"\n",
}


SELECT = "4:ncpus=32:ngpus=4:mpiprocs=1:mem=200gb:cpu_type=rome:network=ib0:scratch=1tb"


def qstat(wall_time: str = "24:00:00", **variables: str) -> str:
    """What ``qstat -f`` of PBS Pro says: it wraps long lines, and begins the rest with a tab."""
    listed = {"PBS_O_HOME": "/home/user", "PBS_O_QUEUE": "workq"} | variables
    listed |= {"PBS_O_WORKDIR": str(ROOT), "PBS_O_HOST": "login1.cluster"}
    lines = [
        "Job Id: 7.server",
        "    Job_Name = second-part",
        "    Job_Owner = user@login1.cluster",
        "    job_state = R",
        "    queue = workq",
        "    Account_Name = lab-42",
        "    Error_Path = login1.cluster:/home/user/synco/second-part.e7",
        "    Resource_List.ncpus = 128",
        "    Resource_List.ngpus = 16",
        "    Resource_List.nodect = 4",
        "    Resource_List.place = scatter:excl",
        f"    Resource_List.select = {SELECT}",
        f"    Resource_List.walltime = {wall_time}",
        "    Variable_List = " + ",".join(f"{name}={value}" for name, value in listed.items()),
        "    project = _pbs_project_default",
        "    Submit_arguments = -N second-part jobs/pretrain.pbs",
    ]
    return "\n".join("\n\t".join(textwrap.wrap(x, 79, **WHOLE)) for x in lines) + "\n"


# also within a word, and with the spaces that are there
WHOLE = {
    "break_on_hyphens": False,
    "drop_whitespace": False,
    "replace_whitespace": False,
    "subsequent_indent": "",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "-x", "-P", ROOT, script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def job(imagenet, tmp_path):
    """Start a job on two "nodes" of one process each: ``job(script, *opts, **variables)``."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in COMMANDS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "nodes").write_text("localhost\nlocalhost.\n")
    started = []

    def start(script: str, *opts: str, **variables: str) -> subprocess.Popen:
        environment = os.environ | {
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "QUEUE": str(tmp_path / "queue"),
            "OMP_NUM_THREADS": "1",
            "CFG": str(ROOT / "configs/synco_vit_tiny.yaml"),
            "DATA": str(imagenet),
            "OUTPUT": str(tmp_path / "out"),
            "PROCESSES": "1",
            "MASTER_PORT": str(free_port()),
            "FLAGS": " ".join(["--opts", *TINY, "MODEL.NAME", "run", *opts]),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": str(NODES),
            "SLURM_JOB_NODELIST": "localhost[0-1]",
            "PBS_O_WORKDIR": str(ROOT),
            "PBS_JOBID": "7.server",
            "PBS_NODEFILE": str(tmp_path / "nodes"),
            "QSTAT": qstat(),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        with open(tmp_path / "job.txt", "a") as output:
            process = subprocess.Popen(
                ["bash", ROOT / "jobs" / script],
                env=environment | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def metrics(folder: Path) -> list[dict]:
    path = folder / "out" / "run" / "default" / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(condition, process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (folder / "job.txt").read_text()
        assert time.monotonic() < deadline, (folder / "job.txt").read_text()
        time.sleep(0.2)


def succeeds(process: subprocess.Popen, folder: Path) -> None:
    try:
        code = process.wait(200)
    except subprocess.TimeoutExpired:
        code = "none after 200 seconds"
    assert code == 0, (folder / "job.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain.slurm", "pretrain.pbs"])
def test_two_nodes_train_on_copied_data(job, tmp_path, imagenet, script):
    disk = tmp_path / "disk"
    process = job(script, LOCAL_DISK=str(disk))
    succeeds(process, tmp_path)
    assert len((tmp_path / "queue.copies").read_text().splitlines()) == 1  # the nodes share a disk
    folder = tmp_path / "out" / "run" / "default"
    assert (folder / "ckpt_epoch_1.pth").exists() and (folder / "log_rank1.txt").exists()
    assert metrics(tmp_path)[-1]["step"] == 2 * 24 // (NODES * 4)
    assert (disk / imagenet.name / "train" / "class0" / "0.jpg").exists()
    assert not (tmp_path / "queue").exists()


@pytest.mark.slow
def test_slurms_warning_queues_the_job_again_and_it_goes_on(job, tmp_path):
    long = ("TRAIN.EPOCHS", "2000", "MODEL.COOLDOWN_EPOCHS", "3000")
    process = job("pretrain.slurm", *long)
    wait_for(lambda: len(metrics(tmp_path)) > 3, process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    succeeds(process, tmp_path)
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
    saved = metrics(tmp_path)[-1]["step"]

    again = job("pretrain.slurm", *long, MASTER_PORT=str(free_port()))
    wait_for(lambda: metrics(tmp_path)[-1]["step"] > saved, again, tmp_path)
    log = (tmp_path / "out" / "run" / "default" / "log_rank0.txt").read_text()
    assert f"at update {saved}" in log
    again.terminate()  # cancelled by its owner: stops, and is not queued again
    assert again.wait(90) != 0
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_a_killed_launcher_costs_no_update_under_slurm(job, tmp_path):
    """srun ends with 137, and all launchers start again; each update is made once."""
    process = job("pretrain.slurm", "TRAIN.EPOCHS", "12", "TRAIN.SAVE_STEPS", "1")
    wait_for(lambda: len(metrics(tmp_path)) > 3, process, tmp_path)
    first, _ = (tmp_path / "queue.tasks").read_text().split()
    os.kill(int(first), signal.SIGKILL)
    succeeds(process, tmp_path)
    assert (tmp_path / "job.txt").read_text().count("a launcher was killed: all start again") == 1
    steps = [line["step"] for line in metrics(tmp_path) if line["kind"] == "train"]
    assert steps == list(range(1, 12 * 24 // (NODES * 4) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("code", [1, 2, 75, 74])
def test_what_no_new_start_mends_is_started_once(job, copy_of_jobs, tmp_path, code):
    (tmp_path / "bin" / "torchrun").write_text(
        f'#!/usr/bin/env bash\necho >> "$QUEUE.runs"\nsleep 1\nexit {code}\n'
    )
    process = job("pretrain.slurm", SLURM_SUBMIT_DIR=str(copy_of_jobs))
    assert process.wait(30) in (code, 128 + signal.SIGTERM)  # of the other node
    assert (tmp_path / "queue.runs").read_text() == "\n" * NODES


@pytest.mark.slow
def test_pbs_job_counts_its_wall_time(job, tmp_path):
    long = ("TRAIN.EPOCHS", "2000", "MODEL.COOLDOWN_EPOCHS", "3000")
    process = job("pretrain.pbs", *long, QSTAT=qstat("00:01:00"), MARGIN="20")
    succeeds(process, tmp_path)
    assert json.loads((tmp_path / "queue").read_text())["script"] == "jobs/pretrain.pbs"
    assert (tmp_path / "out" / "run" / "default" / "checkpoint.pth").exists()


# notes how it was started, then waits for SIGTERM as a run that saves; or copies for ever
TORCHRUN = """#!/usr/bin/env bash
trap 'sleep 1; echo >> "$QUEUE.saved"; exit 75' TERM
line=$(printf '%s\\037' "$@" TAG="$TAG" FLAGS="$FLAGS")
echo "$line" >> "$QUEUE.runs"  # at once: another node writes too
touch "$QUEUE.training"
while true; do sleep 0.1; done
"""


@pytest.fixture
def copy_of_jobs(tmp_path) -> Path:
    """A checkout without an environment of its own, where ``torchrun`` is the one above."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "jobs", checkout / "jobs")
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "torchrun").write_text(TORCHRUN)
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    return checkout


def runs(folder: Path) -> list[list[str]]:
    """The words of each start of torchrun, and the settings after them."""
    return [x.split("\037")[:-1] for x in (folder / "queue.runs").read_text().splitlines()]


def test_pbs_hands_on_what_the_job_was_submitted_with(job, copy_of_jobs, tmp_path):
    """Also variables whose values have spaces, commas and quotes."""
    given = {
        "TAG": "second",
        "FLAGS": "--opts MODEL.ALPHA '[0.1, 0.2]' TAG=no,HOME=x",
        "MARGIN": "20",
    }
    given |= {"NCCL_DEBUG": "INFO", "EMPTY": "", "MASTER_PORT": "29511"}
    places = {"PBS_O_WORKDIR": str(copy_of_jobs), "PBS_O_QUEUE": "routing"}
    process = job("pretrain.pbs", QSTAT=qstat("00:00:22", **given), **given, **places)
    succeeds(process, tmp_path)
    entry = json.loads((tmp_path / "queue").read_text())
    assert entry["options"][:-1] == [
        ["-N", "second-part"],
        ["-q", "routing"],
        ["-A", "lab-42"],
        ["-l", f"select={SELECT}"],
        ["-l", "place=scatter:excl"],
        ["-l", "walltime=00:00:22"],
    ]
    # HOME is a variable too, and as it was
    assert entry["variables"] == given | {"HOME": os.environ["HOME"]}
    assert entry["script"] == "jobs/pretrain.pbs"

    handed_on = given | entry["variables"]
    again = job("pretrain.pbs", QSTAT=qstat("00:00:22", **handed_on), **handed_on, **places)
    succeeds(again, tmp_path)
    first, *others = runs(tmp_path)
    assert len(others) == 3 and all(x == first for x in others)  # two nodes, twice
    assert (tmp_path / "queue.saved").read_text() == 4 * "\n"
    assert "TAG=second" in first and first[first.index("--tag") + 1] == "second"
    assert "[0.1," in " ".join(first)


def test_slurm_keeps_what_the_job_was_submitted_with(job, copy_of_jobs, tmp_path):
    """scontrol requeue names the job: script, options and environment stay with the server."""
    given = {"TAG": "second", "FLAGS": "--opts MODEL.ALPHA [0.1,0.2]"}
    given |= {"SLURM_SUBMIT_DIR": str(copy_of_jobs), "MASTER_PORT": "29511"}
    for part in (1, 2):
        process = job("pretrain.slurm", **given)
        wait_for((tmp_path / "queue.training").exists, process, tmp_path)
        time.sleep(1)
        process.send_signal(signal.SIGUSR1)
        succeeds(process, tmp_path)
        assert (tmp_path / "queue").read_text() == "requeue 7\n" * part
        (tmp_path / "queue.training").unlink()
    first, *others = runs(tmp_path)
    assert len(others) == 3 and all(x == first for x in others)
    assert (tmp_path / "queue.saved").read_text() == 4 * "\n"
    assert first[first.index("--tag") + 1] == "second"


@pytest.mark.parametrize("script", ["pretrain.slurm", "pretrain.pbs"])
def test_no_node_trains_before_all_have_copied(job, copy_of_jobs, tmp_path, script):
    """And a wall time that ends meanwhile queues the job again."""
    (tmp_path / "bin" / "cp").write_text('#!/bin/bash\ntouch "$QUEUE.copies"\nsleep 60\n')
    places = {"SLURM_SUBMIT_DIR": str(copy_of_jobs), "PBS_O_WORKDIR": str(copy_of_jobs)}
    process = job(script, LOCAL_DISK=str(tmp_path / "disk"), **places)
    wait_for((tmp_path / "queue.copies").exists, process, tmp_path)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    succeeds(process, tmp_path)
    assert (tmp_path / "queue").exists() and not (tmp_path / "queue.runs").exists()


def copy_to_disk(data: Path, disk: Path) -> subprocess.CompletedProcess:
    variables = {"DATA": str(data), "LOCAL_DISK": str(disk)}
    command = ["bash", str(ROOT / "jobs/node.sh"), "copy", "1", "1", "localhost"]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def test_a_copy_of_other_data_is_not_trained_on(tmp_path):
    """On a node's own disk, where two data sets may have one name."""
    for number in (1, 2):
        (tmp_path / f"{number}/set/train").mkdir(parents=True)
        (tmp_path / f"{number}/set/train/{number}.txt").touch()
    data, disk = [tmp_path / f"{number}/set" for number in (1, 2)], tmp_path / "disk"
    assert copy_to_disk(data[0], disk).returncode == copy_to_disk(data[0], disk).returncode == 0
    assert (disk / "set/train/1.txt").exists()
    done = copy_to_disk(data[1], disk)
    assert done.returncode == 1 and "disk/set: a copy of other data than" in done.stderr


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda train: (train / "new").touch(), False),
        (lambda train: (train / "a").unlink(), False),
        (lambda train: (train / "a").write_text("longer"), False),
        (lambda train: os.utime(train / "a", (1, 1)), False),  # replaced by as many bytes
        (lambda train: (train / "a").rename(train / "b"), False),
        (lambda train: (train.parent / ".synco").mkdir(), True),  # the program's own lists
        (lambda train: None, True),
    ],
    ids=["added", "removed", "longer", "replaced", "renamed", "listed", "same"],
)
def test_a_copy_of_data_that_changed_in_their_place_is_not_trained_on(tmp_path, change, same):
    data, disk = tmp_path / "set", tmp_path / "disk"
    (data / "train").mkdir(parents=True)
    (data / "train/a").write_text("one")
    assert copy_to_disk(data, disk).returncode == 0
    change(data / "train")
    done = copy_to_disk(data, disk)
    assert (done.returncode == 0) is same, done.stderr
    assert same or "a copy of other data than" in done.stderr
