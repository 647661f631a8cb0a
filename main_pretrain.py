"""Pre-train an encoder with MoBY, BYOL or SynCo.

    python main_pretrain.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG

DATA holds train/<class>/<image>, or another form of docs/data.md. --cfg takes recipes of configs/.
--dry-run says what would be trained and how long it takes; torchrun starts one process a GPU.
"""

import argparse
import contextlib
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data.dataset import Views
from data.loader import BadImages, TrainingLoader, build_pretraining_loader, normalize
from data.opening import DataPath, open_splits
from evaluation.knn_monitor import KnnMonitor
from lr_scheduler import build_scheduler, scaled_rates, without_effect
from models import build_method
from models.batch_norm import synchronize_batch_norm
from models.encoder import add_encoder_list, choose_attention
from models.momentum import MomentumMethod, Output, key_momentum
from models.network import check_network, network_changes, network_of, network_said
from models.synco import SynCo
from optimizer import build_optimizer
from utils.arguments import add_tracker_arguments, given_keys, number_in, parse_arguments
from utils.checkpoint import checkpoint_to_resume, read_checkpoint, restore_training, training_state
from utils.distributed import check_agreement, data_parallel, mean_over_processes, rank, world_size
from utils.errors import UserError
from utils.progress import (
    Checkpoints,
    Progress,
    images_per_update,
    locate,
    warn_of_changes,
    warn_of_settings,
)
from utils.provenance import data_facts, gather_provenance, moment
from utils.run import Run, in_effect, keep_precision, run_script, start, write_config
from utils.seed import seed_step
from utils.signals import StopSignals, end_stopped
from utils.training_log import TrainingLog, duration, measure_throughput
from utils.update import Update, allow_tf32

if TYPE_CHECKING:
    from data.source import ImageSource
    from evaluation.online_probe import OnlineProbe
    from models.pretrained import EncoderFile

PARTS = ("encoder", "projector", "predictor")  # whose gradient norms are reported


def main() -> None:
    """Data, model, optimizer, resume, loop; a signal stops the run so that it can be resumed."""
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        args, config = parse_arguments(__doc__, add_arguments)
        if not config.AUG.SSL_AUG:
            raise UserError("pre-training needs two views: set AUG.SSL_AUG True")
        for flag, given in (("--profile", args.profile), ("--dry-run", args.dry_run)):
            if given and (config.EVAL_MODE or config.THROUGHPUT_MODE):
                raise UserError(f"{flag} needs updates: leave out --eval and --throughput")
        folder = None
        if args.dry_run:
            from utils.dry_run import rehearse, scratch_folder  # few runs need it

            folder = stack.enter_context(scratch_folder())
        run = start(config, folder, trains=True)
        saved = find_checkpoint(config, run)
        config, weights = read_starting_weights(config, args, saved, run)

        loader = build_pretraining_loader(config, "val" if config.EVAL_MODE else "train")
        source = loader.dataset.source
        bad_images = BadImages(source, config.DATA.MAX_BAD_FRACTION, run.logger)

        if saved:
            run = keep_precision(run, config, *saved)
        model = build_model(config, run)
        check_batch(config, model)
        data = data_facts(config.DATA.DATA_PATH, train=(source.names, source.labels))
        check_same_on_all(data, model)
        ddp = data_parallel(model, run.device)

        # ``effective`` is ``config`` with what follows from it and the run, such as scaled rates
        rates = scaled_rates(config, loader.size.images_per_update)
        derived = {"DATA.TRAINING_IMAGES": loader.size.images, "AMP_OPT_LEVEL": run.precision.level}
        effective = in_effect(config, derived | rates.by_key())
        optimizer = build_optimizer(config, model, rates.base)
        scheduler = build_scheduler(config, optimizer, rates, loader.size.updates)
        for line in without_effect(config, given_keys(args)):
            run.logger.warning(line)
        parts = {name: getattr(model, name) for name in PARTS}
        update = Update(ddp, [optimizer], run.precision, config.TRAIN.CLIP_GRAD, parts)
        describe(effective, model, loader, run)

        progress, resumed_from = resume(saved, effective, model, update, loader, data, run)
        total_steps = config.TRAIN.EPOCHS * loader.size.updates
        if progress.step < total_steps:  # else it says how the run was made
            write_config(effective, run.folder)
        probe = build_probe(config, model, source, run, saved)
        saved = None  # its tensors take memory
        if weights and not resumed_from:
            start_from(weights, model, run)
        if config.THROUGHPUT_MODE:
            step = single_update(config, ddp, update, run)
            return measure_throughput(loader, loader.size, loader.ahead, step, run)
        if config.EVAL_MODE:
            if not resumed_from and not weights:
                raise UserError(f"{run.config.OUTPUT}: no checkpoint to evaluate: see --tag")
            return evaluate(model, loader, run)
        if args.dry_run:
            place = DataPath.of(config, cache_mode="no")

            def open_val() -> "ImageSource":
                return open_splits(place, labelled=False, train=source)[1]

            step = single_update(config, ddp, update, run)
            return rehearse(effective, loader, open_val, progress, step, run)

        began_with = resumed_from or args.pretrained
        provenance = describe_run(effective, model, data, began_with, run)

        def state() -> dict:
            place = progress.state_dict() | {"lr_scheduler": scheduler.state_dict()}
            came_from = provenance | {"epoch": progress.epoch, "step": progress.step}
            came_from |= moment(run.device, run.started)
            place |= {"probe": probe.state_dict()} if probe else {}
            return training_state(effective, model, update, **place, provenance=came_from)

        checkpoints = Checkpoints(config, run, progress, state, resumed_from)
        knn = KnnMonitor(config, source, run)
        log = TrainingLog(config, run, progress, [optimizer], dim=model.dim, queues=model.queues())
        signals.training()
        base_momentum = config.MODEL.CONTRAST_MOMENTUM
        watch = log.watch
        if args.profile:
            from utils.profiling import Profile  # only here: few runs need it

            watch = Profile(args.profile, total_steps - progress.step, run).around(log.watch)
        started = time.monotonic()

        # Whatever changes over time follows from ``progress``, so that a resumed run is the same.
        with checkpoints.saved_on_fault():
            while progress.epoch < config.TRAIN.EPOCHS:
                ddp.train()
                loader.start_at(progress.epoch, progress.images_seen)
                views = partial(forward_views, ddp, run.device, progress.epoch)
                forward = probe.learning(views) if probe else views
                for micro_batches in watch(loader):
                    bad_images.note(micro_batches)
                    with checkpoints.update_under_way():
                        scheduler.step_update(progress.step)
                        seed_step(config.SEED, rank(), progress.step)
                        momentum = key_momentum(base_momentum, progress.step, total_steps)
                        model.update_key_encoder(momentum)  # the keys come from the moved one
                        result = update(micro_batches, forward)
                        for output in result.outputs:  # all micro-batches saw the same queue
                            model.enqueue(*output.keys, result.finite)
                        if probe:
                            probe.step(result.finite)
                        progress.advance()

                    # a signal on any process, and SAVE_MINUTES by the clock of the first
                    stop, save_now = signals.agree(checkpoints.time_is_up())
                    if log.record(result, {"momentum": momentum}, stop):  # reads the device
                        bad_images.check()
                        most = config.TRAIN.MAX_SKIPPED_UPDATES
                        update.check_skipped(most, checkpoints.advice(), log.longest_rows)
                    if stop or save_now or checkpoints.due():
                        checkpoints.save(signals)
                    if stop:
                        end_stopped(run.logger, progress.step)  # raises SystemExit
                if not log.reported(progress.epoch):
                    log.end_epoch(knn.after(progress.epoch, model.encoder))
                progress.next_epoch()
        run.logger.info("training took %s", duration(time.monotonic() - started))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_encoder_list(parser)
    add_tracker_arguments(parser)
    parser.add_argument(
        "--pretrained",
        metavar="PATH",
        help="weights that the encoder starts from, of any family that the evaluations read",
    )
    parser.add_argument(
        "--container", metavar="PLACE", help="where in that file they lie, such as model.encoder"
    )
    once = parser.add_mutually_exclusive_group()
    once.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be trained, time three updates, estimate the end; write nothing",
    )
    once.add_argument(
        "--profile",
        type=number_in(1, math.inf),
        metavar="N",
        help="write a trace of N updates, and the operations that took longest into the log",
    )


def forward_views(model: nn.Module, device: torch.device, epoch: int, batch: Views) -> Output:
    """The model's output for the two views of a batch, uint8 of (B, S, S, 3) each.

    SynCo makes synthetic negatives in a window of epochs, so the epoch is passed in.
    """
    # they stay channels last in memory
    views = [
        v.to(device, non_blocking=True).permute(0, 3, 1, 2) for v in (batch.first, batch.second)
    ]
    if batch.draws.numel():  # DATA.BACKEND device
        from data.device_views import finish

        draws = batch.draws.to(device, non_blocking=True).unbind(1)
        return model(*(finish(*pair) for pair in zip(views, draws, strict=True)), epoch)
    return model(*(normalize(view) for view in views), epoch)


def read_starting_weights(
    config: CfgNode, args: argparse.Namespace, saved: tuple[str, dict[str, Any]] | None, run: Run
) -> tuple[CfgNode, "EncoderFile | None"]:
    """The weights of ``--pretrained``, if it is given, and the configuration with their network."""
    path, container = args.pretrained, args.container
    if not path:
        return config, None
    if saved and not os.path.exists(path):
        # a run that goes on needs the network alone, which is the same
        path, container = saved[0], None
    from models.pretrained import read_encoder_for  # which most runs do not need

    weights, adapted = read_encoder_for(config, path, "encoder", container=container)
    for line in network_changes(config, adapted):
        run.logger.info(line)
    return adapted, weights


def start_from(weights: "EncoderFile", model: MomentumMethod, run: Run) -> None:
    """Load the encoder and the key encoder; heads, optimizer and schedule are new."""
    run.logger.info("starting from %s", weights.load(model.encoder, learns=True))
    model.encoder_k.load_state_dict(model.encoder.state_dict())


def build_model(config: CfgNode, run: Run) -> MomentumMethod:
    """The method with its encoders, on the device."""
    model = synchronize_batch_norm(build_method(config), run.device)
    choose_attention(model, run.precision)
    for encoder in (model.encoder, model.encoder_k):
        allow_tf32(encoder, run.precision)
    if config.COMPILE:
        # beside the checkpoint, so that a requeued job finds what was compiled before
        cache = os.path.join(run.config.OUTPUT, "compiled")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        model.encoder.compile()  # in place: the names in a checkpoint stay
        model.encoder_k.compile()
    return model


def check_batch(config: CfgNode, model: MomentumMethod) -> None:
    """BatchNorm needs two images, and an update must not write the queue more than once over."""
    images, queues = images_per_update(config), model.queues()
    if config.DATA.BATCH_SIZE * world_size() < 2:
        raise UserError("BatchNorm needs a total batch of at least 2 images: raise --batch-size")
    if queues and images > queues[0].shape[1]:
        raise UserError(
            f"an update of {images} images does not fit into MODEL.CONTRAST_NUM_NEGATIVE "
            f"{queues[0].shape[1]}: lower --batch-size or lengthen the queue"
        )


def check_same_on_all(data: dict, model: MomentumMethod) -> None:
    """Refuse processes with other images or another model; every process has to call it."""
    weights = sum(p.numel() for p in model.parameters())
    images = {"the number of images": data["images"]["train"], "the images": data["digest"]}
    check_agreement(images | {"the number of weights": weights})


def describe(effective: CfgNode, model: MomentumMethod, loader: TrainingLoader, run: Run) -> None:
    """Log what will be trained, and on what."""
    if isinstance(model, SynCo):
        epochs = model.epochs_with_synthetic(effective.TRAIN.EPOCHS)
        if epochs:
            run.logger.info(f"synthetic negatives from epoch {epochs[0]} to epoch {epochs[-1]}")
        else:
            run.logger.warning(
                "no epoch has synthetic negatives, so this is MoBY: see TRAIN.EPOCHS, "
                "MODEL.WARMUP_EPOCHS, MODEL.COOLDOWN_EPOCHS and MODEL.N1 to N6"
            )
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.logger.info(
        f"{effective.MODEL.TYPE} with {effective.MODEL.ENCODER}: {learned / 1e6:.2f} M parameters "
        f"learn, {loader.size.images} images, {loader.size.updates} updates an epoch, base rate "
        f"{effective.TRAIN.BASE_LR:.3g}"
    )


def describe_run(
    effective: CfgNode, model: MomentumMethod, data: dict, began_with: str | None, run: Run
) -> dict:
    """What the checkpoints say of where they come from, as far as it stays the same."""
    origin: dict[str, Any] = {"checkpoint": began_with and os.path.abspath(began_with)}
    origin |= {"network": network_of(model.encoder).known()}
    origin |= {"method": effective.MODEL.TYPE, "encoder": effective.MODEL.ENCODER}
    return gather_provenance(effective, run.device, origin, data)


def find_checkpoint(config: CfgNode, run: Run) -> tuple[str, dict[str, Any]] | None:
    """Path and content of the checkpoint to continue from, if there is one."""
    path = checkpoint_to_resume(config, run.config.OUTPUT, run.logger)
    return (path, read_checkpoint(path, run.device)) if path else None


def resume(
    saved: tuple[str, dict[str, Any]] | None,
    effective: CfgNode,
    model: MomentumMethod,
    update: Update,
    loader: TrainingLoader,
    data: dict[str, Any],
    run: Run,
) -> tuple[Progress, str | None]:
    """Continue from the checkpoint that was saved; returns the place, and the path if there is one.

    Without one the run starts at TRAIN.START_EPOCH.
    """
    if not saved:
        epoch = effective.TRAIN.START_EPOCH
        return Progress(loader.size, epoch, epoch * loader.size.updates), None
    path, state = saved
    restore_training(state, path, model, update, ("epoch", "step", "rng_state"))
    below = "encoder."  # whose heads the shapes do not tell
    encoder = {n.removeprefix(below): v for n, v in state["model"].items() if n.startswith(below)}
    check_network(model.encoder, encoder, network_said(state), path)
    progress = locate(state, loader.size)
    if not effective.EVAL_MODE:  # whose images are others anyway
        warn_of_changes(state, path, progress, effective.TRAIN.BASE_LR, run.logger)
        warn_of_settings(state, path, effective, data["digest"], run.logger)
    run.logger.info("resumed from %s at update %d", path, progress.step)
    return progress, path


def build_probe(
    config: CfgNode,
    model: MomentumMethod,
    source: "ImageSource",
    run: Run,
    saved: tuple[str, dict[str, Any]] | None,
) -> "OnlineProbe | None":
    """The linear classifier of TRAIN.PROBE, as it was when the checkpoint was saved."""
    if not config.TRAIN.PROBE:
        return None
    from evaluation.online_probe import OnlineProbe  # only here: most runs have none

    probe = OnlineProbe(model.encoder.num_features, source, run.device)
    if saved:
        probe.load_state_dict(*saved)
    return probe


@torch.no_grad()
def evaluate(model: MomentumMethod, loader: TrainingLoader, run: Run) -> None:
    """Log the loss of two views of the val images in whole batches, without an update."""
    model.eval()
    sums, batches = torch.zeros(3, device=run.device), 0
    for micro_batches in loader:
        for batch in micro_batches:
            with run.precision.autocast():
                # no synthetic negatives, so that the losses of all epochs compare
                output = forward_views(model, run.device, -1, batch)
            sums += torch.stack([output.loss, output.accuracy, output.positive])
            batches += 1
    loss, accuracy, positive = mean_over_processes(sums / batches).tolist()
    images = loader.size.updates * loader.size.images_per_update
    said = f"Eval: loss {loss:.4f} accuracy {accuracy:.4f} positive {positive:.4f}"
    run.logger.info(f"{said} of {images} of {loader.size.images} images")


def single_update(
    config: CfgNode, ddp: DistributedDataParallel, update: Update, run: Run
) -> Callable[[list], None]:
    """One update from its micro-batches, with synthetic negatives if the method makes any."""
    forward = partial(forward_views, ddp, run.device, config.MODEL.WARMUP_EPOCHS)

    def step(micro_batches: list) -> None:
        ddp.module.update_key_encoder(config.MODEL.CONTRAST_MOMENTUM)
        result = update(micro_batches, forward)
        for output in result.outputs:
            ddp.module.enqueue(*output.keys, result.finite)

    ddp.train()
    return step


if __name__ == "__main__":
    run_script(main)
