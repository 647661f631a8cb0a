"""The part of python -m tools.benchmark about listing a data set and drawing its order."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PER_CLASS = 1280
MOST_LINKS = 60_000  # to one file; ext4 has 65 000 at most
ROOT = Path(__file__).parent.parent.parent


def listing(args: argparse.Namespace) -> dict:
    """Seconds, and MB that only this process has, to list links to images and to draw an order.

    Each is measured in a process of its own. ``first`` keeps the list, ``kept`` is the median of
    those that find it.
    """
    with tempfile.TemporaryDirectory() as root:
        make_links(Path(root), args.listed)
        time.sleep(3)  # folders that have just changed are not trusted
        first = _measure("list", root)
        kept = [_measure("list", root) for _ in range(args.rounds)]
        shutil.rmtree(root, ignore_errors=True)  # faster than the context's end
        os.makedirs(root, exist_ok=True)
    orders = [_measure("order", str(args.listed)) for _ in range(args.rounds)]
    return {
        "images": args.listed,
        "first": first,
        **{
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in (("kept", kept), ("order", orders))
        },
    }


def make_links(root: Path, images: int) -> None:
    """``train/<class>/<image>``, all hard links to a few small files."""
    file = root / "file"
    for start in range(0, images, PER_CLASS):
        folder = root / "train" / f"n{start // PER_CLASS:08}"
        folder.mkdir(parents=True)
        for number in range(start, min(start + PER_CLASS, images)):
            if number % MOST_LINKS == 0:
                file = root / f"file{number // MOST_LINKS}"
                file.write_bytes(b"image")
            os.link(file, folder / f"{folder.name}_{number}.JPEG")


def _measure(what: str, argument: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark.listing", what, argument],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def _memory() -> float:
    """MB of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


def _main() -> None:
    """One measurement, printed as JSON."""
    from data.loader import EpochBatches  # with all that a script imports
    from data.source import FolderSource

    what, argument = sys.argv[1:]
    before, started = _memory(), time.perf_counter()
    if what == "list":
        source = FolderSource(argument, "train")
        seconds = time.perf_counter() - started
        assert source.names[len(source.names) - 1].endswith(f"_{len(source.names) - 1}.JPEG")
    else:
        batches = EpochBatches(int(argument), 512)
        batches.start_at(1, images_seen=len(batches) // 2 * 512)
        iterator = iter(batches)
        next(iterator)
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "own_mb": _memory() - before}))


if __name__ == "__main__":
    _main()
