"""--compile: the encoders give the losses and gradients of the others, and each compiles once."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY, arguments, tiny
from torch._dynamo.utils import counters

import main_pretrain
from models.encoder import choose_attention, create_encoder
from models.moby import MoBY
from utils.update import Precision

CACHE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def no_cache_folder(monkeypatch):
    """None is set, before a test and after it."""
    monkeypatch.setenv(CACHE, "")
    monkeypatch.delenv(CACHE)


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


@pytest.mark.slow
def test_each_branch_compiles_once(run_main, imagenet, tmp_path, monkeypatch):
    """Over epochs, k-NN after each of them, and a resumed run."""
    # what is compiled, and how often, does not depend on what makes code of it, which takes longer
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_(m, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    given = [*arguments("synco", imagenet, tmp_path, "TRAIN.KNN_FREQ", 1), "TRAIN.EPOCHS"]
    for epochs in (2, 3):
        run_main(main_pretrain, "--compile", *given, epochs)
        assert counters["stats"]["unique_graphs"] == 2, epochs  # encoder and key encoder
        assert not counters["graph_break"]
    assert "at update 12\n" in (tmp_path / "run/default/log_rank0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("given", ["", "elsewhere"])
def test_a_requeued_job_finds_what_was_compiled(tmp_path, monkeypatch, given):
    """In the run folder, or where the variable of torch says."""
    if given:
        monkeypatch.setenv(CACHE, str(tmp_path / given))
    own = ("OUTPUT", str(tmp_path), "MODEL.NAME", "run", "TAG", "t")
    _, run = tiny("configs/moby_vit_tiny.yaml", "COMPILE", "True", *own)
    encoders = {"encoder": torch.nn.Linear(2, 2), "encoder_k": torch.nn.Linear(2, 2)}
    method = SimpleNamespace(modules=lambda: [], **encoders)
    for name in ("build_method", "synchronize_batch_norm"):
        monkeypatch.setattr(main_pretrain, name, lambda *_: method)
    hits = []
    for _ in range(2):
        torch._dynamo.reset()  # as in another process
        counters.clear()
        model = main_pretrain.build_model(run)
        model.encoder(torch.ones(3, 2)).sum().backward()
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1]
    assert any((tmp_path / (given or "run/t/compiled")).iterdir())


@pytest.mark.parametrize("flags, count", [([], 0), (["--compile"], 2)])
def test_the_flag_compiles_both_encoders(run_main, imagenet, tmp_path, monkeypatch, flags, count):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: calls.append(module))
    monkeypatch.setattr("utils.training_log.THROUGHPUT_STEPS", 1)
    run_main(
        main_pretrain,
        *("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", imagenet, *flags),
        *("--output", tmp_path, "--throughput", "--opts", *TINY, "MODEL.NAME", "run"),
    )
    assert len(calls) == count
