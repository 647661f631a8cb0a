"""The notebook of the documentation, run cell by cell without Jupyter."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY

from models import build_method
from tools import make_fake_imagenet
from utils.config import load_config

NOTEBOOK = json.loads((ROOT / "docs/start.ipynb").read_text())


def test_it_is_short_and_holds_no_outputs():
    cells = NOTEBOOK["cells"]
    assert NOTEBOOK["nbformat"] == 4 and len(cells) <= 15
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_it_runs_on_what_the_demo_writes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    demo = (ROOT / "tools/demo.sh").read_text()
    folders = re.findall(r"\$folder(/[\w/]+)", demo)
    assert {"/imagenet", "/runs/demo__synco"} <= set(folders)
    monkeypatch.chdir(tmp_path)
    size = ["--classes", "2", "--train", "12", "--val", "4"]
    monkeypatch.setattr(sys, "argv", ["draw.py", "demo/imagenet", *size])
    make_fake_imagenet.main()
    config = load_config(str(ROOT / "configs/demo.yaml"), TINY)
    run = Path("demo/runs/demo__synco/trained")
    run.mkdir(parents=True)
    torch.manual_seed(0)
    state = {"model": build_method(config).state_dict(), "config": config.dump()}
    torch.save(state, run / "checkpoint.pth")

    names: dict = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert printed.startswith("128 features of an image\n24 training and 8 validation images of 2 ")
    # the figures that it prints, worked out anew
    rows = names["train_features"], names["val_features"]
    assert all(torch.allclose(part.norm(dim=1), torch.ones(len(part))) for part in rows)
    first = torch.cdist(*reversed(rows)).argmin(1)
    right = (names["train_labels"][first] == names["val_labels"]).float().mean()
    assert f"1 neighbour: {right:.1%}, 20 neighbours: " in printed and "chance: 50.0%" in printed
    drawn = [len(axes.images) for axes in names["figure"].axes]
    assert drawn == [1] * 48
    pyplot.close("all")
