"""A checkpoint of v0.1 goes on where it was written, see tests/v0_1/README.md."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import main_pretrain
import models.encoder
import models.momentum
from models.vit import VisionTransformer
from utils.update import Update

OLD = ROOT / "tests/v0_1"
OPTS = [
    *("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0", "PRINT_FREQ", "1"),
    *("TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.BASE_LR", "0.3"),
    *("TRAIN.OPTIMIZER.EPS", "1e-4", "MODEL.CONTRAST_NUM_NEGATIVE", "32", "MODEL.N_HARD", "8"),
    *("MODEL.WARMUP_EPOCHS", "0", "MODEL.ENCODER", "vit_micro", "MODEL.NAME", "run"),
    *("MODEL.N1", "8", "MODEL.N2", "8", "MODEL.N3", "8", "MODEL.N4", "0"),
    *("MODEL.N5", "8", "MODEL.N6", "8"),
]


@pytest.fixture
def micro(monkeypatch):
    """The small networks of that run."""
    head = models.momentum.MLPHead
    small = partial(VisionTransformer, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    monkeypatch.setitem(models.encoder.ENCODERS, "vit_micro", small)

    def small_head(width, out_dim=16, num_layers=2):
        return head(width, 32, out_dim, num_layers)

    monkeypatch.setattr(models.momentum, "MLPHead", small_head)


@pytest.fixture
def images(tmp_path):
    """Two classes of ten images of coloured squares."""
    rng = np.random.default_rng(1)
    for label in range(2):
        folder = tmp_path / f"data/train/class{label}"
        folder.mkdir(parents=True)
        for number in range(10):
            squares = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            pixels = np.kron(squares, np.ones((8, 8, 1), np.uint8))
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "data"


def test_a_run_of_v0_1_goes_on(run_main, micro, images, tmp_path, monkeypatch):
    expected = np.load(OLD / "continued.npz")
    old = torch.load(OLD / "checkpoint.pth", weights_only=True)
    folder = tmp_path / "out/run/default"
    folder.mkdir(parents=True)
    shutil.copy(OLD / "checkpoint.pth", folder / "checkpoint.pth")
    seen, make = [], Update.__call__

    def watched(self, micro_batches, forward):
        if not seen:  # what was loaded, before the first update; the key branch has just moved
            model, state = self.ddp.module, self.state_dict()
            for name, value in model.state_dict().items():
                if "_k." not in name:
                    assert value.equal(old["model"][name]), name
            assert state["optimizer"]["state"].keys() == old["optimizer"]["state"].keys()
            for number, values in old["optimizer"]["state"].items():
                for name, value in values.items():
                    assert value.equal(state["optimizer"]["state"][number][name]), (number, name)
        seen.append([view.clone() for view in micro_batches[0]])
        return make(self, micro_batches, forward)

    keys, get = [], main_pretrain.TrainingLoader.start_at

    def start_at(self, epoch, images_seen=0):
        get(self, epoch, images_seen)
        keys.append(next(iter(self.batch_sampler)))

    monkeypatch.setattr(main_pretrain.TrainingLoader, "start_at", start_at)
    monkeypatch.setattr(Update, "__call__", watched)
    run_main(
        main_pretrain,
        *("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", images),
        *("--output", tmp_path / "out", "--opts", *OPTS),
    )
    assert "at update 7\n" in (folder / "log_rank0.txt").read_text()
    # whatever this machine computes in
    assert json.loads((folder / "config.json").read_text())["AMP_OPT_LEVEL"] == "O0"
    assert keys[0] == [tuple(key) for key in expected["next_batch"].tolist()]
    for view, name in zip(seen[0], ("view1", "view2"), strict=False):
        # other processors round a few values of the augmentations the other way
        assert np.abs(view.numpy().astype(int) - expected[name].astype(int)).max() <= 1
    assert len(seen) == 3
    new = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert (new["step"], new["epoch"], new["images"]) == (10, 1, 20)
    moved = 0.0
    for name, value in new["model"].items():
        wanted = torch.from_numpy(expected[f"after/{name}"])
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4)
        if name.startswith("encoder."):
            moved = max(moved, float((value - old["model"][name]).abs().max()))
    assert moved > 5e-4  # more than the tolerance
