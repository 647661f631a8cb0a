"""A tiny ImageNet, reference data, and ways to run the scripts."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"

PORTS = iter(range(20000, 21000))

# what makes a run tiny, as --opts
TINY = [
    *("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "1"),
    *("TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "PRINT_FREQ", "1"),
    *("MODEL.CONTRAST_NUM_NEGATIVE", "32", "MODEL.N_HARD", "8"),
    *("MODEL.WARMUP_EPOCHS", "1", "MODEL.ENCODER", "vit_nano"),
]


def reference(name: str):
    """A reference file: arrays of an .npz, or the content of a .json."""
    path = REFERENCE / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def write_images(folder: Path, classes: int = 2, images: int = 12, size: int = 40) -> None:
    """``classes`` folders of JPEGs of smooth noise."""
    rng = np.random.default_rng(len(str(folder.name)))
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        for i in range(images):
            coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            image = cv2.resize(coarse, (size + i % 3, size), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder / f"class{number}" / f"{i}.jpg"), image)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    """A data set of 24 training and 7 validation images in 2 classes."""
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "train")
    write_images(root / "val", images=4)
    (root / "val" / "class1" / "3.jpg").unlink()
    return root


@pytest.fixture
def process_group():
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run_main(monkeypatch):
    """Run a script's ``main`` in this process: ``run_main(module, *arguments)``."""

    def run(module, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        try:
            module.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def run_script(script: str, *arguments, processes: int = 0, launcher: str = "torchrun"):
    """Run a script in a process of its own, or in a group of them by a launcher of torch.

    Returns the finished process with its output as text; standard error is in ``stdout``.
    """
    command = [sys.executable]
    if processes:
        module = {"torchrun": "torch.distributed.run", "launch": "torch.distributed.launch"}
        command += ["-m", module[launcher], f"--nproc_per_node={processes}"]
        command += ["--master_port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, str(ROOT / script), *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def free_port() -> int:
    """A port that nothing else takes before its use: none that the kernel lends to connections,
    and of each process of the tests its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in PORTS:
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("", port + 1000 * worker))
            return port + 1000 * worker
    raise RuntimeError("no free port")


def spawn(function, processes: int, *arguments) -> None:
    """Run ``function(rank, *arguments)`` in a gloo group of processes."""
    store = Path(arguments[0]) / f"store_{function.__name__}"
    torch.multiprocessing.spawn(_join, (function, processes, str(store), arguments), processes)


def _join(rank: int, function, processes: int, store: str, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    function(rank, *arguments)
    dist.destroy_process_group()
