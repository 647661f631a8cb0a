"""Judge an encoder by a linear classifier on its features, or by fine-tuning it.

    python eval_linear.py --cfg synco_vit_small --data-path DATA --output OUT --tag TAG --lr 0.3 1 3

It judges the checkpoint.pth of that run, or --pretrained FILE of this project or another.
DATA holds train/<class>/<image> and val/<class>/<image>; --dataset NAME reads other sets.
"""

import argparse
import math
import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from yacs.config import CfgNode

from data.loader import TrainingLoader, build_classification_loader
from data.opening import DataPath, add_dataset_arguments, open_splits
from data.source import ImageSource
from data.subset import add_subset_argument, subset_suffix, take_subset
from data.transfer import MAP, TRANSFER_SETS
from evaluation.features import check_features, encode_images
from evaluation.identity import identity, warn_of_replacing
from evaluation.judged import TEST, TRAIN, Judged, by_name, summary, table
from evaluation.linear import (
    LinearClassifiers,
    build_mixup,
    forward_images,
    read_classifiers,
    score_heads,
)
from evaluation.logistic_regression import probe
from evaluation.protocols import (
    add_protocol_arguments,
    apply_protocol,
    changes,
    choose_protocol,
    choose_tokens,
    head_schedule,
    protocol_said,
    set_aside,
)
from lr_scheduler import build_scheduler, scaled_rates, without_effect
from models import build_encoder
from models.batch_norm import synchronize_batch_norm
from models.pretrained import add_pretrained_arguments, load_pretrained_encoder, read_encoder_for
from optimizer import build_optimizer
from utils.arguments import given_keys, number_in, parse_arguments
from utils.checkpoint import (
    LATEST,
    checkpoint_to_resume,
    link_file,
    read_checkpoint,
    restore_training,
    save_checkpoint,
    training_state,
)
from utils.config import CLASSIFIER, FEATURE, FINE_TUNING, NETWORK, run_folder
from utils.distributed import data_parallel, rank, world_size
from utils.errors import UserError
from utils.progress import Checkpoints, Progress, locate, warn_of_changes
from utils.provenance import data_facts, gather_provenance, moment
from utils.run import (
    Run,
    in_effect,
    keep_precision,
    log_table,
    run_script,
    start,
    write_config,
    write_results,
)
from utils.seed import seed_libraries
from utils.signals import StopSignals, end_stopped
from utils.training_log import TrainingLog, duration, measure_throughput
from utils.update import Update, allow_tf32

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
        args, asked = parse_arguments(__doc__, add_arguments)
        frozen, given = asked.LINEAR_EVAL.WEIGHTS == "freeze", given_keys(args)
        kind = "linprob" if frozen else "ft"
        kind += "_lbfgs" if args.probe == "lbfgs" else ""
        kind += subset_suffix(args.subset)
        folder = os.path.join(run_folder(asked), f"linear_{asked.DATA.DATASET}_{kind}")
        protocol = choose_protocol(args, asked, folder)
        config, rates = apply_protocol(asked, protocol, given, args.lr)
        run = start(config, folder, trains=not (frozen or config.EVAL_MODE))

        train, test = open_splits(DataPath.of(config), args.download)
        train = take_subset(train, args.subset, config.SEED)
        metric = TRANSFER_SETS[config.DATA.DATASET].metric
        if config.EVAL_MODE:
            return evaluate_saved(asked, given, test, folder, run)
        drop = protocol.drop_path_rate if args.drop_path_rate is None else args.drop_path_rate
        decay = args.layer_decay or protocol.layer_decay
        encoder, origin = load_pretrained_encoder(args, config, run, drop, learns=not frozen)
        tokens = choose_tokens(args, protocol, encoder)
        how: dict[str, Any] = {"protocol": protocol.name}
        how["class_tokens"] = list(tokens) if tokens else None
        splits = {"train": (train.names, train.labels), "test": (test.names, test.labels)}
        data = data_facts(config.DATA.DATA_PATH, **splits)
        if args.probe == "lbfgs":
            provenance = gather_provenance(run.config, run.device, origin, data)
            flags = {"--num-l2": args.num_l2, "--protocol": protocol.name, "SEED": config.SEED}
            flags["--subset"] = subset_suffix(args.subset)
            of = identity(run, config, NETWORK | FEATURE, origin, data, **flags)
            warn_of_replacing(run, of)
            provenance["identity"] = of
            strengths = torch.logspace(-6, 5, args.num_l2, dtype=torch.float64).tolist()
            found, classifier = probe(config, encoder, (train, test), strengths, run)
            if rank() == 0:
                kept = {"model": classifier.state_dict(), "lr": [0.0], "epoch": 0, **how}
                kept["provenance"] = provenance | moment(run.device, run.started)
                save_checkpoint(kept, os.path.join(run.folder, BEST))
            return report(config, how, found, provenance, run)
        judged_on = [test]  # with the images that choose, if these are others
        if args.select:
            train, chosen_by = set_aside(train, config.SEED)
            judged_on.append(chosen_by)
        loader = build_classification_loader(config, train)

        uses = NETWORK | FEATURE | CLASSIFIER
        uses |= NETWORK if frozen else FINE_TUNING
        flags = {"--lr": rates, "--protocol": protocol.name, "--select": args.select}
        flags |= {"--subset": subset_suffix(args.subset), "--drop-path-rate": drop}
        flags |= {"class tokens": how["class_tokens"], "processes": world_size()}
        flags |= {} if frozen else {"--layer-decay": decay}
        of = identity(run, config, uses, origin, data, **flags)
        saved = find_checkpoint(config, of, run)
        if saved and not frozen:
            run = keep_precision(run, config, *saved)
            of["AMP_OPT_LEVEL"] = run.precision.level
        classes = len(train.classes)
        model = LinearClassifiers(
            encoder, classes, len(rates), config.SEED, frozen, drop > 0, tokens, protocol.as_mae
        )
        check_batch(config, model)
        model = synchronize_batch_norm(model, run.device)
        allow_tf32(model.encoder, run.precision)
        ddp = data_parallel(model, run.device)

        scaled = scaled_rates(config, loader.size.images_per_update)
        if protocol.as_mae:
            scaled = replace(scaled, minimum=config.TRAIN.MIN_LR)
        derived = {"DATA.TRAINING_IMAGES": loader.size.images, "AMP_OPT_LEVEL": run.precision.level}
        effective = in_effect(config, derived | scaled.by_key())
        groups = weight_groups(config, model, rates, decay, protocol.group)
        optimizers = [build_optimizer(config, model, scaled.base, g) for g in groups]
        schedules = [head_schedule(scaled, rate) for rate in rates] if frozen else [scaled]
        schedulers = [
            build_scheduler(config, optimizer, schedule, loader.size.updates, protocol.as_mae)
            for optimizer, schedule in zip(optimizers, schedules, strict=True)
        ]
        for line in without_effect(config, given):
            run.logger.warning(line)
        update = Update(ddp, optimizers, run.precision, config.TRAIN.CLIP_GRAD, scale=not frozen)
        mixup = None if frozen or metric == MAP else build_mixup(config, classes)
        smoothing = config.MODEL.LABEL_SMOOTHING
        forward = partial(forward_images, ddp, run.device, smoothing, mixup)
        run.logger.info(
            f"{config.LINEAR_EVAL.WEIGHTS} by protocol {protocol.name} on {config.DATA.DATASET}: "
            f"{len(train.names)} training and {len(test.names)} test images, {classes} classes, "
            f"{loader.size.updates} updates an epoch, base rates {rates}"
        )

        provenance = gather_provenance(effective, run.device, origin, data)
        provenance["identity"] = of
        progress, judged, resumed_from = resume(saved, effective, model, update, loader, run, rates)
        saved = None  # its tensors take memory
        run = replace(run, config=effective)
        write_config(effective, run.folder)
        if config.THROUGHPUT_MODE:
            ddp.train()
            step = partial(update, forward=forward)
            return measure_throughput(loader, loader.size, loader.ahead, step, run)

        def came_from() -> dict[str, Any]:
            return provenance | moment(run.device, run.started)

        def state() -> dict[str, Any]:
            place = progress.state_dict() | judged.state_dict() | {"lr": rates, **how}
            return training_state(effective, model, update, **place, provenance=came_from())

        # the weights of a head that diverges are kept as they are, beside those of the others
        which = {"keep_epochs": False, "check_weights": not frozen}
        checkpoints = Checkpoints(config, run, progress, state, resumed_from, **which)
        names = [f"{rate:.12g}" for rate in rates] if frozen else [""]
        log = TrainingLog(config, run, progress, optimizers, names)
        if frozen:  # its features stay as they are
            features = [encode_images(config, model.features, part, run) for part in judged_on]
            for part, name in zip(features, ("test", "held-out"), strict=False):
                check_features(*part, name)
        signals.training()
        advice = f"lower --lr {' '.join(f'{rate:g}' for rate in rates)}"
        started = time.monotonic()

        with checkpoints.saved_on_fault():
            while progress.epoch < config.TRAIN.EPOCHS:
                ddp.train()
                loader.start_at(progress.epoch, progress.images_seen)
                for micro_batches in log.watch(loader):
                    with checkpoints.update_under_way():
                        first = progress.epoch * loader.size.updates
                        for scheduler in schedulers:
                            scheduler.step_update(
                                first if protocol.rate_by_epoch else progress.step
                            )
                        seed_libraries(config.SEED, rank(), progress.step)
                        result = update(micro_batches, forward)
                        progress.advance()

                    stop, save_now = signals.agree(checkpoints.time_is_up())
                    if log.record(result, {}, stop):
                        most = config.TRAIN.MAX_SKIPPED_UPDATES
                        rows = log.longest_rows
                        judged.leave_out(update.check_skipped(most, advice, rows))
                    # at its end an epoch is saved with its figures, but a signal leaves no time
                    if stop or (not progress.epoch_ended and (save_now or checkpoints.due())):
                        checkpoints.save(signals)
                    if stop:
                        end_stopped(run.logger, progress.step)  # raises SystemExit
                if judged.epoch < progress.epoch:
                    if not frozen:
                        judge = model.eval().features
                        features = [encode_images(config, judge, part, run) for part in judged_on]
                    scored = [
                        score_heads(model, *part, metric, judged.left_out) for part in features
                    ]
                    judged.add(progress.epoch, *scored)
                    judged.log(metric, run.logger)
                    if not log.reported(progress.epoch):
                        log.end_epoch(by_name(names, *scored))
                    checkpoints.save(signals)
                    path = os.path.join(run.folder, BEST)
                    judged.save_best(model, path, provenance=came_from(), **how)
                progress.next_epoch()
        run.logger.info("training took %s", duration(time.monotonic() - started))
        best, last = judged.outcome(TRAIN if args.select else TEST)
        report(
            config, how | {"drop_path_rate": drop}, {"best": best, "last": last}, provenance, run
        )


def check_batch(config: CfgNode, model: LinearClassifiers) -> None:
    """BatchNorm that learns needs two images."""
    learns = not model.frozen and any(isinstance(m, _BatchNorm) for m in model.modules())
    if learns and config.DATA.BATCH_SIZE * world_size() < 2:
        raise UserError("BatchNorm needs a total batch of at least 2 images: raise --batch-size")


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


def find_checkpoint(
    config: CfgNode, of: dict[str, Any], run: Run
) -> tuple[str, dict[str, Any]] | None:
    """Path and content of the checkpoint to continue from, if there is one.

    One that is found, not named, is left aside if it is of another evaluation.

    Args:
        config: the configuration of the evaluation.
        of: its identity.
        run: its folder and log.

    Raises:
        UserError: MODEL.RESUME names a checkpoint of another evaluation.
    """
    named = config.MODEL.RESUME
    found = checkpoint_to_resume(config, run.folder, run.logger)
    for path in dict.fromkeys(filter(None, (found, named))):
        state = read_checkpoint(path, run.device)
        other, allowed = changes(state, of, config, asked=path == named)
        if not other:
            if allowed:
                run.logger.warning("%s: it goes on all the same: %s", path, "; ".join(allowed))
            return path, state
        if path == named:
            raise UserError(f"{path}: checkpoint of another evaluation ({'; '.join(other)})")
        begin = f"from {named}" if named else "anew"
        run.logger.warning(
            "%s is of another evaluation (%s): starting %s", path, "; ".join(other), begin
        )
    return None


def resume(
    saved: tuple[str, dict[str, Any]] | None,
    effective: CfgNode,
    model: LinearClassifiers,
    update: Update,
    loader: TrainingLoader,
    run: Run,
    rates: list[float],
) -> tuple[Progress, Judged, str | None]:
    """Continue from the checkpoint that was saved, if there is one.

    Returns:
        the place, what was achieved so far, and the checkpoint's path.
    """
    progress, judged = Progress(loader.size), Judged(rates)
    if not saved:
        return progress, judged, None
    path, state = saved
    restore_training(state, path, model, update, ("epoch", "best", "figures"))
    judged.load_state_dict(state)
    best, beside = (os.path.join(f, BEST) for f in (run.folder, os.path.dirname(path)))
    if rank() == 0 and os.path.exists(beside):  # of another folder, if --resume names one there
        link_file(beside, best)
    if judged.epoch == state["epoch"]:  # it may have been killed before best.pth was written
        how = {name: state.get(name) for name in ("protocol", "class_tokens", "provenance")}
        judged.save_best(model, best, **how)
    progress = locate(state, loader.size)
    warn_of_changes(state, path, progress, effective.TRAIN.BASE_LR, run.logger)
    run.logger.info(
        "resumed from %s at update %d, after epoch %d", path, progress.step, judged.epoch
    )
    return progress, judged, path


def report(
    config: CfgNode,
    how: dict[str, Any],
    found: dict[str, Any],
    provenance: dict[str, Any],
    run: Run,
) -> None:
    """Write results.json with ``best``, ``last`` and more, and log which figure is which.

    Args:
        config: the configuration of the evaluation.
        how: the protocol by name, and what flags have changed of it.
        found: the figures.
        provenance: from ``gather_provenance``.
        run: its folder gets the file.
    """
    metric = TRANSFER_SETS[config.DATA.DATASET].metric
    names = {"dataset": config.DATA.DATASET, "metric": metric}
    names["weights"] = config.LINEAR_EVAL.WEIGHTS
    protocol = {"name": how["protocol"], "image_size": config.DATA.IMG_SIZE}
    if "probe" not in found:
        protocol["epochs"] = config.TRAIN.EPOCHS
    protocol |= {name: value for name, value in how.items() if name != "protocol" and value}
    log_table(run, table(metric, found["best"], found["last"]))
    write_results(run, names | found | {"protocol": protocol}, provenance)
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
