"""What only a CUDA device can show: it computes what the CPU does, and trains and evaluates there.

Tolerances hold with TF32 (10 bits of mantissa), which convolutions use by default.
"""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY, arguments, assert_same, figures, run_script, weights
from test_eval_linear import tinted  # noqa: F401 (a fixture)

import eval_knn
import eval_linear
import eval_retrieval
import eval_video_seg
import main_pretrain
from models import METHODS, build_method
from models.synco import SynCo
from tools.benchmark.gpu import count_waits
from tools.benchmark.training import synco, training_step
from tools.make_tiny_davis import write_davis
from tools.make_tiny_retrieval import write_retrieval
from utils.config import load_config
from utils.distributed import init_process_group, leave_group
from utils.signals import RESUMABLE
from utils.update import Precision, allow_tf32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
ENCODERS = ["vit_nano", "swin_tiny", "timm/resnet18"]
# by which a loss of random weights may differ from the CPU's in float32, as a share
LOSS = {"O0": 0.02, "bfloat16": 0.1, "float16": 0.1}
NO_DRAWS = ["MODEL.ONLINE_DROP_PATH_RATE", "0"]  # the device draws other numbers than the CPU
CPU_LOSSES: dict[tuple[str, str], float] = {}


def metrics(output) -> list[dict]:
    text = (output / "run/default/metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]


def losses(output) -> list[float]:
    """Of the updates that were made: the scale of float16 begins so high that some are not."""
    return [line["loss"] for line in metrics(output) if not line["skipped"]]


def on_the_cpu(monkeypatch, script, *given) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        done = run_script(script, *given)
    assert done.returncode == 0, done.stdout


def cpu_loss(monkeypatch, imagenet, tmp_path, method: str, encoder: str) -> float:
    """The loss of the first update, in float32 on the CPU."""
    if (method, encoder) not in CPU_LOSSES:
        opts = ("MODEL.ENCODER", encoder, "TRAIN.EPOCHS", 1, *NO_DRAWS)
        given = arguments(method, imagenet, tmp_path / "cpu", *opts)
        on_the_cpu(monkeypatch, "main_pretrain.py", *given)
        CPU_LOSSES[method, encoder] = losses(tmp_path / "cpu")[0]
    return CPU_LOSSES[method, encoder]


def smooth(model: torch.nn.Module) -> torch.nn.Module:
    """Without the kink of ReLU, on whose other side an input near 0 may lie on the device."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.GELU())
    return model


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_cpu(monkeypatch, name, encoder, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    torch.manual_seed(0)
    opts = [*TINY, "MODEL.ENCODER", encoder]
    config = load_config(str(ROOT / f"configs/{name}_vit_tiny.yaml"), opts)
    methods = [smooth(build_method(config)).eval()]
    methods.append(copy.deepcopy(methods[0]).to(CUDA))
    for part in (methods[1].encoder, methods[1].encoder_k):
        allow_tf32(part, Precision("O0", CUDA, tf32))
    views = torch.randn(2, 4, 3, 32, 32)
    found = []
    for method in methods:
        device = next(method.parameters()).device
        found.append(method(*views.to(device), epoch=-1).loss)  # no synthetic negatives: no draws
        found[-1].backward()
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-2 if tf32 else 1e-4)
    own, other = (
        {place: p.grad.cpu() for place, p in m.named_parameters() if p.grad is not None}
        for m in methods
    )
    assert own.keys() == other.keys()
    for place, gradient in own.items():
        difference = (other[place] - gradient).norm()
        assert difference < (5e-2 if tf32 else 1e-3) * gradient.norm() + 1e-4, place


@pytest.mark.parametrize("level", LOSS)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_pretraining_begins_as_on_the_cpu(
    run_main, imagenet, tmp_path, monkeypatch, method, encoder, level
):
    """And all updates are made; with synthetic negatives in the second epoch."""
    if not Precision(level, CUDA).native:
        pytest.skip(f"this GPU has no {level}")
    expected = cpu_loss(monkeypatch, imagenet, tmp_path, method, encoder)
    opts = ("MODEL.ENCODER", encoder, "AMP_OPT_LEVEL", level, *NO_DRAWS)
    run_main(main_pretrain, *arguments(method, imagenet, tmp_path, *opts))
    found = losses(tmp_path)
    assert found[0] == pytest.approx(expected, rel=LOSS[level])
    assert len(found) >= (4 if level == "float16" else 12)
    assert all(v.isfinite().all() for v in weights(tmp_path)["model"].values())


OPTIONS = {
    "use-checkpoint": (["--use-checkpoint"], []),
    "device": ([], ["DATA.BACKEND", "device"]),
    "tf32": ([], ["TRAIN.TF32", "True"]),
    "lars": ([], ["TRAIN.OPTIMIZER.NAME", "lars"]),
    "micro-batches": ([], ["DATA.BATCH_SIZE", "2", "TRAIN.ACCUMULATION_STEPS", "2"]),
    "compile": (["--compile"], []),
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_begin_as_the_cpu(run_main, imagenet, tmp_path, monkeypatch, option, encoder):
    flags, opts = OPTIONS[option]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    given = arguments("synco", imagenet, tmp_path, "MODEL.ENCODER", encoder, *NO_DRAWS, *opts)
    run_main(main_pretrain, *flags, *given)
    found = losses(tmp_path)
    assert len(found) == 12
    if option != "micro-batches":  # whose BatchNorm sees other batches
        expected = cpu_loss(monkeypatch, imagenet, tmp_path, "synco", encoder)
        # the colours of the device are those of the CPU within 2/255
        assert found[0] == pytest.approx(expected, rel=0.05 if option == "device" else LOSS["O0"])


def start_waits(encoder: str, level: str):
    """An update of SynCo whose memory and kernels are ready."""
    args = SimpleNamespace(device="cuda", size=32, queue=32, hard=8, negatives=4, batch=4)
    step = training_step(synco(SynCo, args, encoder), level, args)
    for _ in range(3):
        step()
    return step


@pytest.mark.parametrize("level", ["O0", "bfloat16", "float16"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_update_waits(encoder, level):
    """As torch notices it on the device; ``tests/fake_cuda`` has more recipes."""
    init_process_group(0)
    try:
        assert count_waits(start_waits(encoder, level)) == 0
    finally:
        leave_group()


def test_waits_are_noticed():
    assert count_waits(lambda: torch.ones(2, device=CUDA).sum().item()) == 1


# runs a script with the operations that torch promises to repeat bit for bit
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True)
import main_pretrain
from utils.run import run_script
run_script(main_pretrain.main)
"""


def start_deterministic(given) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", DETERMINISTIC, *map(str, given)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("level", LOSS)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_stopped_by_sigterm_a_run_goes_on_bit_for_bit(imagenet, tmp_path, method, encoder, level):
    """Where torch promises equal bits, which it says itself."""
    if not Precision(level, CUDA).native:
        pytest.skip(f"this GPU has no {level}")
    opts = ("MODEL.ENCODER", encoder, "AMP_OPT_LEVEL", level, "TRAIN.EPOCHS", 12)
    whole = start_deterministic(arguments(method, imagenet, tmp_path / "whole", *opts))
    output = whole.communicate(timeout=300)[0]
    if "does not have a deterministic implementation" in output:
        pytest.skip("torch promises no equal bits: " + output.split("RuntimeError: ")[-1][:80])
    assert whole.returncode == 0, output

    given = arguments(method, imagenet, tmp_path / "parts", *opts)
    process = start_deterministic(given)
    log, end = tmp_path / "parts/run/default/metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 2,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == RESUMABLE
    assert 2 <= weights(tmp_path / "parts")["step"] < 72
    again = start_deterministic(given)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_memory_stays_and_activation_checkpoints_lower_it(run_main, imagenet, tmp_path):
    peaks = {}
    opts = ("MODEL.ENCODER", "vit_tiny", "DATA.IMG_SIZE", 224, "DATA.BATCH_SIZE", 12)
    for flags in ([], ["--use-checkpoint"]):
        gc.collect()  # what other tests hold
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        output = tmp_path / f"run{len(flags)}"
        run_main(main_pretrain, *flags, *arguments("moby", imagenet, output, *opts))
        used = [line["memory_mb"] for line in metrics(output)]
        assert used[-1] == pytest.approx(used[1], rel=0.01)  # the optimizer's state is there
        peaks[bool(flags)] = used[-1]
    assert peaks[True] < 0.7 * peaks[False]


def features_of(folder) -> list[torch.Tensor]:
    parts = [torch.load(p, weights_only=True) for p in sorted(folder.glob("*.pth"))]
    return [part for part in parts if part.is_floating_point()]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("script", [eval_knn, eval_retrieval])
def test_features_are_those_of_the_cpu(run_main, imagenet, tmp_path, monkeypatch, script, encoder):
    name, data, more = "eval_knn.py", imagenet, ["--nb-knn", "1", "5"]
    if script is eval_retrieval:
        name, data, more = "eval_retrieval.py", tmp_path / "data", ["--imsize", "64"]
        write_retrieval(str(data), landmarks=4, size=64)
    found = []
    for place in ("gpu", "cpu"):
        given = ["--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", data, *more]
        given += ["--output", tmp_path / place, "--dump-features", tmp_path / place / "features"]
        given += ["--random-weights", "--opts", *TINY, "MODEL.NAME", "run", "MODEL.ENCODER"]
        if place == "gpu":
            run_main(script, *given, encoder)
        else:
            on_the_cpu(monkeypatch, name, *given, encoder)
        found.append(features_of(tmp_path / place / "features"))
    for own, other in zip(*found, strict=True):
        assert torch.cosine_similarity(own, other).min() > 0.999


def test_video_segmentation_gives_the_figures_of_the_cpu(run_main, tmp_path, monkeypatch):
    write_davis(str(tmp_path / "data"), ["plain"], 4, 64, 128)
    found = []
    for place in ("gpu", "cpu"):
        given = ["--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", tmp_path / "data"]
        given += ["--output", tmp_path / place, "--short-side", "64", "--random-weights", "--opts"]
        given += ["MODEL.ENCODER", "vit_nano", "MODEL.NAME", "run", "DATA.IMG_SIZE", "32"]
        if place == "gpu":
            run_main(eval_video_seg, *given)
        else:
            on_the_cpu(monkeypatch, "eval_video_seg.py", *given)
        folder = tmp_path / place / "run/default/video_segmentation_davis2017"
        found.append(figures(folder / "results.json")["J&F-Mean"])
    assert found[0] == pytest.approx(found[1], abs=0.02)


@pytest.mark.parametrize(
    "flags, opts, kind",
    [
        (["--lr", "30"], [], "linprob"),
        (["--probe", "lbfgs"], [], "linprob_lbfgs"),
        (["--lr", "0.5"], ["LINEAR_EVAL.WEIGHTS", "finetune", "AUG.AUTO_AUGMENT", "none"], "ft"),
    ],
)
def test_classes_of_plain_colours_are_told_apart(run_main, tinted, tmp_path, flags, opts, kind):  # noqa: F811
    run_main(
        eval_linear,
        *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", tinted),
        *("--output", tmp_path, "--random-weights", *flags, "--opts", *TINY),
        *("DATA.BATCH_SIZE", "8", "MODEL.NAME", "run", "TRAIN.EPOCHS", "12", *opts),
    )
    found = figures(tmp_path / f"run/default/linear_imagenet_{kind}/results.json")
    last = found["last"]["top1"]
    assert last > 50 if kind == "ft" else last == 100  # chance is 25


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_with_nccl_begin_as_one_with_the_whole_batch(
    run_main, imagenet, tmp_path, method, encoder
):
    opts = ("MODEL.ENCODER", encoder, *NO_DRAWS)
    whole = arguments(method, imagenet, tmp_path / "one", *opts, "DATA.BATCH_SIZE", 8)
    run_main(main_pretrain, *whole)
    given = arguments(method, imagenet, tmp_path / "two", *opts)
    done = run_script("main_pretrain.py", *given, processes=2)
    assert done.returncode == 0, done.stdout
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 6
    # both log the mean over all images; BatchNorm is synchronised
    assert two[0] == pytest.approx(one[0], rel=LOSS["O0"])
