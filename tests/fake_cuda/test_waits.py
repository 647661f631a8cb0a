"""No update waits for the GPU, and a line of the log reads it once: shown on a pretended one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fake_cuda import device
from fake_cuda.recipes import RECIPES
from helpers import ROOT

REASON = device.reason_not_to_run()
METHODS = ("synco", "moby", "byol")
# per cent by which other versions of timm may differ in the launches
TOLERANCE = 2


def run(module: str, *names: str) -> list:
    """What a module of this folder prints, a value a line; in a process that keeps its changes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", f"fake_cuda.{module}", *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]


def of(method: str) -> list:
    """The recipes of a method; with those of BYOL, which are few, the ones of the probe."""
    judged = ("probe", "finetune") if method == "byol" else ()
    return [r for r in RECIPES if r.method in (method, *judged)]


@pytest.mark.slow
@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("method", METHODS)
def test_no_update_waits(method):
    recipes = of(method)
    found = run("recipes", "--json", *(recipe.name for recipe in recipes))
    for recipe, counts in zip(recipes, found, strict=True):
        name = recipe.name
        assert counts["name"] == name
        assert counts["waits"] == {}, name
        assert counts["copies"] == recipe.micro, name  # one a batch
        assert sum(counts["read"].values()) == 1, (name, counts["read"])
        assert 100 * abs(counts["launches"] / recipe.launches - 1) <= TOLERANCE, counts
        assert counts["kept"] <= 0.05 * counts["launches"], name
        if "resnet" in name:
            assert counts["crooked"] == {}, name


def test_the_table_has_what_there_is():
    assert sum(len(of(method)) for method in METHODS) == len(RECIPES) >= 24
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    for method in ("synco", "moby", "byol"):
        own = [r for r in RECIPES if r.method == method]
        kinds = {r.encoder.removeprefix("timm/").split("_")[0].rstrip("0123456789") for r in own}
        assert kinds == {"vit", "swin", "resnet"}
        assert {r.precision for r in own} == {"float32", "bfloat16", "float16"}
        assert {r.optimizer for r in own} >= {"adamw", "lars"}
        assert {r.micro for r in own} == {1, 2}
    keys = {key for r in RECIPES for key in r.more[::2]}
    others = {"TRAIN.USE_CHECKPOINT", "TRAIN.CLIP_GRAD", "MODEL.REPLACE_LN_WITH_BN", "TRAIN.PROBE"}
    assert keys == others | {"DATA.BACKEND"}


# what must be seen of each mistake
MISTAKES = {
    "a product with a tensor of the host": "FakeTensorDeviceMismatchError",
    "an index of the host": "RuntimeError",
    "a mask of the host": "FakeTensorDeviceMismatchError",
    "item": "a value is read",
    "if": "a value is read",
    "a mask": "a mask picks",
    "nonzero": "DynamicOutputShapeException",
    "cpu": "copy to the host",
    "tolist": "copy to the host",
    "a constant": "blocking copy",
    "memory that is not pinned": "copy from memory that is not pinned",
    "nothing wrong": "",
    "nothing wrong in an update": "",
    "a constant of normalize": "blocking copy",
    "torch's SyncBatchNorm": "a mask picks",
    "timm's LARS": "a value is read: utils/update.py",
    "a loss that is looked at": "a value is read",
    "pageable batches": "copy from memory that is not pinned: data/prefetch.py",
    "rows that are read again": "a line waits 2 times",
    "a copy of each statistic": "launches keep statistics",
    "views that are channels first": "conv.py",
}


@pytest.mark.slow
@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_every_planted_mistake_is_seen():
    found = dict(run("mistakes"))
    assert found.keys() == MISTAKES.keys()
    for name, expected in MISTAKES.items():
        assert any(expected in seen for seen in found[name]) if expected else not found[name], name


def test_where_there_is_none_it_says_why(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert device.reason_not_to_run() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch, "__version__", "2.9.0+cu128")
    assert device.reason_not_to_run().endswith("knows torch 2.14, not 2.9.0+cu128")
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    monkeypatch.setattr(device, "compiler", lambda: None)
    assert device.reason_not_to_run().startswith("no C++ compiler")
    monkeypatch.setattr(device, "compiler", lambda: "/usr/bin/c++")
    assert not device.reason_not_to_run()
