"""A run that goes on for some time holds no more memory, files and threads than at first."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TINY, wait_for, write_images

# shares that the end may add; files come and go with batches
GROWTH = {"memory": 0.05, "files": 0.1, "threads": 0.0}
MEMORY = ("Pss_Anon", "Pss_Shmem")  # without pages of files, which depend on what else runs
SECONDS = 40


def measure(pid: int) -> tuple[float, int, int]:
    """kB of memory, files and threads of a process and its workers."""
    pids, memory, files, threads = [pid], 0, 0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    for each in pids:
        status = Path(f"/proc/{each}/smaps_rollup").read_text()
        memory += sum(int(status.split(f"\n{k}:")[1].split()[0]) for k in MEMORY)
        files += len(os.listdir(f"/proc/{each}/fd"))
        threads += len(os.listdir(f"/proc/{each}/task"))
    assert len(pids) > 1  # the data workers are sampled too
    return memory, files, threads


@pytest.mark.slow
def test_a_run_does_not_grow(tmp_path):
    write_images(tmp_path / "imagenet/train", classes=2, images=100)
    command = [sys.executable, str(ROOT / "main_pretrain.py"), "--cfg", "synco_vit_tiny"]
    command += ["--data-path", str(tmp_path / "imagenet"), "--output", str(tmp_path), "--opts"]
    command += [*TINY, "MODEL.NAME", "soak", "TRAIN.EPOCHS", "1000000", "PRINT_FREQ", "1"]
    command += ["TRAIN.SAVE_MINUTES", "0.1", "SAVE_FREQ", "20", "DATA.NUM_WORKERS", "2"]
    command += ["MODEL.WARMUP_EPOCHS", "0", "MODEL.COOLDOWN_EPOCHS", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: (tmp_path / "soak/default/metrics.jsonl").exists())
        samples, started = [], time.monotonic()
        while time.monotonic() - started < SECONDS:
            time.sleep(0.5)
            try:
                samples.append(measure(process.pid))
            except (OSError, IndexError):  # one of them is just ending
                assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        process.kill()
    third = len(samples) // 3
    early, late = (np.median(part, axis=0) for part in (samples[third:-third], samples[-third:]))
    for name, before, after in zip(GROWTH, early, late, strict=True):
        assert after <= before * (1 + GROWTH[name]), f"{name} grew from {before} to {after}"
