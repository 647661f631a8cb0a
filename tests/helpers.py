"""Reference data, tiny runs, and ways to start the scripts."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from forked import as_in_a_script, forking, run_group

import main_pretrain
from data.dataset import Views
from data.folders import FolderSource
from models import build_method
from models.encoder import create_encoder
from optimizer import build_optimizer
from tools.pack_images import pack_zip
from utils.config import DEFAULTS, load_config, with_values
from utils.distributed import data_parallel, init_process_group, leave_group
from utils.progress import EpochSize, Progress
from utils.run import Run
from utils.session import PRETRAINING, Session, StateDicts
from utils.update import Precision, Update

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"

# the project's own; data sets and outputs may lie beside them
SOURCES = sorted(
    path
    for folder in (
        ".",
        "data",
        "evaluation",
        "models",
        "synco_vit",
        "tools",
        "tools/benchmark",
        "utils",
    )
    for path in (ROOT / folder).glob("*.py")
)

# what ``Session.save`` asks: no signal comes, and the time is up when it is up
NO_SIGNALS = SimpleNamespace(agree=lambda over: (False, over))
PORTS = iter(range(20000, 21000))

# what makes a run tiny, as --opts
TINY = [
    *("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "1"),
    *("TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "PRINT_FREQ", "1"),
    *("MODEL.CONTRAST_NUM_NEGATIVE", "32", "MODEL.N_HARD", "8"),
    *("MODEL.WARMUP_EPOCHS", "1", "MODEL.ENCODER", "vit_nano"),
    *("AMP_OPT_LEVEL", "O0"),  # on any machine; test_precision.py has the default
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


def zip_folder(root: Path, split: str, folder: Path) -> None:
    """Pack a split of class folders into ``<split>.zip`` and its list."""
    folder.mkdir(exist_ok=True)
    pack_zip(FolderSource(str(root), split), str(folder / f"{split}.zip"))


def run_script(script: str, *arguments, processes: int = 0, launcher: str = "torchrun"):
    """Run a script, or a module by its name, in a process of its own, or in a group of them by a
    launcher of torch.

    Returns the finished process with its output as text; standard error is in ``stdout``.
    """
    command = [sys.executable]
    words = [str(ROOT / script)] if str(script).endswith(".py") else ["-m", script]
    if processes:
        module = {"torchrun": "torch.distributed.run", "launch": "torch.distributed.launch"}
        command += ["-m", module[launcher], f"--nproc_per_node={processes}"]
        command += ["--master_port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, *words, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nothing else takes before its use: none that the kernel lends to connections,
    and of each process of the tests its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in PORTS:
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("", port + 1000 * worker))
            return port + 1000 * worker
    raise RuntimeError("no free port")


def run_forked(script: str, *arguments, processes: int = 0) -> SimpleNamespace:
    """What ``run_script`` does, without the start of an interpreter and of a launcher."""
    group = run_group(places(processes) or [{}], script, *arguments)
    failed = [one.returncode for one in group if one.returncode]
    text = "".join(one.text() for one in group)
    return SimpleNamespace(returncode=max(failed, default=0), stdout=text)


def places(processes: int) -> list[dict]:
    """The variables that a launcher would set for each process of a group."""
    same = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    same |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return [same | {"RANK": n, "LOCAL_RANK": n} for n in range(processes)]


def spawn(function, processes: int, *arguments, timeout: float = 60) -> None:
    """Run ``function(rank, *arguments)`` in a gloo group of processes."""
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    place["MASTER_PORT"] = str(free_port())
    ready = forking().Barrier(processes)
    given = (function, place, ready, timeout, arguments)
    torch.multiprocessing.start_processes(_join, given, processes, start_method="forkserver")


def _join(rank: int, function, place: dict, ready, timeout: float, arguments) -> None:
    as_in_a_script()
    torch.set_num_threads(1)
    ready.wait()  # imports may take longer than a short timeout
    os.environ |= place | {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    init_process_group(rank, timeout)
    function(rank, *arguments)
    leave_group()


def arguments(method: str, imagenet, output, *opts):
    return [
        *("--cfg", ROOT / f"configs/{method}_vit_tiny.yaml", "--data-path", imagenet),
        *("--output", output, "--opts", *TINY, "MODEL.NAME", "run", *opts),
    ]


def tiny(recipe: str, *opts) -> tuple:
    """A configuration of small images, and what ``start`` would return for it."""
    device = torch.device("cpu")
    opts = ["MODEL.ENCODER", "vit_nano", "DATA.IMG_SIZE", "32", *opts]
    config = load_config(str(ROOT / recipe), opts)
    run = SimpleNamespace(device=device, precision=Precision("O0", device), config=config)
    return config, run


def weights(folder, name="checkpoint.pth"):
    return torch.load(folder / "run" / "default" / name, weights_only=True)


def figures(path: Path) -> dict:
    """``results.json`` without where it came from."""
    results = json.loads(path.read_text())
    del results["provenance"]
    return results


def assert_same(one: dict, other: dict) -> None:
    """Equal bit for bit, model and optimizer."""
    assert one["step"] == other["step"]
    assert set(one["model"]) == set(other["model"])
    for name, value in one["model"].items():
        assert value.equal(other["model"][name]), name
    for i, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert value.equal(other["optimizer"]["state"][i][name]), (i, name)


def write_run(folder, epochs: int = 4, steps: int = 50, **more) -> None:
    """Metrics of a run: loss 5 / step with a ripple, k-NN 0.1 x epoch."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, epochs * steps + 1):
        place = {"epoch": (step - 1) // steps, "step": step, "epochs": step / steps}
        figures = {"loss": 5 / step + 0.1 * (-1) ** step, "lr": 0.1, "positive": 0.5}
        lines.append({"kind": "train"} | place | figures | more)
        if step % steps == 0:
            lines.append({"kind": "epoch"} | place | {"seconds": 1, "knn": 0.1 * step / steps})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def fresh(name, seed=0, **options):
    """An encoder and its weights, which differ from those of another seed."""
    torch.manual_seed(seed)
    encoder = create_encoder(name, **options)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:  # those begin alike
            torch.nn.init.normal_(parameter.data)
    return encoder, {k: v.clone() for k, v in encoder.state_dict().items()}


def run_tool(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr("sys.argv", [module.__file__, *map(str, arguments)])
    module.main()


def views_of(first, second, label=None):
    """The views of a batch in which no image was replaced; by default all have the label 0."""
    none = torch.full((len(first),), -1)
    return Views(first, second, none, none + 1 if label is None else label, none.new_empty(0))


def build_update(config, run):
    """A model, its optimizer, and a function that makes one update of it in epoch 0.

    The function takes the two views of each micro-batch, and keeps the keys as main_pretrain.py
    does.
    """
    model = build_method(config)
    ddp = data_parallel(model, run.device)
    optimizer = build_optimizer(config, model, config.TRAIN.BASE_LR)
    parts = {name: getattr(model, name) for name in main_pretrain.PARTS}
    update = Update(ddp, [optimizer], run.precision, config.TRAIN.CLIP_GRAD, parts)
    forward = partial(main_pretrain.forward_views, ddp, run.device, 0)

    def make(micro_batches):
        result = update([views_of(*batch) for batch in micro_batches], forward)
        for output in result.outputs:
            model.enqueue(*output.keys, result.finite)
        return result

    return model, optimizer, make


class Model:
    """Stands for DistributedDataParallel, and for what it holds."""

    def __init__(self) -> None:
        self.module, self.weights = self, torch.arange(6.0)

    def state_dict(self) -> dict:
        return {"w": self.weights}

    def train(self) -> "Model":
        return self


class Batches(list):
    """A loader."""

    size, starts = EpochSize(8, 4), ()

    def start_at(self, *place) -> None:
        self.starts = (*self.starts, place)


def session_of(folder, step=0, size=(8, 4), kind=PRETRAINING, signals=NO_SIGNALS, **keys):
    """A session of a model without learning, after so many updates."""
    keys = {"TRAIN__EPOCHS": 9, "SAVE_FREQ": 2} | keys
    config = with_values(DEFAULTS, {key.replace("__", "."): v for key, v in keys.items()})
    device, logger = torch.device("cpu"), logging.getLogger("session")
    run = Run(str(folder), device, Precision("O0", device), logger, config)
    update = SimpleNamespace(ddp=Model(), state_dict=dict, optimizers=[])
    loader = Batches()
    loader.size = size = EpochSize(*size)
    session = Session(run, loader, update, signals, StateDicts(), kind)
    epoch = max(0, step - 1) // size.updates
    session.progress = Progress(size, epoch, step)
    session.progress.images_seen = session.progress.steps_of_epoch * size.images_per_update
    return session
