"""Judge an encoder by a linear classifier on its features, or by fine-tuning it.

    python eval_linear.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG --lr 0.3 1 3

It judges the checkpoint.pth of that run, or --pretrained FILE of this project or another.
DATA holds train/<class>/<image> and val/<class>/<image>; --dataset NAME reads other sets.
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data.loader import TrainingLoader, build_classification_loader
from data.opening import DataPath, add_dataset_arguments, open_splits
from data.source import ImageSource
from data.subset import add_subset_argument, subset_suffix, take_subset
from data.transfer import MAP, TRANSFER_SETS
from evaluation.features import check_features, encode_images
from evaluation.identity import identified, identity
from evaluation.judged import TEST, TRAIN, Judged, by_name, summary, table
from evaluation.linear import (
    LinearClassifiers,
    build_mixup,
    forward_images,
    read_classifiers,
    score_heads,
)
from evaluation.logistic_regression import probe
from evaluation.of_run import log_notes, parse_evaluation
from evaluation.protocols import (
    Protocol,
    add_protocol_arguments,
    apply_protocol,
    changes,
    choose_protocol,
    choose_tokens,
    head_schedule,
    protocol_said,
    set_aside,
)
from lr_scheduler import Rates, build_scheduler, scaled_rates, without_effect
from models import build_encoder
from models.batch_norm import synchronize_batch_norm
from models.encoder import Backbone
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder, read_encoder_for
from optimizer import build_optimizer
from utils.arguments import given_keys, number_in
from utils.checkpoint import (
    LATEST,
    Checkpoint,
    checkpoint_to_resume,
    link_file,
    read_checkpoint,
    save_checkpoint,
)
from utils.config import CLASSIFIER, FEATURE, FINE_TUNING, NETWORK, Use, run_folder
from utils.distributed import data_parallel, rank, world_size
from utils.errors import UserError
from utils.progress import EpochSize
from utils.provenance import cost, describe_images
from utils.run import Run, keep_precision, log_table, run_script, start, write_config, write_results
from utils.seed import seed_libraries
from utils.session import Kind, Session
from utils.signals import StopSignals
from utils.training_log import measure_throughput
from utils.update import Forward, Update, allow_tf32

BEST = "best.pth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this script."""
    add_pretrained_arguments(parser)
    add_dataset_arguments(parser)
    add_subset_argument(parser)
    add_protocol_arguments(parser)
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        metavar="RATE",
        help="base rates for 512 images; a probe trains a head for each at once",
    )
    parser.add_argument(
        "--probe",
        choices=["sgd", "lbfgs"],
        default="sgd",
        help="steps on augmented images, or logistic regression on features",
    )
    parser.add_argument(
        "--select",
        choices=["held-out"],
        help="choose epoch and rate on a tenth of the training images, which is not trained on",
    )
    for flag, default, least, most, about in (
        ("--num-l2", 45, 1, math.inf, "L2 strengths from 1e-6 to 1e5 that lbfgs tries"),
        ("--layer-decay", None, 0.01, 1.0, "of fine-tuning's rate from a layer to the one before"),
    ):
        parser.add_argument(flag, type=number_in(least, most), default=default, help=about)


def main() -> None:
    """Data, encoder, heads, resume, loop, figures; a signal stops it so that it can be resumed."""
    with StopSignals() as signals:
        args, asked, notes = parse_evaluation(__doc__, add_arguments)
        frozen, given = asked.LINEAR_EVAL.WEIGHTS == "freeze", given_keys(args)
        protocol = choose_protocol(args, asked, folder := result_folder(args, asked))
        config, rates = apply_protocol(asked, protocol, given, args.lr)
        run = start(config, folder, trains=not (frozen or config.EVAL_MODE))
        log_notes(run, notes)

        train, test = open_splits(DataPath.of(config), args.download)
        train = take_subset(train, args.subset, config.SEED)
        metric = TRANSFER_SETS[config.DATA.DATASET].metric
        if config.EVAL_MODE:
            return evaluate_saved(asked, given, test, folder, run)
        drop = protocol.drop_path_rate if args.drop_path_rate is None else args.drop_path_rate
        encoder, origin = load_pretrained_encoder(args, config, run, drop, learns=not frozen)
        tokens = choose_tokens(args, protocol, encoder)
        how = {"protocol": protocol.name, "class_tokens": list(tokens) if tokens else None}
        splits = {"train": (train.names, train.labels), "test": (test.names, test.labels)}
        data = describe_images(config.DATA.DATA_PATH, **splits)
        if args.probe == "lbfgs":
            run = with_provenance(run, origin, data, logistic_identity(args, run, origin, data))
            return fit_logistic_regression(run, encoder, (train, test), args.num_l2, how)
        # the images that choose, if these are others than the test images
        train, *choosing = set_aside(train, config.SEED) if args.select else (train,)
        loader = build_classification_loader(config, train)

        kind, decay = kind_of_training(frozen, rates), args.layer_decay or protocol.layer_decay
        flags = training_flags(args, how, rates, drop, None if frozen else decay)
        of = identity(run, config, kind.uses, origin, data, **flags)
        checkpoint = find_checkpoint(run, of)
        if not frozen:
            run = keep_precision(run, checkpoint)
            of["AMP_OPT_LEVEL"] = run.precision.level
        heads, as_mae = (len(train.classes), len(rates)), protocol.as_mae
        model = LinearClassifiers(encoder, *heads, config.SEED, frozen, drop > 0, tokens, as_mae)
        ddp = place_model(model, run)
        optimizers, schedulers, scaled = build_optimizers(
            config, model, protocol, rates, decay, loader.size
        )
        update = Update(ddp, optimizers, run.precision, config.TRAIN.CLIP_GRAD, scale=not frozen)
        forward = build_forward(run, ddp, metric, len(train.classes))
        run = replace(run, derived={"DATA.TRAINING_IMAGES": loader.size.images} | scaled.by_key())
        run = with_provenance(run, origin, data, of)
        describe(run, protocol, loader, test, without_effect(config, given))
        judged = Judged(rates, {"lr": rates, **how})
        session = Session(run, loader, update, signals, judged, kind)
        if checkpoint:
            resume(session, judged, checkpoint)
        checkpoint = None  # its tensors take memory
        write_config(run)
        if config.THROUGHPUT_MODE:
            ddp.train()
            return measure_throughput(loader, partial(update, forward=forward), run)
        judge = Judge(model, [test, *choosing], metric, run)

        with session:
            for epoch in session.epochs():
                for micro_batches in session.updates():
                    first = epoch * loader.size.updates
                    for scheduler in schedulers:
                        scheduler.step_update(first if protocol.rate_by_epoch else session.step)
                    seed_libraries(config.SEED, rank(), session.step)
                    session.made(update(micro_batches, forward))
                    judged.leave_out(session.diverged)
                if judged.epoch < epoch:
                    judge(session, judged, how)
        best, last = judged.outcome(TRAIN if args.select else TEST)
        report(run, how | {"drop_path_rate": drop}, {"best": best, "last": last})


def result_folder(args: argparse.Namespace, config: CfgNode) -> str:
    """Where the figures go."""
    kind = "linprob" if config.LINEAR_EVAL.WEIGHTS == "freeze" else "ft"
    kind += "_lbfgs" if args.probe == "lbfgs" else ""
    kind += subset_suffix(args.subset)
    return os.path.join(run_folder(config), f"linear_{config.DATA.DATASET}_{kind}")


def fit_logistic_regression(
    run: Run,
    encoder: Backbone,
    splits: tuple[ImageSource, ImageSource],
    strengths: int,
    how: dict[str, Any],
) -> None:
    """What ``--probe lbfgs`` does, with so many L2 strengths from 1e-6 to 1e5."""
    tried = torch.logspace(-6, 5, strengths, dtype=torch.float64).tolist()
    found, classifier = probe(run.config, encoder, splits, tried, run)
    if rank() == 0:
        kept = {"model": classifier.state_dict(), "lr": [0.0], "epoch": 0, **how}
        kept["provenance"] = run.provenance | cost(run.device, run.started)
        save_checkpoint(kept, os.path.join(run.folder, BEST))
    report(run, how, found)


def flags_said(args: argparse.Namespace, protocol: str) -> dict[str, Any]:
    """What every classifier's figures depend on beside the configuration."""
    return {"--protocol": protocol, "--subset": subset_suffix(args.subset)}


def training_flags(
    args: argparse.Namespace,
    how: dict[str, Any],
    rates: list[float],
    drop: float,
    decay: float | None,
) -> dict[str, Any]:
    """What the figures of a probe by SGD or of fine-tuning depend on beside the configuration."""
    flags = flags_said(args, how["protocol"]) | {"--lr": rates, "--select": args.select}
    flags |= {"--drop-path-rate": drop, "class tokens": how["class_tokens"]}
    return flags | {"processes": world_size()} | ({"--layer-decay": decay} if decay else {})


def logistic_identity(
    args: argparse.Namespace, run: Run, origin: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """What the figures of ``--probe lbfgs`` depend on; warn where others would be replaced."""
    flags = flags_said(args, args.probe) | {"--num-l2": args.num_l2, "SEED": run.config.SEED}
    return identity(run, run.config, NETWORK | FEATURE, origin, data, **flags)


def kind_of_training(frozen: bool, rates: list[float]) -> Kind:
    """In what a probe and fine-tuning differ from pre-training."""
    return Kind(
        uses=NETWORK | FEATURE | CLASSIFIER | (Use(0) if frozen else FINE_TUNING),
        names=[f"{rate:.12g}" for rate in rates] if frozen else [""],
        keep_epochs=False,
        # those of a head that diverges are kept as they are, beside those of the others
        check_weights=not frozen,
        rate=f"--lr {' '.join(f'{rate:g}' for rate in rates)}",
    )


def build_forward(
    run: Run, ddp: DistributedDataParallel, metric: str, classes: int
) -> Callable[[Any], Forward]:
    """What gives the losses of a micro-batch."""
    config, frozen = run.config, ddp.module.frozen
    mixup = None if frozen or metric == MAP else build_mixup(config, classes)
    return partial(forward_images, ddp, run.device, config.MODEL.LABEL_SMOOTHING, mixup)


def with_provenance(run: Run, origin: dict[str, Any], data: Any, of: dict[str, Any]) -> Run:
    """``run`` with what its files say of where they come from; ``of`` is their identity."""
    return replace(run, provenance=identified(run, origin, data, of))


def describe(
    run: Run, protocol: Protocol, loader: TrainingLoader, test: ImageSource, warnings: list[str]
) -> None:
    """Log what will be trained, and on what."""
    for line in warnings:
        run.logger.warning(line)
    size = loader.size
    run.logger.info(
        f"{run.config.LINEAR_EVAL.WEIGHTS} by protocol {protocol.name} on "
        f"{run.config.DATA.DATASET}: {size.images} training and {len(test.names)} test images, "
        f"{len(test.classes)} classes, {size.updates} updates an epoch"
    )


class Judge:
    """Judges the classifiers after an epoch.

    Args:
        model: the encoder with its classifiers.
        sources: the test images, and those that choose, if these are others.
        metric: of the data set.
        run: device and log.
    """

    def __init__(
        self, model: LinearClassifiers, sources: list[ImageSource], metric: str, run: Run
    ) -> None:
        self.model, self.sources, self.metric, self.run = model, sources, metric, run
        self._features: list[tuple[torch.Tensor, torch.Tensor]] = []
        if model.frozen:  # its features stay as they are
            self._features = self._encode(model.features)
            for part, name in zip(self._features, ("test", "held-out"), strict=False):
                check_features(*part, name)

    def __call__(self, session: Session, judged: Judged, how: dict[str, Any]) -> None:
        """Judge the epoch that has ended; log the figures, and save them with the best head."""
        epoch, run = session.progress.epoch, self.run
        features = self._features or self._encode(self.model.eval().features)
        scored = [score_heads(self.model, *f, self.metric, judged.left_out) for f in features]
        judged.add(epoch, *scored)
        judged.log(self.metric, run.logger)
        if not session.epoch_logged:
            session.end_epoch(by_name(session.kind.names, *scored))
        session.save()
        path = os.path.join(run.folder, BEST)
        judged.save_best(self.model, path, provenance=session.provenance(), **how)

    def _encode(self, encoder: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [encode_images(self.run.config, encoder, part, self.run) for part in self.sources]


def place_model(model: LinearClassifiers, run: Run) -> DistributedDataParallel:
    """The model on the device, for all processes; BatchNorm that learns needs two images."""
    learns = not model.frozen and any(isinstance(m, _BatchNorm) for m in model.modules())
    if learns and run.config.DATA.BATCH_SIZE * world_size() < 2:
        raise UserError("BatchNorm needs a total batch of at least 2 images: raise --batch-size")
    model = synchronize_batch_norm(model, run.device)
    allow_tf32(model.encoder, run.precision)
    return data_parallel(model, run.device)


def build_optimizers(
    config: CfgNode,
    model: LinearClassifiers,
    protocol: Protocol,
    rates: list[float],
    decay: float,
    size: EpochSize,
) -> tuple[list[torch.optim.Optimizer], list[Scheduler], Rates]:
    """Optimizer and schedule of each head of a probe, or of fine-tuning, and the scaled rates."""
    scaled = scaled_rates(config, size.images_per_update)
    if protocol.as_mae:
        scaled = replace(scaled, minimum=config.TRAIN.MIN_LR)
    groups = weight_groups(config, model, rates, decay, protocol.group)
    optimizers = [build_optimizer(config, model, scaled.base, group) for group in groups]
    schedules = [head_schedule(scaled, rate) for rate in rates] if model.frozen else [scaled]
    schedulers = [
        build_scheduler(config, optimizer, schedule, size.updates, protocol.as_mae)
        for optimizer, schedule in zip(optimizers, schedules, strict=True)
    ]
    return optimizers, schedulers, scaled


def weight_groups(
    config: CfgNode,
    model: LinearClassifiers,
    rates: list[float],
    layer_decay: float,
    options: dict[str, Any],
) -> list[list[dict]]:
    """The groups of each optimizer: one a head of a probe, with ``options``; else of all layers."""
    decay = config.TRAIN.WEIGHT_DECAY
    if not model.frozen:
        return [model.layer_groups(decay, layer_decay)]
    return [[group] for group in model.head_groups(rates, weight_decay=decay, **options)]


def find_checkpoint(run: Run, of: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to continue from, if there is one.

    One that is found, not named, is left aside if it is of another evaluation.

    Args:
        run: its folder, configuration and log.
        of: the identity of the evaluation.

    Raises:
        UserError: MODEL.RESUME names a checkpoint of another evaluation.
    """
    config, named = run.config, run.config.MODEL.RESUME
    found = checkpoint_to_resume(config, run.folder, run.logger)
    for path in dict.fromkeys(filter(None, (found, named))):
        state = read_checkpoint(path, run.device)
        other, allowed = changes(state, of, config, asked=path == named)
        if not other:
            if allowed:
                run.logger.warning("%s: it goes on all the same: %s", path, "; ".join(allowed))
            return Checkpoint(path, state)
        if path == named:
            raise UserError(f"{path}: checkpoint of another evaluation ({'; '.join(other)})")
        begin = f"from {named}" if named else "anew"
        run.logger.warning(
            "%s is of another evaluation (%s): starting %s", path, "; ".join(other), begin
        )
    return None


def resume(session: Session, judged: Judged, checkpoint: Checkpoint) -> None:
    """Continue from the checkpoint: the training, and what was achieved so far."""
    run, path, state = session.run, checkpoint.path, checkpoint.state
    session.restore(checkpoint)
    judged.load_state_dict(state)
    best, beside = (os.path.join(f, BEST) for f in (run.folder, os.path.dirname(path)))
    if rank() == 0 and os.path.exists(beside):  # of another folder, if --resume names one there
        link_file(beside, best)
    if judged.epoch == state["epoch"]:  # it may have been killed before best.pth was written
        how = {name: state.get(name) for name in ("protocol", "class_tokens", "provenance")}
        judged.save_best(session.update.ddp.module, best, **how)
    if judged.epoch >= 0:
        run.logger.info("what was judged last: after epoch %d", judged.epoch)


def report(run: Run, how: dict[str, Any], found: dict[str, Any]) -> None:
    """Write results.json with ``best``, ``last`` and more, and log which figure is which.

    Args:
        run: its folder gets the file.
        how: the protocol by name, and what flags have changed of it.
        found: the figures.
    """
    config = run.config
    metric = TRANSFER_SETS[config.DATA.DATASET].metric
    names = {"dataset": config.DATA.DATASET, "metric": metric}
    names["weights"] = config.LINEAR_EVAL.WEIGHTS
    protocol = {"name": how["protocol"], "image_size": config.DATA.IMG_SIZE}
    if "probe" not in found:
        protocol["epochs"] = config.TRAIN.EPOCHS
    protocol |= {name: value for name, value in how.items() if name != "protocol" and value}
    log_table(run, table(metric, found["best"], found["last"]))
    write_results(run, names | found | {"protocol": protocol}, run.provenance)
    run.logger.info(summary(metric, found["best"], found["last"]))


def evaluate_saved(
    asked: CfgNode, given: set[str], test: ImageSource, folder: str, run: Run
) -> None:
    """Log the figures of the best and last checkpoint of ``folder``, or of ``--resume``.

    Args:
        asked: the configuration as it was read; a checkpoint's own protocol is applied.
        given: the keys that the command line has set.
        test: the test images.
        folder: of the probe or the fine-tuning.
        run: device and log.
    """
    metric = TRANSFER_SETS[asked.DATA.DATASET].metric
    paths = [os.path.join(folder, name) for name in (BEST, LATEST)]
    paths = [asked.MODEL.RESUME] if asked.MODEL.RESUME else list(filter(os.path.exists, paths))
    if not paths:
        raise UserError(f"{folder}: no {BEST} or {LATEST} to evaluate: train first")
    for path in paths:
        _, adapted = read_encoder_for(asked, path, "encoder")
        model, state = read_classifiers(path, build_encoder(adapted, 0.0), len(test.classes))
        protocol = protocol_said(state, asked.LINEAR_EVAL.WEIGHTS == "freeze")
        config, _ = apply_protocol(asked, protocol, given)
        features, labels = encode_images(config, model.to(run.device).features, test, run)
        run.logger.info("%s", path)
        judged = Judged(state["lr"])
        judged.add(state["epoch"], score_heads(model, features, labels, metric))
        judged.log(metric, run.logger)


if __name__ == "__main__":
    run_script(main)
