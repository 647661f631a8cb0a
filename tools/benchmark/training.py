"""The parts of python -m tools.benchmark about training."""

import argparse
import logging
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from data.dataset import Views
from lr_scheduler import scaled_rates
from main_pretrain import PARTS, forward_views
from models.batch_norm import synchronize_batch_norm
from models.encoder import Backbone, choose_attention, create_encoder
from models.synco import SynCo
from optimizer import build_optimizer
from tools.benchmark.plain import PlainSynCo, momentum_loop
from tools.benchmark.timing import CONTEXT, compare, compare_apart, in_group
from utils.config import load_config
from utils.distributed import data_parallel, init_process_group
from utils.run import Run, keep_freed_memory
from utils.update import Precision, Update, allow_tf32

HEAD_PASSES = 5  # in one timed run: a pass is short compared with a change of processes


CONTEXT.set_forkserver_preload([__name__])
Method = TypeVar("Method", bound=SynCo)


class Nothing(Backbone):
    """An encoder for measuring the heads alone."""

    num_features = 8


def synco(kind: type[Method], args: argparse.Namespace, encoder: str | None = None) -> Method:
    """A SynCo of ``kind`` that makes synthetic negatives in every epoch.

    Its process allocates memory as the scripts do, and the plain form's as Python does.
    """
    torch.manual_seed(0)
    if kind is SynCo:
        keep_freed_memory()
    online, keys = (
        create_encoder(encoder, args.size, drop_path_rate=rate) if encoder else Nothing()
        for rate in (0.2, 0.0)
    )
    method = kind(
        online,
        keys,
        num_negatives=args.queue,
        n_hard=args.hard,
        counts=(args.negatives,) * 6,
        warmup_epochs=0,
    )
    return method.to(args.device)


def head_pass(method: SynCo, q: torch.Tensor, k: torch.Tensor) -> None:
    """The loss of one direction, and its gradient."""
    q = q.detach().requires_grad_()
    method._contrast(q, k, method.queue1, 0)[0].backward()


def extra_memory(kind: type[SynCo], args: argparse.Namespace) -> int:
    """The bytes that a pass takes on top of its inputs."""
    method = synco(kind, args)
    q, k = F.normalize(torch.randn(2, args.head_batch, 256, device=args.device), dim=2)
    head_pass(method, q[:2], k[:2])  # the libraries load
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head_pass(method, q, k)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = peak_memory()
    head_pass(method, q, k)
    return peak_memory() - before


def peak_memory() -> int:
    """The most bytes that this process has held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def build_head(kind: type[SynCo], batch: int, args: argparse.Namespace) -> Callable:
    """Some passes of one direction for ``batch`` queries, in a process of its own."""
    method = synco(kind, args)
    q, k = F.normalize(torch.randn(2, batch, 256, device=args.device), dim=2)

    def passes() -> None:
        for _ in range(HEAD_PASSES):
            head_pass(method, q, k)

    return passes


def head(args: argparse.Namespace) -> dict:
    """Loss and gradient of one direction with synthetic negatives, closed form and built."""
    times = compare_apart(
        3 * args.rounds,
        args.warm_up,
        {},
        closed=(build_head, (SynCo, args.head_batch, args)),
        plain=(build_head, (PlainSynCo, args.head_batch, args)),
    )
    memory = {kind: in_group(1, extra_memory, kind, args) for kind in (SynCo, PlainSynCo)}
    without = argparse.Namespace(**vars(args) | {"negatives": 0})
    parts = compare_apart(
        args.rounds,
        args.warm_up,
        {},
        head=(build_head, (SynCo, args.batch, args)),
        without=(build_head, (SynCo, args.batch, without)),
        step=(build_step, ("O0", "vit_small", args)),
    )
    return {
        "closed_ms": 1e3 * times["closed"] / HEAD_PASSES,
        "plain_ms": 1e3 * times["plain"] / HEAD_PASSES,
        "speedup": times["plain"] / times["closed"],
        "extra_memory_mb": memory[SynCo] / 2**20,
        "plain_extra_memory_mb": memory[PlainSynCo] / 2**20,
        "extra_memory_ratio": memory[SynCo] / max(1, memory[PlainSynCo]),
        # both directions of what the synthetic negatives add
        "share_of_step": 2 * (parts["head"] - parts["without"]) / HEAD_PASSES / parts["step"],
    }


def training_step(method: SynCo, level: str, args: argparse.Namespace) -> Callable:
    """The update of main_pretrain.py, without its data and its logging, in a process group.

    ``level`` is one of AMP_OPT_LEVEL, or ``tf32`` for float32 with such products in the encoder.
    """
    device = torch.device(args.device)
    precision = Precision("O0" if level == "tf32" else level, device, tf32=level == "tf32")
    config = load_config(str(Path(__file__).parents[2] / "configs/synco_vit_small.yaml"))
    run = Run("", device, precision, logging.getLogger(), config)
    method = synchronize_batch_norm(method, device)
    choose_attention(method, precision)
    for encoder in (method.encoder, method.encoder_k):
        allow_tf32(encoder, precision)
    optimizer = build_optimizer(config, method, scaled_rates(config, args.batch).base)
    ddp = data_parallel(method, device)
    parts = {name: getattr(method, name) for name in PARTS}
    update = Update(ddp, [optimizer], run.precision, config.TRAIN.CLIP_GRAD, parts)
    forward = partial(forward_views, ddp, device, 0)
    size = (2, args.batch, args.size, args.size, 3)
    views = torch.randint(256, size, dtype=torch.uint8, device=device)
    none = torch.full((args.batch,), -1)
    batch = Views(views[0], views[1], replaced=none, label=none, draws=torch.empty(args.batch, 0))
    ddp.train()

    def step() -> None:
        method.update_key_encoder(0.99)
        result = update([batch], forward)
        method.enqueue(*result.outputs[0].keys, result.finite)

    return step


def plain_step(method: PlainSynCo, views: torch.Tensor) -> Callable:
    """The update, with everything done one parameter at a time."""
    learned = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, 1e-4, foreach=False, fused=False)
    method.train()

    def step() -> None:
        method.update_key_encoder(0.99)
        output = method(*views, epoch=0)
        optimizer.zero_grad(set_to_none=False)
        output.loss.backward()
        gradients = [p.grad for p in learned if p.grad is not None]
        norm = sum(g.norm().item() ** 2 for g in gradients) ** 0.5
        for g in gradients:
            g.mul_(min(1.0, 5.0 / norm))
        optimizer.step()
        keys1, keys2 = output.keys
        method.enqueue(keys1, keys2, torch.tensor(True, device=keys1.device))

    return step


def note_rate(rates: list[float], args: argparse.Namespace) -> None:
    """Add the best rate of torch's float32 product over a few shapes, in operations a second."""
    best = 0.0
    for m, k, n in ((1024, 1024, 1024), (2048, 2048, 2048), (6304, 384, 1536), (6304, 1536, 384)):
        a, b = torch.randn(m, k, device=args.device), torch.randn(n, k, device=args.device)
        seconds = compare(5, product=partial(F.linear, a, b))["product"]
        best = max(best, 2 * m * k * n / seconds)
    rates.append(best)


def build_step(form: str, encoder: str, args: argparse.Namespace) -> Callable:
    """An update, ``plain`` or at a level of precision, in a process of its own."""
    if form == "plain":
        views = torch.randn(2, args.batch, 3, args.size, args.size, device=args.device)
        return plain_step(synco(PlainSynCo, args, encoder), views)
    init_process_group(0)
    return training_step(synco(SynCo, args, encoder), form, args)


def step_flops(encoder: str, args: argparse.Namespace) -> float:
    """Floating-point operations of an update: products, convolutions and attention."""
    images = 2  # the rest are alike
    method = synco(SynCo, args, encoder)
    layers: list[Any] = list(method.modules())
    for layer in layers:
        layer.fused_attn = False  # the fused kernel of the CPU is not counted
    views = torch.randn(2, images, 3, args.size, args.size, device=args.device)
    with FlopCounterMode(display=False) as counter:
        method(*views, epoch=-1).loss.backward()
    return counter.get_total_flops() * args.batch / images


def step(args: argparse.Namespace) -> dict:
    """An update of SynCo: plain, float32 and autocast, and its share of the product rate."""
    results = {}
    for encoder in args.encoders:
        rates: list[float] = []
        times = compare_apart(
            args.rounds,
            args.warm_up,
            {"rates": partial(note_rate, rates, args)},
            **{form: (build_step, (form, encoder, args)) for form in ("plain", "O0", "O1")},
        )
        rate = step_flops(encoder, args) / times["O0"]
        limit = statistics.median(rates)
        results[encoder] = {
            "plain_s": times["plain"],
            "O0": {
                "s": times["O0"],
                "ratio": times["O0"] / times["plain"],
                "gflops": rate / 1e9,
                "limit_gflops": limit / 1e9,
                "share_of_limit": rate / limit,
            },
            "O1": {"s": times["O1"], "ratio": times["O1"] / times["plain"]},
        }
    return results


def momentum(args: argparse.Namespace) -> dict:
    """The key encoder's update for ViT-S: one call, a loop, and the memory's bandwidth."""
    method = synco(SynCo, args, "vit_small")
    values = sum(p.numel() for p in method.encoder_k.parameters())
    values += sum(p.numel() for p in method.projector_k.parameters())
    source, target = torch.randn(2, values, device=args.device)

    def loop() -> None:
        momentum_loop(method.encoder, method.encoder_k, 0.99)
        momentum_loop(method.projector, method.projector_k, 0.99)

    times = compare(
        5 * args.rounds,
        one_call=lambda: method.update_key_encoder(0.99),
        loop=loop,
        add=lambda: target.add_(source),  # reads two values and writes one, as the update does
    )
    return {
        "one_call_ms": 1e3 * times["one_call"],
        "loop_ms": 1e3 * times["loop"],
        "speedup": times["loop"] / times["one_call"],
        "share_of_bandwidth": times["add"] / times["one_call"],
    }


def step_seconds(args: argparse.Namespace) -> float:
    """Time the updates of a process of a group, on one core."""
    torch.set_num_threads(1)
    step = training_step(synco(SynCo, args, args.encoders[0]), "O0", args)
    return compare(args.rounds, step=step)["step"]


def scaling(args: argparse.Namespace) -> dict:
    """Images a second of two processes on a core each, over those of one on one core."""
    if args.device == "cuda":
        return {}
    one, two = (in_group(processes, step_seconds, args) for processes in (1, 2))
    return {"one_s": one, "two_s": two, "two_processes": 2 * one / two}
