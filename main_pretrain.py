"""Pre-train an encoder with MoBY, BYOL or SynCo."""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from data.augmentation import normalize
from data.loader import BadImages, TrainingLoader, build_pretraining_loader
from evaluation.knn_monitor import KnnMonitor
from lr_scheduler import build_scheduler, scale_learning_rates
from models import build_method
from models.batch_norm import synchronize_batch_norm
from models.kernels import choose_kernels
from models.momentum import MomentumMethod, key_momentum
from optimizer import build_optimizer
from utils.agreement import check_agreement, digest
from utils.arguments import parse_arguments
from utils.checkpoint import training_state
from utils.distributed import (
    all_gather_batch,
    data_parallel,
    mean_over_processes,
    rank,
    world_size,
)
from utils.errors import UserError
from utils.progress import Checkpoints, images_per_update, resume
from utils.run import Run, run_script, start, write_config
from utils.seed import seed_step
from utils.signals import RESUMABLE, StopSignals, shield_workers
from utils.trackers import add_tracker_arguments
from utils.training_log import (
    Averages,
    TrainingLog,
    duration,
    measure_throughput,
    similarity_figures,
)
from utils.update import (
    SkippedInARow,
    copy_buffers,
    gradient_norms,
    poisoned_with,
    restore_buffers,
    step_if_finite,
)

COMPONENTS = ("encoder", "projector", "predictor")
THROUGHPUT_STEPS = 30


@dataclass
class Training:
    """What a run consists of, and the update with which it continues."""

    config: CfgNode
    run: Run
    loader: TrainingLoader
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    bad_images: BadImages
    checkpoints: Checkpoints
    log: TrainingLog
    knn: KnnMonitor
    skipped: SkippedInARow
    signals: StopSignals
    step: int
    shift: int  # images by which the batches of the epoch start early, see ``locate``

    def __post_init__(self) -> None:
        self.micro_batches = max(1, self.config.TRAIN.ACCUMULATION_STEPS)
        self.steps_per_epoch = len(self.loader) // self.micro_batches
        self.per_update = images_per_update(self.config)
        self.queues = queues_of(self.ddp.module)


def main() -> None:
    """Pre-train; a signal stops the run so that it can be resumed."""
    with StopSignals() as signals:
        pretrain(signals)


def pretrain(signals: StopSignals) -> None:
    """Data, model, optimizer, resume, loop."""
    _, config = parse_arguments(__doc__, add_tracker_arguments)
    if not config.AUG.SSL_AUG:
        raise UserError("pre-training needs two views: set AUG.SSL_AUG True")
    run = start(config)

    loader = build_pretraining_loader(config, "val" if config.EVAL_MODE else "train")
    shield_workers(loader)
    steps_per_epoch = len(loader) // max(1, config.TRAIN.ACCUMULATION_STEPS)

    model = synchronize_batch_norm(build_method(config), run.device)
    choose_kernels(model, run.precision)
    if config.COMPILE:
        model.encoder.compile()  # in place: the names in a checkpoint stay
        model.encoder_k.compile()
    check_batch(config, model)
    source = loader.dataset.source
    bad_images = BadImages(source, config.DATA.MAX_BAD_FRACTION, run.logger)
    names = (name.removeprefix(config.DATA.DATA_PATH) for name in source.names)
    facts = {"the number of images": len(source.names), "the images": digest(names)}
    check_agreement(facts | {"the number of weights": sum(p.numel() for p in model.parameters())})
    scale_learning_rates(config, world_size())
    write_config(config, run.folder)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch)
    describe(config, model, steps_per_epoch, run)

    resumed_from, step, shift = resume(config, model, optimizer, steps_per_epoch, run)
    ddp = data_parallel(model, run.device)

    if config.THROUGHPUT_MODE:
        return throughput(config, ddp, loader, optimizer, run)
    if config.EVAL_MODE:
        return evaluate(config, model, loader, run)

    checkpoints = Checkpoints(config, run, resumed_from)
    knn = KnnMonitor(config, source, run)
    log = TrainingLog(config, run, optimizer, model.dim, steps_per_epoch, step)
    training = Training(
        *(config, run, loader, ddp, optimizer, scheduler, bad_images, checkpoints, log),
        *(knn, SkippedInARow(run.device), signals, step, shift),
    )
    signals.training(config.DIST_TIMEOUT)
    started = time.time()
    for epoch in range(step // steps_per_epoch, config.TRAIN.EPOCHS):
        train_one_epoch(training, epoch)
    run.logger.info("training took %s", duration(time.time() - started))


def train_one_epoch(training: Training, epoch: int) -> None:
    """Train from update ``training.step`` to the end of ``epoch``, saving whenever that is due.

    Everything that depends on time (rate, momentum, random draws, the window of synthetic
    negatives) follows from the update's number and ``epoch``, so a resumed run needs no more
    than these and the place in the epoch's order of images.

    Raises:
        SystemExit: RESUMABLE, after a checkpoint, if a process got a signal to stop.
    """
    config, run, model = training.config, training.run, training.ddp.module
    steps_per_epoch, micro_batches = training.steps_per_epoch, training.micro_batches
    total_steps = config.TRAIN.EPOCHS * steps_per_epoch
    first = training.step - epoch * steps_per_epoch
    training.ddp.train()
    training.loader.batch_sampler.set_position(epoch, first * micro_batches, training.shift)
    batches = iter(training.loader)
    averages = Averages()
    epoch_started = interval_started = time.time()
    bar = tqdm(
        range(first, steps_per_epoch),
        desc=f"epoch {epoch}",
        disable=rank() > 0 or not sys.stderr.isatty(),
        leave=False,
    )
    for index in bar:
        training.scheduler.step_update(training.step)
        momentum = key_momentum(config.MODEL.CONTRAST_MOMENTUM, training.step, total_steps)
        seed_step(config.SEED, rank(), training.step)
        model.update_key_encoder(momentum)
        batch = [next(batches) for _ in range(micro_batches)]
        for *_, replaced in batch:
            training.bad_images.note(replaced)
        figures, finite = update(config, training.ddp, batch, training.optimizer, epoch, run)
        averages.add(figures, finite)
        training.skipped.add(finite)
        training.step += 1
        stop, time_is_up = training.signals.agree(training.checkpoints.time_is_up())

        last = index + 1 == steps_per_epoch
        if last or stop or (index + 1) % config.PRINT_FREQ == 0:
            seconds = (time.time() - interval_started) / averages.updates
            means = averages.read() | {"momentum": momentum}
            training.log.line(epoch, training.step, means, seconds, training.queues)
            check_health(training)
            interval_started = time.time()
        if last or stop or time_is_up or training.checkpoints.due(training.step):
            save(training, epoch, index + 1)
        if stop:
            run.logger.info("stopped by a signal after update %d: start again", training.step)
            raise SystemExit(RESUMABLE)
    training.shift = 0
    seconds = time.time() - epoch_started
    training.log.epoch(epoch, training.step, seconds, training.knn.after(epoch, model.encoder))


def update(
    config: CfgNode,
    ddp: DistributedDataParallel,
    batch: list[list[torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    epoch: int,
    run: Run,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One update from a list of micro-batches: two views of each image, and what else comes.

    Returns:
        its figures, scalars on the device, and whether loss and gradient were finite: if not, the
        optimizer made no step and queues and BatchNorm are as before, on all processes.
    """
    model: MomentumMethod = ddp.module
    scaler = run.precision.scaler
    buffers = copy_buffers(model)
    queues = queues_of(model)
    parts, keys = [], []
    for number, views in enumerate(batch, 1):
        view1, view2 = to_device(views, run.device)
        with nullcontext() if number == len(batch) else ddp.no_sync():
            with run.precision.autocast():
                output = ddp(view1, view2, epoch)
            scaler.scale(poisoned_with(output.loss) / len(batch)).backward()
        figures = {"loss": output.loss.detach(), "accuracy": output.accuracy}
        figures |= {"positive": output.positive}
        parts.append(figures | similarity_figures(output.queries, output.keys, queues))
        keys.append([all_gather_batch(k) for k in output.keys])

    scaler.unscale_(optimizer)
    norms = gradient_norms({name: getattr(model, name) for name in COMPONENTS})
    finite = norms["grad_norm"].isfinite()
    if config.TRAIN.CLIP_GRAD:
        torch.nn.utils.clip_grads_with_norm_(
            model.parameters(), config.TRAIN.CLIP_GRAD, norms["grad_norm"], foreach=True
        )
    step_if_finite(optimizer, finite)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # only now: the micro-batches of one update see the same negatives
    for keys1, keys2 in keys:
        model.enqueue(keys1, keys2)
    restore_buffers(model, buffers, finite)
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    return means | norms, finite


def to_device(views: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Two uint8 views, (B, S, S, 3) -> normalised (B, 3, S, S) on the device, channels last."""
    return [normalize(v.to(device, non_blocking=True).permute(0, 3, 1, 2)) for v in views[:2]]


def queues_of(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """queue1 and queue2, nothing if the method has none."""
    return tuple(getattr(model, name) for name in ("queue1", "queue2") if hasattr(model, name))


def check_batch(config: CfgNode, model: MomentumMethod) -> None:
    """BatchNorm needs two images, and an update must not write the queue more than once over."""
    images, queues = images_per_update(config), queues_of(model)
    if config.DATA.BATCH_SIZE * world_size() < 2:
        raise UserError("BatchNorm needs a total batch of at least 2 images: raise --batch-size")
    if queues and images > queues[0].shape[1]:
        raise UserError(
            f"an update of {images} images does not fit into MODEL.CONTRAST_NUM_NEGATIVE "
            f"{queues[0].shape[1]}: lower --batch-size or lengthen the queue"
        )


def describe(config: CfgNode, model: nn.Module, steps_per_epoch: int, run: Run) -> None:
    """Log what will be trained, and on what."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.logger.info(
        "%s with %s: %.2f M parameters learn, %d images, %d updates an epoch, base rate %.3g",
        *(config.MODEL.TYPE, config.MODEL.ENCODER, learned / 1e6),
        *(config.DATA.TRAINING_IMAGES, steps_per_epoch, config.TRAIN.BASE_LR),
    )


def check_health(training: Training) -> None:
    """Stop when the images or the numbers are bad for long; every process has to call it."""
    training.bad_images.check()
    row, most = training.skipped.most(), training.config.TRAIN.MAX_SKIPPED_UPDATES
    if row >= most:
        good = training.checkpoints.last_good or "none so far"
        raise UserError(
            f"{row} updates in a row had a loss or gradient that is not finite (at most "
            f"TRAIN.MAX_SKIPPED_UPDATES {most}): lower TRAIN.BASE_LR and continue from the last "
            f"good checkpoint, {good}"
        )


def save(training: Training, epoch: int, done: int) -> None:
    """Write a checkpoint after ``done`` updates of ``epoch``; every process has to call it."""
    config, run = training.config, training.run
    ended = done == training.steps_per_epoch
    # an epoch is complete without the images that fill no update
    seen = config.DATA.TRAINING_IMAGES if ended else done * training.per_update - training.shift

    def state() -> dict:
        return training_state(
            config,
            training.ddp.module,
            training.optimizer,
            run.precision.scaler,
            lr_scheduler=training.scheduler.state_dict(),
            epoch=epoch,
            step=training.step,
            images=seen,
            images_per_update=training.per_update,
            training_images=config.DATA.TRAINING_IMAGES,
            rng_state=torch.get_rng_state(),
        )

    training.checkpoints.save(state, epoch if ended else None)


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
