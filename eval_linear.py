"""Judge an encoder by a linear classifier on its features, or by fine-tuning it."""

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from yacs.config import CfgNode

from data.augmentation import normalize
from data.loader import (
    TrainingLoader,
    add_dataset_arguments,
    build_classification_loader,
    build_labelled_sources,
)
from data.source import ImageSource
from data.transfer import TRANSFER_SETS
from evaluation.classification_metrics import MAP
from evaluation.features import check_features, encode_images
from evaluation.linear import (
    LinearClassifiers,
    build_mixup,
    describe,
    head_losses,
    read_classifiers,
    score_classifier,
    score_heads,
    weights_digest,
)
from evaluation.logistic_regression import choose_strength
from evaluation.protocols import apply_protocol
from lr_scheduler import build_scheduler, scale_learning_rates
from models import build_encoder
from models.batch_norm import synchronize_batch_norm
from models.encoder import Backbone
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder
from optimizer import build_optimizer
from utils.arguments import number_in, parse_arguments
from utils.checkpoint import (
    LATEST,
    read_checkpoint,
    restore_training,
    save_checkpoint,
    training_state,
)
from utils.distributed import data_parallel, mean_over_processes, rank, world_size
from utils.errors import UserError
from utils.progress import checkpoint_to_resume
from utils.run import Run, run_script, start, write_results
from utils.seed import seed_libraries
from utils.training_log import duration, measure_throughput, memory

BEST = "best.pth"
THROUGHPUT_STEPS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    add_dataset_arguments(parser)
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        metavar="RATE",
        help="base rates for 512 images; a probe trains a head for each at once",
    )
    parser.add_argument("--probe", choices=["sgd", "lbfgs"], default="sgd")
    for flag, default, least, most, about in (
        ("--num-l2", 45, 1, math.inf, "L2 strengths from 1e-6 to 1e5 that lbfgs tries"),
        ("--drop-path-rate", 0.2, 0.0, 0.99, "stochastic depth of fine-tuning"),
        ("--layer-decay", 0.75, 0.01, 1.0, "of fine-tuning's rate from a layer to the one before"),
    ):
        parser.add_argument(flag, type=number_in(least, most), default=default, help=about)


def main() -> None:
    """Data, encoder, heads, resume, loop, figures."""
    args, config = parse_arguments(__doc__, add_arguments)
    rates = apply_protocol(config, args.opts, args.lr)
    frozen = config.LINEAR_EVAL.WEIGHTS == "freeze"
    if args.probe == "lbfgs" and not frozen:
        raise UserError("--probe lbfgs needs a frozen encoder: leave LINEAR_EVAL.WEIGHTS at freeze")
    kind = "linprob" if frozen else "ft"
    run = start(config, os.path.join(config.OUTPUT, f"linear_{config.DATA.DATASET}_{kind}"))
    train, test = build_labelled_sources(config, args.download)
    metric = TRANSFER_SETS[config.DATA.DATASET].metric
    if config.EVAL_MODE:
        return evaluate_saved(config, test, metric, run)
    encoder = load_pretrained_encoder(args, config, run, 0.0 if frozen else args.drop_path_rate)
    if args.probe == "lbfgs":
        strengths = torch.logspace(-6, 5, args.num_l2, dtype=torch.float64).tolist()
        return probe_by_lbfgs(config, encoder, train, test, strengths, metric, run)

    loader = build_classification_loader(config, train)
    steps_per_epoch = len(loader) // max(1, config.TRAIN.ACCUMULATION_STEPS)
    # an interrupted run is continued only by one that agrees in these
    identity = {"encoder": weights_digest(encoder), "lr": rates, "classes": len(train.classes)}
    model = LinearClassifiers(encoder, len(train.classes), len(rates), config.SEED, frozen)
    model = synchronize_batch_norm(model, run.device)
    scale_learning_rates(config, world_size())
    if frozen:
        groups = model.head_groups(rates, config.TRAIN.WEIGHT_DECAY)
        # the heads compute in float32: one that diverges must not stop the steps of the others
        run.precision.scaler = torch.amp.GradScaler(run.device.type, enabled=False)
    else:
        groups = model.layer_groups(config.TRAIN.WEIGHT_DECAY, args.layer_decay)
    optimizer = build_optimizer(config, model, groups)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch)
    mixup = None if frozen or metric == MAP else build_mixup(config, len(train.classes))
    run.logger.info(
        "%s on %s: %d training and %d test images, %d classes, %d updates an epoch, base rates %s",
        *(config.LINEAR_EVAL.WEIGHTS, config.DATA.DATASET, len(train.names), len(test.names)),
        *(len(train.classes), steps_per_epoch, rates),
    )

    done = resume(config, model, optimizer, identity, run)
    ddp = data_parallel(model, run.device)
    if config.THROUGHPUT_MODE:
        step = partial(update, config, ddp, optimizer, mixup, run)
        ddp.train()
        return measure_throughput(loader, config, THROUGHPUT_STEPS, step, run)
    if frozen:  # its features of the test images stay as they are
        features, labels = encode_images(config, model.encoder, test, run)
        check_features(features, labels, "test")
    started = time.time()
    for epoch in range(done["epoch"] + 1, config.TRAIN.EPOCHS):
        train_one_epoch(config, ddp, loader, optimizer, scheduler, mixup, epoch, run)
        if not frozen:
            features, labels = encode_images(config, model.eval().encoder, test, run)
        figures = score_heads(model, features, labels, metric)
        done = judge(figures, metric, rates, epoch, done["best"], run)
        save(config, model, optimizer, identity, done, run)
    run.logger.info("training took %s", duration(time.time() - started))
    report(config, metric, done["best"], done["figures"][rates.index(done["best"]["lr"])], run)


def train_one_epoch(
    config: CfgNode,
    ddp: DistributedDataParallel,
    loader: TrainingLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    mixup: Mixup | None,
    epoch: int,
    run: Run,
) -> None:
    """Train for one epoch; all that is random follows from seed, epoch, image and update."""
    micro_batches = max(1, config.TRAIN.ACCUMULATION_STEPS)
    steps_per_epoch = len(loader) // micro_batches
    ddp.train()
    loader.batch_sampler.set_position(epoch)
    batches = iter(loader)
    sums, count = torch.zeros(len(ddp.module.heads), device=run.device), 0
    started = time.time()
    hidden = rank() > 0 or not sys.stderr.isatty()
    for index in tqdm(range(steps_per_epoch), f"epoch {epoch}", disable=hidden, leave=False):
        step = epoch * steps_per_epoch + index
        scheduler.step_update(step)
        batch = [next(batches) for _ in range(micro_batches)]
        seed_libraries(config.SEED, rank(), step)
        sums += update(config, ddp, optimizer, mixup, run, batch)
        count += 1
        if (index + 1) % config.PRINT_FREQ == 0 or index + 1 == steps_per_epoch:
            losses = mean_over_processes(sums / count).tolist()
            seconds = (time.time() - started) / (index + 1)
            run.logger.info(
                "Train: [%d/%d][%d/%d] lr %.6f time %.4f loss %s mem %.0fMB",
                *(epoch, config.TRAIN.EPOCHS, index + 1, steps_per_epoch),
                *(optimizer.param_groups[-1]["lr"], seconds),
                *(" ".join(f"{loss:.4f}" for loss in losses), memory(run.device)),
            )
            sums.zero_()
            count = 0


def update(
    config: CfgNode,
    ddp: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    mixup: Mixup | None,
    run: Run,
    batch: list[list[torch.Tensor]],
) -> torch.Tensor:
    """One update from a list of micro-batches; returns the loss of each head on the device."""
    model: LinearClassifiers = ddp.module
    smoothing = 0.0 if model.frozen else config.MODEL.LABEL_SMOOTHING
    scaler = run.precision.scaler
    parts = []
    for number, (images, targets) in enumerate(batch, 1):
        images = images.to(run.device, non_blocking=True)
        targets = targets.to(run.device, non_blocking=True)
        several = targets.ndim == 2
        if images.dtype == torch.uint8:
            images = normalize(images)
        if mixup:
            images, targets = mixup(images, targets)
        with nullcontext() if number == len(batch) else ddp.no_sync():
            with run.precision.autocast():
                scores = ddp(images)
            losses = head_losses(scores, targets, smoothing, several) / len(batch)
            scaler.scale(losses.sum()).backward()
        parts.append(losses.detach())
    scaler.unscale_(optimizer)
    if config.TRAIN.CLIP_GRAD:
        for part in model.heads if model.frozen else [model]:
            torch.nn.utils.clip_grad_norm_(part.parameters(), config.TRAIN.CLIP_GRAD)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sum(parts[1:], parts[0])


def judge(
    figures: list[dict[str, float | None] | None],
    metric: str,
    rates: list[float],
    epoch: int,
    best: dict[str, Any] | None,
    run: Run,
) -> dict[str, Any]:
    """Log the figures of every head after an epoch, and keep the best so far."""
    for rate, figure in zip(rates, figures, strict=True):
        run.logger.info("epoch %d, lr %g: %s %s", epoch, rate, metric, describe(figure))
        if figure and (best is None or figure["value"] > best["value"]):
            best = {"value": figure["value"], "epoch": epoch, "lr": rate}
    if best is None:
        raise UserError(f"training diverged with all rates {rates}: lower --lr")
    return {"epoch": epoch, "best": best, "figures": figures}


def save(
    config: CfgNode,
    model: LinearClassifiers,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    done: dict[str, Any],
    run: Run,
) -> None:
    """Write checkpoint.pth, and best.pth, which has the best head alone, if this epoch is best."""
    if rank() > 0:
        return
    scaler = run.precision.scaler
    state = training_state(config, model, optimizer, scaler, **identity, **done)
    save_checkpoint(state, os.path.join(run.folder, LATEST))
    if done["best"]["epoch"] == done["epoch"]:
        rate = done["best"]["lr"]
        alone = model.with_head(identity["lr"].index(rate))
        save_checkpoint({"model": alone, "lr": [rate], **done}, os.path.join(run.folder, BEST))


def resume(
    config: CfgNode,
    model: LinearClassifiers,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    run: Run,
) -> dict[str, Any]:
    """Load the checkpoint to continue from, if there is one; returns what it had achieved.

    One that is found, not named, is left aside if it belongs to other weights, rates or classes.
    """
    path = checkpoint_to_resume(config, run.folder, run.logger)
    if path:
        state = read_checkpoint(path, run.device)
        other = [name for name, value in identity.items() if state.get(name) != value]
        if not other:
            also = ("epoch", "best", "figures")
            restore_training(state, path, model, optimizer, run.precision.scaler, also)
            run.logger.info("resumed from %s after epoch %d", path, state["epoch"])
            return {name: state[name] for name in also}
        if config.MODEL.RESUME:
            raise UserError(f"{path}: checkpoint of another evaluation (other {', '.join(other)})")
        run.logger.warning("%s is of another %s: starting anew", path, ", ".join(other))
    return {"epoch": -1, "best": None, "figures": []}


def report(
    config: CfgNode,
    metric: str,
    best: dict[str, Any],
    last: dict[str, float | None] | None,
    run: Run,
    **more: Any,
) -> None:
    """Log the best figure and write results.json."""
    last = last or {}  # a head that has diverged in the end has no figures
    last = {name: last.get(name) for name in ("top1", "top5", "loss")}
    run.logger.info("best %s: %s, last: %s %s", metric, best, last, more or "")
    names = {"dataset": config.DATA.DATASET, "metric": metric}
    weights = config.LINEAR_EVAL.WEIGHTS
    write_results(run, names | {"weights": weights, "best": best, "last": last} | more)


def evaluate_saved(config: CfgNode, test: ImageSource, metric: str, run: Run) -> None:
    """Log the figures of the best and of the last checkpoint, or of ``--resume``; saves nothing."""
    paths = [os.path.join(run.folder, name) for name in (BEST, LATEST)]
    paths = [config.MODEL.RESUME] if config.MODEL.RESUME else list(filter(os.path.exists, paths))
    if not paths:
        raise UserError(f"{run.folder}: no {BEST} or {LATEST} to evaluate: train first")
    for path in paths:
        model, state = read_classifiers(path, build_encoder(config, 0.0), len(test.classes))
        features, labels = encode_images(config, model.encoder.to(run.device), test, run)
        run.logger.info("%s", path)
        figures = score_heads(model.to(run.device), features, labels, metric)
        judge(figures, metric, state["lr"], state["epoch"], None, run)


def probe_by_lbfgs(
    config: CfgNode,
    encoder: Backbone,
    train: ImageSource,
    test: ImageSource,
    strengths: list[float],
    metric: str,
    run: Run,
) -> None:
    """Logistic regression on the features, with the L2 strength chosen on held-out images."""
    features, labels = encode_images(config, encoder, train, run)
    test_features, test_labels = encode_images(config, encoder, test, run)
    check_features(features, labels, "training")
    check_features(test_features, test_labels, "test")
    classes = len(train.classes)
    examples = features.to(run.device), labels.to(run.device)
    l2, fit = choose_strength(*examples, classes, metric, strengths, config.SEED)
    if not fit.converged:
        run.logger.warning("L-BFGS has not converged: take the figures with care")
    figure = score_classifier(fit.scores(test_features), test_labels, metric)
    if figure is None:
        raise UserError("L-BFGS has diverged, the scores are not finite: take --probe sgd")
    found = {"probe": "lbfgs", "l2": l2, "iterations": fit.iterations}
    found |= {"gradient_norm": fit.gradient_norm, "converged": fit.converged}
    best = {"value": figure["value"], "epoch": None, "lr": None}
    report(config, metric, best, figure, run, **found)
    if rank() == 0:
        model = LinearClassifiers(encoder, classes, 1, config.SEED, frozen=True)
        model.heads[0].load_state_dict({"weight": fit.weight, "bias": fit.bias})
        state = {"model": model.state_dict(), "lr": [0.0], "epoch": 0}
        save_checkpoint(state, os.path.join(run.folder, BEST))


if __name__ == "__main__":
    run_script(main)
