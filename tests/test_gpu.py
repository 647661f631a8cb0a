"""What only a CUDA device can show: it computes what the CPU does, and trains there."""

import copy
import json

import pytest
import torch
from helpers import ROOT, TINY

import main_pretrain
from models import METHODS, build_method
from utils.config import load_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_cpu(name):
    torch.manual_seed(0)
    config = load_config(str(ROOT / f"configs/{name}_vit_tiny.yaml"), TINY)
    methods = [build_method(config).eval()]
    methods.append(copy.deepcopy(methods[0]).cuda())
    views = torch.randn(2, 4, 3, 32, 32)
    losses = []
    for method in methods:
        device = next(method.parameters()).device
        losses.append(method(*views.to(device), epoch=-1).loss)  # no synthetic negatives: no draws
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    for (place, p), other in zip(
        methods[0].named_parameters(), methods[1].parameters(), strict=True
    ):
        if p.grad is not None:
            difference = (other.grad.cpu() - p.grad).norm()
            assert difference < 1e-3 * p.grad.norm() + 1e-4, place


@pytest.mark.parametrize("level", ["O0", "O1"])
@pytest.mark.parametrize("name", METHODS)
def test_pretraining_runs(run_main, imagenet, tmp_path, name, level):
    run_main(
        main_pretrain,
        *("--cfg", ROOT / f"configs/{name}_vit_tiny.yaml", "--data-path", imagenet),
        *("--output", tmp_path, "--amp-opt-level", level, "--opts", *TINY, "MODEL.NAME", "run"),
    )
    lines = (tmp_path / "run/default/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"train"' in line]
    assert len(losses) > 4 and all(0 < loss < 20 for loss in losses)
