"""jobs/: the batch scripts, with the schedulers' commands and variables played on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY, free_port

SCRIPTS = sorted((ROOT / "jobs").iterdir())
NODES = 2

# each starts one process a node and hands SIGTERM on, as the scheduler's own does
START = """#!/usr/bin/env bash
{shift}
trap 'kill -TERM $(jobs -p)' TERM
for node in 0 1; do {variable}=$node "$@" & done
code=0
for job in $(jobs -p); do
    while kill -0 "$job" 2>/dev/null; do wait "$job" || code=$?; done
done
exit $code
"""
COMMANDS = {
    "srun": START.format(
        shift='while [ "${1#--}" != "$1" ]; do shift; done', variable="SLURM_NODEID"
    ),
    # a node's daemon starts the command without the variables of the job's shell
    "pbsdsh": START.format(
        shift='[ "$1" = -- ] && shift\nset -- env -i PATH="$PATH" HOME="$HOME" "$@"',
        variable="PBS_NODENUM",
    ),
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; echo localhost; else echo "$@" >> "$QUEUE"; fi
""",
    "qsub": '#!/usr/bin/env bash\necho "$@" >> "$QUEUE"\n',
    "cp": '#!/usr/bin/env bash\necho "$@" >> "$QUEUE.copies"\nsleep 1\nexec /bin/cp "$@"\n',
    "qstat": '#!/usr/bin/env bash\necho "    Resource_List.walltime = $WALL_TIME"\n',
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
    commands.mkdir()
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
            "WALL_TIME": "24:00:00",
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
def test_pbs_job_counts_its_wall_time(job, tmp_path):
    long = ("TRAIN.EPOCHS", "2000", "MODEL.COOLDOWN_EPOCHS", "3000")
    process = job("pretrain.pbs", *long, WALL_TIME="00:01:00", MARGIN="20")
    succeeds(process, tmp_path)
    assert (tmp_path / "queue").read_text() == "jobs/pretrain.pbs\n"
    assert (tmp_path / "out" / "run" / "default" / "checkpoint.pth").exists()
