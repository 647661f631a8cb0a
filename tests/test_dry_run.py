"""--dry-run: what it says, and that it leaves nothing behind."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY, arguments, run_script, tiny

import main_pretrain
from utils import dry_run
from utils.errors import UserError
from utils.progress import EpochSize, Progress
from utils.run import Run


def listing(folder) -> dict:
    """Each file below a folder, with its time stamp."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_written(run_main, imagenet, tmp_path, monkeypatch, capsys, compiled):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    before = listing(imagenet)
    opts = arguments("synco", imagenet, tmp_path / "out", "COMPILE", str(compiled))
    run_main(main_pretrain, "--dry-run", *opts)
    assert not list(tmp_path.iterdir()) and listing(imagenet) == before
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{tmp_path}/synco-")
    said = capsys.readouterr().out
    for part in (
        "TYPE synco",
        "synco with vit_nano: ",
        "DATA.TRAINING_IMAGES 24, ",
        "TRAIN.BASE_LR 7.8125e-06",
        "data: 24 training images, 2 classes, 7 val images",
        "updates: 6 an epoch, 12 in 2 epochs, 12 to go; 4 images each",
        "peak memory of a process: ",
        f"nothing was written into {tmp_path}/out/run/default\n",
    ):
        assert part in said
    assert re.search(r"3 updates took [\d.e-]+, [\d.e-]+, [\d.e-]+ s: [\d.e+]+ images/s", said)


def test_a_run_that_would_go_on(run_main, imagenet, tmp_path, capsys):
    opts = arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "1")
    run_main(main_pretrain, *opts)
    before = listing(tmp_path)
    run_main(main_pretrain, "--dry-run", *opts[:-1], "3")
    assert listing(tmp_path) == before
    said = capsys.readouterr().out
    assert f"resumed from {tmp_path}/run/default/checkpoint.pth at update 6" in said
    assert "updates: 6 an epoch, 18 in 3 epochs, 12 to go; 4 images each" in said


def test_images_without_val(run_main, imagenet, tmp_path, capsys):
    opts = arguments("byol", imagenet / "train/class0", tmp_path / "out")
    run_main(main_pretrain, "--dry-run", *opts)
    said = capsys.readouterr().out
    assert "data: 12 training images, 1 classes, no val images, which training does not" in said


class Loader:
    """Two updates an epoch, whose images take a second of the clock each time."""

    size = EpochSize(9, 4)

    def __init__(self, clock: list) -> None:
        self.clock, self.starts = clock, []

    def start_at(self, epoch, images_seen=0):
        self.starts.append((epoch, images_seen))

    def __iter__(self):
        for _ in range(2 if not self.starts[-1][1] else 1):
            self.clock[0] += 1
            yield ["batch"]


def test_the_end_is_estimated_from_three_updates(monkeypatch, process_group):
    config, run = tiny("configs/demo.yaml", "TRAIN.EPOCHS", "5000")
    lines, clock, took = [], [0.0], iter([100, 2, 7, 1])
    logger = SimpleNamespace(info=lines.append)
    run = Run("", run.device, run.precision, logger, config, {"TRAIN.BASE_LR": 3.0})
    monkeypatch.setattr(dry_run.time, "monotonic", lambda: clock[0])
    loader = Loader(clock)

    def update(micro_batches):
        assert micro_batches == ["batch"]
        clock[0] += next(took)

    def no_val():
        raise UserError("none")

    session = SimpleNamespace(
        run=run, config=config, loader=loader, step=3, steps=10000,
        progress=Progress(loader.size, epoch=1, step=3, images_seen=4),
    )  # fmt: skip
    train = SimpleNamespace(names=["n"] * 9, classes=["c", "d"])
    dry_run.rehearse(session, train, no_val, update)
    assert loader.starts == [(1, 4), (2, 0), (3, 0)]  # the first epoch has one update left
    said = "\n".join(lines)
    assert "TRAIN.BASE_LR 3.0" in said and "no val images" in said
    assert "2 an epoch, 10000 in 5000 epochs, 9997 to go; 4 images each" in said
    assert "3 updates took 3, 8, 2 s: 1.333 images/s" in said
    assert ", after 8:19:51 of such updates." in said  # 9997 x 3 s


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--eval"], "--dry-run needs updates: leave out --eval and --throughput"),
        (["--throughput"], "--dry-run needs updates"),
        (["--profile", "3"], "not allowed with argument"),
    ],
)
def test_what_it_does_not_go_with(run_main, imagenet, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        run_main(main_pretrain, "--dry-run", *flags, *arguments("moby", imagenet, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes(imagenet, tmp_path):
    opts = ["--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", imagenet, "--output"]
    opts += [tmp_path / "out", "--dry-run", "--opts", *TINY]
    done = run_script("main_pretrain.py", *opts, processes=2)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("updates: 3 an epoch, 6 in 2 epochs, 6 to go; 8 images each") == 1
    assert not (tmp_path / "out").exists()
