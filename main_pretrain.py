"""Pre-train an encoder with MoBY, BYOL or SynCo.

    python main_pretrain.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG

DATA holds train/<class>/<image>, or another form of docs/data.md. --cfg takes recipes of configs/.
--dry-run says what would be trained and how long it takes; torchrun starts one process a GPU.
"""

import argparse
import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from yacs.config import CfgNode

from data.dataset import Views
from data.loader import BadImages, TrainingLoader, build_pretraining_loader, normalize
from data.opening import DataPath, open_splits
from lr_scheduler import build_scheduler, scaled_rates, without_effect
from models import build_method
from models.batch_norm import synchronize_batch_norm
from models.encoder import add_encoder_list, choose_attention
from models.momentum import MomentumMethod, Output, key_momentum
from models.network import check_network, network_changes, network_of, network_said
from models.synco import SynCo
from optimizer import build_optimizer
from utils.arguments import add_tracker_arguments, given_keys, number_in, parse_arguments
from utils.checkpoint import Checkpoint, checkpoint_to_resume, read_checkpoint
from utils.config import run_folder
from utils.distributed import check_agreement, data_parallel, mean_over_processes, rank, world_size
from utils.errors import UserError
from utils.progress import images_per_update
from utils.provenance import describe_images, gather_provenance
from utils.run import Run, keep_precision, run_script, start, write_config
from utils.seed import seed_step
from utils.session import Session, StateDicts
from utils.signals import StopSignals
from utils.training_log import Loader, measure_throughput
from utils.update import Update, allow_tf32

if TYPE_CHECKING:
    from data.source import ImageSource
    from evaluation.knn_monitor import KnnMonitor
    from evaluation.online_probe import OnlineProbe
    from models.pretrained import EncoderFile
    from utils.profiling import Profile

PARTS = ("encoder", "projector", "predictor")  # whose gradient norms are reported
# an epoch in which no method makes synthetic negatives, so that the losses of --eval compare
BEFORE_SYNTHETIC = -1


def main() -> None:
    """Data, model, optimizer, resume, loop; a signal stops the run so that it can be resumed."""
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        args, config = parse_arguments(__doc__, add_arguments)
        check_flags(args, config)
        run = start(config, scratch_folder(stack) if args.dry_run else None, trains=True)
        checkpoint = find_checkpoint(run)
        run, weights = read_starting_weights(run, args, checkpoint)
        run, config = keep_precision(run, checkpoint), run.config

        loader = build_pretraining_loader(config, "val" if config.EVAL_MODE else "train")
        source = loader.dataset.source
        model = build_model(run)
        check_batch(config, model)
        data = describe_images(config.DATA.DATA_PATH, train=(source.names, source.labels))
        check_same_on_all(data, model)

        rates = scaled_rates(config, loader.size.images_per_update)
        optimizer = build_optimizer(config, model, rates.base)
        scheduler = build_scheduler(config, optimizer, rates, loader.size.updates)
        parts = {name: getattr(model, name) for name in PARTS}
        ddp = data_parallel(model, run.device)
        update = Update(ddp, [optimizer], run.precision, config.TRAIN.CLIP_GRAD, parts)

        run = replace(run, derived={"DATA.TRAINING_IMAGES": loader.size.images} | rates.by_key())
        began_with = checkpoint.path if checkpoint else args.pretrained
        run = replace(run, provenance=describe_run(run, model, data, began_with))
        describe(run, model, loader, given_keys(args))
        beside = StateDicts(lr_scheduler=scheduler)  # the weights in a checkpoint
        session = Session(run, loader, update, signals, beside)
        if checkpoint:
            resume(session, checkpoint)
        elif weights:
            start_from(weights, model, run)
        if session.step < session.steps:  # one that has ended keeps what it was made with
            write_config(run)
        if config.EVAL_MODE or config.THROUGHPUT_MODE or args.dry_run:
            return without_training(session, args.dry_run, began_with)

        probe = build_probe(model, source, run, checkpoint)
        beside |= {"probe": probe} if probe else {}
        checkpoint = weights = None  # their tensors take memory
        knn = build_knn(run, source)
        bad_images = BadImages(source, config.DATA.MAX_BAD_FRACTION, run.logger)
        profile = build_profile(args.profile, session)

        # Whatever changes over time follows from the place, so that a resumed run is the same.
        with session:
            for epoch in session.epochs():
                forward: Callable[[Any], Output] = partial(forward_views, ddp, run.device, epoch)
                forward = probe.learning(forward) if probe else forward
                for micro_batches in session.updates(bad_images):
                    scheduler.step_update(session.step)
                    seed_step(config.SEED, rank(), session.step)
                    momentum = key_momentum(
                        config.MODEL.CONTRAST_MOMENTUM, session.step, session.steps
                    )
                    model.update_key_encoder(momentum)  # the keys come from the moved one
                    result = update(micro_batches, forward)
                    for output in result.outputs:  # all micro-batches saw the same queue
                        model.enqueue(*output.keys, result.finite)
                    if probe:
                        probe.step(result.finite)
                    session.made(result, momentum=momentum)
                    if profile:
                        profile.step()
                if not session.saved:
                    session.save()  # before the k-NN accuracy, which takes long
                if not session.epoch_logged:
                    session.end_epoch(knn.after(epoch, model.encoder) if knn else {})


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


def check_flags(args: argparse.Namespace, config: CfgNode) -> None:
    """Refuse what does not go together."""
    if not config.AUG.SSL_AUG:
        raise UserError("pre-training needs two views: set AUG.SSL_AUG True")
    for flag, given in (("--profile", args.profile), ("--dry-run", args.dry_run)):
        if given and (config.EVAL_MODE or config.THROUGHPUT_MODE):
            raise UserError(f"{flag} needs updates: leave out --eval and --throughput")


def scratch_folder(stack: contextlib.ExitStack) -> str:
    """A folder in place of the run folder, also for what is compiled; it is removed in the end."""
    import tempfile  # only here: --dry-run alone needs it

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="synco-"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "compiled"))
    return folder


def find_checkpoint(run: Run) -> Checkpoint | None:
    """The checkpoint to continue from, if there is one."""
    path = checkpoint_to_resume(run.config, run_folder(run.config), run.logger)
    return Checkpoint(path, read_checkpoint(path, run.device)) if path else None


def read_starting_weights(
    run: Run, args: argparse.Namespace, checkpoint: Checkpoint | None
) -> tuple[Run, "EncoderFile | None"]:
    """The weights of ``--pretrained``, if it is given, and the run with their network."""
    path, container = args.pretrained, args.container
    if not path:
        return run, None
    if checkpoint and not os.path.exists(path):
        # a run that goes on needs the network alone, which is the same
        path, container = checkpoint.path, None
    from models.pretrained import read_encoder_for  # only here: most runs start from none

    weights, adapted = read_encoder_for(run.config, path, "encoder", container=container)
    for line in network_changes(run.config, adapted):
        run.logger.info(line)
    return replace(run, config=adapted), weights


def start_from(weights: "EncoderFile", model: MomentumMethod, run: Run) -> None:
    """Load the encoder and the key encoder; heads, optimizer and schedule are new."""
    run.logger.info("starting from %s", weights.load(model.encoder, learns=True))
    model.encoder_k.load_state_dict(model.encoder.state_dict())


def build_model(run: Run) -> MomentumMethod:
    """The method with its encoders, on the device."""
    config = run.config
    model = synchronize_batch_norm(build_method(config), run.device)
    choose_attention(model, run.precision)
    for encoder in (model.encoder, model.encoder_k):
        allow_tf32(encoder, run.precision)
    if config.COMPILE:
        # beside the checkpoint, so that a requeued job finds what was compiled before
        cache = os.path.join(run_folder(config), "compiled")
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


def describe(run: Run, model: MomentumMethod, loader: TrainingLoader, given: set[str]) -> None:
    """Log what will be trained, and on what."""
    for line in without_effect(run.config, given):
        run.logger.warning(line)
    if isinstance(model, SynCo):
        epochs = model.epochs_with_synthetic(run.config.TRAIN.EPOCHS)
        if epochs:
            run.logger.info(f"synthetic negatives from epoch {epochs[0]} to epoch {epochs[-1]}")
        else:
            run.logger.warning(
                "no epoch has synthetic negatives, so this is MoBY: see TRAIN.EPOCHS, "
                "MODEL.WARMUP_EPOCHS, MODEL.COOLDOWN_EPOCHS and MODEL.N1 to N6"
            )
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.logger.info(
        f"{run.config.MODEL.TYPE} with {run.config.MODEL.ENCODER}: {learned / 1e6:.2f} M "
        f"parameters learn, {loader.size.images} images, {loader.size.updates} updates an epoch, "
        f"base rate {run.effective.TRAIN.BASE_LR:.3g}"
    )


def describe_run(
    run: Run, model: MomentumMethod, data: dict, began_with: str | None
) -> dict[str, Any]:
    """What the checkpoints say of where they come from; each adds its epoch and step."""
    origin: dict[str, Any] = {"checkpoint": began_with and os.path.abspath(began_with)}
    origin |= {"network": network_of(model.encoder).known()}
    origin |= {"method": run.config.MODEL.TYPE, "encoder": run.config.MODEL.ENCODER}
    provenance = gather_provenance(run.effective, run.device, origin, data)
    return {k: v for k, v in provenance.items() if k not in ("epoch", "step")}


def resume(session: Session, checkpoint: Checkpoint) -> None:
    """Continue from the checkpoint, if it is of this method and network."""
    session.restore(checkpoint)
    below = "encoder."  # whose heads the shapes do not tell
    tensors = checkpoint.state["model"].items()
    encoder = {n.removeprefix(below): v for n, v in tensors if n.startswith(below)}
    said, model = network_said(checkpoint.state), session.update.ddp.module
    check_network(model.encoder, encoder, said, checkpoint.path)


def build_probe(
    model: MomentumMethod, source: "ImageSource", run: Run, checkpoint: Checkpoint | None
) -> "OnlineProbe | None":
    """The linear classifier of TRAIN.PROBE, as it was when the checkpoint was saved."""
    if not run.config.TRAIN.PROBE:
        return None
    from evaluation.online_probe import OnlineProbe  # only here: most runs have none

    probe = OnlineProbe(model.encoder.num_features, source, run.device)
    if checkpoint:
        probe.load_state_dict(checkpoint.path, checkpoint.state)
    return probe


def build_knn(run: Run, source: "ImageSource") -> "KnnMonitor | None":
    """What measures the k-NN accuracy of TRAIN.KNN_FREQ."""
    if not run.config.TRAIN.KNN_FREQ:
        return None
    from evaluation.knn_monitor import KnnMonitor  # only here: most runs measure none

    return KnnMonitor(run.config, source, run)


def build_profile(updates: int | None, session: Session) -> "Profile | None":
    """What profiles the first updates, if --profile asks for some."""
    if not updates:
        return None
    from utils.profiling import Profile  # only here: few runs need it

    return Profile(updates, session.steps - session.step, session.run)


def without_training(session: Session, dry_run: bool, began_with: str | None) -> None:
    """Do what --throughput, --eval or --dry-run asks for."""
    run, loader, update = session.run, session.loader, session.update
    if run.config.THROUGHPUT_MODE:
        measure_throughput(loader, single_update(update, run), run)
    elif run.config.EVAL_MODE:
        if not began_with:
            raise UserError(f"{run_folder(run.config)}: no checkpoint to evaluate: see --tag")
        evaluate(update.ddp.module, loader, run)
    else:
        from utils.dry_run import rehearse  # only here: few runs need it

        train = loader.dataset.source
        rehearse(session, train, partial(open_val, run.config, train), single_update(update, run))


def open_val(config: CfgNode, train: "ImageSource") -> "ImageSource":
    """The val images, beside those of training."""
    place = DataPath.of(config, cache_mode="no")
    return open_splits(place, labelled=False, train=train)[1]


@torch.no_grad()
def evaluate(model: MomentumMethod, loader: Loader, run: Run) -> None:
    """Log the loss of two views of the val images in whole batches, without an update."""
    model.eval()
    sums, batches = torch.zeros(3, device=run.device), 0
    for micro_batches in loader:
        for batch in micro_batches:
            with run.precision.autocast():
                output = forward_views(model, run.device, BEFORE_SYNTHETIC, batch)
            sums += torch.stack([output.loss, output.accuracy, output.positive])
            batches += 1
    loss, accuracy, positive = mean_over_processes(sums / batches).tolist()
    images = loader.size.updates * loader.size.images_per_update
    said = f"Eval: loss {loss:.4f} accuracy {accuracy:.4f} positive {positive:.4f}"
    run.logger.info(f"{said} of {images} of {loader.size.images} images")


def single_update(update: Update, run: Run) -> Callable[[list], None]:
    """One update from its micro-batches, with synthetic negatives if the method makes any."""
    model = update.ddp.train().module
    forward = partial(forward_views, update.ddp, run.device, run.config.MODEL.WARMUP_EPOCHS)

    def step(micro_batches: list) -> None:
        model.update_key_encoder(run.config.MODEL.CONTRAST_MOMENTUM)
        result = update(micro_batches, forward)
        for output in result.outputs:
            model.enqueue(*output.keys, result.finite)

    return step


if __name__ == "__main__":
    run_script(main)
