"""Killed, stopped and broken runs come back and end with the weights of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Script
from helpers import ROOT, TINY, assert_same, free_port, places, run_forked, wait_for

from utils.signals import RESUMABLE

EPOCHS = 6
STEPS = 6 * EPOCHS
# BAD_DAY=full makes the measurements of docs/reliability.md, which take some minutes
FULL = os.environ.get("BAD_DAY") == "full"
KILLS, KILLS_IN_EVALUATIONS = (30, 20) if FULL else (20, 5)
SPEED = {"seconds", "images_per_s", "memory_mb", "eta_s"}


def arguments(data, output, *opts) -> list[str]:
    given = [
        *("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", data, "--output", output),
        *("--opts", *TINY, "MODEL.NAME", "run", "TRAIN.EPOCHS", EPOCHS, *opts),
    ]
    return [str(argument) for argument in given]


def folder(output: Path) -> Path:
    return output / "run" / "default"


def final(output: Path) -> dict:
    return torch.load(folder(output) / "checkpoint.pth", weights_only=True)


def lines(output: Path) -> list[dict]:
    return [json.loads(x) for x in (folder(output) / "metrics.jsonl").read_text().splitlines()]


def metrics(output: Path) -> list[dict]:
    """Without what the machine's speed changes, and without where the run went on."""
    kept = (line for line in lines(output) if line["kind"] != "start")
    return [{k: v for k, v in line.items() if k not in SPEED} for line in kept]


def trained(output: Path, step: int) -> bool:
    log = folder(output) / "metrics.jsonl"
    return log.exists() and f'"step": {step},' in log.read_text()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(given: list[str], **options) -> Script:
    return Script("main_pretrain.py", *given, **options)


def run(given: list[str]) -> None:
    done = run_forked("main_pretrain.py", *given)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def undisturbed(imagenet, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("undisturbed")
    run(arguments(imagenet, output))
    return final(output)


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, imagenet, tmp_path):
    """SIGKILL, also within saving, which every update does; with one data worker or none."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    kills, saving = 0, 0
    while kills < KILLS:
        workers = draw.choice("01")
        given = arguments(
            imagenet, tmp_path, "TRAIN.SAVE_STEPS", 1, "SAVE_FREQ", 1, "DATA.NUM_WORKERS", workers
        )
        left = set(folder(tmp_path).glob("*.tmp"))
        process = start(given)
        if kills % 3 == 2:  # within saving, as soon as there is another temporary file
            end = time.monotonic() + 5
            while set(folder(tmp_path).glob("*.pth.*.tmp")) <= left and time.monotonic() < end:
                pass
        else:
            time.sleep(draw.uniform(0.1, 1.5))
        process.kill()
        code = process.wait()
        kills += code == -signal.SIGKILL
        saving += not set(folder(tmp_path).glob("*.tmp")) <= left
        assert code in (0, -signal.SIGKILL), (seed, process.text())
        if code == 0:  # it was through before it could be killed: from its middle once more
            for name in ("checkpoint.pth", "checkpoint_previous.pth"):
                (folder(tmp_path) / name).unlink()
            for epoch in range(EPOCHS // 2, EPOCHS):
                (folder(tmp_path) / f"ckpt_epoch_{epoch}.pth").unlink()
    run(given)
    assert_same(undisturbed, final(tmp_path))
    steps = [line["step"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1)), seed
    epochs = {f"ckpt_epoch_{epoch}.pth" for epoch in range(EPOCHS)}
    assert epochs <= {p.name for p in folder(tmp_path).iterdir()}, seed
    assert not list(folder(tmp_path).glob("*.tmp"))
    print(f"{kills} kills, {saving} of them while saving")
    assert saving > 0, seed


@pytest.mark.slow
def test_killed_within_evaluations(imagenet, tmp_path):
    """SIGKILL while the k-NN accuracy is measured after an epoch, in one epoch after the other."""
    epochs = KILLS_IN_EVALUATIONS + 2
    opts = ("TRAIN.KNN_FREQ", 1, "TRAIN.EPOCHS", epochs, "DATA.NUM_WORKERS", 0)
    run(arguments(imagenet, tmp_path / "a", *opts))
    given = arguments(imagenet, tmp_path / "b", *opts)
    kills = 0
    for epoch in range(KILLS_IN_EVALUATIONS):
        process = start(given)
        wait_for(lambda step=6 * (epoch + 1): trained(tmp_path / "b", step))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        kills += [x["kind"] for x in lines(tmp_path / "b")].count("epoch") <= epoch
    run(given)
    assert_same(final(tmp_path / "a"), final(tmp_path / "b"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    print(f"{kills} kills before the accuracy was written down")
    assert kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_says_resumable(undisturbed, imagenet, tmp_path, number):
    given = arguments(imagenet, tmp_path)
    process = start(given)
    wait_for(lambda: trained(tmp_path, 2))
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait() == RESUMABLE
    assert time.monotonic() - started < 10
    state = final(tmp_path)
    assert 0 < state["step"] < STEPS
    assert state["images"] == (state["step"] % 6 or 6) * 4
    run(given)
    assert_same(undisturbed, final(tmp_path))


def test_a_signal_before_training_ends_at_once(imagenet, tmp_path):
    """While the program waits for a second process that never comes, inside a library."""
    given = arguments(imagenet, tmp_path)
    process = Script("main_pretrain.py", *given, environment=places(2)[0])
    handled = f"/proc/{process.pid}/status"

    def catches() -> bool:
        mask = next(x for x in Path(handled).read_text().splitlines() if x.startswith("SigCgt"))
        return bool(int(mask.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    wait_for(catches)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=10)
    assert process.returncode == RESUMABLE
    assert text == "main_pretrain.py: stopped by SIGTERM before training began\n"


def test_a_second_interrupt_ends_at_once(imagenet, tmp_path):
    """The first waits for the data worker, which is held; one Ctrl-C that comes twice is one."""
    given = arguments(imagenet, tmp_path, "TRAIN.EPOCHS", 2000, "PRINT_FREQ", 1)
    process = start(given)
    wait_for(lambda: trained(tmp_path, 2))
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)  # what is prefetched runs out
    try:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT
        assert time.monotonic() - started < 3
    finally:
        os.kill(worker, signal.SIGCONT)


def torchrun(given: list[str], *flags: str) -> subprocess.Popen:
    """Two processes in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *flags]
    command += ["--master_port", str(free_port()), str(ROOT / "main_pretrain.py"), *given]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def pair(imagenet, output) -> list[str]:
    return arguments(imagenet, output, "DATA.BATCH_SIZE", 2)


def run_pair(imagenet, output) -> None:
    done = run_forked("main_pretrain.py", *pair(imagenet, output), processes=2)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def undisturbed_pair(imagenet, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("pair")
    run_pair(imagenet, output)
    return final(output)


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True], ids=["launcher", "all"])
def test_sigterm_to_the_launcher(undisturbed_pair, imagenet, tmp_path, group):
    """Or to every process of the job, data workers included, as schedulers do."""
    process = torchrun(pair(imagenet, tmp_path))
    wait_for(lambda: trained(tmp_path, 3))
    started = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert time.monotonic() - started < 25, text  # the launcher would kill after 30 s
    assert "stopped by a signal after update" in text
    assert "killed by signal" not in text
    assert final(tmp_path)["step"] < STEPS
    run_pair(imagenet, tmp_path)
    assert_same(undisturbed_pair, final(tmp_path))


@pytest.mark.slow
def test_one_of_two_killed_restarts(undisturbed_pair, imagenet, tmp_path):
    process = torchrun(pair(imagenet, tmp_path), "--max-restarts=2")
    wait_for(lambda: (folder(tmp_path) / "checkpoint.pth").exists())
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    try:
        text = process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            process.terminate()
    assert process.returncode == 0, text
    assert "resumed from" in text
    assert_same(undisturbed_pair, final(tmp_path))


@pytest.mark.slow
def test_each_fault_on_two_machines_costs_one_restart(undisturbed_pair, imagenet, tmp_path):
    """Two launchers, each with a process; the first has the store, which outlives the faults."""
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--max_restarts=2", "--rdzv_id=7", "--rdzv_backend=c10d"]
    command += [f"--rdzv_endpoint=localhost:{port}", str(ROOT / "main_pretrain.py")]
    agents, logs = [], [tmp_path / "agent0.txt", tmp_path / "agent1.txt"]
    for log in logs:
        with open(log, "w") as output:
            given = {"stdout": output, "stderr": subprocess.STDOUT}
            given["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
            agents.append(subprocess.Popen(command + pair(imagenet, tmp_path), **given))

    def resumed() -> int:
        return sum(log.read_text().count("resumed from") for log in logs)

    try:
        wait_for(lambda: (folder(tmp_path) / "checkpoint.pth").exists())
        for killed, agent in enumerate(agents):
            os.kill(children(agent.pid)[-1], signal.SIGKILL)
            wait_for(lambda killed=killed: resumed() > killed)
        codes = [agent.wait(120) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
    text = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], text
    assert resumed() == 2 and "Traceback" not in text, text
    assert_same(undisturbed_pair, final(tmp_path))


@pytest.mark.slow
def test_the_other_process_ends_in_one_line(imagenet, tmp_path):
    """Without a launcher that would end it."""
    given = pair(imagenet, tmp_path)
    processes = [Script("main_pretrain.py", *given, environment=place) for place in places(2)]
    wait_for(lambda: trained(tmp_path, 2))
    processes[1].kill()
    text, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    ours = [x for x in text.splitlines() if x.startswith("main_pretrain.py: error: ")]
    assert len(ours) == 1 and "another process of the group died" in ours[0]
    assert "Traceback" not in text


# sends itself a signal when it calls a function for the second time, or the first
AT = f"""
import importlib, os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
place, call, number = sys.argv[1:4]
module, *path, name = place.split("/")
owner = importlib.import_module(module)
for part in path:
    owner = getattr(owner, part)
real, calls = getattr(owner, name), []
def wrapped(*given, **named):
    calls.append(1)
    if len(calls) == int(call):
        os.kill(os.getpid(), int(number))
        time.sleep(0.3)
    return real(*given, **named)
if os.environ["RANK"] == os.environ["VICTIM"]:
    setattr(owner, name, wrapped)
sys.argv = [{str(ROOT / "main_pretrain.py")!r}, *sys.argv[4:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def signalled(imagenet, tmp_path, place: str, call: int, number: int, victim: int) -> list[Script]:
    """Two processes without a launcher, of which one gets a signal at a place."""
    program = tmp_path / "at.py"
    program.write_text(AT)
    opts = ("TRAIN.KNN_FREQ", 1, "TRAIN.SAVE_STEPS", 4, "DIST_TIMEOUT", 15)
    given = (place, call, int(number), *pair(imagenet, tmp_path), *opts)
    own = [one | {"VICTIM": victim} for one in places(2)]
    processes = [Script(program, *given, environment=one) for one in own]
    for process in processes:
        process.wait(90)
    return processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "call", "victim"),
    [
        ("utils.run/lock_folder", 1, 0),
        ("models/build_method", 1, 1),
        ("utils.update/Update/__call__", 2, 0),
        ("utils.session/Checkpoints/write", 1, 0),
        ("evaluation.knn_monitor/KnnMonitor/after", 2, 1),
    ],
)
def test_a_killed_process_ends_the_other_in_one_line_wherever_it_is(
    imagenet, tmp_path, place, call, victim
):
    processes = signalled(imagenet, tmp_path, place, call, signal.SIGKILL, victim)
    assert processes[victim].returncode == -signal.SIGKILL
    text = processes[1 - victim].text()
    assert processes[1 - victim].returncode == 1, text
    last = text.splitlines()[-1]
    assert last.startswith("main_pretrain.py: error: another process of the group died"), text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("utils.session/Checkpoints/write", 1),
        ("evaluation.knn_monitor/KnnMonitor/after", 2),
        ("utils.update/Update/__call__", 2),
    ],
)
def test_a_signal_to_one_stops_both_wherever_it_is(
    undisturbed_pair, imagenet, tmp_path, place, call
):
    processes = signalled(imagenet, tmp_path, place, call, signal.SIGTERM, 0)
    assert [process.returncode for process in processes] == [RESUMABLE] * 2
    assert final(tmp_path)["step"] == max(x.get("step", 0) for x in lines(tmp_path)) < STEPS
    run_pair(imagenet, tmp_path)
    assert_same(undisturbed_pair, final(tmp_path))
