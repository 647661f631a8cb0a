"""--compile: the compiled encoders give the losses and gradients of the others."""

import copy

import pytest
import torch
from helpers import ROOT, TINY

import main_pretrain
from models.encoder import choose_attention, create_encoder
from models.moby import MoBY
from utils.update import Precision


@pytest.mark.slow
def test_loss_and_gradient_stay():
    torch.manual_seed(0)
    encoders = [create_encoder("vit_nano", 32) for _ in range(2)]
    for encoder in encoders:
        encoder.blocks = encoder.blocks[:1]  # compiling takes most of the time
    eager = MoBY(*encoders, num_negatives=32)
    choose_attention(eager, Precision("O0", torch.device("cpu")))
    compiled = copy.deepcopy(eager)
    compiled.encoder.compile()
    compiled.encoder_k.compile()
    assert list(compiled.state_dict()) == list(eager.state_dict())
    views = torch.randn(2, 4, 3, 32, 32)
    losses = []
    for method in (eager, compiled):
        losses.append(method(*views, epoch=0).loss)
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for (name, p), p_compiled in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            # as a whole: BatchNorm of 4 images magnifies what rounding does to single values
            difference = (p_compiled.grad - p.grad).norm()
            assert difference < 2e-4 * p.grad.norm() + 1e-4, name


@pytest.mark.parametrize("flags, count", [([], 0), (["--compile"], 2)])
def test_the_flag_compiles_both_encoders(run_main, imagenet, tmp_path, monkeypatch, flags, count):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: calls.append(module))
    run_main(
        main_pretrain,
        *("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", imagenet, *flags),
        *("--output", tmp_path, "--eval", "--opts", *TINY, "MODEL.NAME", "run"),
    )
    assert len(calls) == count
