"""Train for an hour and watch what a leak would show in: memory, open files and threads.

    python -m tools.soak FOLDER --minutes 60

Runs main_pretrain.py on a small drawn data set, samples it and its workers, stops it by SIGTERM,
writes soak.csv and soak.png, and fails if memory, files or threads grew after the first tenth.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

NAMES = ("seconds", "memory_mb", "files", "threads", "processes")
# shares that the end may add; files come and go with batches
GROWTH = {"memory_mb": 0.03, "files": 0.1, "threads": 0.0}
MEMORY = ("Pss_Anon", "Pss_Shmem")
METRICS = Path("soak", "default", "metrics.jsonl")
OPTS = [
    *("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "16", "DATA.NUM_WORKERS", "2"),
    *("MODEL.ENCODER", "vit_nano", "MODEL.NAME", "soak", "TRAIN.EPOCHS", "1000000"),
    *("TRAIN.SAVE_MINUTES", "1", "SAVE_FREQ", "20", "TRAIN.KEEP_CHECKPOINTS", "2"),
    *("MODEL.CONTRAST_NUM_NEGATIVE", "256", "MODEL.N_HARD", "32"),
    *("MODEL.WARMUP_EPOCHS", "0", "MODEL.COOLDOWN_EPOCHS", "1000000", "PRINT_FREQ", "1"),
    *("AMP_OPT_LEVEL", "O0"),
]


def main() -> None:
    """Train, sample, stop, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="data, run and results go there")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    data = args.folder / "imagenet"
    if not data.exists():
        tool = [sys.executable, "-m", "tools.make_fake_imagenet", str(data)]
        subprocess.run([*tool, "--train", "20", "--val", "2"], check=True)
    command = [sys.executable, "main_pretrain.py", "--cfg", "configs/synco_vit_tiny.yaml"]
    command += ["--data-path", str(data), "--output", str(args.folder), "--opts", *OPTS]
    with open(args.folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and not (args.folder / METRICS).exists():
            time.sleep(0.5)  # it starts
        samples = watch(process, 60 * args.minutes, args.every)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    with open(args.folder / "soak.csv", "w", newline="") as file:
        csv.writer(file).writerows([NAMES, *samples])
    draw(np.array(samples), args.folder / "soak.png")
    print(f"the run ended with exit code {code} after SIGTERM")
    if not report(np.array(samples)):
        raise SystemExit("soak: error: the run grew")


def watch(process: subprocess.Popen, seconds: float, every: float) -> list[tuple]:
    """Samples of NAMES, until the time is over or the process has ended."""
    started, samples = time.monotonic(), []
    while (elapsed := time.monotonic() - started) < seconds and process.poll() is None:
        if sample := measure(process.pid):
            samples.append((round(elapsed, 1), *sample))
        time.sleep(every)
    return samples


def measure(pid: int) -> tuple[float, int, int, int] | None:
    """Memory in MB, files, threads, and the number of processes.

    Memory counts a share of each shared page. It leaves out the pages of files, because how many
    of them count as the process's depends on what else runs.
    """
    pids, memory, files, threads = [pid], 0, 0, 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
        for each in pids:
            status = Path(f"/proc/{each}/smaps_rollup").read_text()
            memory += sum(int(status.split(f"\n{k}:")[1].split()[0]) for k in MEMORY)
            files += len(os.listdir(f"/proc/{each}/fd"))
            threads += len(os.listdir(f"/proc/{each}/task"))
    except (OSError, IndexError):  # one of them is just ending
        return None
    return memory / 1024, files, threads, len(pids)


def report(samples: np.ndarray) -> bool:
    """Print the second tenth of the time against the last one; return whether nothing grew."""
    tenth = max(1, len(samples) // 10)
    flat = True
    for name, column in zip(NAMES[1:], samples.T[1:], strict=True):
        early, late = np.median(column[tenth : 2 * tenth]), np.median(column[-tenth:])
        print(f"{name:10} {early:8.1f} -> {late:8.1f}, at most {column[tenth:].max():.1f}")
        flat &= name not in GROWTH or late <= early * (1 + GROWTH[name])
    return flat


def draw(samples: np.ndarray, path: Path) -> None:
    """A panel for each of memory, files and threads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    labels = ("memory (MB)", "open files", "threads")
    for axis, label, column in zip(axes, labels, samples.T[1:], strict=False):
        axis.plot(samples[:, 0] / 60, column, linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.2 * column.max())
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
