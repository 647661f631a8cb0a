"""The part of python -m tools.benchmark for a GPU node; on a CPU it shows that it runs."""

import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from data.device_views import finish
from data.loader import build_pretraining_loader, num_workers
from models.synco import SynCo
from tools.benchmark.data import photographs
from tools.benchmark.timing import compare, in_group, synchronize
from tools.benchmark.training import peak_memory, step_flops, synco, training_step
from utils.config import load_config

# The vendor's figures for dense products in TFLOP/s: float16 and bfloat16 by tensor cores, TF32,
# and float32. The first whose words are all in the device's name; None: it has no such products.
PEAKS: dict[str, tuple[float, float | None, float]] = {
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417, 60),
    "H100": (989, 494, 67),
    "H200": (989, 494, 67),
    "B200": (2250, 1125, 75),
    "A100": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "V100": (125, None, 15.7),
    "T4": (65, None, 8.1),
}
LAUNCHES = ("LaunchKernel", "GraphLaunch")  # in the names of the driver's calls
SYNCHRONIZING = "called a synchronizing CUDA operation"  # torch's warning
COLUMNS = {
    "images_per_s": "images/s",
    "waits": "waits",
    "launches": "launches",
    "memory_mb": "memory MB",
    "tflops": "TFLOP/s a device",
    "share_of_peak": "share of the vendor's peak",
    "first_s": "first update s",
}


def peak(name: str, precision: str) -> float | None:
    """The vendor's peak of a device in TFLOP/s, None for one that is not in the table."""
    words = set(name.replace("-", " ").split())
    for device, (half, tf32, single) in PEAKS.items():
        if set(device.split()) <= words and "MIG" not in words:
            return {"O0": single, "tf32": tf32}.get(precision, half)
    return None


def gpu(args: argparse.Namespace) -> dict:
    """Updates by encoder, precision and number of processes, one form compiled; the loader."""
    cuda = args.device == "cuda"
    precisions = ["O0"]
    if cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        precisions = ["O0", "tf32", "float16", "bfloat16"]
    elif cuda:
        precisions = ["O0", "float16"]
    devices = torch.cuda.device_count() if cuda else 2
    groups = [n for n in (2, 4, 8) if n <= devices]
    updates: dict[str, dict] = {}
    for encoder in args.encoders:
        # on the CPU: a GPU in exclusive mode is for the processes that measure
        flops = step_flops(encoder, argparse.Namespace(**vars(args) | {"device": "cpu"}))
        forms = [(p, False, 1) for p in precisions] + [(precisions[-1], True, 1)]
        forms += [(precisions[-1], False, processes) for processes in groups]
        for precision, compiled, processes in forms:
            name = f"{encoder} {precision} {'compiled' if compiled else 'eager'} {processes}"
            found = or_error(processes, measure, encoder, precision, compiled, args)
            if "s" in found:
                found["tflops"] = flops / found["s"] / 1e12
                limit = peak(device_name(args), precision)
                found |= {"share_of_peak": found["tflops"] / limit} if limit else {}
            updates[name] = found
            print(name, found, flush=True)
    loader = {name: or_error(1, load, name, args) for name in ("opencv", "device")}
    return {"device": device_name(args), "update": updates, "loader": loader}


def device_name(args: argparse.Namespace) -> str:
    """What is measured."""
    return torch.cuda.get_device_name() if args.device == "cuda" else "CPU"


def or_error(processes: int, function: Callable[..., dict], *arguments: Any) -> dict:
    """What ``in_group`` gives, or its ``error``: an encoder too large costs only its own row."""
    try:
        return in_group(processes, function, *arguments)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        return {"error": str(error).strip().splitlines()[-1][:200]}


def measure(encoder: str, precision: str, compiled: bool, args: argparse.Namespace) -> dict:
    """Seconds, waits, launches and memory of an update, the same on each process of the group."""
    method = synco(SynCo, args, encoder)
    if compiled:  # with ``--quick`` nothing makes code of it, which takes a minute
        for part in (method.encoder, method.encoder_k):
            part.compile(backend="eager" if args.quick else "inductor")
    step = training_step(method, precision, args)
    started = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - started
    for _ in range(args.warm_up):
        step()
    synchronize()
    seconds = compare(args.rounds, step=step)["step"]
    return {
        "s": seconds,
        "images_per_s": args.batch * torch.distributed.get_world_size() / seconds,
        "waits": count_waits(step),
        "launches": count_launches(step),
        "memory_mb": _memory() / 2**20,
        "first_s": first,
    }


def _memory() -> int:
    """The most bytes of the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()


def count_waits(step: Callable[[], object]) -> int:
    """How often ``step`` lets the host wait for the GPU, as torch notices it.

    On the CPU, how often it reads a value of a tensor.
    """
    if not torch.cuda.is_available():
        return _events(step, lambda e: e.name == "aten::_local_scalar_dense")
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNCHRONIZING in str(warning.message) for warning in caught)


def count_launches(step: Callable[[], object]) -> int:
    """How many kernels ``step`` starts; on the CPU, how many operators have none within them."""
    if torch.cuda.is_available():
        return _events(step, lambda e: any(part in e.name for part in LAUNCHES))
    return _events(step, lambda e: e.name.startswith("aten::") and not e.cpu_children)


def _events(step: Callable[[], object], wanted: Callable[[Any], bool]) -> int:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
        synchronize()
    return sum(map(wanted, profiler.events() or []))


def load(backend: str, args: argparse.Namespace) -> dict:
    """Images a second that the workers of a process deliver, and of the colours on the device."""
    with tempfile.TemporaryDirectory() as root:
        opts = ["DATA.DATA_PATH", root, "DATA.BACKEND", backend, "DATA.IMG_SIZE", str(args.size)]
        opts += ["DATA.BATCH_SIZE", str(args.batch), "OUTPUT", root]
        config = load_config(str(Path(__file__).parents[2] / "configs/synco_vit_small.yaml"), opts)
        workers = num_workers(config)
        folder = Path(root, "train", "class0")
        folder.mkdir(parents=True)
        files = photographs(args.images)
        for number in range(args.batch * (8 * workers + args.rounds)):
            path, first = folder / f"{number}.jpg", folder / f"{number % len(files)}.jpg"
            path.write_bytes(files[number]) if path == first else path.hardlink_to(first)
        loader = build_pretraining_loader(config)
        loader.start_at(0, 0)
        updates = iter(loader)
        for _ in range(1 + loader.ahead):
            batch = next(updates)[0]
        started = time.perf_counter()
        count = sum(len(micro[0]) for update in updates for micro in update)
        rate = count / (time.perf_counter() - started)
    found = {"images_per_s": rate, "workers": workers}
    if backend == "device":
        views = [view.to(args.device).permute(0, 3, 1, 2) for view in (batch.first, batch.second)]
        pairs = list(zip(views, batch.draws.to(args.device).unbind(1), strict=True))
        seconds = compare(args.rounds, colours=lambda: [finish(*pair) for pair in pairs])
        found["colours_images_per_s"] = args.batch / seconds["colours"]
    return found


def table(results: dict) -> str:
    """The results of ``gpu`` as Markdown."""
    heads = ["encoder", "precision", "form", "processes", *COLUMNS.values()]
    rows = [heads, ["---"] * len(heads)]
    for name, found in results["update"].items():
        cells = [f"{found[key]:.4g}" if key in found else "" for key in COLUMNS]
        said = [found["error"].replace("|", "/")] if "error" in found else cells
        rows.append([*name.split(), *said])
    columns = ("images_per_s", "workers", "colours_images_per_s", "error")
    loader = [["loader", "images/s", "workers", "colours on the device, images/s", "error"]]
    loader.append(["---"] * len(loader[0]))
    for name, found in results["loader"].items():
        cells = [found.get(key, "") for key in columns]
        loader.append([name, *(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)])
    lines = [f"| {' | '.join(row)} |" if row else "" for row in [*rows, [], *loader]]
    about = "Shares are of the vendor's figure for dense products, see tools/benchmark/gpu.py."
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return "\n".join([f"# {results['device']}", "", f"{versions}. {about}", "", *lines]) + "\n"
