"""Pre-train an encoder with MoBY, BYOL or SynCo."""

import os
import sys
import time
from contextlib import nullcontext

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from data.augmentation import normalize
from data.loader import build_pretraining_loader
from lr_scheduler import build_scheduler, scale_learning_rates
from models import build_method
from models.batch_norm import synchronize_batch_norm
from models.encoder import use_fused_attention
from models.momentum import MomentumMethod, key_momentum
from optimizer import build_optimizer
from utils.arguments import parse_arguments
from utils.checkpoint import (
    LATEST,
    checkpoint_to_resume,
    read_checkpoint,
    restore_training,
    save_checkpoint,
    training_state,
)
from utils.distributed import (
    all_gather_batch,
    data_parallel,
    mean_over_processes,
    rank,
    world_size,
)
from utils.errors import UserError
from utils.launch import Run, run_script, start
from utils.measure import duration, measure_throughput, memory
from utils.seed import seed_step

COMPONENTS = ("encoder", "projector", "predictor")
THROUGHPUT_STEPS = 30


def main() -> None:
    """Data, model, optimizer, resume, loop."""
    _, config = parse_arguments(__doc__)
    if not config.AUG.SSL_AUG:
        raise UserError("pre-training needs two views: set AUG.SSL_AUG True")
    run = start(config)

    loader = build_pretraining_loader(config, "val" if config.EVAL_MODE else "train")
    micro_batches = max(1, config.TRAIN.ACCUMULATION_STEPS)
    steps_per_epoch = len(loader) // micro_batches

    model = synchronize_batch_norm(build_method(config), run.device)
    # on the CPU, the fused kernel's backward pass in bfloat16 is slower than plain products
    use_fused_attention(model, not (run.precision.enabled and run.device.type == "cpu"))
    if config.COMPILE:
        model.encoder.compile()  # in place: the names in a checkpoint stay
        model.encoder_k.compile()
    check_batch(config, micro_batches)
    scale_learning_rates(config, world_size())
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch)
    describe(config, model, steps_per_epoch, run)

    step = resume(config, model, optimizer, steps_per_epoch, run)
    ddp = data_parallel(model, run.device)

    if config.THROUGHPUT_MODE:
        return throughput(config, ddp, loader, optimizer, run)
    if config.EVAL_MODE:
        return evaluate(config, model, loader, run)

    started = time.time()
    for epoch in range(step // steps_per_epoch, config.TRAIN.EPOCHS):
        step = train_one_epoch(config, ddp, loader, optimizer, scheduler, epoch, step, run)
        save(config, model, optimizer, scheduler, epoch, step, run)
    run.logger.info("training took %s", duration(time.time() - started))


def train_one_epoch(
    config: CfgNode,
    ddp: DistributedDataParallel,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    epoch: int,
    step: int,
    run: Run,
) -> int:
    """Train from update ``step`` to the end of ``epoch``; returns the next update's number.

    Everything that depends on time (rate, momentum, random draws, the window of synthetic
    negatives) follows from ``step`` and ``epoch``, so a resumed run needs no more than these.
    """
    model: MomentumMethod = ddp.module
    micro_batches = max(1, config.TRAIN.ACCUMULATION_STEPS)
    steps_per_epoch = len(loader) // micro_batches
    total_steps = config.TRAIN.EPOCHS * steps_per_epoch
    first = step - epoch * steps_per_epoch
    ddp.train()
    loader.batch_sampler.set_position(epoch, first * micro_batches)
    batches = iter(loader)
    # sums stay on the device; reading them is a synchronisation, done at PRINT_FREQ only
    sums, count = torch.zeros(len(COMPONENTS) + 4, device=run.device), 0
    epoch_started = interval_started = time.time()
    bar = tqdm(
        range(first, steps_per_epoch),
        desc=f"epoch {epoch}",
        disable=rank() > 0 or not sys.stderr.isatty(),
        leave=False,
    )
    for index in bar:
        scheduler.step_update(step)
        momentum = key_momentum(config.MODEL.CONTRAST_MOMENTUM, step, total_steps)
        seed_step(config.SEED, rank(), step)
        model.update_key_encoder(momentum)
        batch = [next(batches) for _ in range(micro_batches)]
        sums += update(config, ddp, batch, optimizer, epoch, run)
        count += 1
        step += 1

        if (index + 1) % config.PRINT_FREQ == 0 or index + 1 == steps_per_epoch:
            loss, accuracy, positive, norm, *norms = mean_over_processes(sums / count).tolist()
            seconds = (time.time() - interval_started) / count
            run.logger.info(
                "Train: [%d/%d][%d/%d] eta %s lr %.6f momentum %.6f time %.4f loss %.4f "
                "accuracy %.4f positive %.4f grad_norm %.4f (%s) images/s %.1f mem %.0fMB",
                epoch,
                config.TRAIN.EPOCHS,
                index + 1,
                steps_per_epoch,
                duration(seconds * (total_steps - step)),
                optimizer.param_groups[0]["lr"],
                momentum,
                seconds,
                loss,
                accuracy,
                positive,
                norm,
                " ".join(f"{n} {v:.4f}" for n, v in zip(COMPONENTS, norms, strict=True)),
                config.DATA.BATCH_SIZE * world_size() * micro_batches / seconds,
                memory(run.device),
            )
            sums.zero_()
            count = 0
            interval_started = time.time()
    run.logger.info("EPOCH %d training takes %s", epoch, duration(time.time() - epoch_started))
    return step


def update(
    config: CfgNode,
    ddp: DistributedDataParallel,
    batch: list[list[torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    epoch: int,
    run: Run,
) -> torch.Tensor:
    """One update from a list of micro-batches; returns its statistics on the device.

    These are loss, accuracy, positive similarity, the gradient's norm, and that of each of
    COMPONENTS.
    """
    model: MomentumMethod = ddp.module
    scaler = run.precision.scaler
    statistics, keys = [], []
    for number, views in enumerate(batch, 1):
        view1, view2 = to_device(views, run.device)
        with nullcontext() if number == len(batch) else ddp.no_sync():
            with run.precision.autocast():
                output = ddp(view1, view2, epoch)
            scaler.scale(output.loss / len(batch)).backward()
        statistics.append(torch.stack([output.loss.detach(), output.accuracy, output.positive]))
        keys.append([all_gather_batch(k) for k in output.keys])

    scaler.unscale_(optimizer)
    norms = gradient_norms(model)
    if config.TRAIN.CLIP_GRAD:
        torch.nn.utils.clip_grads_with_norm_(
            model.parameters(), config.TRAIN.CLIP_GRAD, norms[0], foreach=True
        )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # only now: the micro-batches of one update see the same negatives
    for keys1, keys2 in keys:
        model.enqueue(keys1, keys2)
    return torch.cat([torch.stack(statistics).mean(0), norms])


def to_device(views: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Two uint8 views, (B, S, S, 3) -> normalised (B, 3, S, S) on the device, channels last."""
    return [normalize(v.to(device, non_blocking=True).permute(0, 3, 1, 2)) for v in views[:2]]


def gradient_norms(model: nn.Module) -> torch.Tensor:
    """L2 norm of all gradients, then of each of COMPONENTS, without a synchronisation."""
    norms = [
        torch.nn.utils.get_total_norm(
            [p.grad for p in getattr(model, name).parameters() if p.grad is not None]
        )
        for name in COMPONENTS
    ]
    parts = torch.stack([n.to(next(model.parameters()).device) for n in norms])
    return torch.cat([parts.norm()[None], parts])


def check_batch(config: CfgNode, micro_batches: int) -> None:
    """BatchNorm needs two images, and an update must not write the queue more than once over."""
    images = config.DATA.BATCH_SIZE * world_size()
    length = config.MODEL.CONTRAST_NUM_NEGATIVE
    if images < 2:
        raise UserError("BatchNorm needs a total batch of at least 2 images: raise --batch-size")
    if config.MODEL.TYPE != "byol" and images * micro_batches > length:
        raise UserError(
            f"an update of {images * micro_batches} images does not fit into "
            f"MODEL.CONTRAST_NUM_NEGATIVE {length}: lower --batch-size or lengthen the queue"
        )


def describe(config: CfgNode, model: nn.Module, steps_per_epoch: int, run: Run) -> None:
    """Log what will be trained, and on what."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.logger.info(
        "%s with %s: %.2f M parameters learn, %d images, %d updates an epoch, base rate %.3g",
        config.MODEL.TYPE,
        config.MODEL.ENCODER,
        learned / 1e6,
        config.DATA.TRAINING_IMAGES,
        steps_per_epoch,
        config.TRAIN.BASE_LR,
    )


def save(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    epoch: int,
    step: int,
    run: Run,
) -> None:
    """Write checkpoint.pth, and every SAVE_FREQ epochs and at the end ckpt_epoch_N.pth."""
    if rank() > 0:
        return
    state = training_state(
        config,
        model,
        optimizer,
        run.precision.scaler,
        lr_scheduler=scheduler.state_dict(),
        epoch=epoch,
        step=step,
        rng_state=torch.get_rng_state(),
    )
    names = [LATEST]
    if (epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS:
        names.append(f"ckpt_epoch_{epoch}.pth")
    for name in names:
        path = os.path.join(run.folder, name)
        save_checkpoint(state, path)
        run.logger.info("%s saved", path)


def resume(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    run: Run,
) -> int:
    """Load the checkpoint to continue from, if there is one; returns the next update's number."""
    path = checkpoint_to_resume(config, run.folder)
    if not path:
        return config.TRAIN.START_EPOCH * steps_per_epoch
    state = read_checkpoint(path, run.device)
    restore_training(
        state, path, model, optimizer, run.precision.scaler, also=("step", "rng_state")
    )
    torch.set_rng_state(state["rng_state"].cpu())
    run.logger.info("resumed from %s at update %d", path, state["step"])
    return state["step"]


@torch.no_grad()
def evaluate(config: CfgNode, model: MomentumMethod, loader: DataLoader, run: Run) -> None:
    """Log the loss of two views of the val images, without an update."""
    model.eval()
    sums = torch.zeros(3, device=run.device)
    for views in loader:
        view1, view2 = to_device(views, run.device)
        with run.precision.autocast():
            # no synthetic negatives, so that the losses of all epochs compare
            output = model(view1, view2, epoch=-1)
        sums += torch.stack([output.loss, output.accuracy, output.positive])
    loss, accuracy, positive = mean_over_processes(sums / len(loader)).tolist()
    run.logger.info("Eval: loss %.4f accuracy %.4f positive %.4f", loss, accuracy, positive)


def throughput(
    config: CfgNode,
    ddp: DistributedDataParallel,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    run: Run,
) -> None:
    """Log images a second of the loader alone and of the update alone; saves nothing."""

    def step(batch: list[list[torch.Tensor]]) -> None:
        ddp.module.update_key_encoder(config.MODEL.CONTRAST_MOMENTUM)
        update(config, ddp, batch, optimizer, config.MODEL.WARMUP_EPOCHS, run)

    ddp.train()
    measure_throughput(loader, config, THROUGHPUT_STEPS, step, run)


if __name__ == "__main__":
    run_script(main)
