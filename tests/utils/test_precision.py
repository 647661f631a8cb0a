"""Precision: what auto becomes and why, what a resumed run keeps, float16, TF32."""

import json
import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, arguments, assert_same, spawn, tiny, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import main_pretrain
import utils.distributed
from models import build_method
from utils import run as run_module
from utils import update as update_module
from utils.checkpoint import Checkpoint
from utils.distributed import data_parallel, rank
from utils.errors import UserError
from utils.run import Run, check_same_precision, keep_precision, start
from utils.update import (
    LEVELS,
    Forward,
    Precision,
    Update,
    allow_tf32,
    computes_in,
    encode,
    processor_flags,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AMX, OLD = {"amx_bf16", "avx2"}, {"avx2"}


@pytest.fixture
def computer(monkeypatch):
    """A processor with these flags, or a GPU that has bfloat16 or not: ``computer(flags, new)``."""

    def be(flags: set[str] | None = None, new_gpu: bool = False) -> None:
        monkeypatch.setattr(update_module, "processor_flags", lambda: flags)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kind: new_gpu)
        # a scaler of CUDA switches itself off where there is none
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)

    return be


@pytest.mark.parametrize(
    ("level", "device", "flags", "new_gpu", "becomes", "dtype", "said"),
    [
        ("auto", CPU, {"amx_bf16"}, False, "bfloat16", torch.bfloat16, "processor computes in it"),
        ("auto", CPU, {"avx512_bf16"}, False, "bfloat16", torch.bfloat16, "bfloat16 (auto, as"),
        ("auto", CPU, OLD, True, "O0", None, "float32 (auto, as this processor computes in no bf"),
        ("auto", CPU, None, False, "O0", None, "float32 (auto"),  # another architecture
        ("auto", GPU, OLD, True, "bfloat16", torch.bfloat16, "this GPU computes in it)"),
        ("auto", GPU, AMX, False, "float16", torch.float16, "float16 with loss scaling (auto, as"),
        ("O0", CPU, AMX, True, "O0", None, "float32 (AMP_OPT_LEVEL O0)"),
        ("O1", CPU, OLD, False, "O1", torch.bfloat16, "bfloat16 (AMP_OPT_LEVEL O1)"),
        ("O2", GPU, OLD, True, "O2", torch.bfloat16, "bfloat16 ("),
        ("O1", GPU, AMX, False, "O1", torch.float16, "float16 with loss scaling (AMP_OPT_LEVEL O1"),
        ("bfloat16", GPU, OLD, False, "bfloat16", torch.bfloat16, "bfloat16 ("),
        ("float16", CPU, AMX, False, "float16", torch.float16, "float16 with loss scaling"),
    ],
)
def test_what_a_level_becomes_and_why(
    computer, level, device, flags, new_gpu, becomes, dtype, said
):
    computer(flags, new_gpu)
    precision = Precision(level, device)
    assert precision.level == becomes and precision.enabled == (dtype is not None)
    assert dtype is None or precision.dtype == dtype
    assert precision.scaler.is_enabled() == (dtype == torch.float16)
    assert said in precision.about


@pytest.mark.parametrize(
    "level, dtype", [("O0", torch.float32), ("O1", torch.bfloat16), ("float16", torch.float16)]
)
def test_products_have_the_type_of_the_level(level, dtype):
    with Precision(level, CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    "level, flags, emulated",
    [
        ("O1", {"avx2"}, True),
        ("O1", {"avx512_bf16"}, False),
        ("bfloat16", {"amx_bf16"}, False),
        ("float16", {"amx_bf16"}, True),
        ("float16", {"avx512_fp16"}, False),
        ("O1", None, False),  # another architecture
        ("O0", {"avx2"}, False),
        ("auto", {"avx2"}, False),
    ],
)
def test_what_a_processor_emulates_is_a_warning(computer, caplog, level, flags, emulated):
    computer(flags)
    precision = Precision(level, CPU)
    assert precision.emulated == emulated
    run_module.log_precision(precision, logging.getLogger("x"))
    assert ("this processor has no " in caplog.text) == emulated


def test_unknown_level():
    with pytest.raises(ValueError, match="O0, O1, O2"):
        Precision("O3", CPU)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\nflags : other\n", {"fpu", "amx_bf16"}),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", None),
        (None, None),
    ],
)
def test_what_linux_says_of_a_processor(tmp_path, text, flags):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    found = processor_flags(str(path))
    assert found == flags if flags is None else flags <= found and "other" not in found


def test_this_processor_is_as_torch_knows_it():
    if not hasattr(torch.cpu, "get_capabilities") or processor_flags() is None:
        pytest.skip("torch or Linux does not say")
    known = torch.cpu.get_capabilities()
    expected = known.get("amx_bf16", False) or known.get("avx512_bf16", False)
    assert computes_in(torch.bfloat16, CPU) == expected


# --- a start


def started(tmp_path, monkeypatch, level, **more):
    monkeypatch.delenv("RANK", raising=False)
    config, _ = tiny("configs/moby_vit_tiny.yaml", "OUTPUT", str(tmp_path), "AMP_OPT_LEVEL", level)
    try:
        return start(config, **more)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("level", "trains", "written"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "O0"),  # figures do not depend on the machine
        ("O0", True, "O0"),
        ("O1", False, "O1"),
    ],
)
def test_what_auto_became_is_in_effect(tmp_path, monkeypatch, computer, level, trains, written):
    computer(AMX)
    run = started(tmp_path, monkeypatch, level, trains=trains)
    assert run.effective.AMP_OPT_LEVEL == run.precision.level == written
    log = (tmp_path / run.folder / "log_rank0.txt").read_text()
    assert f"INFO precision: {run.precision.about}\n" in log


def test_processes_that_differ_are_refused(monkeypatch, computer):
    computer(new_gpu=True)
    ours = Precision("auto", GPU)
    computer(new_gpu=False)
    theirs = {"the precision": Precision("auto", GPU).about}
    monkeypatch.setattr(utils.distributed, "all_gather_objects", lambda own: [own, own, theirs])
    with pytest.raises(UserError, match=r"^process 2 differs .* the precision is float16 .*-level"):
        check_same_precision(ours)


def other_processors(_, folder: str) -> None:
    flags = AMX if rank() else OLD
    update_module.processor_flags = lambda: flags
    config, _ = tiny("configs/moby_vit_tiny.yaml", "OUTPUT", folder)
    run_module.init_process_group = lambda *given: CPU  # it is joined already
    with pytest.raises(UserError, match="process 1 differs from process 0: the precision is bfl"):
        start(config, trains=True)
    assert not os.listdir(folder)
    assert start(config).precision.level == "O0"  # an evaluation


@pytest.mark.slow
def test_two_processors_of_unlike_kinds_are_refused(tmp_path):
    spawn(other_processors, 2, str(tmp_path))


# --- a resumed run


@pytest.mark.parametrize(
    ("before", "asked", "flags", "after", "warns"),
    [
        ("AMP_OPT_LEVEL: bfloat16", "auto", AMX, "bfloat16", False),
        ("AMP_OPT_LEVEL: O0", "auto", AMX, "O0", False),
        ("AMP_OPT_LEVEL: O1", "auto", OLD, "O1", False),  # as before, emulated
        (None, "auto", AMX, "O0", False),  # it does not say
        ("AMP_OPT_LEVEL: auto", "auto", AMX, "O0", False),
        ("AMP_OPT_LEVEL: O9", "auto", AMX, "O0", False),
        ("AMP_OPT_LEVEL: float16", "auto", {"avx512_fp16"}, "float16", False),
        ("AMP_OPT_LEVEL: bfloat16", "auto", OLD, "O0", True),  # the device cannot
        ("AMP_OPT_LEVEL: float16", "auto", AMX, "bfloat16", True),
        ("AMP_OPT_LEVEL: bfloat16", "O0", AMX, "O0", True),  # what was asked for stays
        ("AMP_OPT_LEVEL: O0", "float16", AMX, "float16", True),
        ("AMP_OPT_LEVEL: O1", "O1", AMX, "O1", False),
    ],
)
def test_what_a_resumed_run_keeps(computer, caplog, before, asked, flags, after, warns):
    computer(flags)
    config, _ = tiny("configs/moby_vit_tiny.yaml", "AMP_OPT_LEVEL", asked)
    anew = Run("", CPU, Precision(asked, CPU), logging.getLogger("x"), config)
    state = {"config": f"A: 1\n{before}\nTAG: t\n"} if before else {"config": object()}
    run = keep_precision(anew, Checkpoint("c.pth", state))
    assert run.precision.level == run.effective.AMP_OPT_LEVEL == after
    warned = [r for r in caplog.records if r.levelname == "WARNING" and "c.pth" in r.message]
    assert len(warned) == warns
    if warns:
        assert before.split()[1] in warned[0].message and run.precision.about in warned[0].message


def config_of(tmp_path) -> str:
    return json.loads((tmp_path / "run/default/config.json").read_text())["AMP_OPT_LEVEL"]


def level_in(state: dict) -> str:
    (level,) = re.findall(r"^AMP_OPT_LEVEL: (\w+)$", state["config"], re.MULTILINE)
    assert state["provenance"]["precision"] == level
    return level


@pytest.mark.slow
def test_a_run_keeps_what_it_was_begun_with(run_main, imagenet, tmp_path, computer):
    """Also on another machine, as long as that can; else one warning says what changes."""
    log = tmp_path / "run/default/log_rank0.txt"
    for epochs, flags, level in (
        (1, AMX, "bfloat16"),
        (2, {"avx512_bf16"}, "bfloat16"),
        (3, OLD, "O0"),
        (4, AMX, "O0"),
    ):
        computer(flags)
        run_main(
            main_pretrain,
            *arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", epochs),
            *("AMP_OPT_LEVEL", "auto"),
        )
        assert config_of(tmp_path) == level_in(weights(tmp_path)) == level
        assert weights(tmp_path)["epoch"] == epochs - 1
    warned = [line for line in log.read_text().splitlines() if "WARNING" in line and "AMP_" in line]
    assert len(warned) == 1 and "goes on with O0: from here on products are in float32" in warned[0]


# --- float16, which the processor has too


@pytest.fixture
def first_scale(monkeypatch):
    """Let loss scaling begin elsewhere: ``first_scale(64.0)``."""
    real = torch.amp.GradScaler

    def begin_at(scale: float) -> None:
        def scaler(*given, **more):
            return real(*given, **{"init_scale": scale} | more)

        monkeypatch.setattr(torch.amp, "GradScaler", scaler)

    return begin_at


def half(imagenet, folder, *opts):
    return arguments("synco", imagenet, folder, "AMP_OPT_LEVEL", "float16", *opts)


@pytest.mark.slow
def test_float16_resumes_bit_for_bit(run_main, imagenet, tmp_path, first_scale):
    """With its scale, of which each finite update of a row may have changed the count."""
    first_scale(64.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_main(main_pretrain, *half(imagenet, whole))
    run_main(main_pretrain, *half(imagenet, parts, "TRAIN.SAVE_STEPS", 2))
    (parts / "run/default/checkpoint_previous.pth").replace(parts / "run/default/checkpoint.pth")
    cut_short = weights(parts)
    assert cut_short["step"] == 10 and cut_short["scaler"]["_growth_tracker"] > 0
    run_main(main_pretrain, *half(imagenet, parts))
    assert_same(weights(whole), weights(parts))
    assert weights(whole)["scaler"] == weights(parts)["scaler"]


@pytest.mark.slow
@pytest.mark.parametrize("levels", [("O0", "float16", "O0"), ("float16", "bfloat16", "float16")])
def test_a_checkpoint_goes_on_under_another_precision(
    run_main, imagenet, tmp_path, first_scale, levels
):
    first_scale(64.0)
    for epochs, level in enumerate(levels, 1):
        given = arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", epochs)
        run_main(main_pretrain, *given, "AMP_OPT_LEVEL", level)
        state = weights(tmp_path)
        assert (state["step"], level_in(state)) == (6 * epochs, level)
        assert bool(state["scaler"]) == (level == "float16")
        assert all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.slow
def test_float16_skips_what_overflows(run_main, imagenet, tmp_path, first_scale):
    """The scale halves until it fits; the updates until then are counted and leave no trace."""
    first_scale(2.0**26)
    run_main(main_pretrain, *half(imagenet, tmp_path, "TRAIN.MAX_SKIPPED_UPDATES", 40))
    lines = (tmp_path / "run/default/metrics.jsonl").read_text().splitlines()
    skipped = [line["skipped"] for line in map(json.loads, lines) if line["kind"] == "train"]
    state = weights(tmp_path)
    assert state["scaler"]["scale"] == 2.0 ** (26 - sum(skipped))
    assert 0 < sum(skipped) < len(skipped) == 12 and skipped[-1] == 0
    assert all(v.isfinite().all() for v in state["model"].values())


# --- TF32


@pytest.mark.parametrize(
    ("asked", "device", "new_gpu", "allowed", "said"),
    [
        (False, GPU, True, False, None),
        (True, GPU, True, True, "; TF32 products in the encoder alone"),
        (True, GPU, False, False, "; this GPU has no TF32"),
        (True, CPU, True, False, "; this processor has no TF32"),
    ],
)
def test_where_tf32_is_allowed(computer, asked, device, new_gpu, allowed, said):
    computer(OLD, new_gpu)
    precision = Precision("O0", device, asked)
    assert precision.tf32 == allowed
    assert precision.about.endswith(said or "(AMP_OPT_LEVEL O0)")


class Products(TorchDispatchMode):
    """Notes of each product which of the two precisions torch is set to, by the sizes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[set[int], str]] = []

    def __torch_dispatch__(self, function, types, given=(), more=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            sizes = {n for t in given if isinstance(t, torch.Tensor) for n in t.shape}
            self.seen.append((sizes, torch.get_float32_matmul_precision()))
        return function(*given, **(more or {}))


class OneStep(nn.Module):
    """An encoder of width 11 that is called twice, and a head of width 13."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 11))
        self.head = nn.Linear(11, 13)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = encode(self.encoder, x), encode(self.encoder, 2 * x)
        first, second = map(self.head, features)
        return (first @ second.T).square().mean()


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_reaches_the_encoder_alone_forward_and_backward(process_group, allowed):
    model = OneStep()
    allow_tf32(model.encoder, SimpleNamespace(tf32=allowed))
    ddp = data_parallel(model, CPU)
    update = Update(ddp, [torch.optim.SGD(model.parameters(), 0.1)], Precision("O0", CPU))
    with Products() as products:
        update([torch.randn(7, 5)] * 2, lambda batch: Forward(ddp(batch)))
    kinds = {"encoder": set(), "beyond": set()}
    for sizes, precision in products.seen:
        kinds["beyond" if 13 in sizes else "encoder"].add(precision)
    assert kinds == {"encoder": {"high" if allowed else "highest"}, "beyond": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("name", ["synco", "byol"])
@pytest.mark.parametrize("apart", [False, True], ids=["both views at once", "each view by itself"])
def test_tf32_never_reaches_logits_and_loss(process_group, name, apart):
    """Of the methods themselves: a queue of 37, heads' outputs of 256."""
    opts = ["MODEL.CONTRAST_NUM_NEGATIVE", "37", "MODEL.N_HARD", "8", "MODEL.WARMUP_EPOCHS", "0"]
    opts += ["MODEL.REPLACE_LN_WITH_BN", str(apart)]
    config, _ = tiny(f"configs/{name}_vit_tiny.yaml", *opts)
    model = build_method(config)
    assert model.views_apart == apart
    for encoder in (model.encoder, model.encoder_k):
        allow_tf32(encoder, SimpleNamespace(tf32=True))
    with Products() as products:
        model(*torch.randn(2, 4, 3, 32, 32), epoch=0).loss.backward()
    precisions = {"logits": set(), "encoder": set()}
    for sizes, precision in products.seen:
        if sizes & {37, 256, 4096}:
            precisions["logits"].add(precision)
        elif model.encoder.num_features in sizes:
            precisions["encoder"].add(precision)
    assert precisions == {"logits": {"highest"}, "encoder": {"high"}}
    assert torch.get_float32_matmul_precision() == "highest"


def test_levels_are_those_of_the_key_and_of_the_flag():
    from utils.config import KEYS

    assert KEYS["AMP_OPT_LEVEL"].allowed == LEVELS
    assert (ROOT / "configs/demo.yaml").read_text().count("AMP_OPT_LEVEL: O0") == 1
